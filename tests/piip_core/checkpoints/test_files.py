import os

import pytest
import torch
from safetensors.torch import save_file

from piip_core.checkpoints import read_checkpoint, write_checkpoint
from piip_core.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0, dtype=torch.bfloat16)}


class Payload:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def assert_state(file):
    assert file.state.keys() == STATE.keys()
    for key, value in STATE.items():
        assert file.state[key].dtype == value.dtype and torch.equal(file.state[key], value)


@pytest.mark.parametrize(
    ("content", "extras"),
    [
        (STATE, ()),
        ({"state_dict": STATE, "meta": {"epoch": 12}, "optimizer": {}}, ("meta", "optimizer")),
        ({"module": STATE, "lr_scheduler": None}, ("lr_scheduler",)),
        ({"model": {"state_dict": STATE, "x": 1}}, ("model.x",)),
        ({"model": {f"module.{key}": value for key, value in STATE.items()}}, ()),
    ],
)
def test_known_wrappers_are_opened_and_the_rest_is_listed(content, extras, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    file = read_checkpoint(tmp_path / "file.pth")
    assert_state(file)
    assert file.extras == extras


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "file.safetensors")
    assert_state(read_checkpoint(tmp_path / "file.safetensors"))


def test_code_in_a_pickle_is_not_run_unless_asked_for(tmp_path):
    torch.save({"model": STATE, "extra": Payload(str(tmp_path / "trace"))}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth.*--unsafe-pickle"):
        read_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "trace").exists()
    assert_state(read_checkpoint(tmp_path / "file.pth", unsafe_pickle=True))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_broken_files_are_named(name, damage, tmp_path):
    path = tmp_path / name
    write_checkpoint(path, {"a": torch.randn(1000)})
    content = {"empty": b"", "truncated": path.read_bytes()[:2000], "text": b"<!doctype html>" * 50}[damage]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as error:
        read_checkpoint(path)
    assert ("is empty (0 bytes)" in str(error.value)) == (damage == "empty" and name == "file.pth")


def test_missing_files_and_files_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pth: no such file"):
        read_checkpoint(tmp_path / "nothing.pth")
    torch.save({"epoch": 3}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"no state dict inside \(found epoch\)"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_what_is_written_is_read_with_its_description(name, tmp_path):
    description = {"config": {"branches": [1, 2]}, "detector": None}
    write_checkpoint(tmp_path / "new" / name, STATE, description=description)
    file = read_checkpoint(tmp_path / "new" / name)
    assert_state(file)
    assert file.description == description and file.extras == ()
    (tmp_path / "plain").touch()
    assert (tmp_path / "new" / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
