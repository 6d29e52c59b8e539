"""transformers' Trainer with parts that learn at their own rates, and checkpoints that are published whole."""

from __future__ import annotations

import functools
import json
import logging
import resource
from collections.abc import Collection, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from llava_piip.data.sampler import ModalityLengthSampler
from piip_core.deepspeed_start import save_engine
from piip_core.errors import ConfigError, SaveError
from piip_core.files import write_atomically
from piip_core.training_checkpoints import FailedSaves, RunFolder

from ..loading import FINAL, PARTS, ModelSource, base_model, load_tensors, part_parameters
from .arguments import PIIPTrainingArguments
from .checkpointing import check_same_processes, gathered_state, run_folder, save_trained

logger = logging.getLogger(__name__)


# Methods of transformers' Trainer that are replaced or called below though nothing promises them: there is no public
# way to the order of the data, to where a checkpoint is written, or to the loading of parts of a model.
# Seen working with transformers 5.16.1 to 5.24.0
_REPLACED = (
    "_get_train_sampler",
    "_get_output_dir",
    "_save_checkpoint",
    "_prepare_for_training",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
)


def check_trainer(trainer: type = Trainer) -> None:
    """Refuses a Trainer that would not call what is replaced here, and so would train or save otherwise."""
    missing = [name for name in _REPLACED if not callable(getattr(trainer, name, None))]
    if missing:
        raise ConfigError(
            f"transformers {transformers.__version__}: its Trainer has no {', '.join(missing)}, which training builds "
            "on; expected 5.16.1 to 5.24.0: pip install 'transformers<=5.24.0'"
        )


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Groups for an optimizer: per part, with and without weight decay; frozen parameters are in none.

    `decayed` has the names of parameters with weight decay. Each group says its `part`, which optimizers carry along.
    """
    groups = []
    for part in PARTS:
        trained = {name: p for name, p in part_parameters(model, part).items() if p.requires_grad}
        for decay in sorted({weight_decay, 0.0}, reverse=True):
            params = [p for name, p in trained.items() if (weight_decay if name in decayed else 0.0) == decay]
            if params:
                groups.append({"params": params, "lr": learning_rates[part], "weight_decay": decay, "part": part})
    return groups


class _OrderOfEpochs(TrainerCallback):
    """Tells samplers the epoch.

    With several processes, accelerate's own way to them ends early when a run goes on within an epoch.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        sampler = kwargs["train_dataloader"].batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


class PIIPTrainer(Trainer):
    """Trains a model in the layout of transformers' Llava.

    Args:
        source: Where the frozen weights came from; saves that hold trained parts alone name it.
        group_by_modality: Batches of similar lengths, text-only samples apart; the data set says the lengths.
        **kwargs: As for `Trainer`; `args` is a `PIIPTrainingArguments`.
    """

    args: PIIPTrainingArguments

    def __init__(self, *, source: ModelSource | None = None, group_by_modality: bool = False, **kwargs: Any) -> None:
        check_trainer()
        super().__init__(**kwargs)
        self.add_callback(_OrderOfEpochs())
        self.source, self.group_by_modality = source or ModelSource(), group_by_modality
        if self.args.loss_average == "micro_batch":
            # without the number of tokens of the whole update, the Trainer averages the means of the micro batches
            self.model_accepts_loss_kwargs = False
        # A model whose language model was trained is saved as a whole
        self.saves_parts = "language_model" not in self.args.train_parts
        self._staged, self.failed_saves = False, FailedSaves(logger)
        self._tokens = self._images = 0
        self._since = perf_counter()

    # ---- Order of the data and learning rates ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_modality or dataset is None:
            return super()._get_train_sampler(train_dataset)
        batches = self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(dataset.modality_lengths, self.args.train_batch_size, batches, seed=seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer with the learning rate of each trained part; frozen parameters are left out."""
        if self.optimizer is None:
            target = base_model(self.model if model is None else model)
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            rates = {part: self.args.learning_rate_of(part) for part in PARTS}
            decayed = frozenset(self.get_decay_parameter_names(target))
            groups = parameter_groups(target, rates, self.args.weight_decay, decayed)
            self.optimizer_cls_and_kwargs = (optimizer, settings | {"params": groups})
        return super().create_optimizer(model)

    # ---- What the log says ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trains on one micro batch, returns its loss, and counts its tokens and images for the log."""
        mask, images = inputs.get("attention_mask"), inputs.get("pixel_values")
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())
        self._images += 0 if images is None else len(images)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds learning rates, throughput and peak memory to what is logged beside a loss."""
        if "loss" in logs:
            logs |= self._rates(logs["learning_rate"]) | self._throughput()
        super().log(logs, start_time)

    def _rates(self, first: float) -> dict[str, float]:
        """Rates that the last update used, of parts with one of their own; `first` is that of the first group."""
        own = {group["part"]: self.args.learning_rate_of(group["part"]) for group in self.optimizer.param_groups}
        base = next(iter(own.values()))
        if len(set(own.values())) == 1 or not base:
            return {}
        return {f"learning_rate_{part}": first * rate / base for part, rate in own.items()}

    def _throughput(self) -> dict[str, float]:
        """Tokens and images per second over all processes since the last call, and the largest peak of memory."""
        now, device = perf_counter(), self.args.device
        peak = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        local = torch.tensor([[float(self._tokens), float(self._images), peak]], dtype=torch.float64, device=device)
        table = self.accelerator.gather(local)
        seconds, self._since, self._tokens, self._images = now - self._since, now, 0, 0
        return {
            "tokens_per_second": round(table[:, 0].sum().item() / seconds, 1),
            "images_per_second": round(table[:, 1].sum().item() / seconds, 2),
            "peak_memory_gb": round(table[:, 2].max().item() / 1e9, 2),
        }

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / RunFolder.STAGING) if self._staged else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = run_folder(super()._get_output_dir(trial))
        self._staged = True
        try:
            write = super()._save_checkpoint
            run.save(f"checkpoint-{self.state.global_step}", lambda _: write(model, trial), main=self.args.should_save)
        except SaveError as error:
            self.failed_saves.add(error)
            return
        finally:
            self._staged = False
        if self.args.should_save:
            run.keep_last(self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_final(self) -> Path:
        """Saves the model and its processor as `final` in the folder of the run; all processes call it."""
        run = run_folder(self.args.output_dir)
        return run.save(FINAL, lambda folder: self.save_model(str(folder)), main=self.args.should_save)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Unlike the Trainer's own, writes no pickles, and names as the model has them under ZeRO-3 too."""
        state_dict = None
        if self.is_deepspeed_enabled:
            if self.saves_parts and self.deepspeed.zero_optimization_partition_weights():
                # only what is trained: the frozen language model would be gathered for nothing
                state_dict = gathered_state(self.model, keep=self.args.should_save)
            else:
                state_dict = self.accelerator.get_state_dict(self.deepspeed)
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.saves_parts:
            save_trained(self.model, folder, self.source, state_dict=state_dict, processor=self.processing_class)
        else:
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
            self.processing_class.save_pretrained(folder)
        with write_atomically(folder / "training_arguments.json", "w") as file:
            json.dump(self.args.to_sanitized_dict() | {"num_processes": self.args.world_size}, file, indent=2)

    # ---- Resuming ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        partial = self.saves_parts and self.is_deepspeed_enabled
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:
            check_same_processes(Path(resume_from_checkpoint), self.args.world_size)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if partial else resume_from_checkpoint
        )
        if self.is_deepspeed_enabled:
            engine = self.model_wrapped
            more = {"exclude_frozen_parameters": True} if partial else {}
            engine.save_checkpoint = functools.partial(save_engine, engine, **more)
        if partial and resume_from_checkpoint is not None:
            # not strict: the checkpoint has the trained parameters, the others are there already
            deepspeed_load_checkpoint(engine, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        self._since = perf_counter()
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.saves_parts:
            load_tensors(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
