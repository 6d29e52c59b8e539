"""Names of necks and heads: Detectron2's and ours against those of the published models.

Every published model is a backbone with one of `HEADS` around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_Pairs = Sequence[tuple[str, str]]
_LINEAR = ("weight", "bias")  # of a convolution or norm, too
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class HeadNames:
    """What surrounds a backbone.

    Attributes:
        published: Published name of every tensor outside the backbone, by ours.
        backbone: Where our model holds the backbone.
    """

    published: Mapping[str, str]
    backbone: str


def _with_parts(pairs: _Pairs, parts: Sequence[str] = _LINEAR) -> dict[str, str]:
    """Names of tensors from (ours, published) names of modules."""
    return {f"{ours}.{part}": f"{published}.{part}" for ours, published in pairs for part in parts}


# Detectron2's region-based detectors

_FPN_RPN = _with_parts(
    [
        *((f"backbone.fpn_lateral{i + 2}", f"neck.lateral_convs.{i}.conv") for i in range(4)),
        *((f"backbone.fpn_output{i + 2}", f"neck.fpn_convs.{i}.conv") for i in range(4)),
        ("proposal_generator.rpn_head.conv", "rpn_head.rpn_conv"),
        ("proposal_generator.rpn_head.objectness_logits", "rpn_head.rpn_cls"),
        ("proposal_generator.rpn_head.anchor_deltas", "rpn_head.rpn_reg"),
    ]
)


def _roi_heads(stage: str = "") -> dict[str, str]:
    """Box and mask head, of a stage of a cascade or alone."""
    box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{stage}"
    return _with_parts(
        [
            *((f"roi_heads.box_head{stage}.fc{i + 1}", f"{box}.shared_fcs.{i}") for i in range(2)),
            (f"roi_heads.box_predictor{stage}.cls_score", f"{box}.fc_cls"),
            (f"roi_heads.box_predictor{stage}.bbox_pred", f"{box}.fc_reg"),
            *((f"roi_heads.mask_head{stage}.mask_fcn{i + 1}", f"{mask}.convs.{i}.conv") for i in range(4)),
            (f"roi_heads.mask_head{stage}.deconv", f"{mask}.upsample"),
            (f"roi_heads.mask_head{stage}.predictor", f"{mask}.conv_logits"),
        ]
    )


# DINO: four levels, six encoder and six decoder layers


def _dino_layers() -> Iterator[tuple[str, str]]:
    """Names of the modules in layers: each samples, is feed-forward and normalises."""
    for kind, sampling, number, norms in (("encoder", "self_attn", 0, 2), ("decoder", "cross_attn", 1, 3)):
        modules = [("linear1", "ffns.0.layers.0.0"), ("linear2", "ffns.0.layers.1")]
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            modules.append((f"{sampling}.{name}", f"attentions.{number}.{name}"))
        modules += [(f"norm{i + 1}", f"norms.{i}") for i in range(norms)]
        for layer in (f"transformer.{kind}.layers.{i}" for i in range(6)):
            yield from ((f"{layer}.{ours}", f"bbox_head.{layer}.{published}") for ours, published in modules)


def _dino() -> dict[str, str]:
    necks = [*((f"neck.convs.{i}", f"neck.convs.{i}") for i in range(3)), ("neck.convs.3", "neck.extra_convs.0")]
    names = {f"{ours}.weight": f"{published}.conv.weight" for ours, published in necks}
    names |= _with_parts([(f"{ours}.norm", f"{published}.gn") for ours, published in necks])
    modules = list(_dino_layers())
    for name in ("enc_output", "enc_output_norm", "decoder.norm"):
        modules.append((f"transformer.{name}", f"bbox_head.transformer.{name}"))
    points = "transformer.decoder.ref_point_head"
    modules += [(f"{points}.layers.{i}", f"bbox_head.{points}.{2 * i}") for i in range(2)]
    for i in range(7):  # one pair of branches per decoder layer, and the last for the encoder's proposals
        modules.append((f"class_embed.{i}", f"bbox_head.cls_branches.{i}"))
        modules += [(f"bbox_embed.{i}.layers.{j}", f"bbox_head.reg_branches.{i}.{2 * j}") for j in range(3)]
    names |= _with_parts(modules)
    for layer in (f"transformer.decoder.layers.{i}" for i in range(6)):
        for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            names[f"{layer}.self_attn.{name}"] = f"bbox_head.{layer}.attentions.0.attn.{name}"
    for name in ("transformer.level_embeds", "transformer.query_embed.weight"):
        names[name] = f"bbox_head.{name}"
    return names | {"label_embed.weight": "bbox_head.label_embedding.weight"}


# UperNet with its auxiliary head


def _upernet() -> dict[str, str]:
    layers = ["bottleneck", "fpn_bottleneck", *(f"{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(3))]
    convolutions = [
        *((f"sem_seg_head.psp_modules.{i}", f"decode_head.psp_modules.{i}.1") for i in range(4)),
        *((f"sem_seg_head.{name}", f"decode_head.{name}") for name in layers),
        ("auxiliary_head.convs.0", "auxiliary_head.convs.0"),
    ]
    names = {f"{ours}.weight": f"{published}.conv.weight" for ours, published in convolutions}
    names |= _with_parts([(f"{ours}.norm", f"{published}.bn") for ours, published in convolutions], _BATCH_NORM)
    classifiers = [(f"{ours}.conv_seg", f"{name}.conv_seg") for ours, name in _SEGMENTATION_HEADS]
    return names | _with_parts(classifiers)


_SEGMENTATION_HEADS = (("sem_seg_head", "decode_head"), ("auxiliary_head", "auxiliary_head"))
_BELOW_FPN = "backbone.bottom_up.features."
_ALONE = "backbone.features."
_CASCADE = {ours: published for stage in range(3) for ours, published in _roi_heads(f".{stage}").items()}

HEADS: Mapping[str, HeadNames] = {
    "rpn": HeadNames(_FPN_RPN, _BELOW_FPN),
    "mask_rcnn": HeadNames(_FPN_RPN | _roi_heads(), _BELOW_FPN),
    "cascade_mask_rcnn": HeadNames(_FPN_RPN | _CASCADE, _BELOW_FPN),
    "dino": HeadNames(_dino(), _ALONE),
    "upernet": HeadNames(_upernet(), _ALONE),
}
"""By name, as in `ZooEntry.head`; "rpn" is a part of Mask R-CNN."""
