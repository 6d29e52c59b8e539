"""Composed pictures: what their label says is what is painted on them, and the splits share nothing."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from piip_digits.composer import ABSENT, DigitComposer
from piip_digits.scenes import NAMED_COLOURS, split_samples


@pytest.fixture(scope="module")
def composers():
    return {split: DigitComposer(split, num_photos=40, palette=NAMED_COLOURS) for split in ("train", "val")}


def compose(composer, count=64, seed=0, **options):
    return composer.batch(count, torch.Generator().manual_seed(seed), **options)


def as_sample(picture: torch.Tensor) -> np.ndarray:
    """The bright digit of a picture on black, cut out and shrunk to the 8 x 8 points of scikit-learn's digits."""
    ink = picture.amax(dim=0).numpy()
    rows, columns = (np.flatnonzero(ink.max(axis=axis) > 0.3) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)
    square = np.zeros((side, side))
    left = (side - cut.shape[1]) // 2
    square[:, left : left + cut.shape[1]] = cut[:side]
    blocks = np.array_split(np.arange(side), 8)
    return np.array([[square[np.ix_(r, c)].mean() for c in blocks] for r in blocks]) * 16


def test_the_generator_decides_everything(composers):
    images, labels, centres, colours = compose(composers["train"])
    assert images.shape == (64, 3, 64, 64) and images.dtype == torch.float32 and colours.shape == (64, 1)
    assert labels.shape == (64, 1) and labels.dtype == torch.int64 and set(labels.flatten().tolist()) == set(range(10))
    assert 0 <= images.min() and images.max() <= 1
    again = DigitComposer("train", num_photos=40, palette=NAMED_COLOURS).batch(64, torch.Generator().manual_seed(0))
    assert torch.equal(images, again.images) and torch.equal(labels, again.labels)
    assert centres.shape == (64, 1, 2) and torch.equal(centres, again.centres)
    assert not torch.equal(compose(composers["train"], seed=1)[0], images)
    generator = torch.Generator().manual_seed(0)
    first, second = (composers["train"].batch(64, generator)[0] for _ in range(2))
    assert torch.equal(first, images) and not torch.equal(second, images)


def test_labels_name_the_digit_that_is_seen(composers):
    """A nearest-neighbour classifier that knows the 8 x 8 originals only, of the other split, reads the pictures."""
    known, digits = split_samples("val"), load_digits()
    reader = KNeighborsClassifier(3).fit(digits.data[known], digits.target[known])
    batch = compose(composers["train"], 200, contrast=0.0)
    read = reader.predict([as_sample(picture).ravel() for picture in batch.images])
    assert (
        read == batch.labels[:, 0].numpy()
    ).mean() > 0.6  # turned, sheared and coloured ones among them; chance is 0.1


def test_several_digits_lie_apart_where_they_are_said_to_be_in_their_colours():
    composer = DigitComposer(
        "train",
        image_size=96,
        min_digit_size=24,
        max_digit_size=32,
        max_digits=3,
        palette=NAMED_COLOURS,
        num_photos=2,
    )
    batch = compose(composer, 100, contrast=0.0)
    present = batch.labels != ABSENT
    assert torch.equal(present, batch.colours != ABSENT) and present.any(dim=1).all()
    numbers = present.sum(dim=1)
    assert set(numbers.tolist()) == {1, 2, 3}
    for image, labels, centres, colours in zip(batch.images, batch.labels, batch.centres, batch.colours, strict=True):
        around = []
        for label, (x, y), colour in zip(labels, centres, colours, strict=True):
            if label == ABSENT:
                continue
            x, y = round(x.item()), round(y.item())
            box = (slice(max(y - 13, 0), y + 13), slice(max(x - 13, 0), x + 13))
            patch = image[:, box[0], box[1]]
            bright = patch.amax(dim=0) > 0.75
            assert bright.any()
            paint = patch[:, bright].median(dim=1).values
            distances = [(paint - torch.tensor(rgb)).abs().max().item() for _, rgb in NAMED_COLOURS]
            assert min(range(len(distances)), key=distances.__getitem__) == colour
            around.append(box)
        rest = image.clone()
        for rows, columns in around:
            rest[:, max(rows.start - 12, 0) : rows.stop + 12, max(columns.start - 12, 0) : columns.stop + 12] = 0
        assert rest.max() < 0.05  # no digit that nobody speaks of


def test_photographs_come_up_with_the_contrast(composers):
    black, half, full = (compose(composers["val"], contrast=value).images for value in (0.0, 0.5, 1.0))
    # Where a picture is bright on black there is the digit, which no photograph changes
    digit = black.amax(dim=1, keepdim=True).expand_as(black) > 0.7
    assert (full - black)[digit].abs().mean() < 0.05
    outside = black.amax(dim=1, keepdim=True).expand_as(black) == 0
    assert torch.allclose(half[outside] * 2, full[outside], atol=1e-6)
    assert full[outside].mean() > 0.1


def test_splits_share_no_digit_and_no_photograph(composers):
    sprites = {split: composer.opacity.flatten(1).double() for split, composer in composers.items()}
    assert [len(sprites[split]) for split in ("train", "val")] == [len(split_samples(s)) for s in ("train", "val")]
    assert sum(map(len, sprites.values())) == len(load_digits().target)
    assert torch.cdist(sprites["train"], sprites["val"]).min() > 1
    # Colourless pieces at a coarse scale: no piece of one split looks like one of the other
    coarse = {split: torch.nn.functional.avg_pool2d(c.photos, 16).flatten(1) for split, c in composers.items()}
    assert torch.cdist(coarse["train"], coarse["val"]).min() > 0.1
