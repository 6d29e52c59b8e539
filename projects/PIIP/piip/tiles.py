"""Detection in tiles of a large image, which the library sahi cuts, and whose detections it puts together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from piip_core.errors import UserError

if TYPE_CHECKING:
    from piip.predict import Predictor


def detect_in_tiles(
    predictor: Predictor,
    image: np.ndarray,
    size: int,
    *,
    min_score: float = 0.0,
    overlap: float = 0.2,
    whole: bool = True,
) -> Instances:
    """Detects the objects of one image (H, W, 3), uint8 RGB, tile by tile.

    Of detections of a class of which one covers half of the other, the best one is kept.

    Args:
        predictor: A detector.
        image: The image.
        size: Side of the tiles in pixels of the image.
        min_score: Lowest score of a detection.
        overlap: Part of a tile that the next one sees, too.
        whole: Look at the whole image as well, for objects larger than the overlap.

    Returns:
        What `predictor(image)` returns, best first; boxes of a detector with masks are those of the masks.

    Raises:
        UserError: Without sahi.
    """
    try:
        from sahi.models.detectron2 import Detectron2DetectionModel
        from sahi.predict import get_sliced_prediction
    except ImportError as error:
        raise UserError(f'tiles need the package sahi ({error}): pip install "piip[tiles]"') from error

    class Model(Detectron2DetectionModel):
        """The predictor in place of Detectron2's own."""

        def load_model(self) -> None:
            self.model = predictor

        def perform_inference(self, image: np.ndarray) -> None:
            self._original_predictions = {"instances": predictor(image, min_score=min_score)}

    names = {str(index): category.name for index, category in enumerate(predictor.categories)}
    model = Model(confidence_threshold=min_score, category_mapping=names or None, device=str(predictor.device))
    # sahi's default, merging, joins neighbours: docs/small_objects.md has the scores
    options: dict[str, Any] = {"postprocess_type": "NMS", "perform_standard_pred": whole, "verbose": 0}
    options |= {"overlap_height_ratio": overlap, "overlap_width_ratio": overlap}
    sliced = get_sliced_prediction(image, model, slice_height=size, slice_width=size, **options)
    found = sorted(sliced.object_prediction_list, key=lambda prediction: prediction.score.value, reverse=True)
    instances = Instances(image.shape[:2])
    instances.scores = torch.tensor([prediction.score.value for prediction in found])
    instances.pred_classes = torch.tensor([prediction.category.id for prediction in found], dtype=torch.int64)
    if model.original_predictions["instances"].has("pred_masks"):
        masks = np.array([prediction.mask.bool_mask for prediction in found], dtype=bool)
        instances.pred_masks = torch.from_numpy(masks.reshape(-1, *image.shape[:2]))
        instances.pred_boxes = BitMasks(instances.pred_masks).get_bounding_boxes()  # sahi's are a pixel too small
    else:
        boxes = torch.tensor([prediction.bbox.to_xyxy() for prediction in found], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
    return instances
