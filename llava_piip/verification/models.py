"""Cases of the whole model: places of visual tokens, the complete checkpoint, generation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from piip_core.checkpoints.lazy import LazyState
from piip_core.errors import UserError
from piip_core.verification import Check, GoldenCase

from ..checkpoints import LlavaNames, convert_folder, load_published_projector
from ..checkpoints.names import OUR_PROJECTOR
from ..configuration import PIIPLlavaConfig
from ..conversation import IGNORE_INDEX, messages_from_llava
from ..modeling import PIIPLlavaForConditionalGeneration
from ..processing import PIIPLlavaProcessor

__all__ = ["verify_complete_model", "verify_splicing"]

PLACEHOLDER = -200


def verify_complete_model(case: GoldenCase) -> Check:
    """Converts the recorded checkpoint, loads it as users do, and compares prompts, logits, gradients, generation."""
    check = Check(case)
    folder = case.path.parent / case.info["checkpoint_dir"]
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "model"
        (vision_config,) = folder.glob("*.py")
        done = convert_folder(folder, target, vision_config=vision_config, clip_configs=case.info["clip_configs"])
        used = len(done.report.used) + len(done.report.ignored)
        check.equal("number of tensors", torch.tensor(used), torch.tensor(case.info["n_tensors"]))
        model = PIIPLlavaForConditionalGeneration.from_pretrained(target, dtype=torch.float32).eval()
        processor = PIIPLlavaProcessor.from_pretrained(target)
    given = case.below("input.")
    rows = _expanded_rows(given["input_ids"].long(), given["attention_mask"].bool(), processor)
    _check_prompts(check, processor, rows)

    labels = [processor.encode_conversation(messages, has_images=tagged).labels for messages, tagged in _messages(case)]
    ids, mask = _padded(rows, 0), _padded([[1] * len(row) for row in rows], 0)
    padded_labels = _padded(labels, IGNORE_INDEX)
    check.equal("output.attention_mask", mask)
    check.equal("output.labels", padded_labels)
    # The recorded run gives the text-only row a black image that goes nowhere
    features = model.get_image_features(given["pixel_values"])
    check.close("output.image_tokens", features.last_hidden_state)
    output = model(input_ids=ids, attention_mask=mask, pixel_values=given["pixel_values"][:1], labels=padded_labels)
    valid = mask.bool()
    check.close("output.logits", output.logits[valid], case.tensors["output.logits"][valid])
    check.close("loss", output.loss.reshape(1), torch.tensor([case.info["loss"]]))
    output.loss.backward()
    _check_gradients(check, model)
    _check_generation(check, model, processor)
    _check_first_stage(check, model)
    return check


def _messages(case: GoldenCase) -> list[tuple[list[dict[str, str]], bool]]:
    """Messages of each recorded conversation, and whether it has an image."""
    tagged = [any("<image>" in turn["value"] for turn in turns) for turns in case.info["conversations"]]
    return [
        (messages_from_llava(turns, has_image=image), image)
        for turns, image in zip(case.info["conversations"], tagged, strict=True)
    ]


def _check_prompts(check: Check, processor: PIIPLlavaProcessor, rows: list[list[int]]) -> None:
    for i, (messages, tagged) in enumerate(_messages(check.case)):
        ours = processor.encode_conversation(messages, has_images=tagged).input_ids
        check.equal(f"input_ids.{i}", torch.tensor(ours), torch.tensor(rows[i]))


def _check_gradients(check: Check, model: PIIPLlavaForConditionalGeneration) -> None:
    vision = model.config.vision_config.piip
    names = LlavaNames(vision, ("clip",) * len(vision.branches))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    published = names.to_published(LazyState.of(gradients), source=check.case.name)[0]
    for name in check.case.results:
        if name.startswith("grad."):
            check.close(name, published[name.removeprefix("grad.")])


def _check_generation(check: Check, model: PIIPLlavaForConditionalGeneration, processor: PIIPLlavaProcessor) -> None:
    recorded = check.case.tensors["gen.output_ids"][:, 1:]  # without bos, which the pinned library puts in front
    ids = check.case.tensors["gen.input_ids"].long()
    rows = _expanded_rows(ids, torch.ones_like(ids, dtype=torch.bool), processor)
    prompt = processor.encode_prompt(check.case.info["generation_prompt"], 1)
    check.equal("gen.input_ids", torch.tensor(prompt), torch.tensor(rows[0]))
    ids = torch.tensor(rows)
    new = _generate(
        model, ids, None, {"pixel_values": check.case.below("input.")["pixel_values"][:1]}, recorded.shape[1]
    )
    check.equal("gen.output_ids", new, recorded)


def _check_first_stage(check: Check, model: PIIPLlavaForConditionalGeneration) -> None:
    """The file of the first stage has the projectors that the whole checkpoint has."""
    path = check.case.path.parent / check.case.info["stage1_file"]["path"]
    found = load_published_projector(path, num_branches=2)
    state = model.state_dict()
    check.equal("stage1.count", torch.tensor(len(found)), torch.tensor(len(check.case.info["stage1_file"]["keys"])))
    for name, tensor in found.items():
        check.equal(f"stage1.{name}", tensor.float(), state[OUR_PROJECTOR + name])


def verify_splicing(case: GoldenCase) -> Check:
    """Given visual tokens go to their places: embeddings, masks, labels, logits, loss, generation.

    Where the recorded code goes wrong (it re-uses the last image where images run out, and cuts through an image), the
    numbers are compared with what it did, and that ours refuses such a call.
    """
    check = Check(case)
    model = _decoder(case)
    for info in case.info["cases"]:
        _check_splicing_case(check, model, info)
    for info in case.info["generation"]:
        _check_splicing_generation(check, model, info)
    return check


class _RecordedLength(PIIPLlavaConfig):
    """The case has five visual tokens per image, which no square grid has."""

    image_seq_length = 5


def _decoder(case: GoldenCase) -> PIIPLlavaForConditionalGeneration:
    """A model of ours around the recorded decoder; its tower is never run, since the visual tokens are given."""
    text = LlamaConfig(**case.config)
    decoder = LlamaForCausalLM(text)
    decoder.load_state_dict(case.below("state."))
    with torch.device("meta"):
        config = _RecordedLength(text_config=text, image_token_index=text.vocab_size, projector_norm="none")
        model = PIIPLlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    return model.eval()


@dataclass(frozen=True)
class _Batch:
    """Inputs of a recorded case in our form, before padding."""

    ids: list[list[int]]
    labels: list[list[int]]
    features: Tensor
    enough: bool

    @classmethod
    def of(cls, case: GoldenCase, name: str, image_indices: list[int] | None, image_token_id: int) -> _Batch:
        tensors = case.below(f"{name}.")
        features = case.tensors["image_features"].float()
        ids = tensors["input_ids"].long()
        mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
        labels = tensors.get("labels", torch.full_like(ids, IGNORE_INDEX)).long()
        images = [0, 1] if image_indices is None else image_indices
        given, used, last = iter(images), [], None
        rows, row_labels = [], []
        for row, keep, own in zip(ids, mask, labels, strict=True):
            places = int((row[keep] == PLACEHOLDER).sum())
            for taken in range(max(places, 1)):  # a row without a place takes an image all the same
                last = next(given, last)  # the recorded code takes the last one again
                used += [last] if taken < places else []
            rows.append(_expand(row[keep].tolist(), row[keep].tolist(), features.shape[1], image_token_id))
            row_labels.append(_expand(row[keep].tolist(), own[keep].tolist(), features.shape[1], IGNORE_INDEX))
        return cls(rows, row_labels, features[used], len(used) <= len(images))


def _expand(ids: list[int], values: list[int], length: int, fill: int) -> list[int]:
    """`values`, with `length` times `fill` in each place of an image."""
    pairs = zip(ids, values, strict=True)
    return [v for token, value in pairs for v in ([fill] * length if token == PLACEHOLDER else [value])]


def _expanded_rows(ids: Tensor, mask: Tensor, processor: PIIPLlavaProcessor) -> list[list[int]]:
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [_expand(row, row, processor.image_seq_length, processor.image_token_id) for row in rows]


def _padded(rows: list[list[Any]], value: int, side: str = "right") -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])


def _encoded(features: Tensor) -> dict[str, BaseModelOutputWithPooling]:
    return {"image": BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tuple(features))}


@torch.no_grad()
def _check_splicing_case(check: Check, model: PIIPLlavaForConditionalGeneration, info: dict[str, Any]) -> None:
    case, name, side = check.case, f"case.{info['case']}", info["padding_side"]
    batch = _Batch.of(case, name, info["image_indices"], model.config.image_token_id)
    limit = info["tokenizer_model_max_length"]
    ids, labels = _padded(batch.ids, 0, side), _padded(batch.labels, IGNORE_INDEX, side)
    mask = _padded([[1] * len(row) for row in batch.ids], 0, side)
    if not batch.enough:
        unique = torch.unique(batch.features, dim=0)
        _check_refused(check, f"{name}.refused", model, input_ids=ids, mm_encoder_outputs=_encoded(unique))
    embeds = model.model._embed(ids, batch.features if len(batch.features) else None)
    if limit is not None:
        cut = [row[:limit] for row in batch.ids]
        refused = _padded(cut, 0, side)
        _check_refused(check, f"{name}.refused", model, input_ids=refused, mm_encoder_outputs=_encoded(batch.features))
        rows = [row[keep.bool()][:limit] for row, keep in zip(embeds, mask, strict=True)]
        mask = _padded([[1] * len(row) for row in cut], 0, side)
        labels = _padded([row[:limit] for row in batch.labels], IGNORE_INDEX, side)
        embeds = torch.zeros(*mask.shape, embeds.shape[-1])
        for target, keep, row in zip(embeds, mask.bool(), rows, strict=True):
            target[keep] = row
        output = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    else:
        encoded = _encoded(batch.features) if len(batch.features) else None
        output = model(input_ids=ids, attention_mask=mask, labels=labels, mm_encoder_outputs=encoded)
    valid = mask.bool()
    check.close(f"{name}.inputs_embeds", embeds[valid], case.tensors[f"{name}.inputs_embeds"].float()[valid])
    check.close(f"{name}.logits", output.logits[valid], case.tensors[f"{name}.logits"][valid])
    if info["attention_mask_given"]:
        check.equal(f"{name}.attention_mask_out", mask)
    if info["labels_given"]:
        check.equal(f"{name}.labels_out", labels)
        check.close(f"{name}.loss", output.loss.reshape(1), torch.tensor([info["loss"]]))
    if info["position_ids_given"]:
        check.equal(f"{name}.position_ids_out", (mask.cumsum(1) - 1).clamp(min=0))


def _check_refused(check: Check, name: str, model: PIIPLlavaForConditionalGeneration, **inputs: Any) -> None:
    try:
        model(**inputs)
    except UserError:
        refused = True
    else:
        refused = False
    check.equal(name, torch.tensor([refused]), torch.tensor([True]))


@torch.no_grad()
def _check_splicing_generation(check: Check, model: PIIPLlavaForConditionalGeneration, info: dict[str, Any]) -> None:
    case, name = check.case, f"gen.{info['case']}"
    batch = _Batch.of(case, name, info["image_indices"] or [], model.config.image_token_id)
    ids = _padded(batch.ids, 0, info["padding_side"])
    mask = _padded([[1] * len(row) for row in batch.ids], 0, info["padding_side"])
    images = {"mm_encoder_outputs": _encoded(batch.features)} if len(batch.features) else {}
    recorded = case.tensors[f"{name}.output_ids"][:, 1:]  # without bos, which the pinned library puts in front
    new = _generate(model, ids, mask, images, info["max_new_tokens"], info["eos_token_id"])
    check.equal(f"{name}.output_ids", new, recorded)


def _generate(
    model: PIIPLlavaForConditionalGeneration,
    ids: Tensor,
    mask: Tensor | None,
    images: dict[str, Any],
    max_new_tokens: int,
    eos_token_id: int = 2,
) -> Tensor:
    """Greedy decoding; the new tokens alone."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_token_id, pad_token_id=0, bos_token_id=1
    )
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **images)[:, ids.shape[1] :]
