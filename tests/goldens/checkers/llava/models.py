"""Cases of the whole model: places of visual tokens, the complete checkpoint, generation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

from checkers import Check, GoldenCase
from checkers.losses import check_gradients
from llava_piip.checkpoints import OUR_PROJECTOR, LlavaNames, convert_folder, load_published_projector
from llava_piip.configuration import PIIPLlavaConfig
from llava_piip.conversation import IGNORE_INDEX, IMAGE_TAG, EncodedConversation, messages_from_llava
from llava_piip.modeling import PIIPLlavaForConditionalGeneration
from llava_piip.processing import PIIPLlavaProcessor
from piip_core.checkpoints import read_checkpoint, to_published

from .text import PUBLIC_IMAGE_ID, refused_conversation, refused_labels


def verify_complete_model(case: GoldenCase) -> Check:
    """Converts the recorded checkpoint, loads it as users do, and compares prompts, logits, gradients, generation."""
    check = Check(case)
    folder = case.path.parent / case.info["checkpoint_dir"]
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "model"
        (vision_config,) = folder.glob("*.py")
        done = convert_folder(folder, target, vision_config=vision_config, clip_configs=case.info.get("clip_configs"))
        check.same("number of tensors", len(done.report.used) + len(done.report.ignored), case.info["n_tensors"])
        model = PIIPLlavaForConditionalGeneration.from_pretrained(
            target, dtype=torch.float32, trust_remote_code=False
        ).eval()
        processor = PIIPLlavaProcessor.from_pretrained(target, trust_remote_code=False)
    given, public = case.below("input."), json.loads((folder / "config.json").read_text())
    pixels = given["pixel_values"]
    batch = _Batch.of(given, range(len(pixels)), processor.image_seq_length, processor.image_token_id)
    for i, turns in enumerate(case.info["conversations"]):
        _check_conversation(check, processor, i, turns, batch)
    check.close("output.image_tokens", torch.stack(model.get_image_features(pixels).pooler_output))
    inputs = batch.padded(public.get("tokenizer_padding_side", "right"))
    check.equal("output.attention_mask", inputs["attention_mask"])
    check.equal("output.labels", inputs["labels"])
    # Images of rows without a placeholder go nowhere in the recorded run, and are not given to ours
    output = model(**inputs, pixel_values=pixels[batch.used] if batch.used else None)
    valid = inputs["attention_mask"].bool()
    check.close("output.logits", output.logits[valid], case.tensors["output.logits"][valid])
    check.close("loss", output.loss.reshape(1), torch.tensor([case.info["loss"]]))
    output.loss.backward()
    names = LlavaNames.of_published(read_checkpoint(folder).state, model.config)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    check_gradients(check, to_published(gradients, names)[0])
    _check_generation(check, model, processor, batch)
    if "stage1_file" in case.info:
        _check_first_stage(check, model)
    return check


def _check_conversation(
    check: Check, processor: PIIPLlavaProcessor, row: int, turns: Sequence[Mapping[str, str]], batch: _Batch
) -> None:
    """Ids and labels of one row, out of its conversation."""
    tagged = any(IMAGE_TAG in turn["value"] for turn in turns)

    def encode() -> EncodedConversation:
        return processor.encode_conversation(messages_from_llava(turns, has_image=tagged), has_images=tagged)

    nothing = refused_labels(batch.labels[row])
    encoded = check.attempt(f"conversation.{row}", encode, refused_conversation(turns) or nothing)
    if encoded is not None:
        check.same(f"input_ids.{row}", encoded.input_ids, batch.ids[row])
        if not nothing:  # where the public code miscounts the tokens of a sample, it learns nothing from it
            check.same(f"labels.{row}", encoded.labels, batch.labels[row])


def _check_generation(
    check: Check, model: PIIPLlavaForConditionalGeneration, processor: PIIPLlavaProcessor, batch: _Batch
) -> None:
    """Greedy decoding after the recorded prompt, which is how a row with as many images begins."""
    case, text = check.case, check.case.info["generation_prompt"]
    count = text.count(IMAGE_TAG)
    prompt = processor.encode_prompt(text, count)
    recorded = _Batch.of(
        {"input_ids": case.tensors["gen.input_ids"]}, range(count), processor.image_seq_length, processor.image_token_id
    )
    check.same("gen.input_ids", [prompt], recorded.ids)
    rows = [*zip(batch.ids, batch.images, strict=True), ([], batch.used)]  # or else the first images of all
    _, alike = max((row for row in rows if len(row[1]) >= count), key=lambda row: _common_start(row[0], prompt))
    used = alike[:count]
    images = {"pixel_values": case.below("input.")["pixel_values"][used]} if used else {}
    expected = case.tensors["gen.output_ids"][:, 1:]  # without bos, which the pinned library puts in front
    check.equal("gen.output_ids", _generate(model, recorded.padded("left"), images, expected.shape[1]), expected)


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids that two rows begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _check_first_stage(check: Check, model: PIIPLlavaForConditionalGeneration) -> None:
    """The file of the first stage has the projectors that the whole checkpoint has."""
    recorded = check.case.info["stage1_file"]
    count = len(model.config.vision_config.piip.branches)
    found = load_published_projector(check.case.path.parent / recorded["path"], count, model.config.projector_norm)
    state = model.state_dict()
    check.same("stage1.count", len(found), len(recorded["keys"]))
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


def _decoder(case: GoldenCase) -> PIIPLlavaForConditionalGeneration:
    """A model of ours around the recorded decoder; its tower is never run, since the visual tokens are given."""
    text = LlamaConfig(**case.config)
    decoder = LlamaForCausalLM(text)
    decoder.load_state_dict(case.below("state."))

    class Config(PIIPLlavaConfig):
        """A case may have as many visual tokens per image as no square grid has."""

        image_seq_length = case.tensors["image_features"].shape[1]

    with torch.device("meta"):
        config = Config(text_config=text, image_token_index=text.vocab_size, projector_norm="none")
        model = PIIPLlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.generation_config = GenerationConfig.from_model_config(text)
    return model.eval()


@dataclass(frozen=True)
class _Batch:
    """Rows of a recorded call in our form, without padding: an image is as many ids as it has visual tokens.

    Attributes:
        images: Index of the image at each placeholder of a row, as the public code deals them out.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    images: list[list[int]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], given: Sequence[int], length: int, image_token_id: int) -> _Batch:
        """From `input_ids`, and `attention_mask` and `labels` where recorded.

        A row without a placeholder takes an image all the same, and where images run out the last one is taken again.
        """
        ids = tensors["input_ids"].long()
        mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
        labels = tensors.get("labels", torch.full_like(ids, IGNORE_INDEX)).long()
        left, last = iter(given), None
        rows, row_labels, images = [], [], []
        for row, own, keep in zip(ids, labels, mask, strict=True):
            kept = row[keep].tolist()
            places = kept.count(PUBLIC_IMAGE_ID)
            taken = [last := next(left, last) for _ in range(max(places, 1))]
            images.append(taken[:places])
            rows.append(_expand(kept, kept, length, image_token_id))
            row_labels.append(_expand(kept, own[keep].tolist(), length, IGNORE_INDEX))
        return cls(rows, row_labels, images)

    @property
    def used(self) -> list[int]:
        """Index of the image at every placeholder, row by row."""
        return list(chain.from_iterable(self.images))

    def padded(self, side: str) -> dict[str, Tensor]:
        """Inputs of the model."""
        mask = [[1] * len(row) for row in self.ids]
        values = {"input_ids": (self.ids, 0), "attention_mask": (mask, 0), "labels": (self.labels, IGNORE_INDEX)}
        return {name: _padded(rows, value, side) for name, (rows, value) in values.items()}

    def cut(self, limit: int | None) -> _Batch:
        """The first `limit` ids of every row."""
        return _Batch([row[:limit] for row in self.ids], [row[:limit] for row in self.labels], self.images)


def _expand(ids: list[int], values: list[int], length: int, fill: int) -> list[int]:
    """`values`, with `length` times `fill` in each place of an image."""
    pairs = zip(ids, values, strict=True)
    return [v for token, value in pairs for v in ([fill] * length if token == PUBLIC_IMAGE_ID else [value])]


def _padded(rows: list[list[Any]], value: int, side: str) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])


def _encoded(features: Tensor) -> dict[str, Any]:
    """Keywords that give the model visual tokens (images, tokens, width) in place of pixels."""
    if not len(features):
        return {}
    encoded = BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tuple(features))
    return {"mm_encoder_outputs": {"image": encoded}}


@torch.no_grad()
def _check_splicing_case(check: Check, model: PIIPLlavaForConditionalGeneration, info: dict[str, Any]) -> None:
    case, name, side = check.case, f"case.{info['case']}", info["padding_side"]
    batch, given, features = _recorded(check, model, name, info)
    kept = batch.cut(info["tokenizer_model_max_length"])
    inputs = kept.padded(side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = model.config.image_token_id
    if len(batch.used) > len(given):
        call = partial(model, **batch.padded(side), **_encoded(features[given]))
        check.refuses(f"{name}.refused", call, "more placeholders than images")
    if int((ids == image).sum()) < sum(row.count(image) for row in batch.ids):
        check.refuses(f"{name}.refused", partial(model, **inputs, **_encoded(features[batch.used])), "an image is cut")
    if info["position_ids_given"]:
        inputs["position_ids"] = (mask.cumsum(1) - 1) * mask
        check.equal(f"{name}.position_ids_out", inputs["position_ids"])
    uncut = batch.padded(side)
    output, embeds = _run(model, **uncut | (inputs if kept.ids == batch.ids else {}), **_encoded(features[batch.used]))
    if kept.ids != batch.ids:
        rows = embeds[uncut["attention_mask"].bool()].split([len(row) for row in batch.ids])
        embeds = embeds.new_zeros(*mask.shape, embeds.shape[-1])
        embeds[mask.bool()] = torch.cat([row[: len(cut)] for row, cut in zip(rows, kept.ids, strict=True)])
        output = model(**{key: value for key, value in inputs.items() if key != "input_ids"}, inputs_embeds=embeds)
    valid = mask.bool()
    check.close(f"{name}.inputs_embeds", embeds[valid], case.tensors[f"{name}.inputs_embeds"].float()[valid])
    check.close(f"{name}.logits", output.logits[valid], case.tensors[f"{name}.logits"][valid])
    if info["attention_mask_given"]:
        check.equal(f"{name}.attention_mask_out", mask)
    if info["labels_given"]:
        check.equal(f"{name}.labels_out", inputs["labels"])
        check.close(f"{name}.loss", output.loss.reshape(1), torch.tensor([info["loss"]]))


def _recorded(
    check: Check, model: PIIPLlavaForConditionalGeneration, name: str, info: Mapping[str, Any]
) -> tuple[_Batch, list[int], Tensor]:
    """The rows of a call, the indices of the images that it was given, and the visual tokens of all images."""
    tensors, features = check.case.below(f"{name}."), check.case.tensors["image_features"].float()
    # No indices: a list of images, one entry for each row
    given = list(range(len(tensors["input_ids"]))) if info["image_indices"] is None else info["image_indices"]
    batch = _Batch.of(tensors, given, features.shape[1], model.config.image_token_id)
    return batch, given, features


def _run(model: PIIPLlavaForConditionalGeneration, **inputs: Any) -> tuple[Any, Tensor]:
    """The output, and the embeddings that the decoder was given."""
    seen: list[Tensor] = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    try:
        return model(**inputs), seen[0]
    finally:
        hook.remove()


@torch.no_grad()
def _check_splicing_generation(check: Check, model: PIIPLlavaForConditionalGeneration, info: dict[str, Any]) -> None:
    name = f"gen.{info['case']}"
    batch, _, features = _recorded(check, model, name, info)
    recorded = check.case.tensors[f"{name}.output_ids"][:, 1:]  # without bos, which the pinned library puts in front
    inputs = batch.padded(info["padding_side"])
    new = _generate(
        model, inputs, _encoded(features[batch.used]), info["max_new_tokens"], eos_token_id=info["eos_token_id"]
    )
    check.equal(f"{name}.output_ids", new, recorded)


def _generate(
    model: PIIPLlavaForConditionalGeneration,
    inputs: Mapping[str, Tensor],
    images: Mapping[str, Any],
    max_new_tokens: int,
    **settings: Any,
) -> Tensor:
    """Greedy decoding; the new tokens alone."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    settings |= {"do_sample": False, "max_new_tokens": max_new_tokens}
    return model.generate(input_ids=ids, attention_mask=mask, **images, **settings)[:, ids.shape[1] :]
