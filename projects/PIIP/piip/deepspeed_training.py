"""Training under DeepSpeed's ZeRO: settings, trainer, checkpoints, and the model as one file."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from timm.optim import Lamb
from torch import distributed, nn

from piip.checkpointer import RUN_STATE, CategoryTable, read_categories
from piip_core.checkpoints import load_torch_file, read_checkpoint, write_checkpoint
from piip_core.deepspeed_start import LIVE_PARAMETERS, import_deepspeed, save_engine
from piip_core.errors import CheckpointError, ConfigError, SaveError, UserError
from piip_core.files import read_json, write_atomically
from piip_core.training_checkpoints import OutputFolderError, RunFolder

_TAG = "zero"  # folder of DeepSpeed's files in a checkpoint
_FINAL = "model_final.safetensors"


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
    cheap = any(getattr(module, "grad_checkpointing", False) == "cheap" for module in model.modules())
    if cheap and zero_stage(cfg) == 3:
        raise ConfigError(
            "use_act_checkpoint=cheap: expected True or False with train.deepspeed.stage=3, whose linears change in "
            "place what would be kept"
        )
    device = torch.device(cfg.train.device)
    deepspeed = import_deepspeed(device.type)
    if not distributed.is_initialized():  # a single process
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        comm.create_local_process_group(1)
    os.environ.setdefault("LOCAL_RANK", str(comm.get_local_rank()))
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    config = deepspeed_config(cfg, batch_size)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


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


def run_folder(output_dir: str) -> RunFolder:
    """The folder of a run under DeepSpeed."""
    return RunFolder(Path(output_dir), RUN_STATE, fewer="train.checkpointer.max_to_keep", resume="--resume")


def export_checkpoint(checkpoint: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Writes the weights of a `checkpoint-N`, and the classes, as one file; see `write_checkpoint`.

    Returns:
        What to load: `target`, or its index.

    Raises:
        CheckpointError: If the folder is no complete checkpoint.
    """
    if not (Path(checkpoint) / RUN_STATE).is_file():
        found = f"has no {RUN_STATE}" if Path(checkpoint).is_dir() else "no such folder"
        raise CheckpointError(f"{checkpoint}: {found}; expected the checkpoint-N of a run under DeepSpeed")
    description = {"categories": CategoryTable(read_categories(str(checkpoint))).state_dict()}
    return write_checkpoint(target, read_checkpoint(checkpoint).state, description=description)


class DeepSpeedCheckpointer(HookBase):
    """Saves and loads `checkpoint-N`, the state after N iterations; all processes call the methods together.

    Such a folder holds DeepSpeed's files, one or two per process, and the state of trainer and hooks. It is written
    aside and renamed when the last process has written its share. As a hook, it saves every `period` iterations and at
    the end, where it exports the model too; the last `max_to_keep` stay.
    """

    def __init__(
        self,
        engine: Any,
        trainer: Any,
        output_dir: str,
        categories: CategoryTable,
        *,
        period: int = 1,
        max_to_keep: int | None = None,
    ) -> None:
        self.engine, self.trainer, self.categories = engine, trainer, categories
        self.period, self.max_to_keep = period, max_to_keep
        self.run = run_folder(output_dir)

    def after_step(self) -> None:
        """Saves if the period or the training is over, and deletes the oldest checkpoints beyond `max_to_keep`.

        Raises:
            SaveError: If it cannot be written.
        """
        iterations, last = self.trainer.iter + 1, self.trainer.max_iter
        if iterations % self.period and iterations != last:
            return
        folder = self.run.save(f"{self.run.PREFIX}{iterations}", self._write, main=comm.is_main_process())
        if comm.is_main_process():
            self.run.keep_last(self.max_to_keep)
        comm.synchronize()
        if iterations == last:
            self.export(folder)

    def _write(self, folder: Path) -> None:
        save_engine(self.engine, folder, _TAG)
        state = {
            "trainer": self.trainer.state_dict(),
            "categories": self.categories.state_dict(),
            "stage": int(self.engine.zero_optimization_stage()),
            "num_processes": comm.get_world_size(),
        }
        if comm.is_main_process():
            with write_atomically(folder / RUN_STATE) as file:
                torch.save(state, file)

    def load(self, folder: Path) -> None:
        """Goes on from a complete checkpoint.

        Raises:
            OutputFolderError: If it is of another stage or number of processes.
            DatasetError: If it was trained on other classes.
        """
        state = load_torch_file(folder / RUN_STATE, mmap=False)
        otherwise = f"train.init_checkpoint={folder}, another train.output_dir and no --resume"
        RunFolder.check_same_processes(folder, state["num_processes"], comm.get_world_size(), otherwise)
        stage = int(self.engine.zero_optimization_stage())
        if state["stage"] != stage:
            raise OutputFolderError(
                f"{folder}: is of ZeRO stage {state['stage']}, this run of {stage}. Go on with train.deepspeed.stage="
                f"{state['stage']}, or start anew from its weights: {otherwise}"
            )
        self.categories.load_state_dict(state["categories"])
        self.engine.load_checkpoint(str(folder), tag=_TAG)
        self.trainer.load_state_dict(state["trainer"])

    def export(self, checkpoint: Path) -> Path:
        """`export_checkpoint` to `model_final.safetensors` by the first process; all get its SaveError."""
        result: Path | SaveError = self.run.path / _FINAL
        if comm.is_main_process():
            try:
                result = export_checkpoint(checkpoint, result)
            except SaveError as error:
                result = error
        result = comm.all_gather(result)[0]
        if isinstance(result, SaveError):
            raise result
        return result
