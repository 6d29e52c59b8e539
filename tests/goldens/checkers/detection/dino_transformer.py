"""Cases of DINO's neck, encoder with query selection, and decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from checkers import Check, GoldenCase
from checkers.losses import recorded_loss
from piip.modeling.dino.denoising import DenoisingQueries
from piip.modeling.dino.geometry import Levels, map_encoding, padding_masks
from piip.modeling.dino.transformer import Selection, grid_proposals

from .dino_model import build_dino, check_gradients, check_selected, given_images, given_maps, record_outputs


def verify_dino_neck(case: GoldenCase) -> Check:
    """Maps and all gradients."""
    check = Check(case)
    model = build_dino(case)
    maps = [x.requires_grad_() for x in given_maps(case)]
    outputs = model.neck(maps)
    for index, output in enumerate(outputs):
        check.close(f"output.{index}", output)
    recorded_loss(case, outputs).backward()
    check_gradients(check, model, maps)
    return check


@torch.no_grad()
def verify_dino_encoder(case: GoldenCase) -> Check:
    """From the neck's maps to the initial queries."""
    check, model, maps, images = Check(case), build_dino(case), given_maps(case), given_images(case)
    transformer = model.transformer
    levels = transformer.layout(maps, images.image_sizes, tuple(images.tensor.shape[-2:]))
    shapes = torch.tensor(levels.shapes)
    check.equal("output.spatial_shapes", shapes)
    check.equal("output.level_start_index", shapes.prod(dim=1).cumsum(dim=0) - shapes.prod(dim=1))
    masks = padding_masks(images.image_sizes, tuple(images.tensor.shape[-2:]), levels.shapes)
    for level, mask in enumerate(masks):
        check.equal(f"output.mask.{level}", mask)
        check.close(f"output.pos.{level}", map_encoding(mask, transformer.embed_dim).permute(0, 3, 1, 2))
    check.equal("output.mask_flatten", levels.padding_mask)
    check.close("output.lvl_pos_embed", transformer.positions(levels))
    check.close("output.valid_ratios", levels.valid_ratios)
    check.close("output.encoder_reference_points", levels.reference_points())

    outputs = record_outputs(transformer.encoder.layers)
    memory = transformer.encode(maps, levels)
    for layer, output in enumerate(outputs):
        check.close(f"output.encoder_layer.{layer}", output)
    check.close("output.memory", memory)
    proposals, valid = grid_proposals(levels)
    seen = transformer.output_memory(memory, valid)
    check.close("output.output_memory", seen)
    check.close("output.enc_class", model.class_embed[-1](seen))
    check.close("output.enc_coord_unact", model.bbox_embed[-1](seen) + proposals)
    selection = transformer.select(memory, levels, model.class_embed[-1], model.bbox_embed[-1])
    _check_selection(check, selection, levels)
    _check_initial(check, *transformer.initial_queries(selection))
    return check


@torch.no_grad()
def verify_dino_decoder(case: GoldenCase) -> Check:
    """From a given memory through selection, decoder and heads, with or without given denoising queries."""
    check, model, images = Check(case), build_dino(case), given_images(case)
    transformer, decoder, memory = model.transformer, model.transformer.decoder, case.tensors["input.memory"]
    shapes = [tuple(shape) for shape in case.tensors["input.spatial_shapes"].tolist()]
    levels = Levels.of(padding_masks(images.image_sizes, tuple(images.tensor.shape[-2:]), shapes))
    selection = transformer.select(memory, levels, model.class_embed[-1], model.bbox_embed[-1])
    _check_selection(check, selection, levels)
    denoising = _given_queries(case)
    content, box_logits = transformer.initial_queries(selection, denoising)
    _check_initial(check, content, box_logits)

    outputs, positions = record_outputs(decoder.layers), record_outputs([decoder.ref_point_head])
    seen = _record_inputs(decoder.layers, 2)
    mask = case.tensors.get("input.attn_mask")
    hidden, references = decoder(content, box_logits.sigmoid(), memory, levels, model.bbox_embed[:-1], mask)
    for i, output in enumerate(outputs):
        check.close(f"output.query_pos.{i}", positions[i])
        check.close(f"output.ref_input.{i}", seen[i])
        check.close(f"output.layer.{i}", output)
        check.close(f"output.hs.{i}", hidden[i])
    for i, reference in enumerate(references):
        check.close(f"output.ref.{i}", reference)
    for i, (logits, boxes) in enumerate(zip(*model.decode_heads(hidden, references), strict=True)):
        check.close(f"output.cls.{i}", logits)
        check.close(f"output.box.{i}", boxes)
    return check


def _given_queries(case: GoldenCase) -> DenoisingQueries | None:
    if "input.dn_label_query" not in case.tensors:
        return None
    content, box_logits = (case.tensors[f"input.dn_{kind}_query"] for kind in ("label", "bbox"))
    return DenoisingQueries(layout=None, labels=None, boxes=None, content=content, box_logits=box_logits)


def _check_selection(check: Check, selection: Selection, levels: Levels) -> None:
    proposals, valid = grid_proposals(levels)
    check.close("output.proposals_unact", proposals)
    check.equal("output.proposal_valid", valid)
    check.close("output.topk_score", selection.class_logits)
    check.close("output.topk_anchor", selection.boxes)
    check_selected(check, "output.topk_index", selection.class_logits, selection.cells)


def _check_initial(check: Check, content: Tensor, box_logits: Tensor) -> None:
    check.close("output.query", content)
    check.close("output.reference_points", box_logits.sigmoid())


def _record_inputs(modules: list[torch.nn.Module], position: int) -> list[Tensor]:
    """A list that fills with one positional input of the modules as they run."""
    inputs: list[Tensor] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _module, given: inputs.append(given[position]))
    return inputs
