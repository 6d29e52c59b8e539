"""The eyes of the small chat model: two networks, each taught digits on its own before they are joined in a pyramid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
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

__all__ = [
    "CHAT_PYRAMID",
    "CLASSIFIER_TOKENS",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "BranchResult",
    "DigitTeacher",
    "chat_entry",
    "chat_pyramid",
    "classifier_pyramid",
    "train_branches",
]

PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)
"""Of the pictures that the branches learn from, so the image processor of the chat model needs them as well."""

CLASSIFIER_TOKENS = 8
"""Side of the grid of visual tokens of `classifier_pyramid`: that of its Branch 1, a quarter of all cells."""

_IMAGE_SIZE = CHAT_SCENES.image_size
_NO_DIGIT = NUM_CLASSES  # class of a cell without the centre of a digit
_NO_DIGIT_WEIGHT = 0.2  # most cells are empty
_ALONE_SIZE, _ALONE_DIGITS = 64, (30, 44)  # pixels of pictures of one digit, and heights of the digits
_ALONE = 0.6  # part of the training with these: among others, a network learns digits much later
_CONTRAST_RAMP = 0.35  # part of the training in which the photographs come up
_BATCH_ALONE, _BATCH = 64, 32  # pictures
_LEARNING_RATE = 5e-3
_STEPS = (1500, 1300)
_NUM_VAL = 1024
_SEED = 0


# There is one interaction before the last stage and one behind it: on the maps of the first stages it would take longer
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


@dataclass(frozen=True)
class BranchResult:
    """A trained branch.

    Attributes:
        accuracy: Part of the digits, never seen in training, on photographs never seen in training, that it tells where
            there is a digit.
        file: Its weights, for `BranchConfig.pretrained`.
    """

    accuracy: float
    file: Path


class DigitTeacher(nn.Module):
    """A branch with linear classifiers on its final map: every cell says which digit is there, if any, and its colour.

    An average over the map would teach the branch to forget where things are, which a chat model has to know.

    Args:
        config: The branch.
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
    """Of pictures with one digit: it does not matter which of the cells knows it, and its colour."""
    both = (digit[..., :NUM_CLASSES, None] + colour[..., None, :]).flatten(1, 2).logsumexp(dim=1)
    return F.cross_entropy(both.flatten(1), batch.labels[:, 0] * len(NAMED_COLOURS) + batch.colours[:, 0])


def _loss_of_cells(digit: Tensor, colour: Tensor, batch: ComposedDigits) -> Tensor:
    """Of pictures with several digits: the cell with the centre of a digit has to know it, and the others that they
    have none."""
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
    """Picture, row and column of the cell of every digit that is there."""
    present = batch.labels != ABSENT
    column, row = (batch.centres[present] * per_side / batch.images.shape[-1]).long().unbind(dim=1)
    return present.nonzero()[:, 0], row, column


def chat_pyramid(results: Mapping[int, BranchResult] | None = None) -> PIIPConfig:
    """`CHAT_PYRAMID` with branches that start from the weights of `train_branches`."""
    results = results or {}
    branches = tuple(
        replace(branch, pretrained=str(results[number].file)) if number in results else branch
        for number, branch in enumerate(CHAT_PYRAMID.branches, 1)
    )
    return replace(CHAT_PYRAMID, branches=branches)


def classifier_pyramid() -> PIIPConfig:
    """The pyramid of `projects/PIIP/configs/demo/piip_digits_classifier.py`, for the pictures of the chat."""
    return replace(demo_config(image_size=_IMAGE_SIZE), merging=None)


def chat_entry(vision: PIIPConfig = CHAT_PYRAMID, *, embed_dim: int = 96) -> MultimodalEntry:
    """The small chat model as a row of the zoo, for `llava_piip.assembly.assemble`.

    Args:
        vision: Its pyramid.
        embed_dim: Width of the language model.
    """
    return MultimodalEntry(
        name="digit_chat",
        title="PIIP-LLaVA that knows digits",
        vision=vision,
        language_model="none",
        embed_dim=embed_dim,
        scores=MultimodalScores(*[math.nan] * len(fields(MultimodalScores))),
        flops_g=math.nan,
    )


def train_branches(folder: Path, *, steps: Sequence[int] = _STEPS, num_val: int = _NUM_VAL) -> dict[int, BranchResult]:
    """Teaches digits to the branches of `CHAT_PYRAMID`, all at the same time: one process with one thread for each.

    The same steps give the same weights.

    Args:
        folder: Where to put the weights, `branch1.safetensors` and so on.
        steps: Updates of each branch.
        num_val: Digits that accuracy is measured on.

    Returns:
        What came out, by the number of the branch (from 1).
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")  # forking a process that has used PyTorch's threads can hang
    count = len(CHAT_PYRAMID.branches)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_process, initargs=(context.RLock(),))
    with pool:
        running = {
            number: pool.submit(_train, number, folder / f"branch{number}.safetensors", updates, num_val)
            for number, updates in enumerate(steps, 1)
        }
        return {number: future.result() for number, future in running.items()}


def _start_process(lock: object) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(lock)  # for bars of several processes on one terminal


def _train(number: int, file: Path, steps: int, num_val: int) -> BranchResult:
    torch.manual_seed(_SEED)
    model = DigitTeacher(CHAT_PYRAMID.branches[number - 1])
    alone, several, generator = _alone("train"), _several("train"), torch.Generator().manual_seed(_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.08)
    progress = tqdm(range(steps), desc=f"Branch {number}", unit="batch", position=number - 1, mininterval=0.5)
    shown = math.log(NUM_CLASSES * len(NAMED_COLOURS))
    for step in progress:
        contrast = min(0.1 + step / (steps * _CONTRAST_RAMP), 1.0)
        if step < steps * _ALONE:
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
    accuracy = _accuracy(model, num_val)
    write_checkpoint(file, model.branch.model.state_dict())
    return BranchResult(accuracy, file)


@torch.inference_mode()
def _accuracy(model: DigitTeacher, count: int) -> float:
    model.eval()
    composer, generator = _several("val"), torch.Generator().manual_seed(_SEED)
    right = total = 0
    while total < count:
        batch = composer.batch(_BATCH, generator)
        digit, _ = model(batch.images)
        guesses = digit[_cells_of(batch, digit.shape[1])][:, :NUM_CLASSES].argmax(dim=1)
        right += int((guesses == batch.labels[batch.labels != ABSENT]).sum())
        total += len(guesses)
    return right / total


def _alone(split: str) -> DigitComposer:
    """Small pictures of one digit."""
    smallest, largest = _ALONE_DIGITS
    return DigitComposer(
        split,
        image_size=_ALONE_SIZE,
        min_digit_size=smallest,
        max_digit_size=largest,
        palette=NAMED_COLOURS,
    )


def _several(split: str) -> DigitComposer:
    """Pictures like the scenes of the chat."""
    return DigitComposer(
        split,
        image_size=_IMAGE_SIZE,
        min_digit_size=CHAT_SCENES.min_digit_size,
        max_digit_size=CHAT_SCENES.max_digit_size,
        max_digits=CHAT_SCENES.max_digits,
        palette=NAMED_COLOURS,
    )
