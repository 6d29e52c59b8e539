"""Training under DeepSpeed's ZeRO: weights, gradients and optimizer states divided among the processes."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from timm.optim import Lamb
from torch import distributed, nn

from piip_core.deepspeed_start import LIVE_PARAMETERS, import_deepspeed
from piip_core.errors import ConfigError, UserError
from piip_core.files import read_json


def zero_stage(cfg: DictConfig) -> int:
    """The stage of `train.deepspeed.stage`; 0, or no such setting, is DistributedDataParallel.

    Raises:
        ConfigError: If it is none of 0 to 3, or the other settings do not go with it.
    """
    stage = OmegaConf.select(cfg, "train.deepspeed.stage", default=0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"train.deepspeed.stage={stage}: expected 1, 2 or 3, or 0 to train without DeepSpeed")
    if stage and cfg.train.amp.enabled and cfg.train.amp.get("precision", "bfloat16") != "bfloat16":
        raise ConfigError(
            f"train.amp.precision={cfg.train.amp.precision}: expected bfloat16 with train.deepspeed.stage={stage}"
        )
    if stage != 3 and OmegaConf.select(cfg, "train.deepspeed.offload_parameters", default=False):
        raise ConfigError(f"train.deepspeed.offload_parameters: expected train.deepspeed.stage=3, not {stage}")
    return stage


def deepspeed_config(cfg: DictConfig, batch_size: int) -> dict[str, Any]:
    """Settings of DeepSpeed for a LazyConfig.

    There is no entry for the precision: weights, gradients and optimizer states are float32, as under
    DistributedDataParallel, and mixed precision is autocast in either case.

    Raises:
        ConfigError: If the file of `train.deepspeed.config` cannot be read.
    """
    settings, stage = cfg.train.deepspeed, zero_stage(cfg)
    host = {"device": "cpu", "pin_memory": torch.device(cfg.train.device).type == "cuda"}
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": settings.bucket_size,
        "allgather_bucket_size": settings.bucket_size,
        "overlap_comm": True,
    }
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": settings.bucket_size, "stage3_max_live_parameters": LIVE_PARAMETERS}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = host
    if settings.offload_parameters:
        zero["offload_param"] = host
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.train.get("clip_norm", 0.0),
        # any optimizer that a LazyConfig names; its rule is applied to each process's part
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,  # Detectron2's writers print
        "zero_optimization": zero,
    }
    if settings.get("config") is None:
        return config
    try:
        more = read_json(settings.config)
    except UserError as error:
        raise ConfigError(f"train.deepspeed.config={error} with settings of DeepSpeed") from None
    return OmegaConf.to_container(OmegaConf.merge(config, more))


def build_engine(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> Any:
    """DeepSpeed's engine around a model on its device; `optimizer` is then over this process's part of its parameters.

    Raises:
        ConfigError: If DeepSpeed is not installed, a setting is wrong, or the optimizer cannot be divided.
    """
    if isinstance(optimizer, Lamb):
        raise ConfigError(
            f"optimizer {type(optimizer).__name__}: its steps depend on norms of whole tensors, which ZeRO divides; "
            "expected train.deepspeed.stage=0, or another optimizer such as torch.optim.AdamW"
        )
    device = torch.device(cfg.train.device)
    deepspeed = import_deepspeed(device.type)
    _describe_group()
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    config = deepspeed_config(cfg, batch_size)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _describe_group() -> None:
    """Makes the group of a single process if there is none, and tells DeepSpeed which process this is."""
    if not distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        comm.create_local_process_group(1)
    os.environ.setdefault("LOCAL_RANK", str(comm.get_local_rank()))


class DeepSpeedTrainer(SimpleTrainer):
    """`SimpleTrainer` whose model is DeepSpeed's engine; gradients are averaged, clipped and applied by it."""

    def __init__(self, engine: Any, data_loader: Any, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(engine, data_loader, optimizer)
        self._batches = itertools.chain(data_loader)  # asks the loader not before the first batch is wanted

    def run_step(self) -> None:
        """One iteration: forward, backward, optimizer step."""
        start = time.perf_counter()
        data = next(self._batches)
        data_time = time.perf_counter() - start
        losses = self.model(data)
        self.model.backward(sum(losses.values()))
        self.after_backward()
        self.write_metrics(losses, data_time, self.iter)
        self.model.step()

    def state_dict(self) -> dict[str, Any]:
        """Iteration and hooks; weights and optimizer states are in DeepSpeed's files."""
        return TrainerBase.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores iteration and hooks."""
        TrainerBase.load_state_dict(self, state_dict)


def evaluation_model(engine: Any, build: Callable[[], nn.Module]) -> nn.Module:
    """A model to evaluate, whole on this process; all processes call it.

    In stage 3 it is a copy: the model itself gathers its weights layer by layer on all processes at once, which
    images of other sizes and numbers would bring out of step. `build` makes another model like that of the engine.
    """
    trained = engine.module
    if engine.zero_optimization_stage() < 3:
        return trained
    whole = build()
    for target, parameter in zip(whole.parameters(), trained.parameters(), strict=True):
        with import_deepspeed().zero.GatheredParameters([parameter]), torch.no_grad():
            target.copy_(parameter)
    for target, buffer in zip(whole.buffers(), trained.buffers(), strict=True):
        target.copy_(buffer)
    return whole
