"""The eyes of the small chat model: two networks, each taught digits on its own before they are joined in a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from piip_core import BranchConfig, ConvNeXtConfig, InteractionConfig, PIIPConfig, TimmConfig
from piip_core.branches import build_branch
from piip_core.checkpoints import write_checkpoint
from piip_core.pyramid import resize_for_branch
from piip_core.zoo import MultimodalEntry, MultimodalScores
from piip_digits.composer import ABSENT, ComposedDigits, DigitComposer
from piip_digits.model import demo_config
from piip_digits.scenes import NAMED_COLOURS, NUM_CLASSES

from .questions import CHAT_SCENES

PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)
"""Of the images that the branches learn from, so the image processor of the chat model needs them as well."""

_IMAGE_SIZE = CHAT_SCENES.image_size
_NO_DIGIT = NUM_CLASSES  # class of a cell without the centre of a digit
_NO_DIGIT_WEIGHT = 0.2  # most cells are empty
# Settings of a `DigitComposer`: small images of one digit, and images like the scenes of the chat
_ALONE = dict(image_size=64, min_digit_size=30, max_digit_size=44, palette=NAMED_COLOURS)
_SEVERAL = dict(
    image_size=_IMAGE_SIZE,
    min_digit_size=CHAT_SCENES.min_digit_size,
    max_digit_size=CHAT_SCENES.max_digit_size,
    max_digits=CHAT_SCENES.max_digits,
    palette=NAMED_COLOURS,
)
_ALONE_PART = 0.6  # part of the training with one digit: among others, a network learns digits much later
_CONTRAST_RAMP = 0.35  # part of the training in which the photographs come up
_BATCH_ALONE, _BATCH = 64, 32  # images
_LEARNING_RATE = 5e-3
_SEED = 0
_WEIGHTS = "branch{}.safetensors"


# There is one interaction before the last stage and one after it: on the maps of the first stages it would take longer
# than all the rest
_LARGE = BranchConfig(
    # A plain ViT of this size learns nothing from scratch in as many updates
    network=TimmConfig(
        name="convnext_atto",
        options=dict(
            depths=(1, 1, 2, 1),
            dims=(24, 64, 128, 160),
            kernel_sizes=3,
            patch_size=2,
            output_stride=16,  # 4 x 4 cells at the end, as Branch 2 has
            ls_init_value=None,
        ),
    ),
    image_size=_IMAGE_SIZE // 2,
    segments=((0, 6), (7, 8)),
)
_SMALL = BranchConfig(
    network=ConvNeXtConfig(depths=(1, 1, 2, 1), stage_dims=(24, 48, 96, 128), kernel_size=3, layer_scale=None),
    image_size=_IMAGE_SIZE,
    segments=((0, 5), (6, 7)),
)

CHAT_PYRAMID = PIIPConfig(
    branches=(_LARGE, _SMALL),
    # The publication's drop path is meant for weeks of training, not for minutes
    interaction=InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.0),
    merging=None,
)
"""Branch 1 has 1.7 times the parameters of Branch 2 and sees a quarter of its pixels; both end with 4 x 4 cells."""


class DigitTeacher(nn.Module):
    """A branch with linear classifiers on its final map: every cell says which digit is there, if any, and its colour.

    An average over the map would teach the branch to forget where things are, which a chat model has to know.
    """

    def __init__(self, config: BranchConfig) -> None:
        super().__init__()
        self.branch = build_branch(config)
        self.factor = config.image_size / _IMAGE_SIZE
        dim = self.branch.dims[-1]
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, NUM_CLASSES + 1 + len(NAMED_COLOURS)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of cells for images (B, 3, H, W) from 0 to 1.

        Returns:
            Logits (B, h, w, 11) of digits, the last one for none, and (B, h, w, colours).
        """
        state = self.branch.embed(resize_for_branch((images - PIXEL_MEAN[0]) / PIXEL_STD[0], self.factor))
        state = self.branch.run(state, 0, self.branch.num_blocks)
        digit, colour = self.head(state.tokens).split((NUM_CLASSES + 1, len(NAMED_COLOURS)), dim=3)
        return digit, colour


def _loss_alone(digit: Tensor, colour: Tensor, batch: ComposedDigits) -> Tensor:
    """Of images with one digit: it does not matter which of the cells knows it, and its colour."""
    both = (digit[..., :NUM_CLASSES, None] + colour[..., None, :]).flatten(1, 2).logsumexp(dim=1)
    return F.cross_entropy(both.flatten(1), batch.labels[:, 0] * len(NAMED_COLOURS) + batch.colours[:, 0])


def _loss_of_cells(digit: Tensor, colour: Tensor, batch: ComposedDigits) -> Tensor:
    """Of images with several digits: each cell has to know the digit whose centre it holds, or that it holds none."""
    digits, colours = _cell_targets(batch, digit.shape[1])
    weights = digit.new_ones(NUM_CLASSES + 1)
    weights[_NO_DIGIT] = _NO_DIGIT_WEIGHT
    loss = F.cross_entropy(digit.flatten(0, 2), digits.flatten(), weight=weights)
    return loss + 0.5 * F.cross_entropy(colour.flatten(0, 2), colours.flatten(), ignore_index=ABSENT)


def _cell_targets(batch: ComposedDigits, per_side: int) -> tuple[Tensor, Tensor]:
    """Digits (B, h, w), `_NO_DIGIT` in most cells, and colours (B, h, w), `ABSENT` there."""
    digits = batch.labels.new_full((len(batch.labels), per_side, per_side), _NO_DIGIT)
    colours = torch.full_like(digits, ABSENT)
    where = _cells_of(batch, per_side)
    present = batch.labels != ABSENT
    digits[where] = batch.labels[present]
    colours[where] = batch.colours[present]
    return digits, colours


def _cells_of(batch: ComposedDigits, per_side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of the cell of every digit that is there."""
    present = batch.labels != ABSENT
    column, row = (batch.centres[present] * per_side / batch.images.shape[-1]).long().unbind(dim=1)
    return present.nonzero()[:, 0], row, column


def chat_pyramid(folder: Path) -> PIIPConfig:
    """`CHAT_PYRAMID` with branches that start from the weights of `train_branches`."""
    branches = tuple(
        replace(branch, pretrained=str(folder / _WEIGHTS.format(number)))
        for number, branch in enumerate(CHAT_PYRAMID.branches, 1)
    )
    return replace(CHAT_PYRAMID, branches=branches)


def classifier_pyramid() -> PIIPConfig:
    """The pyramid of `projects/PIIP/configs/demo/piip_digits_classifier.py`, for the images of the chat."""
    return replace(demo_config(image_size=_IMAGE_SIZE), merging=None)


def chat_entry(vision: PIIPConfig) -> MultimodalEntry:
    """The small chat model with a pyramid as an entry of the zoo, for `llava_piip.assembly.assemble`."""
    return MultimodalEntry(
        name="digit_chat",
        title="PIIP-LLaVA that knows digits",
        vision=vision,
        language_model="none",
        embed_dim=96,
        scores=MultimodalScores(*[math.nan] * len(fields(MultimodalScores))),
        flops_g=math.nan,
    )


def train_branches(folder: Path, *, steps: Sequence[int] = (1500, 1300), num_val: int = 1024) -> list[float]:
    """Teaches digits to the branches of `CHAT_PYRAMID`, all at the same time: one process with one thread for each.

    Writes `branch1.safetensors` and so on; the same steps give the same weights. Returns the part of `num_val` unseen
    digits that each branch tells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")  # forking a process that has used PyTorch's threads can hang
    workers = dict(mp_context=context, initializer=_start_process, initargs=(context.RLock(),))
    with ProcessPoolExecutor(len(steps), **workers) as pool:
        return list(pool.map(partial(_train_branch, folder, num_val=num_val), range(1, len(steps) + 1), steps))


def _start_process(lock: object) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(lock)  # for bars of several processes on one terminal


def _train_branch(folder: Path, number: int, steps: int, *, num_val: int) -> float:
    """Writes the weights of a branch, and returns its accuracy."""
    torch.manual_seed(_SEED)
    model = DigitTeacher(CHAT_PYRAMID.branches[number - 1])
    alone, several = (DigitComposer("train", **settings) for settings in (_ALONE, _SEVERAL))
    generator = torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.08)
    progress = tqdm(range(steps), desc=f"Branch {number}", unit="batch", position=number - 1, mininterval=0.5)
    shown = math.log(NUM_CLASSES * len(NAMED_COLOURS))
    for step in progress:
        contrast = min(0.1 + step / (steps * _CONTRAST_RAMP), 1.0)
        if step < steps * _ALONE_PART:
            batch = alone.batch(_BATCH_ALONE, generator, contrast=contrast)
            loss = _loss_alone(*model(batch.images), batch)
        else:
            batch = several.batch(_BATCH, generator, contrast=contrast)
            loss = _loss_of_cells(*model(batch.images), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        shown += 0.05 * (loss.item() - shown)
        progress.set_postfix(loss=f"{shown:.2f}", refresh=False)
    write_checkpoint(folder / _WEIGHTS.format(number), model.branch.model.state_dict())
    return _accuracy(model, num_val)


@torch.inference_mode()
def _accuracy(model: DigitTeacher, count: int) -> float:
    model.eval()
    composer, generator = DigitComposer("val", **_SEVERAL), torch.Generator().manual_seed(_SEED)
    right = total = 0
    while total < count:
        batch = composer.batch(_BATCH, generator)
        digit, _ = model(batch.images)
        guesses = digit[_cells_of(batch, digit.shape[1])][:, :NUM_CLASSES].argmax(dim=1)
        right += int((guesses == batch.labels[batch.labels != ABSENT]).sum())
        total += len(guesses)
    return right / total
