"""Padding, positions, selection and decoder of DINO's transformer."""

import pytest

pytest.importorskip("detectron2")

import torch

from piip.modeling.dino import DINOTransformer
from piip.modeling.dino.geometry import padding_masks
from piip.modeling.dino.transformer import select_proposals

WIDTH = 16


def maps_of(padded_size, images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [tuple(side // stride for side in padded_size) for stride in (8, 16, 32, 64)]
    return [torch.randn(images, WIDTH, *size, generator=generator) for size in sizes]


def run(model, maps, image_sizes, padded_size):
    with torch.no_grad():
        out = model.transformer.eval()(maps, image_sizes, padded_size, model.class_embed, model.bbox_embed)
    return [out.hidden[-1], out.references[-1], out.selection.boxes, out.selection.class_logits]


def test_what_lies_in_the_padding_does_not_matter(make_dino):
    model, size, padded = make_dino(), (128, 64), (192, 192)
    maps = maps_of(padded)
    other = [x.clone() for x in maps]
    for x, mask in zip(other, padding_masks([size], padded, [x.shape[-2:] for x in maps]), strict=True):
        x.masked_fill_(mask[:, None], 5.0)
        assert mask.any()
    for ours, theirs in zip(run(model, maps, [size], padded), run(model, other, [size], padded), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_image_alone_and_in_a_batch_give_the_same(make_dino):
    model, size, padded = make_dino(), (128, 64), (256, 192)
    maps = maps_of(padded, images=2)
    alone = run(model, [x[:1] for x in maps], [size], padded)
    for ours, theirs in zip(alone, run(model, maps, [size, padded], padded), strict=True):
        torch.testing.assert_close(ours, theirs[:1], atol=1e-5, rtol=1e-5)


def test_selection_does_not_depend_on_the_padding(make_dino):
    """More padding moves the cells of all levels to other fractions of the maps; nothing else may follow."""
    model, size, padded = make_dino(), (128, 64), (256, 192)
    maps = maps_of(padded)
    cropped = [
        x[..., : size[0] // stride, : size[1] // stride] for x, stride in zip(maps, (8, 16, 32, 64), strict=True)
    ]
    boxes, logits = run(model, maps, [size], padded)[2:]
    cropped_boxes, cropped_logits = run(model, cropped, [size], size)[2:]
    torch.testing.assert_close(boxes, cropped_boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, cropped_logits, atol=1e-5, rtol=1e-5)


def test_the_best_class_selects():
    logits = torch.zeros(1, 5, 3)
    logits[0, 3, 2], logits[0, 1, 0], logits[0, 4, 1] = 3.0, 2.0, 1.0
    assert select_proposals(logits, 3).tolist() == [[3, 1, 4]]
    with pytest.raises(ValueError, match="num_queries=6 on maps of 5 cells"):
        select_proposals(logits, 6)


def test_as_many_queries_as_cells_work(make_dino):
    size = (64, 64)
    cells = 8 * 8 + 4 * 4 + 2 * 2 + 1
    model = make_dino(num_queries=cells)
    found = run(model, maps_of(size), [size], size)
    assert all(x.isfinite().all() for x in found)
    assert (found[2] == 1).all(dim=-1).sum() == 0  # on an image without padding every cell has a proposal


def test_a_width_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="embed_dim=20: expected a multiple of 4 and of num_heads=8"):
        DINOTransformer(embed_dim=20)
