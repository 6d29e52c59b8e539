"""Checkpoint folders of DeepSpeed: weights of ZeRO stages 0 to 3, without DeepSpeed and without running pickled code.

Stages 0 to 2 save the whole model once, and the fp32 weights of each parameter group as one flat tensor, cut into one
partition per rank. Stage 3 saves no whole tensor: each parameter, padded to a multiple of the number of ranks, is cut
into one piece per rank, and a rank's pieces follow one another in its flat tensors. This is not documented; it was seen
in files of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .lazy import LazyState, LazyTensor
from .single import CheckpointFile, listed, load_torch_file

__all__ = ["deepspeed_folder", "read_deepspeed"]

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tensor_rank>\d+)_model_states\.pt")
_OPTIM_FILE = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<tensor_rank>\d+)_optim_states\.pt")
# Layers of a pipeline, and experts: other files of the same endings
_OTHER_FILE = re.compile(r"layer_.*[-_]model_states\.pt|expp_rank_.*_optim_states\.pt")
_AGAIN = "Copy the whole folder again, or take another checkpoint of the run"


_Loader = Callable[[Path], Mapping[str, Any]]


class _Ignored:
    """Stands in for DeepSpeed's classes beside the weights: their contents are read as plain values."""


# What the partitions hold besides tensors and plain values: known, and nothing that needs DeepSpeed's code
_STAND_INS = [
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def deepspeed_folder(path: Path) -> Path | None:
    """The folder with the files of one DeepSpeed checkpoint that `path` means, or None if it is something else.

    Args:
        path: The folder of a run (with a file `latest`), that of a checkpoint (`global_stepN`), or a file in it.

    Raises:
        CheckpointError: If `latest` names a checkpoint that is not there.
    """
    if path.is_file():
        return path.parent if _MODEL_FILE.fullmatch(path.name) or _OPTIM_FILE.fullmatch(path.name) else None
    if (path / "latest").is_file():
        tag = (path / "latest").read_bytes()[:300].decode(errors="replace").strip()
        found = next((entry for entry in path.iterdir() if entry.name == tag and entry.is_dir()), None)
        if found is None:
            raise CheckpointError(f"{path / 'latest'}: names the checkpoint {tag!r}, which is no folder beside it")
        return found
    files = (file.name for file in path.iterdir())
    patterns = (_MODEL_FILE, _OPTIM_FILE, _OTHER_FILE)
    return path if any(pattern.fullmatch(name) for name in files for pattern in patterns) else None


def read_deepspeed(folder: Path, *, unsafe_pickle: bool, master_weights: bool, verify: bool = False) -> CheckpointFile:
    """Reads the weights of a DeepSpeed checkpoint.

    Args:
        folder: As from `deepspeed_folder`.
        unsafe_pickle: Allow Python objects of other origin than DeepSpeed; see `read_checkpoint`.
        master_weights: Of stages 0 to 2, take the optimizer's fp32 weights instead of the model's, which may be of
            lower precision. Stage 3 has no others.
        verify: See `read_checkpoint`.

    Raises:
        CheckpointError: If files are missing, of a run with tensor, pipeline or expert parallelism, or do not fit.
    """
    _refuse_other_layouts(folder)
    model_files, optim_files = _by_rank(folder, _MODEL_FILE), _by_rank(folder, _OPTIM_FILE)
    if not model_files:
        raise CheckpointError(f"{folder}: holds no mp_rank_00_model_states.pt. {_AGAIN}")
    load = partial(_load, unsafe_pickle=unsafe_pickle, verify=verify)
    whole = None in model_files
    if whole and len(model_files) > 1:
        raise CheckpointError(f"{folder}: holds files of stage 3 and of a lower one, of different checkpoints")
    if not whole:
        models = [_Model.load(file, load) for file in _complete(folder, model_files, "model_states")]
        shards = _load_partitions(folder, optim_files, load)
        entries = _stage3(models, shards)
        first = models[0]
    else:
        first = _Model.load(model_files[None], load)
        shards = _load_partitions(folder, optim_files, load) if master_weights else []
        entries = _stage012(first, shards) if master_weights else LazyState.of(first.module).entries
    return CheckpointFile(folder, LazyState(entries), "module", tuple(key for key in first.content if key != "module"))


def _refuse_other_layouts(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        if _OTHER_FILE.fullmatch(file.name):
            raise CheckpointError(f"{file}: of a run with pipeline or expert parallelism, which is not supported")
        match = _MODEL_FILE.fullmatch(file.name) or _OPTIM_FILE.fullmatch(file.name)
        if match and int(match["tensor_rank"]) > 0:
            raise CheckpointError(
                f"{file}: one part of a tensor-parallel model; expected mp_rank_00 alone. Merge the parts with the "
                "program that saved them"
            )


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int | None, Path]:
    found: dict[int | None, Path] = {}
    for file in sorted(folder.iterdir()):
        match = pattern.fullmatch(file.name)
        if match:
            rank = None if match["rank"] is None else int(match["rank"])
            if rank in found:
                raise CheckpointError(f"{file}: {found[rank].name} is of the same rank; one is of another checkpoint")
            found[rank] = file
    return found


def _complete(folder: Path, files: Mapping[int | None, Path], ending: str, count: int | None = None) -> list[Path]:
    """The files in the order of their ranks, of which none may be missing."""
    count = count or max((rank for rank in files if rank is not None), default=0) + 1
    missing = [f"zero_pp_rank_{rank}_mp_rank_00_{ending}.pt" for rank in range(count) if rank not in files]
    if missing:
        raise CheckpointError(f"{folder}: lacks {listed(missing)}, of {count} ranks. {_AGAIN}")
    if len(files) > count:
        raise CheckpointError(f"{files[max(files)]}: of a run with {len(files)} ranks, but the others say {count}")
    return [files[rank] for rank in range(count)]


@dataclass(frozen=True)
class _Model:
    """A model states file."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path, load: _Loader) -> _Model:
        content = load(path)
        module = content.get("module")
        if not isinstance(module, Mapping) or not all(isinstance(value, Tensor) for value in module.values()):
            raise CheckpointError(f"{path}: has no tensors under 'module'; expected the model states of DeepSpeed")
        if content.get("mp_world_size", 1) > 1:
            raise CheckpointError(f"{path}: one of {content['mp_world_size']} parts of a tensor-parallel model")
        return cls(path, content)

    @property
    def module(self) -> Mapping[str, Tensor]:
        return self.content["module"]

    @property
    def groups(self) -> list[Mapping[str, torch.Size]]:
        """Names and shapes of the trained parameters of each group, in the order of the flat tensors."""
        groups = self.content.get("param_shapes")
        if not groups:
            raise CheckpointError(f"{self.path}: has no 'param_shapes', without which partitions cannot be merged")
        return [groups] if isinstance(groups, Mapping) else list(groups)

    def mapping(self, key: str) -> Mapping[str, Any]:
        return self.content.get(key) or {}


def _load(path: Path, *, unsafe_pickle: bool, verify: bool) -> Mapping[str, Any]:
    with torch.serialization.safe_globals(_STAND_INS):
        content = load_torch_file(path, unsafe_pickle=unsafe_pickle, verify=verify)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary of DeepSpeed")
    return content


@dataclass(frozen=True)
class _Partition:
    """The fp32 weights of one rank: one flat tensor per group (stages 1, 2) or per piece of them (stage 3)."""

    path: Path
    flat: list[Tensor]
    # Elements after each parameter of each group that only align the next one
    alignments: list[list[int]] | None


def _load_partitions(folder: Path, files: Mapping[int | None, Path], load: _Loader) -> list[_Partition]:
    if not files:
        raise CheckpointError(
            f"{folder}: has no zero_pp_rank_*_optim_states.pt, which alone hold fp32 weights (and all weights in "
            "stage 3). They are not needed for stages 0 to 2 without master_weights (--master-weights)"
        )
    partitions = []
    count = None
    for file in files.values():
        states = load(file).get("optimizer_state_dict")
        if not isinstance(states, Mapping) or "partition_count" not in states:
            raise CheckpointError(f"{file}: not a partition of ZeRO: 'optimizer_state_dict' has no 'partition_count'")
        # Stages 1 and 2 have one for each group; they differ with experts alone, refused before
        counts = states["partition_count"]
        count = max(counts) if isinstance(counts, list | tuple) else counts
        flat = states.get("fp32_flat_groups", states.get("single_partition_of_fp32_groups"))
        if not isinstance(flat, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in flat):
            raise CheckpointError(f"{file}: holds no fp32 weights (fp32_flat_groups, single_partition_of_fp32_groups)")
        partitions.append(_Partition(file, [t.flatten() for t in flat], states.get("param_alignment_paddings")))
    order = {partition.path: partition for partition in partitions}
    return [order[file] for file in _complete(folder, files, "optim_states", count)]


def _stage012(model: _Model, partitions: Sequence[_Partition]) -> dict[str, LazyTensor]:
    groups, ranks = model.groups, len(partitions)
    for partition in partitions:
        if len(partition.flat) != len(groups):
            raise CheckpointError(f"{partition.path}: {len(partition.flat)} groups, {len(groups)} in {model.path.name}")
    trained: dict[str, LazyTensor] = {}
    for number, shapes in enumerate(groups):
        pieces = [partition.flat[number] for partition in partitions]
        alignments = (partitions[0].alignments or {number: [0] * len(shapes)})[number]
        start = 0
        for (name, shape), alignment in zip(shapes.items(), alignments, strict=True):
            trained[name] = _merged(shape, pieces[0].dtype, [(pieces, start, math.prod(shape))])
            start += math.prod(shape) + alignment
        have = sum(piece.numel() for piece in pieces)
        # Partitions start at multiples of 2 elements, so that the padding at the end is short
        if not start <= have < start + 2 * ranks:
            raise _does_not_fit(partitions[-1].path, have, start)
    entries = LazyState.of(model.module).entries  # keeps order, buffers and what is not trained
    unknown = [name for name in trained if name not in entries]
    if unknown:
        raise CheckpointError(f"{model.path}: 'param_shapes' names {listed(unknown)}, which 'module' lacks")
    entries |= trained
    entries |= {name: trained[same] for name, same in model.mapping("shared_params").items() if same in trained}
    return entries


def _stage3(models: Sequence[_Model], partitions: Sequence[_Partition]) -> dict[str, LazyTensor]:
    model, ranks = models[0], len(partitions)
    if len(models) != ranks:
        raise CheckpointError(f"{model.path.parent}: model states of {len(models)} ranks, partitions of {ranks}")
    found: dict[str, LazyTensor] = {}
    start = 0
    for name, shape in ((name, shape) for group in model.groups for name, shape in group.items()):
        length = math.ceil(math.prod(shape) / ranks)
        found[name] = _merged(shape, partitions[0].flat[0].dtype, [(p.flat, start, length) for p in partitions])
        start += length
    for partition in partitions:
        have = sum(tensor.numel() for tensor in partition.flat)
        if have != start:
            raise _does_not_fit(partition.path, have, start)
    found |= dict(_frozen(models))
    found |= {name: found[same] for name, same in model.mapping("shared_params").items() if same in found}
    buffers = set(model.content.get("buffer_names") or ())
    found |= {name: LazyTensor.of(tensor) for name, tensor in model.module.items() if name in buffers}
    lost = [name for name in model.module if name not in found]
    if lost:
        raise CheckpointError(f"{model.path}: the weights of {listed(lost)} are in no file of the checkpoint")
    return {name: found[name] for name in (*model.module, *(name for name in found if name not in model.module))}


def _frozen(models: Sequence[_Model]) -> Iterator[tuple[str, LazyTensor]]:
    for name, shape in models[0].mapping("frozen_param_shapes").items():
        pieces = []
        for model in models:
            piece = model.mapping("frozen_param_fragments").get(name)
            if piece is None or piece.numel() != math.ceil(math.prod(shape) / len(models)):
                raise CheckpointError(f"{model.path}: lacks this rank's part of the frozen parameter {name}")
            pieces.append(([piece.flatten()], 0, piece.numel()))
        yield name, _merged(shape, pieces[0][0][0].dtype, pieces)


def _does_not_fit(path: Path, have: int, want: int) -> CheckpointError:
    return CheckpointError(f"{path}: {have} elements in all, {want} expected from 'param_shapes'. {_AGAIN}")


def _merged(
    shape: Sequence[int], dtype: torch.dtype, sources: Sequence[tuple[Sequence[Tensor], int, int]]
) -> LazyTensor:
    """A tensor whose elements are spread over flat ones; what exceeds its size is padding.

    Args:
        shape: Of the whole.
        dtype: Of the whole.
        sources: For each source: flat tensors that count as one, the first element, the number of elements.
    """
    return LazyTensor(torch.Size(shape), dtype, partial(_merge, torch.Size(shape), sources))


def _merge(shape: torch.Size, sources: Sequence[tuple[Sequence[Tensor], int, int]]) -> Tensor:
    parts: list[Tensor] = []
    for tensors, start, length in sources:
        for tensor in tensors:
            low, high = max(start, 0), min(start + length, tensor.numel())
            if low < high:
                parts.append(tensor[low:high])
            start -= tensor.numel()
    if not parts:
        return sources[0][0][0][:0].reshape(shape)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[: math.prod(shape)].reshape(shape)
