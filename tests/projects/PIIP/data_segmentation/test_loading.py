"""Samples and batches: what the mapper gives, and that training resumes with the same ones."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.config import instantiate
from PIL import Image

from piip.data import DatasetError, UnreadableImageError
from piip.data.segmentation import SemSegDatasetMapper, get_sem_seg_dicts
from piip.lazy_config import load_config


@pytest.fixture
def config(repo_root):
    """Loads the ADE20K data configuration with overrides."""
    return lambda *overrides: load_config(str(repo_root / "projects/PIIP/configs/common/ade20k.py"), overrides)


def _records(files):
    return get_sem_seg_dicts(str(files.images), str(files.labels), classes=str(files.classes))


def _mapper(files, **kwargs):
    settings = {"is_train": True, "augmentations": [], **kwargs}
    return SemSegDatasetMapper(classes=str(files.classes), **settings)


def test_a_training_sample_is_the_files_content(shared_files):
    sample = _mapper(shared_files)(_records(shared_files)[0])
    assert sample["image"].dtype == torch.uint8 and sample["sem_seg"].dtype == torch.int64
    with Image.open(shared_files.images / "1.png") as image, Image.open(shared_files.labels / "1.png") as labels:
        assert np.array_equal(sample["image"].permute(1, 2, 0), np.asarray(image))
        assert np.array_equal(sample["sem_seg"], np.asarray(labels))
    assert (sample["height"], sample["width"]) == (40, 56)
    bgr = _mapper(shared_files, image_format="BGR")(_records(shared_files)[0])
    assert torch.equal(bgr["image"].flip(0), sample["image"])


def test_a_test_sample_has_no_labels_and_a_short_side_of_512(config, shared_files):
    cfg = config(
        *shared_files.overrides("test"), "+train.output_dir=x", "data.num_classes=3", "dataloader.test.num_workers=0"
    )
    samples = [sample for batch in instantiate(cfg.dataloader.test) for sample in batch]
    assert [tuple(sample["image"].shape) for sample in samples[:2]] == [(3, 512, 717), (3, 683, 512)]
    assert all("sem_seg" not in sample for sample in samples)
    assert [(sample["height"], sample["width"]) for sample in samples[:2]] == [(40, 56), (64, 48)]


def test_bad_files_are_named_or_skipped(files):
    records = _records(files)
    (files.labels / "1.png").write_bytes((files.labels / "1.png").read_bytes()[:60])
    with pytest.raises(UnreadableImageError, match=r"labels/1.png: .*on_bad_image=skip trains without"):
        _mapper(files)(records[0])
    assert _mapper(files, on_bad_image="skip")(records[0]) is None
    (files.images / "2.png").write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=r"images/2.png: the file is empty"):
        _mapper(files)(records[1])
    # A wrong label is a mistake in the data, not a broken file: never skipped
    labels = np.zeros((40, 56), dtype=np.uint8)
    labels[3, 4] = 3
    Image.fromarray(labels).save(files.labels / "3.png")
    for mode in ("error", "skip"):
        with pytest.raises(DatasetError, match=r"labels/3.png: label 3 \(1 pixels\)"):
            _mapper(files, on_bad_image=mode)(records[2])
    Image.fromarray(labels[10:]).save(files.labels / "5.png")
    with pytest.raises(DatasetError, match=r"labels/5.png: \(30, 56\) \(h, w\), its image \(40, 56\)"):
        _mapper(files)(records[4])
