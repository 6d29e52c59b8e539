"""Whole detectors as ONNX files, for batches of any size."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from piip.modeling.rcnn import PublishedCascadeROIHeads
from piip_core.export import DEFAULT_OPSET, INPUT, ExportCheck, ExportError, import_runtime, refusing, write_checked
from piip_core.ops.reference import gathering

_OUTPUTS = ["batch_index", "boxes", "scores", "classes", "masks"]
_PRECISE = (  # modules that need all their bits
    *("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas", "/predictor/"),
    *("sampling_offsets", "attention_weights"),
)


def export_detector(
    model: nn.Module,
    path: Path,
    image: Tensor,
    *,
    opset: int = DEFAULT_OPSET,
    gridsample: bool = True,
    half: bool = False,
    calibration: Sequence[Tensor] = (),
    names: Sequence[str] = (),
) -> ExportCheck:
    """Writes a Mask R-CNN or Cascade R-CNN as .onnx, after a comparison of onnxruntime with Detectron2.

    The input is named "image", (B, 3, H, W) float32. The outputs, of the N objects in all images together, are
    "batch_index" (N,), the image of each object, "boxes" (N, 4) in pixels of the input (x0, y0, x1, y1), "scores" (N,),
    best first in every image, "classes" (N,) and, of a model with masks, "masks" (N, side, side), probabilities in the
    boxes.

    The file says as metadata what a program has to know: "names" of the classes, "format" of the channels, and
    "pixel_mean", with which smaller images are to be filled up.

    Args:
        model: A `GeneralizedRCNN` of Detectron2 on the CPU in float32. It is set to evaluation mode.
        path: File to write; weights beyond 2 GB go to further ones beside it.
        image: An example with detections, (3, H, W) as the model takes it: resized, 0 to 255, not normalised.
            Its size becomes that of all images.
        opset: ONNX operator set, 16 (the first whose RoiAlign is aligned) to 20.
        gridsample: Whether deformable attention becomes GridSample, or Gather and arithmetic.
        half: Compute backbone and heads in float16 and store their weights so.
        calibration: Images like `image`: compute what multiplies with weights in int8, scaled to what occurs in these.
        names: Of the classes.

    Raises:
        ExportError: If the model is another, nothing is found in the image, a package is missing, or the file computes
            something else.
    """
    if not isinstance(model, GeneralizedRCNN) or not isinstance(model.roi_heads, StandardROIHeads):
        raise ExportError(
            f"{type(model).__name__}: expected a Mask or Cascade R-CNN; others export their backbone alone"
        )
    expected, height, width = _Listed(model).eval(), *image.shape[1:]
    # Two different images: the second tells whether they are kept apart
    images = torch.stack((image.float(), image.float().flip(-1)))
    with torch.no_grad():
        found = expected(images)
    if not (found[0] == 0).any():
        raise ExportError("nothing is found in the image: expected one with objects, to trace and to compare")
    names_of_outputs = _OUTPUTS[: len(found)]
    axes = {name: {0: "objects"} for name in names_of_outputs} | {INPUT: {0: "batch"}}

    def write(file: Path) -> Callable[[Tensor], list[Tensor]]:
        open_onnx = import_runtime(opset)
        options: dict[str, Any] = {"dynamo": False, "opset_version": opset, "dynamic_axes": axes}
        with warnings.catch_warnings(), refusing(f"{type(model).__name__} at {height} x {width}"), torch.no_grad():
            warnings.simplefilter("ignore")  # of each size that becomes a constant
            with gathering(not gridsample):
                batched = _Batched(model, (height, width)).eval()
                torch.onnx.export(
                    batched, (images,), file, input_names=[INPUT], output_names=names_of_outputs, **options
                )
        notes = {"names": list(names), "format": model.input_format, "pixel_mean": model.pixel_mean.flatten().tolist()}
        _note(file, {key: json.dumps(value) for key, value in notes.items()})
        return open_onnx(file)

    def finish(file: Path) -> None:
        if half and calibration:
            raise ExportError("float16 and int8: expected one of them")
        with refusing(f"{type(model).__name__} in fewer bits"):
            if half:
                _to_float16(file)
            if calibration:
                _to_int8(file, calibration)
            if calibration or half:
                import_runtime(opset)(file)(images)  # fails if onnxruntime does not take it

    return write_checked(expected, path, images, write, finish)


def _note(file: Path, notes: Mapping[str, str]) -> None:
    import onnx

    content = onnx.load(file, load_external_data=False)
    onnx.helper.set_model_props(content, dict(notes))
    onnx.save(content, file)


def _to_float16(file: Path) -> None:
    """What predicts boxes and scores, and the sampling of deformable attention, stay in float32."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    def stays(name: str, kind: str) -> bool:
        sampling = "/interactions." in name and "/attn/" in name and kind != "MatMul"
        inside = name.startswith("/backbone/") or kind in ("Conv", "Gemm", "ConvTranspose", "Relu")
        return sampling or not inside or any(word in name for word in _PRECISE)

    content = onnx.load(file)
    kept = [node.name for node in content.graph.node if stays(node.name, node.op_type)]
    options = {"keep_io_types": True, "op_block_list": DEFAULT_OP_BLOCK_LIST, "node_block_list": kept}
    onnx.save(convert_float_to_float16(content, **options), file)


def _to_int8(file: Path, images: Sequence[Tensor]) -> None:
    """Products with weights, but those that predict boxes, scores and where deformable attention reads."""
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{INPUT: image[None].float().numpy()} for image in images])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    nodes = onnx.load(file, load_external_data=False).graph.node
    quantization.quantize_static(
        file,
        file,
        Reader(),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_exclude=[node.name for node in nodes if any(word in node.name for word in _PRECISE)],
        per_channel=True,
        extra_options={"MatMulConstBOnly": True},
    )


class _Listed(nn.Module):
    """Detectron2's own inference, with the outputs of an exported file."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model.inference([{"image": image} for image in images], do_postprocess=False)
        rows = torch.cat([torch.full((len(x),), index) for index, x in enumerate(found)])
        columns = [torch.cat([getattr(x, name) for x in found]) for name in ("scores", "pred_classes")]
        if self.model.roi_heads.mask_on:
            columns.append(torch.cat([x.pred_masks[:, 0] for x in found]))
        return rows, torch.cat([x.pred_boxes.tensor for x in found]), *columns


class _NMS(torch.autograd.Function):
    """Non-maximum suppression of boxes (B, K, 4) by scores (B, 1, K), each row for itself: ONNX's operator.

    Gives the indices (rows, 0, k) of boxes with a higher score than `min_score` that no better one overlaps by more
    than `max_iou`.
    """

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, max_iou: float, min_score: float) -> Tensor:
        rows = []
        for row, (boxes_, (scores_,)) in enumerate(zip(boxes, scores, strict=True)):
            (above,) = (scores_ > min_score).nonzero(as_tuple=True)
            kept = above[nms(boxes_[above], scores_[above], max_iou)]
            rows.append(torch.stack((torch.full_like(kept, row), torch.zeros_like(kept), kept), dim=1))
        return torch.cat(rows)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, max_iou: float, min_score: float) -> Any:
        limits = torch.tensor([2**31 - 1]), torch.tensor([max_iou]), torch.tensor([min_score])
        return g.op("NonMaxSuppression", boxes, scores, *(g.op("Constant", value_t=limit) for limit in limits))


class _RoiAlign(torch.autograd.Function):
    """Pools boxes (N, 4) of the images with index (N,), as a layer of Detectron2 does: ONNX's operator.

    PyTorch's own translation has a condition on the shape of the boxes, which other programs stumble over.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, boxes: Tensor, image: Tensor, size: int, scale: float, ratio: int, aligned: bool
    ) -> Tensor:
        rois = torch.cat((image[:, None].to(boxes.dtype), boxes), dim=1)
        return roi_align(features, rois, size, scale, ratio, aligned)

    @staticmethod
    def symbolic(
        g: Any, features: Any, boxes: Any, image: Any, size: int, scale: float, ratio: int, aligned: bool
    ) -> Any:
        return g.op(
            "RoiAlign",
            features,
            boxes,
            image,
            output_height_i=size,
            output_width_i=size,
            sampling_ratio_i=max(ratio, 0),
            spatial_scale_f=scale,
            coordinate_transformation_mode_s="half_pixel" if aligned else "output_half_pixel",
        )


def _suppress(boxes: Tensor, scores: Tensor, max_iou: float, min_score: float, instead: float) -> Tensor:
    """The scores (B, K), with those of boxes (B, K, 4) that are suppressed or not higher than `min_score` replaced."""
    row, _, index = _NMS.apply(boxes, scores[:, None], max_iou, min_score).unbind(1)
    kept = torch.zeros_like(scores).index_put((row, index), torch.ones_like(row, dtype=scores.dtype))
    return torch.where(kept > 0, scores, instead)


class _Batched(nn.Module):
    """What Detectron2 computes image by image, for a batch at once whose size a trace leaves open.

    Boxes of all images are in one tensor of a fixed number per image up to the last step, after which those without a
    score are dropped.
    """

    def __init__(self, model: GeneralizedRCNN, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.heads, self.image_size = model, model.roi_heads, image_size
        several = isinstance(self.heads, CascadeROIHeads)
        self.box_heads = list(self.heads.box_head) if several else [self.heads.box_head]
        self.predictors = list(self.heads.box_predictor) if several else [self.heads.box_predictor]
        self.mean_logits = isinstance(self.heads, PublishedCascadeROIHeads)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.backbone(self._prepare(images))
        proposals, there = self._propose(maps)
        boxes, probabilities = self._classify(maps, proposals)
        # One row for each class of each image
        count, classes = map(int, probabilities.shape[1:])
        boxes = boxes.transpose(1, 2).flatten(0, 1)
        scores = torch.where(there[..., None], probabilities, 0.0).transpose(1, 2).flatten(0, 1)
        last = self.predictors[-1]
        scores = _suppress(boxes, scores, last.test_nms_thresh, last.test_score_thresh, 0.0)
        limit = classes * count
        scores, index = scores.view(-1, limit).topk(min(last.test_topk_per_image, limit))
        image, slot = (scores > 0).nonzero().unbind(1)
        index = index[image, slot]
        boxes, found = boxes.view(-1, limit, 4)[image, index], index // count
        masks = [self._masks(maps, image, boxes, found)] if self.heads.mask_on else []
        return image, boxes, scores[image, slot], found, *masks

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalised, and with zeros at the right and bottom up to the sides that the backbone divides."""
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        constraint = self.model.backbone.padding_constraints.get("square_size", 0)
        divisor = max(self.model.backbone.size_divisibility, 1)
        height, width = (-(-max(side, constraint) // divisor) * divisor for side in self.image_size)
        return nn.functional.pad(images, (0, width - self.image_size[1], 0, height - self.image_size[0]))

    def _clip(self, boxes: Tensor) -> Tensor:
        height, width = self.image_size
        return boxes.clamp(min=0).minimum(boxes.new_tensor((width, height, width, height)))

    def _propose(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (B, P, 4) from the region proposal network, and which (B, P) of them there are."""
        rpn = self.model.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        levels = []
        for anchors, logits, deltas in zip(rpn.anchor_generator(maps), *rpn.rpn_head(maps), strict=True):
            logits = logits.permute(0, 2, 3, 1).flatten(1)
            deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            scores, index = logits.topk(min(rpn.pre_nms_topk[False], len(anchors)))
            deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4))
            boxes = rpn.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.tensor[index].flatten(0, 1))
            boxes = self._clip(boxes.view(-1, index.shape[1], 4))
            large = ((boxes[..., 2:] - boxes[..., :2]) > rpn.min_box_size).all(-1)
            scores = torch.where(large, scores, -torch.inf)
            levels.append((boxes, _suppress(boxes, scores, rpn.nms_thresh, torch.finfo().min, -torch.inf)))
        boxes, scores = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        scores, index = scores.topk(min(rpn.post_nms_topk[False], int(scores.shape[1])))
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)), scores > -torch.inf

    def _classify(self, features: Mapping[str, Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, P, C, 4) of every class and probabilities (B, P, C), after all stages."""
        maps, count = [features[name] for name in self.heads.box_in_features], boxes.shape[1]
        image = torch.arange(boxes.shape[0])[:, None].expand(-1, count).flatten()
        boxes, votes = boxes.flatten(0, 1), []
        for head, predictor in zip(self.box_heads, self.predictors, strict=True):
            logits, deltas = predictor(head(_pool(self.heads.box_pooler, maps, image, boxes)))
            votes.append(logits if self.mean_logits else logits.softmax(-1))
            boxes = self._clip(predictor.box2box_transform.apply_deltas(deltas, boxes).unflatten(1, (-1, 4)))
            boxes = boxes[:, 0] if boxes.shape[1] == 1 else boxes
        mean = torch.stack(votes).mean(0)
        probabilities = (mean.softmax(-1) if self.mean_logits else mean)[:, :-1]
        boxes = boxes[:, None].expand(-1, probabilities.shape[1], -1) if boxes.dim() == 2 else boxes
        return boxes.unflatten(0, (-1, count)), probabilities.unflatten(0, (-1, count))

    def _masks(self, features: Mapping[str, Tensor], image: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """Probabilities (N, side, side) of the pixels in boxes."""
        crops = _pool(self.heads.mask_pooler, [features[x] for x in self.heads.mask_in_features], image, boxes)
        heads = self.heads.mask_head if isinstance(self.heads.mask_head, nn.ModuleList) else [self.heads.mask_head]
        logits = torch.stack([head.layers(crops) for head in heads])
        if logits.shape[2] == 1:
            return logits[:, :, 0].sigmoid().mean(0)
        return logits[:, torch.arange(classes.shape[0]), classes].sigmoid().mean(0)


def _pool(pooler: ROIPooler, maps: Sequence[Tensor], image: Tensor, boxes: Tensor) -> Tensor:
    """`ROIPooler.forward` for boxes (N, 4) of images given by index (N,)."""
    layers = [(x.output_size[0], x.spatial_scale, x.sampling_ratio, x.aligned) for x in pooler.level_poolers]
    if len(layers) == 1:
        return _RoiAlign.apply(maps[0], boxes, image, *layers[0])
    limits = pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    levels = assign_boxes_to_levels([Boxes(boxes)], *limits)
    pooled = boxes.new_zeros(boxes.shape[0], maps[0].shape[1], *pooler.output_size)
    for level, (features, layer) in enumerate(zip(maps, layers, strict=True)):
        (here,) = (levels == level).nonzero(as_tuple=True)
        pooled = pooled.index_put((here,), _RoiAlign.apply(features, boxes[here], image[here], *layer))
    return pooled
