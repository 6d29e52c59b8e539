"""Names of necks and heads: Detectron2's and ours against those of the published models.

Every published model is a backbone with one of `HEADS` around it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .rules import Rule, rename_parts

__all__ = ["HEADS", "HeadNames"]

_LINEAR = ("weight", "bias")  # of a convolution or norm, too
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SAMPLING = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


@dataclass(frozen=True)
class _Names:
    """A rule, and what its stars stand for in published models."""

    rule: Rule
    values: tuple[Sequence[object], ...]

    def tensors(self) -> Iterator[str]:
        for values in itertools.product(*self.values):
            name = self.rule.ours
            for value in values:
                name = name.replace("*", str(value), 1)
            yield name


@dataclass(frozen=True)
class HeadNames:
    """What surrounds a backbone.

    Args:
        names: Its rules.
        backbone: Where our model holds the backbone.
    """

    names: tuple[_Names, ...]
    backbone: str

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rename rules between our names and the published ones."""
        return tuple(names.rule for names in self.names)

    def tensors(self) -> tuple[str, ...]:
        """Our name of every tensor of the published models outside the backbone."""
        return tuple(name for names in self.names for name in names.tensors())


def _pairs(*pairs: tuple[str, str], values: tuple[Sequence[object], ...] = (_LINEAR,)) -> tuple[_Names, ...]:
    return tuple(_Names(rule, values) for rule in rename_parts(*pairs))


def _convolution(ours: str, published: str) -> tuple[_Names, ...]:
    """A convolution without bias, with batch norm."""
    return (
        *_pairs((f"{ours}.weight", f"{published}.conv.weight"), values=()),
        *_pairs((f"{ours}.norm.*", f"{published}.bn.*"), values=(_BATCH_NORM,)),
    )


def _join(parts: Iterator[tuple[_Names, ...]]) -> tuple[_Names, ...]:
    return tuple(itertools.chain.from_iterable(parts))


# Detectron2's region-based detectors

_FPN_RPN = _pairs(
    *((f"backbone.fpn_lateral{i + 2}.*", f"neck.lateral_convs.{i}.conv.*") for i in range(4)),
    *((f"backbone.fpn_output{i + 2}.*", f"neck.fpn_convs.{i}.conv.*") for i in range(4)),
    ("proposal_generator.rpn_head.conv.*", "rpn_head.rpn_conv.*"),
    ("proposal_generator.rpn_head.objectness_logits.*", "rpn_head.rpn_cls.*"),
    ("proposal_generator.rpn_head.anchor_deltas.*", "rpn_head.rpn_reg.*"),
)


def _roi_heads(stage: str) -> tuple[_Names, ...]:
    """Box and mask head, of a stage of a cascade or alone."""
    return _pairs(
        *((f"roi_heads.box_head{stage}.fc{i + 1}.*", f"roi_head.bbox_head{stage}.shared_fcs.{i}.*") for i in range(2)),
        (f"roi_heads.box_predictor{stage}.cls_score.*", f"roi_head.bbox_head{stage}.fc_cls.*"),
        (f"roi_heads.box_predictor{stage}.bbox_pred.*", f"roi_head.bbox_head{stage}.fc_reg.*"),
        *(
            (f"roi_heads.mask_head{stage}.mask_fcn{i + 1}.*", f"roi_head.mask_head{stage}.convs.{i}.conv.*")
            for i in range(4)
        ),
        (f"roi_heads.mask_head{stage}.deconv.*", f"roi_head.mask_head{stage}.upsample.*"),
        (f"roi_heads.mask_head{stage}.predictor.*", f"roi_head.mask_head{stage}.conv_logits.*"),
    )


# DINO: four levels, six encoder and six decoder layers

_LAYERS = range(6)
_ENCODER = ("transformer.encoder.layers.*", "bbox_head.transformer.encoder.layers.*")
_DECODER = ("transformer.decoder.layers.*", "bbox_head.transformer.decoder.layers.*")

_QUERY_POSITION = "transformer.decoder.ref_point_head"


def _below(prefixes: tuple[str, str], *pairs: tuple[str, str], parts: Sequence[str] = _LINEAR) -> tuple[_Names, ...]:
    """Names inside each layer of the encoder or decoder."""
    ours, published = prefixes
    named = ((f"{ours}.{a}", f"{published}.{b}") for a, b in pairs)
    return _pairs(*named, values=(_LAYERS, parts))


def _dino_neck(ours: int, published: str) -> tuple[_Names, ...]:
    return (
        *_pairs((f"neck.convs.{ours}.weight", f"neck.{published}.conv.weight"), values=()),
        *_pairs((f"neck.convs.{ours}.norm.*", f"neck.{published}.gn.*")),
    )


_FFN = (("linear1.*", "ffns.0.layers.0.0.*"), ("linear2.*", "ffns.0.layers.1.*"))
_DINO = (
    *_join(_dino_neck(level, f"convs.{level}") for level in range(3)),
    *_dino_neck(3, "extra_convs.0"),
    *_pairs(("transformer.level_embeds", "bbox_head.transformer.level_embeds"), values=()),
    *_pairs(("transformer.query_embed.weight", "bbox_head.transformer.query_embed.weight"), values=()),
    *_pairs(("transformer.enc_output.*", "bbox_head.transformer.enc_output.*")),
    *_pairs(("transformer.enc_output_norm.*", "bbox_head.transformer.enc_output_norm.*")),
    *_below(_ENCODER, *((f"self_attn.{name}.*", f"attentions.0.{name}.*") for name in _SAMPLING)),
    *_below(_ENCODER, *_FFN, *((f"norm{i + 1}.*", f"norms.{i}.*") for i in range(2))),
    *_below(_DECODER, ("self_attn.out_proj.*", "attentions.0.attn.out_proj.*")),
    *_below(_DECODER, ("self_attn.*", "attentions.0.attn.*"), parts=("in_proj_weight", "in_proj_bias")),
    *_below(_DECODER, *((f"cross_attn.{name}.*", f"attentions.1.{name}.*") for name in _SAMPLING)),
    *_below(_DECODER, *_FFN, *((f"norm{i + 1}.*", f"norms.{i}.*") for i in range(3))),
    *_pairs(
        *(
            (
                f"transformer.decoder.ref_point_head.layers.{i}.*",
                f"bbox_head.transformer.decoder.ref_point_head.{2 * i}.*",
            )
            for i in range(2)
        ),
        ("transformer.decoder.norm.*", "bbox_head.transformer.decoder.norm.*"),
    ),
    # One pair of branches per decoder layer, and the last for the encoder's proposals
    *_pairs(("class_embed.*.*", "bbox_head.cls_branches.*.*"), values=(range(7), _LINEAR)),
    *_pairs(
        *((f"bbox_embed.*.layers.{i}.*", f"bbox_head.reg_branches.*.{2 * i}.*") for i in range(3)),
        values=(range(7), _LINEAR),
    ),
    *_pairs(("label_embed.weight", "bbox_head.label_embedding.weight"), values=()),
)

# UperNet with its auxiliary head

_UPERNET = (
    *_join(_convolution(f"sem_seg_head.psp_modules.{i}", f"decode_head.psp_modules.{i}.1") for i in range(4)),
    *_join(
        _convolution(f"sem_seg_head.{name}", f"decode_head.{name}")
        for name in (
            "bottleneck",
            *(f"lateral_convs.{i}" for i in range(3)),
            *(f"fpn_convs.{i}" for i in range(3)),
            "fpn_bottleneck",
        )
    ),
    *_pairs(("sem_seg_head.conv_seg.*", "decode_head.conv_seg.*")),
    *_convolution("auxiliary_head.convs.0", "auxiliary_head.convs.0"),
    *_pairs(("auxiliary_head.conv_seg.*", "auxiliary_head.conv_seg.*")),
)

_BELOW_FPN = "backbone.bottom_up.features."
_ALONE = "backbone.features."

HEADS: Mapping[str, HeadNames] = {
    "rpn": HeadNames(_FPN_RPN, _BELOW_FPN),
    "mask_rcnn": HeadNames((*_FPN_RPN, *_roi_heads("")), _BELOW_FPN),
    "cascade_mask_rcnn": HeadNames((*_FPN_RPN, *_join(_roi_heads(f".{stage}") for stage in range(3))), _BELOW_FPN),
    "dino": HeadNames(_DINO, _ALONE),
    "upernet": HeadNames(_UPERNET, _ALONE),
}
"""By name, as in `ZooEntry.head`; "rpn" is a part of Mask R-CNN."""
