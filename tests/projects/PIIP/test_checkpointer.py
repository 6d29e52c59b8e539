"""What `AtomicCheckpointer` loads besides its own files; saving and resuming are in test_train.py."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.config import instantiate

from piip.checkpointer import AtomicCheckpointer, find_weights, follow_published, read_categories
from piip.lazy_config import load_config
from piip.modeling import PIIPBackbone
from piip_core import (
    BranchConfig,
    ClassifierConfig,
    InteractionConfig,
    MergingConfig,
    PIIPClassifier,
    PIIPConfig,
    ViTConfig,
    zoo,
)
from piip_core.checkpoints import PublishedNames, write_checkpoint
from piip_core.errors import CheckpointError

TSBL = str(Path(__file__).parents[3] / "projects/PIIP/configs/COCO/mask_rcnn_piip_tsbl_1344_896_672_448_1x.py")


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


def test_a_classifier_starts_the_pyramid_of_a_detector(tmp_path, caplog):
    """Found by its type, whatever the detector calls it; evaluation still asks for the whole model."""
    pyramid = PIIPConfig(
        branches=[
            BranchConfig(network=ViTConfig(embed_dim=dim, depth=2, num_heads=2, pos_grid=size // 16), image_size=size)
            for dim, size in ((16, 32), (8, 64))
        ],
        interaction=InteractionConfig(num_interactions=1, num_heads=2),
        merging=None,
    )
    dense = dataclasses.replace(pyramid, merging=MergingConfig(num_groups=8))
    torch.manual_seed(1)
    classifier = PIIPClassifier(ClassifierConfig(pyramid=pyramid, pooling="average", num_classes=4))
    AtomicCheckpointer(classifier, str(tmp_path)).save("model")
    path = str(tmp_path / "model.pth")
    model = nn.ModuleDict({"backbone": PIIPBackbone(dense, pad_divisor=32), "head": nn.Linear(4, 4)})
    head = model["head"].weight.clone()
    with pytest.raises(CheckpointError, match="is not in the file"):
        AtomicCheckpointer(model, strict=True).load(path)
    loader = AtomicCheckpointer(model)
    loader.logger = logging.getLogger("test")  # Detectron2's own keeps its messages, once it was set up
    with caplog.at_level("INFO"):
        assert loader.load(path, checkpointables=[]) == {}
    assert "not of the pyramid (head." in caplog.text and f"{path}: " in caplog.text
    assert "other tensors of this one stay as they were (backbone.features.merging." in caplog.text
    image = torch.randn(1, 3, 64, 64)
    for found, expected in zip(model["backbone"].features.pyramid(image), classifier.pyramid(image), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(model["head"].weight, head)

    wider = dataclasses.replace(dense, branches=(dense.branches[1], dense.branches[1]))
    other = nn.ModuleDict({"backbone": PIIPBackbone(wider, pad_divisor=32)})
    with pytest.raises(CheckpointError, match=r"model\.pth: its pyramid is not that of the model"):
        AtomicCheckpointer(other).load(path, checkpointables=[])


def test_a_released_model_of_four_branches_is_built_as_its_file_holds_it(tmp_path):
    """Its Branch 4 is a second copy of Branch 3's network; overrides of the configuration stay."""
    config = zoo.get("piip_tsbl_1344_896_672_448").config
    held = zoo.tsbl_as_released(config)
    description = PublishedNames(held, ("deit",) * 4).to_dict()
    path = write_checkpoint(tmp_path / "model.safetensors", {"x": torch.zeros(1)}, description=description)
    override = "model.backbone.bottom_up.config.branches.branch1.image_size=224"
    cfg = load_config(TSBL, [override])
    follow_published(cfg, str(path))
    found = instantiate(cfg.model.backbone.bottom_up.config)
    assert [branch.network for branch in found.branches] == [branch.network for branch in held.branches]
    assert found.branches[0].image_size == 224 and found.branches[3].network != config.branches[3].network


def test_settings_that_are_no_names_stay(tmp_path):
    assert find_weights("") == "" and find_weights("https://example.org/a.pth") == "https://example.org/a.pth"
    assert find_weights(str(tmp_path / "x.pth")) == str(tmp_path / "x.pth")
