"""The training loader: order, randomness, resuming and bad image files."""

from __future__ import annotations

import copy
import itertools
import logging

import numpy as np
import pytest

pytest.importorskip("detectron2")

import detectron2.data.transforms as T
import torch
from detectron2.data import DatasetMapper
from detectron2.data.samplers import TrainingSampler
from PIL import Image

from piip.data import (
    CheckedDatasetMapper,
    DatasetError,
    KeepRatioResize,
    UnreadableImageError,
    build_train_loader,
    get_coco_dicts,
    read_image,
)
from piip.data.loader import TrainBatchSampler
from piip_core.images import ImageTooLargeError


def _mapper(**kwargs):
    return CheckedDatasetMapper(
        True,
        augmentations=[KeepRatioResize([(64, 48), (80, 60)]), T.RandomFlip()],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        **kwargs,
    )


def _batches(files, count, start=0, mapper=None, **kwargs):
    dicts = get_coco_dicts(str(files.annotations), str(files.images))
    settings = {"total_batch_size": 2, "seed": 7, **kwargs}
    loader = build_train_loader(dicts, mapper=mapper or _mapper(), **settings)
    loader.batch_sampler.start = start
    return list(itertools.islice(loader, count))


def _assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(itertools.chain(*left), itertools.chain(*right), strict=True):
        assert a["image_id"] == b["image_id"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)


def test_batches_do_not_depend_on_workers_start_or_the_global_generators(shared_coco):
    whole = _batches(shared_coco, 8)
    np.random.seed(123)
    torch.manual_seed(123)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    _assert_same(_batches(shared_coco, 3, start=5), whole[5:])
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    _assert_same(_batches(shared_coco, 3, start=5, num_workers=2), whole[5:])
    flat = [sample["image"] for batch in whole for sample in batch]
    assert len({tuple(image.shape) for image in flat}) > 2  # both scales and both aspect ratios were drawn


def test_another_seed_gives_another_order(shared_coco):
    ids = [[s["image_id"] for batch in _batches(shared_coco, 6, seed=seed) for s in batch] for seed in (7, 8)]
    assert ids[0] != ids[1]


def test_every_epoch_has_every_image_once_and_batches_have_one_orientation():
    wide = np.array([0, 1, 1, 0, 1, 1])
    batches = list(itertools.islice(TrainBatchSampler(6, 2, 3, wide), 9))
    assert all(len({wide[index] for index, _ in batch}) == 1 for batch in batches)
    assert len({seed for batch in batches for _, seed in batch}) == 18

    counts = np.zeros(6, dtype=int)
    for batch in itertools.islice(TrainBatchSampler(6, 3, 3), 8):
        for index, _ in batch:
            counts[index] += 1
        if counts.sum() % 6 == 0:
            assert len(set(counts.tolist())) == 1


def test_processes_share_the_images_of_an_epoch(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        parts.append([sample for batch in itertools.islice(TrainBatchSampler(6, 3, 3), 1) for sample in batch])
    assert sorted(index for part in parts for index, _ in part) == list(range(6))
    assert len({seed for part in parts for _, seed in part}) == 6


def test_a_batch_that_cannot_be_divided_is_refused(shared_coco, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    with pytest.raises(ValueError, match="total_batch_size=2: expected a positive multiple of the 4 processes"):
        _batches(shared_coco, 1)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


BAD = [
    (_truncate, "cannot be decoded"),
    (lambda path: path.write_bytes(b""), r"the file is empty \(0 bytes\)"),
    (lambda path: path.write_text("<html>404</html>"), "cannot be decoded"),
    (lambda path: Image.new("I;16", (160, 120), 40000).save(path), "more than 8 bits per channel"),
    (lambda path: path.unlink(), "no such file"),
]


@pytest.mark.parametrize(("damage", "words"), BAD)
def test_a_bad_image_is_named(coco, damage, words):
    dicts = get_coco_dicts(str(coco.annotations), str(coco.images))
    damage(coco.images / "001.png")
    with pytest.raises(UnreadableImageError, match=f"001.png: .*{words}"):
        read_image(str(coco.images / "001.png"))
    with pytest.raises(UnreadableImageError, match=f"001.png: .*{words}.*on_bad_image=skip"):
        _mapper()(dicts[0])
    assert _mapper(on_bad_image="skip")(dicts[0]) is None
    assert _mapper(on_bad_image="skip")(dicts[1])["image_id"] == 2


def test_a_bad_image_stops_training_through_worker_processes(coco):
    _truncate(coco.images / "002.png")
    with pytest.raises(UnreadableImageError, match=r"002\.png"):
        _batches(coco, 4, num_workers=1)


def test_skipped_images_are_replaced_counted_and_warned_about_once(coco, caplog):
    _truncate(coco.images / "002.png")
    (coco.images / "003.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="piip"):
        batches = _batches(coco, 12, mapper=_mapper(on_bad_image="skip"))
        again = _batches(coco, 4, start=8, mapper=_mapper(on_bad_image="skip"), num_workers=1)
    _assert_same(batches[8:], again)
    assert {len(batch) for batch in batches} == {2}
    assert {s["image_id"] for batch in batches for s in batch} == {1, 4, 5, 6}
    warnings = [r.getMessage() for r in caplog.records if "unreadable image files skipped" in r.getMessage()]
    assert len(warnings) == 2  # one per loader
    assert "1 unreadable image files skipped so far, the last one is" in warnings[0]


def test_nothing_but_bad_images_is_an_error(coco):
    for path in coco.images.iterdir():
        path_data = path.read_bytes()
        path.write_bytes(path_data[:100])
    with pytest.raises(DatasetError, match="100 images in a row cannot be read"):
        _batches(coco, 1, mapper=_mapper(on_bad_image="skip"))


def test_another_size_than_annotated_is_an_error_in_either_mode(coco):
    data = coco.read()
    data["images"][0]["width"] = 161
    coco.write(data)
    dicts = get_coco_dicts(str(coco.annotations), str(coco.images))
    for mode in ("error", "skip"):
        with pytest.raises(DatasetError, match=r"001.png: .*\(160, 120\), expect \(161, 120\).*image id 1"):
            _mapper(on_bad_image=mode)(dicts[0])


def test_skipping_is_refused_in_evaluation():
    with pytest.raises(ValueError, match="in evaluation would change the result"):
        CheckedDatasetMapper(False, augmentations=[], image_format="RGB", on_bad_image="skip")
    with pytest.raises(ValueError, match="on_bad_image='ignore'"):
        CheckedDatasetMapper(True, augmentations=[], image_format="RGB", on_bad_image="ignore")


@pytest.mark.parametrize(
    ("is_train", "image_format", "options"),
    [
        (True, "RGB", {"use_instance_mask": True, "recompute_boxes": True}),
        (True, "BGR", {}),
        (False, "RGB", {}),
    ],
)
def test_good_images_are_mapped_as_by_detectron2(shared_coco, is_train, image_format, options):
    """DatasetMapper._transform_annotations, in piip/data/mapper.py."""
    settings = {"augmentations": [KeepRatioResize([(64, 48)])], "image_format": image_format, **options}
    record = get_coco_dicts(str(shared_coco.annotations), str(shared_coco.images))[0]
    before = copy.deepcopy(record)
    ours, theirs = (mapper(is_train, **settings)(record) for mapper in (CheckedDatasetMapper, DatasetMapper))
    assert record == before and ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    if is_train:
        ours, theirs = ours["instances"].get_fields(), theirs["instances"].get_fields()
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["gt_boxes"].tensor, theirs["gt_boxes"].tensor)
        assert ("gt_masks" in ours) == ("use_instance_mask" in options)


def test_a_turned_tiff_file_is_mapped_as_the_image_that_it_shows(coco):
    record = get_coco_dicts(str(coco.annotations), str(coco.images))[0]
    mapper, path = CheckedDatasetMapper(True, augmentations=[], image_format="RGB"), coco.images / "001.png"
    with Image.open(path) as image:
        shown = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        exif = Image.Exif()
        exif[274] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, "TIFF", exif=exif)  # read by its content
    assert torch.equal(mapper(record)["image"], shown)


def test_a_huge_image_is_never_skipped(coco, monkeypatch):
    record = get_coco_dicts(str(coco.annotations), str(coco.images))[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    for mode in ("error", "skip"):
        with pytest.raises(ImageTooLargeError, match=r"001.png: .*19200 pixels.*limit of 18000 pixels"):
            _mapper(on_bad_image=mode)(record)


def test_order_is_that_of_detectron2s_sampler():
    (sampler := TrainBatchSampler(7, batch_size=2, seed=5)).start = 3
    found = [index for batch in itertools.islice(sampler, 8) for index, _ in batch]
    assert found == list(itertools.islice(TrainingSampler(7, seed=5), 6, 22))
