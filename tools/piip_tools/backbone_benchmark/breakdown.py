"""Where the time of a forward pass goes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import nn
from tqdm import tqdm

from piip_core.branches.beit import RelativeBiasAttention
from piip_core.interaction import DeformableCrossAttention, Injection
from piip_core.merging import BranchMerging, FeaturePyramid

from ..timing import limited_threads, now_for
from .measuring import autocast_for, load
from .sides import Side

__all__ = ["PARTS", "REST", "Breakdown", "measure_parts"]

PARTS: Mapping[type[nn.Module], str] = {
    Attention: "self-attention",
    RelativeBiasAttention: "self-attention",
    Mlp: "MLPs",
    DeformableCrossAttention: "deformable attention",
    Injection: "interactions: norms, projections, FFNs",
    BranchMerging: "merging",
    FeaturePyramid: "feature pyramid",
}
REST = "embeddings, norms, residuals of branches"


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """One side in one precision.

    Attributes:
        side: Title of the side.
        precision: As in `Measurement`.
        seconds: By part; a part does not contain another.
    """

    side: str
    precision: str
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def measure_parts(
    sides: Sequence[Side],
    precisions: Sequence[str],
    *,
    device: str = "cpu",
    batch: int = 1,
    repeats: int = 3,
    threads: int = 1,
    parts: Mapping[type[nn.Module], str] = PARTS,
) -> list[Breakdown]:
    """Medians of the time spent in each kind of module, in forward passes without gradients.

    A GPU is waited for at every border of a part, which costs time that it would not take otherwise.

    Args:
        parts: What the time in modules of a type is called, without that in modules inside that have a part of their
            own. Other time is `REST`.
    """
    found = []
    with limited_threads(threads):
        for precision in precisions:
            for side in tqdm(sides, desc=f"parts in {precision}", leave=False):
                model, image = load(side, precision, device, batch)
                with side.context(model), autocast_for(precision, device), torch.no_grad():
                    model(image)
                    runs = [_run(model, image, parts, threads) for _ in range(repeats)]
                names = dict.fromkeys(name for run in runs for name in run)
                seconds = {name: statistics.median(run[name] for run in runs) for name in names}
                found.append(Breakdown(side=side.title, precision=precision, seconds=seconds))
    return found


def _run(model: nn.Module, image: torch.Tensor, parts: Mapping[type[nn.Module], str], threads: int) -> Counter[str]:
    clock = now_for(image.device, threads)
    spent: Counter[str] = Counter()
    running, since = [REST], clock()

    def switch(change: Any) -> None:
        nonlocal since
        now = clock()
        spent[running[-1]] += now - since
        since = now
        change()

    with ExitStack() as stack:
        for module in model.modules():
            name = next((name for kind, name in parts.items() if isinstance(module, kind)), None)
            if name is not None:
                enter = module.register_forward_pre_hook(lambda *_, name=name: switch(lambda: running.append(name)))
                leave = module.register_forward_hook(lambda *_: switch(running.pop))
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        model(image)
        switch(running.pop)
    return spent
