"""Whatever a file holds: it is read right, or refused by name."""

import _codecs
import functools
import io
import json
import os
import pickle
import re
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from piip_core.checkpoints import convert_file, read_checkpoint, write_checkpoint
from piip_core.checkpoints.pretrained import read_source
from piip_core.errors import CheckpointError

STATE = {
    "a.weight": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
    "b": torch.tensor(2.0, dtype=torch.bfloat16),
    "c": torch.arange(50),
}


def legacy(path):
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=False)


def compressed(path):
    torch.save({"model": STATE}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


WRITERS = {
    "zip.pth": lambda path: write_checkpoint(path, STATE),
    "legacy.pth": legacy,
    "compressed.pth": compressed,
    "x.safetensors": lambda path: write_checkpoint(path, STATE),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_mutated_files_are_refused_by_name_or_read_and_never_read_wrong_if_verified(name, verify, tmp_path, mutated):
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    refused = 0
    for seed in range(100):
        path.write_bytes(mutated(content, seed))
        try:
            state = dict(read_checkpoint(path, verify=verify).state)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), seed
            refused += 1
        else:
            has_sums = name != "legacy.pth" and (name != "x.safetensors" or b'"piip_crc32":' in path.read_bytes())
            if verify and has_sums:  # not if the very name of the sum is lost
                assert state.keys() == STATE.keys(), seed
                assert all(torch.equal(state[key], tensor) for key, tensor in STATE.items()), seed
    assert refused > 30
    path.write_bytes(content)
    assert all(torch.equal(read_checkpoint(path, verify=True).state[key], tensor) for key, tensor in STATE.items())


def write_shards(path):
    write_checkpoint(path.with_suffix("").with_suffix(""), STATE, max_shard_bytes=10)


def write_torch_shards(path):
    torch.save(STATE, path.with_name("shard.bin"))
    path.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "shard.bin")}))


SHARDS = {"x.safetensors.index.json": write_shards, "x.bin.index.json": write_torch_shards}


@pytest.mark.parametrize("name", ["zip.pth", "compressed.pth", "x.safetensors", *SHARDS])
def test_a_flipped_bit_in_a_tensor_stops_a_conversion(name, tmp_path):
    (WRITERS | SHARDS)[name](tmp_path / name)
    path = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)  # of shards, that of a.weight
    data = bytearray(path.read_bytes())
    start = data.find(STATE["a.weight"].numpy().tobytes()[:16]) if name != "compressed.pth" else len(data) // 3
    assert start > 0
    data[start + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^{path}: .*(checksum|damaged)"):
        convert_file(tmp_path / name, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(data: bytes, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", "byteorder": b"little", **more}.items():
            archive.writestr(f"x/{name}", content)
    return file.getvalue()


def called(function, *args) -> bytes:
    return zipped(pickle.dumps({"a": Call(function, *args)}, protocol=2))


def hexed(times: int) -> bytes:
    value = Call(_codecs.encode, "a" * 100, "utf-8")
    for _ in range(times):
        value = Call(_codecs.encode, value, "hex")
    return called(_codecs.encode, value, "hex")


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@functools.cache
def deflated_zeros() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("x/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(1100):
                entry.write(bytes(2**20))
    return file.getvalue()


LARGE = 68 * 10**9
NO_CHECKPOINTS = {
    "claims 68e9 elements": lambda: called(torch.Tensor, LARGE),
    "expanded to 68e9 elements": lambda: saved({"a": torch.zeros(1).expand(LARGE)}),
    "without values": lambda: saved({"a": torch.empty(LARGE, device="meta")}),
    "sparse": lambda: saved({"a": torch.sparse_coo_tensor([[1]], [1.0], (LARGE,))}),
    "bytes": lambda: called(bytearray, 10**12),
    "codecs": lambda: hexed(45),
    "nested": lambda: zipped(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "deflated": deflated_zeros,
    "words": lambda: b"cat\ndog\n" * 100,
    "text": lambda: b"<!doctype html>" * 50,
    "dot": lambda: b".",
    "program": lambda: b"cos\nsystem\n(S'touch /tmp/mark'\ntR.",
    "PNG": lambda: b"\x89PNG\r\n\x1a\n" + bytes(200),
    "ELF": lambda: b"\x7fELF" + bytes(range(256)),
    "tar": lambda: (b"pytorch_model.bin" + bytes(239)) * 3,
    "zip of another program": lambda: zipped(b"", **{"word/document.xml": b"<xml/>"}),
    "empty": lambda: b"",
    "zeros": lambda: bytes(10_000),
}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.safetensors.index.json", "x.npz"])
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_by_name(kind, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(NO_CHECKPOINTS[kind]())
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: ") as error:
        dict(read_source(str(path)))
    assert ("--unsafe-pickle" in str(error.value)) == (kind == "program" and name == "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.safetensors.index.json", "x.npz"])
@pytest.mark.parametrize("kind", ["/dev/zero", "pipe", "folder"])
def test_devices_pipes_and_folders_are_not_read(kind, name, tmp_path):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: "):
        read_source(str(path))


def test_a_header_of_safetensors_that_claims_what_is_not_there(tmp_path):
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [LARGE], "data_offsets": [0, 4 * LARGE]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a readable"):
        read_checkpoint(path)
    save_file(STATE, path, metadata={"piip": "[" * 5000})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a readable"):
        read_checkpoint(path)


def test_expanded_and_empty_tensors_of_ordinary_sizes_are_read(tmp_path):
    values = torch.randn(1, 4)
    torch.save({"a": values.expand(100, 4), "b": values, "c": torch.zeros(0)}, tmp_path / "x.pth")
    state = read_checkpoint(tmp_path / "x.pth").state
    assert torch.equal(state["a"], values.expand(100, 4)) and state["c"].numel() == 0
