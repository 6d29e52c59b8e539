"""Cases of text: prompts of the conversation templates, tokenizers, and label masks."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_piip.assembly import add_image_token
from llava_piip.conversation import (
    IGNORE_INDEX,
    IMAGE_TAG,
    ConversationError,
    EncodedConversation,
    encode_conversation,
    encode_prompt,
    messages_from_llava,
    render_conversation,
)
from llava_piip.tokenization import bos_ids, encode_text, keep_legacy_setting
from piip_core.errors import NotSupportedYet
from piip_core.verification import Check, Comparison, GoldenCase

__all__ = ["llama_tokenizer", "verify_masks", "verify_prompts", "verify_tokenizer"]

# The public code knows one template under two names
TEMPLATES = {"v1": "vicuna_v1"}
PUBLIC_IMAGE_ID = -200


@contextmanager
def llama_tokenizer(model_file: Path, *, legacy: bool) -> Iterator[PreTrainedTokenizerBase]:
    """A Llama tokenizer of a bare SentencePiece file, loaded from a folder laid out like a published one.

    It is saved and loaded once more, as the tokenizer of every trained model is.
    """
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = special | {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
    }
    with tempfile.TemporaryDirectory() as name:
        published, saved = Path(name, "published"), Path(name, "saved")
        published.mkdir()
        shutil.copyfile(model_file, published / "tokenizer.model")
        (published / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = AutoTokenizer.from_pretrained(published)
        keep_legacy_setting(tokenizer)
        tokenizer.save_pretrained(saved)
        yield AutoTokenizer.from_pretrained(saved)


def verify_prompts(case: GoldenCase) -> Check:
    """Prompts of all templates, the rewriting of image tags, and the system texts."""
    check = Check(case)
    for name, template in case.info["templates"].items():
        opening = template["system"] + template["sep"] if template["system"] else ""
        _same(check, f"output.opening.{name}", _prompt(name, []), opening)
    for entry in case.info["prompts"]:
        _verify_prompt(check, entry)
    for index, entry in enumerate(case.info["image_tag_rewriting"]):
        messages = messages_from_llava(entry["conversation"], has_image=True)
        name = f"output.image_tags.{index}"
        _same(check, f"{name}.after", [m["content"] for m in messages], [turn["value"] for turn in entry["after"]])
        prompt = _prompt("v1", messages)
        _same(check, f"{name}.v1_prompt", prompt, entry["v1_prompt"])
        _same(check, f"{name}.n_placeholders", prompt.count(IMAGE_TAG), entry["n_placeholders"])
        if "plain_exception" in entry:
            _refuses(check, f"{name}.plain_exception", partial(_prompt, "plain", messages))
        else:
            plain = _prompt("plain", messages)
            _same(check, f"{name}.plain_prompt", plain, entry["plain_prompt"])
            question = plain.removesuffix(messages[1]["content"] + "\n")
            _same(check, f"{name}.plain_human_after", question, entry["plain_human_after"])
    return check


def _verify_prompt(check: Check, entry: Mapping[str, Any]) -> None:
    """One prompt.

    A last answer that is missing stands for the place where generation starts. The public object "plain" raises
    TypeError for every answer, although training renders them; what is compared there is the training form: the images,
    the answer and a newline, if the question has an image and there is one round, otherwise that ours raises too. With
    no answer (or an empty one, which that object takes for none) it is the question by itself.
    """
    name = f"output.prompt.{entry['template']}.{entry['case']}"
    messages = [{"role": message["role"], "content": message["text"]} for message in entry["messages"]]
    prompted = bool(messages) and messages[-1]["role"] == "assistant" and messages[-1]["content"] is None
    if entry["template"] != "plain":
        ours = _prompt(entry["template"], messages[:-1] if prompted else messages, add_generation_prompt=prompted)
        _same(check, name, ours, entry["prompt"])
    elif "exception" not in entry:
        _same(check, name, _prompt("plain", messages[:1]), entry["prompt"])
    elif len(messages) == 2 and IMAGE_TAG in messages[0]["content"]:
        expected = f"{IMAGE_TAG}{messages[1]['content']}\n"
        _same(check, name, _prompt("plain", messages), expected, f"public: {entry['exception']}; form of training")
    else:
        _refuses(check, name, partial(_prompt, "plain", messages))


def verify_tokenizer(case: GoldenCase) -> Check:
    """Ids, pieces and texts of the recorded slow tokenizer."""
    check = Check(case)
    model_file = case.path.with_name(case.info["tokenizer_file"])
    for legacy in (False, True):
        with llama_tokenizer(model_file, legacy=legacy) as tokenizer:
            _same(check, f"output.vocab_size.legacy={legacy}", len(tokenizer), case.info["vocab_size"])
            for kind, verify in (("encode", _verify_encoding), ("decode", _verify_decoding)):
                for index, entry in enumerate(case.info[kind]):
                    if entry["legacy"] == legacy:
                        verify(check, f"output.{kind}.{index}", tokenizer, entry)
    return check


def _verify_encoding(check: Check, name: str, tokenizer: PreTrainedTokenizerBase, entry: Mapping[str, Any]) -> None:
    ids, offsets = encode_text(tokenizer, entry["text"])
    _same(check, f"{name}.ids", bos_ids(tokenizer) + ids, entry["ids"], repr(entry["text"]))
    _same(check, f"{name}.pieces", tokenizer.convert_ids_to_tokens(entry["ids"]), entry["pieces"])
    covered = {position for start, end in offsets for position in range(start, end)}
    _same(check, f"{name}.offsets", covered, set(range(len(entry["text"]))), repr(entry["text"]))
    decoded = tokenizer.decode(entry["ids"], skip_special_tokens=True)
    detail = ""
    if entry["legacy"] and decoded == f" {entry['decoded']}":
        # such a tokenizer deletes the space it put in front, and then SentencePiece one more
        decoded, detail = entry["decoded"], "one leading space more than the slow tokenizer of the older kind"
    _same(check, f"{name}.decoded", decoded, entry["decoded"], detail)


def _verify_decoding(check: Check, name: str, tokenizer: PreTrainedTokenizerBase, entry: Mapping[str, Any]) -> None:
    _same(check, name, tokenizer.decode(entry["ids"], skip_special_tokens=True), entry["text"], str(entry["ids"]))


def verify_masks(case: GoldenCase) -> Check:
    """Prompts, ids and intended labels of training samples, with one token per image."""
    check = Check(case)
    info = case.info
    if info["special_ids"]["image"] != PUBLIC_IMAGE_ID or info["special_ids"]["ignore"] != IGNORE_INDEX:
        raise NotSupportedYet("other ids of images or ignored labels")
    model_file = case.path.with_name(info["tokenizer_file"])
    for legacy in (False, True):
        with llama_tokenizer(model_file, legacy=legacy) as tokenizer:
            add_image_token(tokenizer)
            for entry in info["cases"]:
                if entry["legacy"] == legacy:
                    name = f"output.{entry['case']}.legacy={legacy}"
                    _verify_mask(check, name, tokenizer, TEMPLATES.get(info["template"], info["template"]), entry)
    return check


def _verify_mask(
    check: Check, name: str, tokenizer: PreTrainedTokenizerBase, template: str, entry: Mapping[str, Any]
) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    settings = {"image_token_id": image_id, "image_seq_length": 1, "has_images": entry["has_image"]}

    def encode(max_length: int | None = None) -> EncodedConversation:
        messages = messages_from_llava(entry["conversation"], has_image=entry["has_image"])
        return encode_conversation(tokenizer, messages, chat_template=template, max_length=max_length, **settings)

    if "exception" in entry:
        _refuses(check, f"{name}.exception", encode)
        return
    messages = messages_from_llava(entry["conversation"], has_image=entry["has_image"])
    prompt, _ = render_conversation(messages, chat_template=template, tokenizer=tokenizer)
    _same(check, f"{name}.prompt", prompt, entry["prompt"])
    expected = [image_id if token == PUBLIC_IMAGE_ID else token for token in entry["input_ids"]]
    ids = encode_prompt(tokenizer, prompt, **settings)
    if "untruncated_length" in entry:
        _same(check, f"{name}.untruncated_length", len(ids), entry["untruncated_length"])
        ids = ids[: entry["model_max_length"]]
    _same(check, f"{name}.input_ids", ids, expected)

    if entry["n_intended_supervised"] == 0:
        # Nothing to learn from: the public code goes on with such a sample, ours says which it is
        max_length = entry["model_max_length"] if "untruncated_length" in entry else None
        _refuses(check, f"{name}.intended_labels", partial(encode, max_length))
        return
    encoded = encode()
    _same(check, f"{name}.input_ids of training", encoded.input_ids[: len(expected)], expected)
    _same(check, f"{name}.intended_labels", encoded.labels[: len(expected)], entry["intended_labels"])
    if "untruncated_length" in entry:
        # cut inside of a round by the public code, after a whole one by ours
        encoded = encode(entry["model_max_length"])
        length = len(encoded.input_ids)
        _same(check, f"{name}.input_ids cut", encoded.input_ids, expected[:length])
        _same(check, f"{name}.intended_labels cut", encoded.labels, entry["intended_labels"][:length])
        _same(check, f"{name}.turns_cut", encoded.turns_cut, 1)
    supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
    _same(check, f"{name}.n_intended_supervised", supervised, entry["n_intended_supervised"])


def _prompt(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    template = TEMPLATES.get(template, template)
    return render_conversation(messages, chat_template=template, add_generation_prompt=add_generation_prompt)[0]


def _refuses(check: Check, name: str, run: Callable[[], object]) -> None:
    """Passes if `run` says that the conversation cannot be used."""
    try:
        result = run()
    except ConversationError as error:
        check.comparisons.append(Comparison(name, 0.0, True, str(error)))
    else:
        check.comparisons.append(Comparison(name, math.inf, False, f"{result!r}, expected an error"))


def _same(check: Check, name: str, ours: object, expected: object, detail: str = "") -> None:
    passed = ours == expected
    if not passed:
        detail = f"{detail} {ours!r}, expected {expected!r}".strip()
    check.comparisons.append(Comparison(name, 0.0 if passed else 1.0, passed, detail))
