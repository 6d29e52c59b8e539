"""Top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

__all__ = ["TopKEvaluator"]


class TopKEvaluator(DatasetEvaluator):
    """Share of the images, in percent, whose class is among the k with the highest scores.

    Every image counts once, whatever the number of processes: Detectron2's test loader deals them out without filling
    up the last batches.

    Args:
        topk (Sequence[int]): the k; above the number of classes they give 100.
    """

    def __init__(self, topk: Sequence[int] = (1, 5)) -> None:
        self.topk = tuple(topk)
        self.reset()

    def reset(self) -> None:
        """Sets all counts to zero."""
        self._images, self._hits = 0, dict.fromkeys(self.topk, 0)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Counts a batch: "label" of its inputs, the index of the class, and "scores" (num_classes,) of its outputs.

        Raises:
            ValueError: If a score is not a number.
        """
        scores = torch.stack([output["scores"] for output in outputs])
        if scores.isnan().any():
            raise ValueError(f"scores of {inputs[0].get('file_name', 'an image')} or after it are not numbers (NaN)")
        labels = torch.tensor([entry["label"] for entry in inputs], device=scores.device)
        best = scores.topk(min(max(self.topk), scores.shape[1])).indices == labels[:, None]
        self._images += len(labels)
        for k in self.topk:
            self._hits[k] += int(best[:, :k].sum())

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"classification": {"top1": ..., "top5": ...}} on the first process, None on others; all call it."""
        parts = comm.gather((self._images, self._hits))
        if not comm.is_main_process():
            return None
        images = sum(count for count, _ in parts)
        return {
            "classification": {f"top{k}": 100.0 * sum(hits[k] for _, hits in parts) / max(images, 1) for k in self.topk}
        }
