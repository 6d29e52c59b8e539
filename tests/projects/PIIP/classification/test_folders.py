"""Folders of classes: what is read, held out and refused; samples."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from PIL import Image
from torchvision.datasets import ImageFolder

from piip.data import DatasetError
from piip.data.audit import audit_classes
from piip.data.classification import ClassificationMapper, folder_categories, get_test_dicts, get_train_dicts
from piip.data.loader import TrainBatchSampler
from piip.lazy_config import follow_annotations, has_test_set, load_config

CONFIG = str(Path(__file__).parents[1] / "tiny_classifier.py")


def test_images_and_classes_are_those_of_torchvision(folders):
    (folders.train / "red" / "deeper").mkdir()
    Image.new("RGB", (8, 8)).save(folders.train / "red" / "deeper" / "1.jpg")
    reference = ImageFolder(str(folders.train))
    records = get_train_dicts(str(folders.train), num_classes=3)
    assert [(record["file_name"], record["label"]) for record in records] == reference.samples
    assert [category.name for category in folder_categories(str(folders.train))] == reference.classes
    # what other systems leave behind is neither a class nor an image
    (folders.train / ".checkpoints").mkdir()
    (folders.train / "red" / "._1.png").write_bytes(b"x")
    assert get_train_dicts(str(folders.train), num_classes=3) == records


def test_a_share_is_held_out_of_every_class_and_stays(folders):
    def split(share):
        train = get_train_dicts(str(folders.train), share=share)
        return train, get_test_dicts(None, train_images=str(folders.train), share=share)

    train, test = split(0.25)
    everything = {record["file_name"] for record in get_train_dicts(str(folders.train))}
    names = [{record["file_name"] for record in part} for part in (train, test)]
    assert names[0] | names[1] == everything and not names[0] & names[1]
    assert [record["label"] for record in test] == [0, 1, 2]  # one of four each
    assert [len(part) for part in split(0.01)] == [9, 3] and [len(part) for part in split(0.99)] == [3, 9]
    Image.new("RGB", (8, 8)).save(folders.train / "red" / "new.png")
    (folders.train / "blue").rename(folders.train / "azure")
    assert {os.path.basename(r["file_name"]) for r in split(0.25)[1] if r["label"] == 1} == {
        os.path.basename(r["file_name"]) for r in test if r["label"] == 1
    }


def test_folders_that_cannot_be_used(folders):
    train, root = str(folders.train), folders.root
    with pytest.raises(DatasetError, match=r"nowhere: no such folder .* one sub-folder of images per class"):
        get_train_dicts(str(root / "nowhere"))
    with pytest.raises(DatasetError, match=r"1\.png: is a file"):
        get_train_dicts(str(folders.train / "red" / "1.png"))
    with pytest.raises(DatasetError, match=r"red: has no sub-folders"):
        get_train_dicts(str(folders.train / "red"))
    with pytest.raises(DatasetError, match=r"3 classes .* Set data.num_classes=3"):
        get_train_dicts(train, num_classes=1000)
    with pytest.raises(DatasetError, match=r"data.test.share=1.5: expected a part"):
        get_train_dicts(train, share=1.5)
    (folders.train / "violet").mkdir()
    with pytest.raises(DatasetError, match=r"1 of 4 classes .* have no image: violet"):
        get_train_dicts(train)
    Image.new("RGB", (8, 8)).save(folders.train / "violet" / "1.png")
    with pytest.raises(DatasetError, match=r"violet: one image, none to hold out"):
        get_train_dicts(train, share=0.5)
    with pytest.raises(DatasetError, match=r"only the first has none, only the second has violet"):
        follow_annotations(load_config(CONFIG, folders.overrides()), training=True)


def test_the_configuration_follows_the_folders(shared_folders):
    cfg = load_config(CONFIG, [*shared_folders.overrides(), "train.warmup_epochs=1"])
    assert [c.name for c in follow_annotations(cfg, training=True)] == ["blue", "green", "red"]
    assert (cfg.data.num_classes, cfg.data.train.num_images) == (3, 12)
    assert cfg.train.max_iter == 4 and cfg.lr_multiplier.warmup_iters == 3  # 1.5 and 1 epochs, 4 images at a time
    assert cfg.model.config.num_classes == cfg.model.mixup.num_classes == 3 and has_test_set(cfg)
    held_out = load_config(CONFIG, [shared_folders.overrides()[0], "data.test.images=null", "data.test.share=0.5"])
    assert len(follow_annotations(held_out, training=True)) == 3 and has_test_set(held_out)
    assert held_out.data.train.num_images == 6 == len(instantiate(held_out.dataloader.test.dataset))
    without = load_config(CONFIG, [shared_folders.overrides()[0], "data.test.images=null"])
    assert not has_test_set(without)
    with pytest.raises(DatasetError, match=r"data.test.images is null"):
        follow_annotations(without, training=False)


def test_a_folder_smaller_than_a_batch_is_warned_about(shared_folders, caplog):
    cfg = load_config(CONFIG, [*shared_folders.overrides(), "dataloader.train.total_batch_size=16"])
    follow_annotations(cfg, training=True)
    assert cfg.train.max_iter == 1 and "12 training images, fewer than" in caplog.text


def test_test_images_are_resized_and_cropped_as_torchvision_does(tmp_path):
    """Bicubic, the short side to the input size, the centre."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize
    from torchvision.transforms.functional import pil_to_tensor

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    picture.save(tmp_path / "1.png")
    mapper = instantiate(load_config(CONFIG).dataloader.test.mapper)
    sample = mapper({"file_name": str(tmp_path / "1.png"), "label": 2})
    expected = pil_to_tensor(CenterCrop(32)(Resize(32, InterpolationMode.BICUBIC)(picture)))
    assert sample["label"] == 2 and sample["image"].dtype == torch.uint8
    assert torch.equal(sample["image"], expected)


def test_repeated_augmentation_gives_every_image_several_times_in_a_row():
    plain = [index for batch, _ in zip(TrainBatchSampler(7, 2, 0), range(14), strict=False) for index, _ in batch]
    sampler = TrainBatchSampler(7, 2, 0, repeats=3)
    batches = [batch for batch, _ in zip(sampler, range(42), strict=False)]
    repeated = [index for batch in batches for index, _ in batch]
    assert repeated == [index for index in plain for _ in range(3)]
    assert len({seed for batch in batches for _, seed in batch}) == len(repeated)  # each augmented anew
    sampler.start = 40
    assert [batch for batch, _ in zip(sampler, range(2), strict=False)] == batches[40:]


def _names(records):
    return [Path(record["file_name"]).name for record in records if record["label"] == 2]


def test_every_format_that_is_read_counts_and_others_are_named(folders, caplog):
    kept = _names(get_train_dicts(str(folders.train)))
    assert not caplog.text
    for ending, kind in {".gif": "GIF", ".jfif": "JPEG", ".JPE": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA"}.items():
        Image.new("RGB", (8, 8)).save(folders.train / "red" / f"image{ending}", kind)
    for name in ("a.heic", "b.HEIC", "notes.txt", "LICENSE", "drawing.eps"):
        (folders.train / "red" / name).write_bytes(b"x")
    (folders.train / "loose.png").write_bytes(b"x")
    records = get_train_dicts(str(folders.train))
    assert _names(records) == [*kept, "image.JPE", "image.gif", "image.jfif", "image.jp2", "image.tga"]
    for record in records:
        assert ClassificationMapper(True, transform=np.asarray)(record)["image"].shape[2] == 3
    assert "5 files do not end as images and are left out: " in caplog.text
    assert "LICENSE" in caplog.text and "and 2 more" in caplog.text
    assert "1 files lie in no class and are left out: " in caplog.text and "loose.png" in caplog.text


def test_links_that_go_round_are_followed_once(folders, tmp_path, caplog):
    before = get_train_dicts(str(folders.train))
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "9.png")
    (tmp_path / "more" / "up").symlink_to(tmp_path)
    (folders.train / "red" / "more").symlink_to(tmp_path / "more")
    (folders.train / "red" / "round").symlink_to("..")  # would give this class the images of the others
    (folders.train / "all").symlink_to(".")
    (folders.train / "nothing").symlink_to("nothing")
    found = get_train_dicts(str(folders.train))
    more = {"file_name": str(folders.train / "red" / "more" / "9.png"), "label": 2}
    assert found == [*before, more] and len(folder_categories(str(folders.train))) == 3
    assert "round: is a link to a folder that it lies in" in caplog.text


def test_classes_that_look_alike_are_one(folders):
    composed, apart = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    (folders.train / "green").rename(folders.train / composed)
    (folders.val / "green").rename(folders.val / apart)
    categories = follow_annotations(load_config(CONFIG, folders.overrides()), training=True)
    assert [category.name for category in categories] == ["blue", "red", composed]
    assert [len(_names(get_train_dicts(str(folder)))) for folder in (folders.train, folders.val)] == [4, 3]
    (folders.train / apart).mkdir()
    with pytest.raises(DatasetError, match=r"1 sub-folders have the name of another one"):
        get_train_dicts(str(folders.train))


def test_other_classes_than_in_training_are_named(folders, caplog):
    """Also where nothing but the data sets of a configuration is built, as Detectron2's own script does."""
    settings = {"train_images": str(folders.train), "num_classes": 3}
    assert get_test_dicts(str(folders.val), **settings) and not caplog.text
    (folders.val / "red").rename(folders.val / "violet")
    get_test_dicts(str(folders.val), **settings)
    assert "only the first has violet, only the second has red" in caplog.text
    parts = [(name, str(getattr(folders, name)), None, None) for name in ("train", "val")]
    assert [problem.kind for problem in audit_classes(parts).sets[1].problems] == ["classes differ"]


def test_a_huge_image_is_a_problem_of_its_size(folders, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    (problem, *_) = audit_classes([("mine", str(folders.train), None, None)]).sets[0].problems
    assert problem.kind == "image unreadable" and "1920 pixels) exceeds limit of 1800" in problem.message
