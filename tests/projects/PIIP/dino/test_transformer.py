"""Padding, positions, selection and decoder of DINO's transformer."""

import pytest

pytest.importorskip("detectron2")

import torch
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSinePositionEmbedding

from piip.modeling.dino import DINOTransformer, positions
from piip.modeling.dino.positions import Levels, map_encoding, padding_masks
from piip.modeling.dino.transformer import grid_proposals, select_proposals

WIDTH = 16


def maps_of(padded_size, images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [tuple(side // stride for side in padded_size) for stride in (8, 16, 32, 64)]
    return [torch.randn(images, WIDTH, *size, generator=generator) for size in sizes]


def run(model, maps, image_sizes, padded_size):
    with torch.no_grad():
        out = model.transformer.eval()(maps, image_sizes, padded_size, model.class_embed, model.bbox_embed)
    return [out.hidden[-1], out.references[-1], out.selection.boxes, out.selection.class_logits]


def test_masks_look_at_the_nearest_pixel():
    coarse, odd = padding_masks([(64, 40), (96, 96)], (96, 96), [(3, 3), (2, 5)])
    assert torch.equal(coarse[0], torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 1]]).bool()) and not coarse[1].any()
    assert torch.equal(odd[0], torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]).bool())  # pixels 0, 19, 38, 57, 76


def test_sine_encoding_is_transformers_but_for_offset_and_temperature(monkeypatch):
    monkeypatch.setattr(positions, "_MAP_TEMPERATURE", 10_000)
    mask = padding_masks([(60, 40), (96, 80)], (96, 96), [(12, 12)])[0]
    theirs = DeformableDetrSinePositionEmbedding(WIDTH // 2, normalize=True)
    expected = theirs(shape=(2, 1, 12, 12), device=mask.device, dtype=torch.float32, mask=~mask)
    # theirs lies half a cell before ours: shift the angles, which the first pair of features shows
    ours = map_encoding(mask, WIDTH)
    valid = (~mask).float()
    half = torch.pi / valid.cumsum(1)[:, -1:]
    sine, cosine = ours[..., 0], ours[..., 1]
    shifted = sine * half.cos() - cosine * half.sin()
    torch.testing.assert_close(shifted[~mask], expected[:, 0][~mask], atol=1e-4, rtol=1e-4)


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


def test_proposals_keep_off_the_border_and_the_padding():
    levels = Levels.of(padding_masks([(512, 480)], (512, 512), [(64, 64), (32, 32)]))
    logits, valid = grid_proposals(levels)
    assert torch.equal(valid, logits.isfinite().all(dim=-1))
    fine, coarse = valid[0].split([64 * 64, 32 * 32])
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[1:63, 1:59] = True  # 0.5 / 64 and 0.5 / 60 are less than 0.01
    assert torch.equal(fine.view(64, 64), expected)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[:, :30] = True
    assert torch.equal(coarse.view(32, 32), expected)
    boxes = logits[0, 64 * 64 + 33].sigmoid()  # second row, second column of the second level
    torch.testing.assert_close(boxes, torch.tensor([1.5 / 30, 1.5 / 32, 0.1, 0.1]))


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
