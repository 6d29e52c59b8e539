"""What `AtomicCheckpointer` loads besides its own files; saving and resuming are in test_train.py."""

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from piip.checkpointer import AtomicCheckpointer, read_categories
from piip_core.checkpoints import write_checkpoint
from piip_core.errors import CheckpointError


def _model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_sharded_weights_are_loaded_by_their_index(tmp_path):
    index = str(write_checkpoint(tmp_path / "model.safetensors", _model(3).state_dict(), max_shard_bytes=300))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    model = _model(0)
    AtomicCheckpointer(model, strict=True).load(index)
    for name, tensor in _model(3).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert read_categories(index) == ()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"files are missing: model-00002-of-00002\.safetensors"):
        AtomicCheckpointer(model, strict=True).load(index)


def test_files_in_the_format_before_zip_are_read(tmp_path):
    path = str(tmp_path / "old.pth")
    content = {"model": _model(3).state_dict(), "categories": [{"id": 7, "name": "disc"}]}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert [category.name for category in read_categories(path)] == ["disc"]
    model = _model(0)
    AtomicCheckpointer(model, strict=True).load(path)
    assert torch.equal(model[1].weight, _model(3)[1].weight)
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such file"):
        read_categories(str(tmp_path / "gone.pth"))
