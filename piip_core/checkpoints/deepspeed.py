"""DeepSpeed checkpoint folders: the weights of ZeRO stages 0 to 3.

DeepSpeed's own `zero_to_fp32` unpickles without restriction, needs DeepSpeed and holds the whole model in memory.

Stages 0 to 2 save the whole model once, and the fp32 weights of each parameter group as one flat tensor, cut into one
partition per rank. Stage 3 saves no whole tensor: each parameter, padded to a multiple of the number of ranks, is cut
into one piece per rank, and a rank's pieces follow one another in its flat tensors. This is not documented; it was seen
in files of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, listed
from .formats import CheckpointFile, LazyState, LazyTensor, load_torch_file

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tensor_rank>\d+)_model_states\.pt")
_OPTIM_FILE = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<tensor_rank>\d+)_optim_states\.pt")
# Layers of a pipeline, and experts: other files of the same endings
_OTHER_FILE = re.compile(r"layer_.*[-_]model_states\.pt|expp_rank_.*_optim_states\.pt")
_ALL = -1  # the rank of a file that all processes share
_AGAIN = "Copy the whole folder again, or take another checkpoint of the run"


class _Ignored:
    """Stands in for DeepSpeed's classes beside the weights: their contents are read as plain values."""


# What the partitions hold besides tensors and plain values: known, and nothing that needs DeepSpeed's code
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def deepspeed_folder(path: Path) -> Path | None:
    """The folder of the checkpoint that `path` is, is a file of, or names in its file `latest`; None without one."""
    if path.is_file():
        return path.parent if _MODEL_FILE.fullmatch(path.name) or _OPTIM_FILE.fullmatch(path.name) else None
    if (path / "latest").is_file():
        tag = (path / "latest").read_bytes()[:300].decode(errors="replace").strip()
        found = next((entry for entry in path.iterdir() if entry.name == tag and entry.is_dir()), None)
        if found is None:
            raise CheckpointError(f"{path / 'latest'}: names the checkpoint {tag!r}, which is no folder beside it")
        return found
    patterns = (_MODEL_FILE, _OPTIM_FILE, _OTHER_FILE)
    return path if any(p.fullmatch(file.name) for file in path.iterdir() for p in patterns) else None


def read_deepspeed(folder: Path, *, unsafe_pickle: bool, master_weights: bool, verify: bool) -> CheckpointFile:
    """Reads the weights in a folder of `deepspeed_folder`; see `read_checkpoint`.

    Of stages 0 to 2, those of the model, or as `master_weights` the optimizer's. Stage 3 has no others than these.
    """
    load = partial(_load, unsafe_pickle=unsafe_pickle, verify=verify)
    files = _by_rank(folder, _MODEL_FILE)
    if not files:
        raise CheckpointError(f"{folder}: holds no mp_rank_00_model_states.pt. {_AGAIN}")
    if _ALL in files:
        models = [load(files[_ALL])]
        entries = LazyState.of(_module(models[0])).entries  # with the buffers and what is not trained, in order
        if master_weights:
            entries = _merge_groups(models[0], entries, _load_partitions(folder, load))
    else:
        models = [load(file) for file in _in_order(folder, files, max(files) + 1, "model_states")]
        entries = _merge_pieces(models, _load_partitions(folder, load))
    return CheckpointFile(folder, LazyState(entries), tuple(key for key in models[0].content if key != "module"))


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Files by the rank of their process; `_ALL` for the one of all."""
    found: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if _OTHER_FILE.fullmatch(file.name):
            raise CheckpointError(f"{file}: of a run with pipeline or expert parallelism, which is not supported")
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        if int(match["tensor_rank"]) > 0:
            raise CheckpointError(
                f"{file}: one part of a tensor-parallel model; expected mp_rank_00 alone. Merge the parts with the "
                "program that saved them"
            )
        rank = int(match["rank"] or _ALL)
        if rank in found:
            raise CheckpointError(f"{file}: {found[rank].name} is of the same rank; one is of another checkpoint")
        found[rank] = file
    return found


def _in_order(folder: Path, files: Mapping[int, Path], count: int, ending: str) -> list[Path]:
    """The files of all ranks, of which none may be missing."""
    missing = [f"zero_pp_rank_{rank}_mp_rank_00_{ending}.pt" for rank in range(count) if rank not in files]
    if missing:
        raise CheckpointError(f"{folder}: lacks {listed(missing)}, of {count} ranks. {_AGAIN}")
    if len(files) > count:
        raise CheckpointError(f"{files[max(files)]}: of a run with {len(files)} ranks, but the others say {count}")
    return [files[rank] for rank in range(count)]


@dataclass(frozen=True)
class _States:
    """What a file of DeepSpeed holds."""

    path: Path
    content: Mapping[str, Any]

    def mapping(self, key: str) -> Mapping[str, Any]:
        return self.content.get(key) or {}

    def tied(self, entries: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The parameters that share those of other names."""
        return {name: entries[same] for name, same in self.mapping("shared_params").items() if same in entries}


def _load(path: Path, *, unsafe_pickle: bool, verify: bool) -> _States:
    with torch.serialization.safe_globals(_STAND_INS):
        content = load_torch_file(path, unsafe_pickle=unsafe_pickle, verify=verify)
    return _States(path, content if isinstance(content, Mapping) else {})


def _module(model: _States) -> Mapping[str, Tensor]:
    module = model.content.get("module")
    if not isinstance(module, Mapping) or not all(isinstance(value, Tensor) for value in module.values()):
        raise CheckpointError(f"{model.path}: has no tensors under 'module'; expected the model states of DeepSpeed")
    return module


def _groups(model: _States) -> list[Mapping[str, torch.Size]]:
    """Names and shapes of the trained parameters of each group, in the order of the flat tensors."""
    groups = model.content.get("param_shapes")
    if not groups:
        raise CheckpointError(f"{model.path}: has no 'param_shapes', without which partitions cannot be merged")
    return [groups] if isinstance(groups, Mapping) else list(groups)


@dataclass(frozen=True)
class _Partition:
    """The fp32 weights of one rank: one flat tensor per group (stages 1, 2) or per piece of them (stage 3)."""

    path: Path
    flat: list[Tensor]
    # Elements after each parameter of each group that only align the next one
    alignments: list[list[int]] | None

    def check_size(self, have: int, want: int, slack: int = 1) -> None:
        if not want <= have < want + slack:
            raise CheckpointError(f"{self.path}: {have} elements in all, {want} expected from 'param_shapes'. {_AGAIN}")


def _load_partitions(folder: Path, load: Callable[[Path], _States]) -> list[_Partition]:
    files = _by_rank(folder, _OPTIM_FILE)
    if not files:
        raise CheckpointError(
            f"{folder}: has no zero_pp_rank_*_optim_states.pt, which alone hold fp32 weights (and all weights in "
            "stage 3). They are not needed for stages 0 to 2 without master_weights (--master-weights)"
        )
    partitions: dict[Path, _Partition] = {}
    for file in files.values():
        states = load(file).mapping("optimizer_state_dict")
        counts = states.get("partition_count")  # stages 1 and 2 have one for each group, all the same without experts
        flat = states.get("fp32_flat_groups", states.get("single_partition_of_fp32_groups"))
        if counts is None or flat is None or not all(isinstance(tensor, Tensor) for tensor in flat):
            raise CheckpointError(f"{file}: holds no fp32 weights under 'optimizer_state_dict'; expected those of ZeRO")
        count = max(counts) if isinstance(counts, list | tuple) else counts
        alignments = states.get("param_alignment_paddings")
        partitions[file] = _Partition(file, [tensor.flatten() for tensor in flat], alignments)
    return [partitions[file] for file in _in_order(folder, files, count, "optim_states")]


def _merge_groups(
    model: _States, entries: Mapping[str, LazyTensor], partitions: Sequence[_Partition]
) -> dict[str, LazyTensor]:
    """Stages 0 to 2: the entries of the model with the parameters out of the flat tensors of all ranks."""
    groups = _groups(model)
    for partition in partitions:
        if len(partition.flat) != len(groups):
            raise CheckpointError(f"{partition.path}: {len(partition.flat)} groups, {len(groups)} in {model.path.name}")
    trained: dict[str, LazyTensor] = {}
    for number, shapes in enumerate(groups):
        pieces = [partition.flat[number] for partition in partitions]
        alignments = (partitions[0].alignments or {number: [0] * len(shapes)})[number]
        start = 0
        for (name, shape), alignment in zip(shapes.items(), alignments, strict=True):
            trained[name] = _merged(shape, [(pieces, start, math.prod(shape))])
            start += math.prod(shape) + alignment
        # Partitions start at multiples of 2 elements, so that the padding at the end is short
        have = sum(piece.numel() for piece in pieces)
        partitions[-1].check_size(have, start, slack=2 * len(partitions))
    return {**entries, **trained, **model.tied(trained)}


def _merge_pieces(models: Sequence[_States], partitions: Sequence[_Partition]) -> dict[str, LazyTensor]:
    """Stage 3: all parameters out of their pieces on all ranks, and the buffers."""
    model, module, ranks = models[0], _module(models[0]), len(partitions)
    if len(models) != ranks:
        raise CheckpointError(f"{model.path.parent}: model states of {len(models)} ranks, partitions of {ranks}")
    found: dict[str, LazyTensor] = {}
    start = 0
    for name, shape in ((name, shape) for group in _groups(model) for name, shape in group.items()):
        length = math.ceil(math.prod(shape) / ranks)
        found[name] = _merged(shape, [(partition.flat, start, length) for partition in partitions])
        start += length
    for partition in partitions:
        partition.check_size(sum(tensor.numel() for tensor in partition.flat), start)
    for name, shape in model.mapping("frozen_param_shapes").items():
        length = math.ceil(math.prod(shape) / ranks)
        fragments = [m.mapping("frozen_param_fragments") for m in models]
        if any(name not in held or held[name].numel() != length for held in fragments):
            raise CheckpointError(f"{model.path.parent}: lacks a rank's part of the frozen parameter {name}")
        found[name] = _merged(shape, [([held[name].flatten()], 0, length) for held in fragments])
    found |= model.tied(found)
    buffers = set(model.content.get("buffer_names") or ())
    found |= {name: LazyTensor.of(tensor) for name, tensor in module.items() if name in buffers}
    lost = [name for name in module if name not in found]
    if lost:
        raise CheckpointError(f"{model.path}: the weights of {listed(lost)} are in no file of the checkpoint")
    return {name: found[name] for name in (*module, *found)}


def _merged(shape: Sequence[int], sources: Sequence[tuple[Sequence[Tensor], int, int]]) -> LazyTensor:
    """A tensor whose elements are spread over flat ones; what exceeds its size is padding.

    Each source has flat tensors that count as one, the first element, and the number of elements.
    """

    def load() -> Tensor:
        parts: list[Tensor] = []
        for tensors, start, length in sources:
            for tensor in tensors:
                parts.append(tensor[max(start, 0) : max(start + length, 0)])
                start -= tensor.numel()
        return torch.cat(parts)[: math.prod(shape)].reshape(shape)

    return LazyTensor(torch.Size(shape), sources[0][0][0].dtype, load)
