"""Single files of weights, PyTorch's and .safetensors: tensors are read when asked for, and code is never run."""

from __future__ import annotations

import codecs
import json
import os
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import check_regular

# Where the known training programs put the weights inside their files, and that of classifiers their moving average
_WRAPPERS, _EMA_WRAPPERS = ("state_dict", "model", "module"), ("model_ema", "state_dict_ema")
# Our own description inside converted files: a key of the dictionary, or of the safetensors header (as JSON)
DESCRIPTION = "piip"
# In the safetensors header: the `checksum` of the tensors
CHECKSUM = "piip_crc32"
# A checkpoint claims no more than this factor of its size, where that is above the number of bytes: compressed weights
# are far from it, files made to exhaust memory beyond
_MOST_COMPRESSION, _MOST_PADDING = 100, 2**30
# What torch.load allows in files without Python objects, and makes large things of small files
_ALLOCATING = {"__builtin__ bytearray", "builtins bytearray"}
_OF_BYTES = {"latin1", "latin-1"}
_PLAIN_MODULES = ("torch", "collections", "_codecs")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known by shape and type, and read by calling `load`."""

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """Wraps a tensor that is in memory."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


class LazyState(Mapping[str, Tensor]):
    """A read-only state dict that keeps no tensor: each access reads it from its file.

    Most tensors are views of the mapped file. They can be written to without changing the file, but other accesses may
    see the change: clone what you change. The file must not be overwritten in place while the state is in use
    (replacing it by a new one, as `write_checkpoint` does, is fine).

    Args:
        entries: The tensors by name.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> LazyState:
        """Wraps any state dict; one that is lazy already stays as it is."""
        if isinstance(state, LazyState):
            return state
        return cls({key: LazyTensor.of(tensor) for key, tensor in state.items()})

    def __getitem__(self, key: str) -> Tensor:
        return self.entries[key].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries  # Mapping's own would read the tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, without reading a tensor."""
        return {key: tuple(entry.shape) for key, entry in self.entries.items()}

    def below(self, prefix: str) -> LazyState:
        """The tensors whose names begin with a prefix, without it."""
        inside = {key: entry for key, entry in self.entries.items() if key.startswith(prefix)}
        return LazyState({key.removeprefix(prefix): entry for key, entry in inside.items()})


@dataclass(frozen=True)
class CheckpointFile:
    """Weights of a checkpoint and what else it holds.

    Attributes:
        path: Where it was read from: a file, an index or a folder.
        state: The state dict, on the CPU, in the dtypes of the file; each tensor is read when it is asked for.
        extras: Names of other entries of the file, such as "optimizer".
        description: The description that `write_checkpoint` stored, or None.
    """

    path: Path
    state: LazyState
    extras: tuple[str, ...] = ()
    description: dict[str, Any] | None = None


def read_file(path: Path, *, unsafe_pickle: bool = False, ema: bool = False, verify: bool = False) -> CheckpointFile:
    """Reads the state dict in one PyTorch or .safetensors file; see `read_checkpoint`."""
    if path.suffix != ".safetensors":
        content = load_torch_file(path, unsafe_pickle=unsafe_pickle, verify=verify)
        return _unwrap(path, content, _EMA_WRAPPERS if ema else _WRAPPERS)
    if ema:
        raise CheckpointError(f"{path}: a .safetensors has one set of weights, and no moving average (--ema)")
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
    if verify and CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors):
        raise CheckpointError(f"{path}: differs from its checksum, bits have changed: download or copy the file again")
    entries = {key: LazyTensor(t.shape, t.dtype, partial(file.get_tensor, key)) for key, t in tensors.items()}
    return CheckpointFile(path, LazyState(entries), description=description)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A sum over names, types, shapes and values, in the order of the names."""
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _unwrap(path: Path, content: Any, wrappers: Sequence[str]) -> CheckpointFile:
    """The state dict inside the dictionaries that training programs put around it."""
    outer: list[str] = []
    extras: list[str] = []
    description = None
    while isinstance(content, Mapping) and not _is_state(content):
        inside = next((key for key in wrappers if isinstance(content.get(key), Mapping)), None)
        if inside is None:
            break
        description = content.get(DESCRIPTION, description)
        extras += [".".join([*outer, str(key)]) for key in content if key not in (inside, DESCRIPTION)]
        outer.append(inside)
        content = content[inside]
    if not (isinstance(content, Mapping) and _is_state(content)):
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        wanted = "moving average of the weights" if "model_ema" in wrappers else "state dict"
        raise CheckpointError(
            f"{path}: no {wanted} inside (found {found}). Expected a dictionary of tensors, alone or under "
            + ", ".join(repr(key) for key in wrappers)
        )
    return CheckpointFile(path, LazyState.of(content), tuple(extras), description)


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


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
    if not path.stat().st_size:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); download or save it again")
    objects: list[str] = []
    try:
        size, mappable = _check_archive(path, verify)
        if not unsafe_pickle:
            _check_pickles(path, objects)
        content = _load(path, unsafe_pickle, mmap=mmap and mappable)
        if not unsafe_pickle:
            _check_tensors(path, content, size)
        return content
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: its Python objects need a package that is missing here ({error})") from None
    except Exception as error:  # of any type, depending on which bytes are wrong
        if objects:
            raise CheckpointError(
                f"{path}: holds more than tensors and plain values, and could run code when loaded ("
                f"{', '.join(sorted(objects)[:3])}). If you trust where it comes from, pass unsafe_pickle=True "
                "(--unsafe-pickle) once and save a .safetensors"
            ) from None
        raise CheckpointError(
            f"{path}: not a complete PyTorch checkpoint ({_first_line(error)}); damaged, cut off or another kind of "
            "file. Download it again"
        ) from None


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load(path: Path, unsafe_pickle: bool, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError:
        if not unsafe_pickle:
            raise
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=False)


def _check_archive(path: Path, verify: bool) -> tuple[int, bool]:
    """How many bytes a file holds, and whether they can be mapped; refuses what is made to exhaust memory."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6
        return path.stat().st_size, False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if size > max(_MOST_PADDING, _MOST_COMPRESSION * path.stat().st_size):
            raise CheckpointError(
                f"{path}: claims to hold {size} bytes, more than {_MOST_COMPRESSION} times its own size"
            )
        if verify and (damaged := archive.testzip()):
            raise CheckpointError(
                f"{path}: {damaged} differs from its checksum, bits have changed: download or copy the file again (one "
                "that was saved with torch.serialization.set_crc32_options(False) has no right checksums)"
            )
    return size, all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _check_pickles(path: Path, objects: list[str]) -> None:
    """Refuses pickles that make much of little, with what PyTorch allows; adds the names of other objects in them."""
    allowed = {entry[1] for entry in torch.serialization.get_safe_globals() if isinstance(entry, tuple)}
    for file in _pickles(path):
        found = [(code.name, value) for code, value, _ in pickletools.genops(file) if isinstance(value, str)]
        names = [value.replace(" ", ".") for code, value in found if code == "GLOBAL"]
        objects += [n for n in names if n not in allowed and n.partition(".")[0] not in _PLAIN_MODULES]
        words = {value for _, value in found if len(value) < 40}
        bombs = words & _ALLOCATING
        if "_codecs encode" in words:  # for plain bytes; other codecs make them longer, again and again
            bombs |= {word for word in words - _OF_BYTES if " " not in word and _is_codec(word)}
        if bombs:
            raise CheckpointError(f"{path}: calls {min(bombs)}, which could fill the memory; expected tensors alone")


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(4):  # number of the format, version, machine, content
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as file:
                    yield file


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
