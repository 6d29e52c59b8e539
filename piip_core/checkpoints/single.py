"""Reading one checkpoint file without running anybody's code."""

from __future__ import annotations

import codecs
import json
import os
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import check_regular
from .lazy import LazyState, LazyTensor

__all__ = ["CHECKSUM", "DESCRIPTION", "CheckpointFile", "checksum", "listed", "load_torch_file", "read_single"]

# Where the known training programs put the weights inside their files
WRAPPERS = ("state_dict", "model", "module")
# Where the training of classifiers puts their moving average
EMA_WRAPPERS = ("model_ema", "state_dict_ema")
# A checkpoint claims no more than this factor of its size, where that is above the number of bytes: compressed weights
# are far from it, files made to exhaust memory beyond
_MOST_COMPRESSION, _MOST_PADDING = 100, 2**30
# What torch.load allows in files without Python objects, and makes large things of small files
_ALLOCATING = {"__builtin__ bytearray", "builtins bytearray"}
_OF_BYTES = {"latin1", "latin-1"}
_PLAIN_MODULES = ("torch", "collections", "_codecs")
# Our own description inside converted files: a key of the dictionary, or of the safetensors header (as JSON)
DESCRIPTION = "piip"
# In the safetensors header: the `checksum` of the tensors
CHECKSUM = "piip_crc32"


@dataclass(frozen=True)
class CheckpointFile:
    """Weights of a checkpoint and what else it holds.

    Attributes:
        path: Where it was read from: a file, an index or a folder.
        state: The state dict, on the CPU, in the dtypes of the file; each tensor is read when it is asked for.
        wrapper: Path of the state dict inside the file, such as "model"; empty if the file is the state dict.
        extras: Names of other entries of the file, such as "optimizer".
        description: The description that `write_checkpoint` stored, or None.
    """

    path: Path
    state: LazyState
    wrapper: str = ""
    extras: tuple[str, ...] = ()
    description: dict[str, Any] | None = None


def load_torch_file(
    path: str | os.PathLike[str], *, unsafe_pickle: bool = False, mmap: bool = True, verify: bool = False
) -> Any:
    """`torch.load` onto the CPU that runs no code, and says clearly what is wrong with a file, whatever its bytes are.

    Args:
        path: The file.
        unsafe_pickle: If the file holds Python objects, load them all the same, which can run any code.
        mmap: Map the tensors of the file into memory instead of reading them, where its format allows.
        verify: Read everything and compare it with the sums in the file, where its format has some.

    Raises:
        CheckpointError: If the file does not exist, is damaged, holds Python objects or claims to hold far more than
            it does; the message names it.
    """
    path = Path(path)
    check_regular(path, CheckpointError)
    try:
        size, mappable = _check_content(path, verify, trusted=unsafe_pickle)
        load = partial(torch.load, path, map_location="cpu", mmap=mmap and mappable)
        try:
            content = load(weights_only=True)
        except pickle.UnpicklingError:
            if not unsafe_pickle:
                raise
            content = load(weights_only=False)
        if not unsafe_pickle:
            _check_tensors(path, content, size)
        return content
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: its Python objects need a package that is missing here ({error})") from None
    except Exception as error:  # of any type, depending on which bytes are wrong
        objects = _objects(path)
        if objects and not unsafe_pickle:
            raise CheckpointError(
                f"{path}: holds more than tensors and plain values, and could run code when loaded ({objects}). If you "
                "trust where it comes from, pass unsafe_pickle=True (--unsafe-pickle) once and save a .safetensors"
            ) from None
        raise CheckpointError(
            f"{path}: not a complete PyTorch checkpoint ({_first_line(error)}); damaged, cut off or another kind of "
            "file. Download it again"
        ) from None


def _check_content(path: Path, verify: bool, *, trusted: bool) -> tuple[int, bool]:
    """How many bytes a PyTorch file holds, and whether they can be mapped; refuses what is made to exhaust memory."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6
        with open(path, "rb") as file:
            for _ in range(0 if trusted else 4):  # number of the format, version, machine, content
                _check_pickle(path, file)
        return path.stat().st_size, False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > max(_MOST_PADDING, _MOST_COMPRESSION * path.stat().st_size):
            raise CheckpointError(
                f"{path}: claims to hold {size} bytes, more than {_MOST_COMPRESSION} times its own size"
            )
        for entry in entries:
            if entry.filename.endswith("data.pkl") and not trusted:
                with archive.open(entry) as file:
                    _check_pickle(path, file)
        damaged = archive.testzip() if verify else None
        if damaged:
            raise CheckpointError(
                f"{path}: {damaged} differs from its checksum, bits have changed: download or copy the file again (one "
                "that was saved with torch.serialization.set_crc32_options(False) has no right checksums)"
            )
    return size, all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _check_pickle(path: Path, file: IO[bytes]) -> None:
    """Refuses a pickle that makes much of little, with what PyTorch allows in one without Python objects."""
    words = {value for _, value, _ in pickletools.genops(file) if isinstance(value, str) and len(value) < 40}
    bombs = words & _ALLOCATING
    if "_codecs encode" in words:  # for plain bytes; other codecs make them longer, again and again
        bombs |= {word for word in words - _OF_BYTES if " " not in word and _is_codec(word)}
    if bombs:
        raise CheckpointError(f"{path}: calls {sorted(bombs)[0]}, which could fill the memory; expected tensors alone")


def _is_codec(name: str) -> bool:
    try:
        return codecs.lookup(name) is not None
    except (LookupError, ValueError):
        return False


def _check_tensors(path: Path, content: Any, size: int) -> None:
    """Refuses tensors that have no values in the file: it would be as small however large they say to be."""
    storages: dict[int, int] = {}
    claimed = 0
    for tensor in _tensors(content):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: holds a tensor on {tensor.device}, {tensor.layout}; expected plain ones")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
        claimed += max(0, tensor.nbytes - storage.nbytes())  # expanded
    claimed += sum(storages.values())
    if claimed > size + _MOST_PADDING:
        raise CheckpointError(f"{path}: claims tensors of {claimed} bytes, but holds {size}; expected their values")


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, however deep."""
    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)


def _objects(path: Path) -> str:
    """Python objects that a file names, as far as that can be told."""
    names: list[str] = []
    with suppress(Exception):  # of the older format, or damaged
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with suppress(Exception), open(path, "rb") as file:
        while True:  # one pickle after the other, up to what is none
            found = [name for code, name, _ in pickletools.genops(file) if code.name == "GLOBAL"]
            names += [name for name in found if name.split()[0].partition(".")[0] not in _PLAIN_MODULES]
    return ", ".join(sorted(names)[:3])


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_single(path: Path, unsafe_pickle: bool, *, ema: bool = False, verify: bool = False) -> CheckpointFile:
    """Reads a state dict from one PyTorch or .safetensors file.

    Raises:
        CheckpointError: If it cannot be read or holds no state dict, or with `ema` no moving average.
    """
    if path.suffix == ".safetensors":
        if ema:
            raise CheckpointError(f"{path}: a .safetensors has one set of weights, and no moving average (--ema)")
        return _read_safetensors(path, verify)
    content = load_torch_file(path, unsafe_pickle=unsafe_pickle, verify=verify)
    return _unwrap(path, content, EMA_WRAPPERS if ema else WRAPPERS)


def _read_safetensors(path: Path, verify: bool) -> CheckpointFile:
    check_regular(path, CheckpointError)
    try:
        file = safe_open(path, framework="pt", device="cpu")
        # The file is mapped: this reads nothing but shapes and types
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        metadata = file.metadata() or {}
        description = json.loads(metadata[DESCRIPTION]) if DESCRIPTION in metadata else None
    except Exception as error:  # of any type, depending on which bytes are wrong
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({_first_line(error)}). Download or export it again"
        ) from None
    if verify and metadata.get(CHECKSUM, checksum(tensors)) != checksum(tensors):
        raise CheckpointError(f"{path}: differs from its checksum, bits have changed: download or copy the file again")
    entries = {key: LazyTensor(t.shape, t.dtype, partial(file.get_tensor, key)) for key, t in tensors.items()}
    return CheckpointFile(path, LazyState(entries), description=description)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A sum over names, types, shapes and values, in the order of the names."""
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(memoryview(tensor.flatten().view(torch.uint8).numpy()), total)
    return f"{total:08x}"


def _unwrap(path: Path, content: Any, wrappers: Sequence[str]) -> CheckpointFile:
    wrapper: list[str] = []
    extras: list[str] = []
    description = None
    while isinstance(content, Mapping) and not _is_state(content):
        inside = [key for key in wrappers if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        description = content.get(DESCRIPTION, description)
        extras += [".".join([*wrapper, str(key)]) for key in content if key not in (inside[0], DESCRIPTION)]
        wrapper.append(inside[0])
        content = content[inside[0]]
    if not (isinstance(content, Mapping) and _is_state(content)):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path}: no state dict inside (found {found}). Expected a dictionary of tensors, alone or under "
            + ", ".join(repr(key) for key in wrappers)
        )
    return CheckpointFile(path, LazyState.of(content), ".".join(wrapper), tuple(extras), description)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
