"""Detectors of golden cases: the project's own model, with the sizes and settings of a public configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from omegaconf import DictConfig
from torch import Tensor, nn

from checkers import GoldenCase
from piip.modeling import PIIPFPN, published_cascade_mask_rcnn
from piip.modeling.rcnn import published_mask_rcnn, weights_from_stds
from piip_core.checkpoints.head_names import HEADS
from piip_core.errors import NotSupportedYet

_STRIDES = (4, 8, 16, 32)
_NAMES = ("res2", "res3", "res4", "res5")


class MapsBackbone(Backbone):
    """Stands for a backbone whose output is already known.

    Args:
        channels (Sequence[int]): of the maps, largest first; the last map has stride 32.
    """

    size_divisibility = 32
    padding_constraints = {"size_divisibility": 32}  # noqa: RUF012 (Detectron2's contract has a plain attribute)

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.output_shape(), self.maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        count = len(self.channels)
        return {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, channels, stride in zip(_NAMES[-count:], self.channels, _STRIDES[-count:], strict=True)
        }


def require(what: str, value: Any, supported: Any) -> None:
    """Raises NotSupportedYet unless a setting has the only value that the project's model has."""
    if value != supported:
        raise NotSupportedYet(f"{what}={value!r}")


def build_detector(case: GoldenCase, detector: str) -> nn.Module:
    """The project's detector behind the maps of the case, with the weights of the case, in evaluation mode.

    Args:
        case: A case with a public detector configuration.
        detector: Which head names the weights have: "rpn", "mask_rcnn" or "cascade_mask_rcnn".
    """
    config = case.config
    model = published_cascade_mask_rcnn() if detector == "cascade_mask_rcnn" else published_mask_rcnn()
    _set_neck(model, config["neck"])
    _set_rpn(model.proposal_generator, config)
    if detector == "mask_rcnn":
        _set_mask_rcnn(model.roi_heads, config)
    elif detector == "cascade_mask_rcnn":
        _set_cascade(model.roi_heads, config)
    model.pixel_mean, model.pixel_std = [0.0] * 3, [1.0] * 3
    network = instantiate(model).eval()
    network.backbone.bottom_up.maps = recorded_maps(case)
    # a case that records the RPN alone has no weights for the heads after it
    result = network.load_state_dict(rename_heads(case.below("state."), detector), strict=False)
    wrong = [name for name in result.missing_keys if detector != "rpn" or not name.startswith("roi_heads.")]
    if wrong or result.unexpected_keys:
        raise ValueError(f"{case.name}: missing {wrong}, unexpected {result.unexpected_keys}")
    return network


def rename_heads(state: Mapping[str, Tensor], detector: str) -> dict[str, Tensor]:
    """Weights of a published neck and heads under our names; raises KeyError for one that has none."""
    ours = {published: name for name, published in HEADS[detector].published.items()}
    return {ours[name]: tensor for name, tensor in state.items()}


def recorded_maps(case: GoldenCase) -> list[Tensor]:
    """The backbone maps of the case, largest first."""
    maps = case.below("input.maps.")
    return [maps[str(index)] for index in range(len(maps))]


def image_list(case: GoldenCase) -> ImageList:
    """The images of the case, as far as heads look at them: their sizes."""
    sizes = [tuple(meta["img_shape"][:2]) for meta in case.info["img_metas"]]
    height, width = (max(meta["pad_shape"][axis] for meta in case.info["img_metas"]) for axis in (0, 1))
    return ImageList(torch.zeros(len(sizes), 3, height, width), sizes)


def _set_neck(model: DictConfig, neck: Mapping[str, Any]) -> None:
    require("neck.type", neck["type"], "FPN")
    require("neck.num_outs", neck["num_outs"], len(neck["in_channels"]) + 1)
    model.backbone = LazyCall(PIIPFPN)(
        bottom_up=LazyCall(MapsBackbone)(channels=neck["in_channels"]),
        in_features=list(_NAMES[-len(neck["in_channels"]) :]),
        out_channels=neck["out_channels"],
        top_block=model.backbone.top_block,
    )


def _set_rpn(rpn: DictConfig, config: Mapping[str, Any]) -> None:
    head, train, test = config["rpn_head"], config["train_cfg"], config["test_cfg"]["rpn"]
    assigner, sampler, proposal = train["rpn"]["assigner"], train["rpn"]["sampler"], train["rpn_proposal"]
    anchors = head["anchor_generator"]
    require("rpn_head.feat_channels", head["feat_channels"], head["in_channels"])
    require("anchor_generator.scales", len(anchors["scales"]), 1)
    require("sampler.neg_pos_ub", sampler["neg_pos_ub"], -1)
    require("rpn_proposal.nms", proposal["nms"], test["nms"])
    require("rpn_proposal.min_bbox_size", proposal["min_bbox_size"], test["min_bbox_size"])
    rpn.head.in_channels = head["in_channels"]
    rpn.head.num_anchors = len(anchors["ratios"]) * len(anchors["scales"])
    rpn.anchor_generator.strides = anchors["strides"]
    rpn.anchor_generator.sizes = [[stride * scale for scale in anchors["scales"]] for stride in anchors["strides"]]
    rpn.anchor_generator.aspect_ratios = anchors["ratios"]
    _set_matcher(rpn.anchor_matcher, assigner)
    _set_coder(rpn.box2box_transform, head["bbox_coder"])
    rpn.batch_size_per_image = sampler["num"]
    rpn.positive_fraction = sampler["pos_fraction"]
    rpn.pre_nms_topk = (proposal["nms_pre"], test["nms_pre"])
    rpn.post_nms_topk = (proposal["max_per_img"], test["max_per_img"])
    rpn.nms_thresh = test["nms"]["iou_threshold"]
    rpn.min_box_size = test["min_bbox_size"]
    rpn.anchor_boundary_thresh = train["rpn"]["allowed_border"]
    rpn.smooth_l1_beta = _beta(head["loss_bbox"])
    rpn.loss_weight = {
        "loss_rpn_cls": head["loss_cls"]["loss_weight"],
        "loss_rpn_loc": head["loss_bbox"]["loss_weight"],
    }


def _set_mask_rcnn(roi_heads: DictConfig, config: Mapping[str, Any]) -> None:
    public, train, test = config["roi_head"], config["train_cfg"]["rcnn"], config["test_cfg"]["rcnn"]
    _set_roi_heads(roi_heads, public, public["bbox_head"], train, test)
    _set_matcher(roi_heads.proposal_matcher, train["assigner"])
    _set_box_head(roi_heads.box_head, roi_heads.box_predictor, public["bbox_head"], test)
    _set_mask_head(roi_heads.mask_head, public)


def _set_cascade(roi_heads: DictConfig, config: Mapping[str, Any]) -> None:
    public, train, test = config["roi_head"], config["train_cfg"]["rcnn"], config["test_cfg"]["rcnn"]
    for name in ("proposal_matchers", "box_heads", "box_predictors", "mask_heads"):
        roi_heads[name] = [roi_heads[name][0] for _ in range(public["num_stages"])]
    roi_heads.stage_loss_weights = list(public["stage_loss_weights"])
    for stage, (box, settings) in enumerate(zip(public["bbox_head"], train, strict=True)):
        require("sampler of every stage", settings["sampler"], train[0]["sampler"])
        _set_roi_heads(roi_heads, public, box, settings, test)
        _set_cascade_matcher(roi_heads.proposal_matchers[stage], settings["assigner"])
        _set_box_head(roi_heads.box_heads[stage], roi_heads.box_predictors[stage], box, test)
        _set_mask_head(roi_heads.mask_heads[stage], public)


def _set_roi_heads(
    roi_heads: DictConfig,
    public: Mapping[str, Any],
    box: Mapping[str, Any],
    train: Mapping[str, Any],
    test: Mapping[str, Any],
) -> None:
    """What Mask R-CNN and the stages of a cascade have in common."""
    mask = public["mask_head"]
    require("mask_head.type", mask["type"], "FCNMaskHead")
    require("mask_thr_binary", test["mask_thr_binary"], 0.5)
    require("sampler.neg_pos_ub", train["sampler"]["neg_pos_ub"], -1)
    for name, weight in (("cls", box["loss_cls"]), ("bbox", box["loss_bbox"]), ("mask", mask["loss_mask"])):
        require(f"weight of loss_{name}", weight["loss_weight"], 1.0)
    crop = public["mask_roi_extractor"]["roi_layer"]["output_size"]
    require("train_cfg.rcnn.mask_size", train["mask_size"], 2 * crop)
    roi_heads.num_classes = box["num_classes"]
    roi_heads.batch_size_per_image = train["sampler"]["num"]
    roi_heads.positive_fraction = train["sampler"]["pos_fraction"]
    roi_heads.proposal_append_gt = train["sampler"]["add_gt_as_proposals"]
    _set_pooler(roi_heads.box_pooler, public["bbox_roi_extractor"])
    _set_pooler(roi_heads.mask_pooler, public["mask_roi_extractor"])


def _set_box_head(head: DictConfig, predictor: DictConfig, box: Mapping[str, Any], test: Mapping[str, Any]) -> None:
    require("bbox_head.type", box["type"], "Shared2FCBBoxHead")
    size, width = box["roi_feat_size"], box["fc_out_channels"]
    head.input_shape = ShapeSpec(channels=box["in_channels"], height=size, width=size)
    head.fc_dims = [width, width]
    predictor.input_shape = ShapeSpec(channels=width)
    _set_coder(predictor.box2box_transform, box["bbox_coder"])
    predictor.cls_agnostic_bbox_reg = box["reg_class_agnostic"]
    predictor.smooth_l1_beta = _beta(box["loss_bbox"])
    predictor.test_score_thresh = test["score_thr"]
    predictor.test_nms_thresh = test["nms"]["iou_threshold"]
    predictor.test_topk_per_image = test["max_per_img"]


def _set_mask_head(head: DictConfig, public: Mapping[str, Any]) -> None:
    mask, crop = public["mask_head"], public["mask_roi_extractor"]["roi_layer"]["output_size"]
    head.input_shape = ShapeSpec(channels=mask["in_channels"], height=crop, width=crop)
    head.conv_dims = [mask["conv_out_channels"]] * (mask["num_convs"] + 1)


def _set_cascade_matcher(matcher: DictConfig, assigner: Mapping[str, Any]) -> None:
    require("assigner.type", assigner["type"], "MaxIoUAssigner")
    require("assigner.match_low_quality", assigner["match_low_quality"], False)
    require("assigner.neg_iou_thr", assigner["neg_iou_thr"], assigner["pos_iou_thr"])
    matcher.thresholds = [assigner["pos_iou_thr"]]


def _set_matcher(matcher: DictConfig, assigner: Mapping[str, Any]) -> None:
    require("assigner.type", assigner["type"], "MaxIoUAssigner")
    positive, negative = assigner["pos_iou_thr"], assigner["neg_iou_thr"]
    ignored = positive > negative
    matcher.thresholds = [negative, positive] if ignored else [positive]
    matcher.labels = [0, -1, 1] if ignored else [0, 1]
    matcher.min_quality = assigner["min_pos_iou"] if assigner["match_low_quality"] else None


def _set_coder(transform: DictConfig, coder: Mapping[str, Any]) -> None:
    require("bbox_coder.target_means", [float(mean) for mean in coder["target_means"]], [0.0] * 4)
    transform.weights = weights_from_stds(coder["target_stds"])


def _set_pooler(pooler: DictConfig, extractor: Mapping[str, Any]) -> None:
    require("roi_layer.type", extractor["roi_layer"]["type"], "RoIAlign")
    pooler.output_size = extractor["roi_layer"]["output_size"]
    pooler.sampling_ratio = extractor["roi_layer"]["sampling_ratio"]
    pooler.scales = [1.0 / stride for stride in extractor["featmap_strides"]]


def _beta(loss: Mapping[str, Any]) -> float:
    """Transition point of a box loss; L1 is smooth L1 with 0."""
    if loss["type"] not in ("L1Loss", "SmoothL1Loss"):
        raise NotSupportedYet(f"box loss {loss['type']}")
    return 0.0 if loss["type"] == "L1Loss" else loss.get("beta", 1.0)
