"""What a training run can be told: about the model, the data and the training itself."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from piip_core.errors import ConfigError, check, check_choice

from ..loading import PREFIXES

# ruff: noqa: RUF009  (_argument is dataclasses.field)

_DEEPSPEED_FOLDER = Path(__file__).with_name("deepspeed")


def _argument(default: Any, text: str) -> Any:
    """A field with a text for `--help`; a list is copied for each object."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": text})


@dataclass
class ModelArguments:
    """Where the model to train comes from."""

    model: str | None = _argument(None, "a row of the zoo, or a saved model's folder")
    language_model: str | None = _argument(None, "name or folder of a row's language model; None: the published one")
    pretrained_vision: bool = _argument(True, "start a row's branches from their pretrained weights; false: at random")
    projector: str | None = _argument(None, "folder that stage 1 saved, to start from its projector and other parts")
    attn_implementation: str | None = _argument(None, "attention of the language model: sdpa, flash_attention_2, eager")

    def __post_init__(self) -> None:
        given = "a row of the zoo (--model piip_llava_clip_bl_512_256_7b) or a folder"
        check(self.model is not None, "model", self.model, given)
        found = self.projector is None or Path(self.projector).is_dir()
        check(found, "projector", self.projector, "a folder that stage 1 saved")


@dataclass
class DataArguments:
    """What to train on."""

    annotations: list[str] = _argument([], "files in LLaVA's JSON format")
    image_root: list[str] = _argument([], "folder that image paths are relative to: one, or one per annotation file")
    on_error: str = _argument("raise", "an entry or image that cannot be used: 'raise' stops, 'skip' leaves it out")
    follow_links: bool = _argument(False, "whether links below an image folder may lead out of it")
    chat_template: str = _argument("vicuna_v1", "how conversations become text: vicuna_v1, plain, llava_v1")
    max_length: int = _argument(2048, "longest sequence, image tokens included; longer ones are cut at a turn boundary")
    pad_to_square: bool = _argument(True, "pad images to a square; false cuts one out of their middle (stage 1)")
    images_as_viewed: bool = _argument(True, "follow orientation tags, and put transparent images on white")
    group_by_modality: bool = _argument(True, "batches of similar length, text-only samples apart")

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("raise", "skip"))
        check(self.max_length > 0, "max_length", self.max_length, "a positive number of tokens")
        files = len(self.annotations)
        check(files > 0, "annotations", self.annotations, "files to train on: --annotations FILE [FILE ...]")
        each = f"one folder, or one for each of the {files} annotation files, in their order"
        check(len(self.image_root) in (0, 1, files), "image_root", self.image_root, each)
        # Before anything is said of the device, which the training arguments look at
        for file in self.annotations:
            check(Path(file).is_file(), "annotations", file, "a file that exists")
        for folder in self.image_root:
            check(Path(folder).is_dir(), "image_root", folder, "a folder that exists")

    def roots(self) -> str | dict[str, str] | None:
        """Image folders as `ConversationDataset` takes them."""
        if len(self.image_root) > 1:
            return dict(zip(self.annotations, self.image_root, strict=True))
        return self.image_root[0] if self.image_root else None


@dataclass
class PIIPTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, and what is particular here: parts, their learning rates, adapters, resuming."""

    train_parts: list[str] = _argument(["projector"], f"what to train: any of {', '.join(PREFIXES)}")
    projector_lr: float | None = _argument(None, "learning rate of the projector; None: learning_rate")
    vision_lr: float | None = _argument(None, "learning rate of the vision tower; None: learning_rate")
    language_lr: float | None = _argument(None, "learning rate of the language model; None: learning_rate")
    total_batch_size: int | None = _argument(None, "samples of one update over all devices; 0: not set here")
    loss_average: str = _argument(
        "batch",
        "'batch': every supervised token of an update weighs the same. 'micro_batch': every micro batch of each "
        "device weighs the same, as the published models were trained",
    )
    lora: bool = _argument(False, "train adapters on the language model instead of all its weights")
    lora_rank: int = _argument(128, "width of the adapters")
    lora_alpha: float = _argument(256.0, "strength of the adapters, times 1 / rank")
    lora_dropout: float = _argument(0.05, "dropout in front of the adapters")
    lora_target: list[str] = _argument(
        [], "names of the linear layers to adapt, such as q_proj; none: all in the blocks"
    )
    bits: int = _argument(16, "precision of the frozen language model under LoRA: 16, or 8 or 4 (QLoRA, bitsandbytes)")
    resume: bool = _argument(False, "go on from the last checkpoint in output_dir; without one, start at the beginning")
    overwrite_output_dir: bool = _argument(False, "start anew in a folder of an earlier run, deleting its checkpoints")
    remove_unused_columns: bool = _argument(False, "left to the data loader")
    # As transformers has them since 5.23
    activation_checkpointing: bool | None = _argument(None, "compute activations again, which spares memory")
    activation_checkpointing_kwargs: dict[str, Any] | str | None = _argument(None, "options of torch.utils.checkpoint")

    def __post_init__(self) -> None:
        self._check_parts()
        check_choice("loss_average", self.loss_average, ("batch", "micro_batch"))
        check(bool(self.output_dir), "output_dir", self.output_dir, "a folder for the run: --output_dir DIR")
        both = self.resume and self.overwrite_output_dir
        check(not both, "overwrite_output_dir", True, "False together with resume=True")
        if self.total_batch_size:
            self._accumulate()
        if isinstance(self.deepspeed, str):
            self.deepspeed = None if self.deepspeed == "none" else str(deepspeed_config(self.deepspeed))
        if self.deepspeed and "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
            raise ConfigError(
                "deepspeed: was not started by a launcher. Start it as `deepspeed llava_piip/train/train.py ...` or "
                "`torchrun ...`, or give --deepspeed none"
            )
        renamed = "activation_checkpointing" in {known.name for known in fields(TrainingArguments)}
        if not renamed:
            self.gradient_checkpointing = bool(self.activation_checkpointing)
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        try:
            super().__post_init__()
        except ValueError as error:  # what the device cannot do, or settings that exclude one another
            reason = " ".join(str(error).split())
            needs_gpu = self.tf32 or (self.bf16 and not self.use_cpu)
            hint = " (without a GPU: --use_cpu true --bf16 false --tf32 false)"
            raise ConfigError(reason + (hint if needs_gpu and not torch.accelerator.is_available() else "")) from error
        if not renamed:
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def _check_parts(self) -> None:
        """Refuses parts and adapters that cannot be."""
        for part in self.train_parts:
            check_choice("train_parts", part, tuple(PREFIXES))
        check(len(set(self.train_parts)) == len(self.train_parts), "train_parts", self.train_parts, "each part once")
        check(self.bits in (16, 8, 4), "bits", self.bits, "16, 8 or 4")
        check(self.bits == 16 or self.lora, "bits", self.bits, "16 without --lora: quantised weights cannot be trained")
        check(self.lora_rank > 0, "lora_rank", self.lora_rank, "a positive number")
        check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a share from 0 to below 1")
        if self.lora:
            replaced = "no 'language_model' with lora=True, which trains adapters in its place"
            check("language_model" not in self.train_parts, "train_parts", self.train_parts, replaced)
        else:
            check(bool(self.train_parts), "train_parts", self.train_parts, f"at least one of {', '.join(PREFIXES)}")

    def _accumulate(self) -> None:
        """Sets the number of micro batches of each device that make up `total_batch_size` samples."""
        devices = int(os.environ.get("WORLD_SIZE", 1))  # as every launcher says it; torch may not have started yet
        at_once = devices * self.per_device_train_batch_size
        if self.total_batch_size < 1 or self.total_batch_size % at_once:
            raise ConfigError(
                f"total_batch_size={self.total_batch_size}: expected a multiple of per_device_train_batch_size x "
                f"devices = {self.per_device_train_batch_size} x {devices} = {at_once}; change "
                "per_device_train_batch_size"
            )
        steps = self.total_batch_size // at_once
        if self.gradient_accumulation_steps not in (1, steps):
            raise ConfigError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: total_batch_size="
                f"{self.total_batch_size} needs {steps} here; leave it out, or give --total_batch_size 0"
            )
        self.gradient_accumulation_steps = steps

    def learning_rate_of(self, part: str) -> float:
        """Learning rate of one part; adapters count as the language model."""
        own = {"projector": self.projector_lr, "vision_tower": self.vision_lr, "language_model": self.language_lr}[part]
        return self.learning_rate if own is None else own


def deepspeed_config(name: str) -> Path:
    """File of a DeepSpeed configuration that comes with the package ("zero2"), or the path as given."""
    packaged = {path.stem: path for path in _DEEPSPEED_FOLDER.glob("*.json")}
    if name not in packaged and not Path(name).is_file():
        known = ", ".join(sorted(packaged))
        raise ConfigError(f"deepspeed={name!r}: no such file; expected {known}, none, or the path of a JSON file")
    return packaged.get(name, Path(name))
