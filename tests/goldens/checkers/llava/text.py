"""Cases of text: prompts of the conversation templates, tokenizers, and label masks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from checkers import Check, GoldenCase
from llava_piip.assembly import add_image_token
from llava_piip.conversation import (
    IGNORE_INDEX,
    IMAGE_TAG,
    EncodedConversation,
    encode_conversation,
    encode_prompt,
    messages_from_llava,
    render_conversation,
)
from llava_piip.tokenization import bos_ids, encode_text, keep_legacy_setting

# The public code knows one template under two names
TEMPLATES = {"v1": "vicuna_v1"}
PUBLIC_IMAGE_ID = -200


def refused_conversation(turns: Sequence[Mapping[str, str]]) -> str:
    """Why `messages_from_llava` refuses on purpose what the public code takes; empty if it does not."""
    return "" if any(turn["from"] == "human" for turn in turns) else "a conversation without a question"


def refused_messages(messages: Sequence[Mapping[str, Any]], template: str) -> str:
    """Why a template refuses on purpose what the public code takes; empty if it does not."""
    roles = [message["role"] for message in messages]
    if roles and "user" not in roles:
        return "a conversation without a question"
    if roles != ["user" if index % 2 == 0 else "assistant" for index in range(len(roles))]:
        return "user and assistant take turns"
    return "template 'plain' takes one question and one answer" if template == "plain" and len(roles) > 2 else ""


def refused_labels(labels: Sequence[int]) -> str:
    """Why training refuses on purpose labels that the public code takes; empty if it does not."""
    return "" if any(label != IGNORE_INDEX for label in labels) else "nothing to train on"


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
        tokenizer = AutoTokenizer.from_pretrained(published, trust_remote_code=False)
        keep_legacy_setting(tokenizer)
        tokenizer.save_pretrained(saved)
        yield AutoTokenizer.from_pretrained(saved, trust_remote_code=False)


def verify_prompts(case: GoldenCase) -> Check:
    """Prompts of all templates, the rewriting of image tags, and the system texts."""
    check = Check(case)
    for name, template in case.info["templates"].items():
        opening = template["system"] + template["sep"] if template["system"] else ""
        check.same(f"output.opening.{name}", _prompt(name, []), opening)
    for entry in case.info["prompts"]:
        _verify_prompt(check, entry)
    for index, entry in enumerate(case.info["image_tag_rewriting"]):
        _verify_rewriting(check, f"output.image_tags.{index}", entry)
    return check


def _verify_rewriting(check: Check, name: str, entry: Mapping[str, Any]) -> None:
    """Where the image tags of one conversation go, and the prompts after it."""
    turns = entry["conversation"]
    messages = check.attempt(name, partial(messages_from_llava, turns, has_image=True), refused_conversation(turns))
    if messages is None:
        return
    after = [turn["value"] for turn in entry["after"]][-len(messages) :]  # ours leaves a greeting out here already
    check.same(f"{name}.after", [message["content"] for message in messages], after)
    prompt = _prompt("v1", messages)
    check.same(f"{name}.v1_prompt", prompt, entry["v1_prompt"])
    check.same(f"{name}.n_placeholders", prompt.count(IMAGE_TAG), entry["n_placeholders"])
    if "plain_exception" in entry:
        check.refuses(f"{name}.plain_exception", partial(_prompt, "plain", messages))
    else:
        plain = _prompt("plain", messages)
        check.same(f"{name}.plain_prompt", plain, entry["plain_prompt"])
        question = plain.removesuffix(messages[1]["content"] + "\n")
        check.same(f"{name}.plain_human_after", question, entry["plain_human_after"])


def _verify_prompt(check: Check, entry: Mapping[str, Any]) -> None:
    """One prompt.

    A last answer that is missing stands for the place where generation starts. The public object "plain" raises
    TypeError for every answer, although training renders them; what is compared there is the training form: the images,
    the answer and a newline, if the question has an image and there is one round, otherwise that ours raises too. With
    no answer (or an empty one, which that object takes for none) it is the question by itself.
    """
    name, template = f"output.prompt.{entry['template']}.{entry['case']}", entry["template"]
    messages = [{"role": message["role"], "content": message["text"]} for message in entry["messages"]]
    prompted = bool(messages) and messages[-1]["role"] == "assistant" and messages[-1]["content"] is None
    expected, detail = entry.get("prompt"), ""
    if template != "plain":
        run = partial(_prompt, template, messages[:-1] if prompted else messages, add_generation_prompt=prompted)
    else:
        alone = "exception" not in entry and len(messages) <= 2
        run = partial(_prompt, template, messages[:1] if alone else messages)
    if "exception" in entry:
        if template != "plain" or len(messages) != 2 or IMAGE_TAG not in messages[0]["content"]:
            check.refuses(name, run)
            return
        expected = f"{IMAGE_TAG * messages[0]['content'].count(IMAGE_TAG)}{messages[1]['content']}\n"
        detail = f"public: {entry['exception']}; form of training"
    ours = check.attempt(name, run, refused_messages(messages, template))
    if ours is not None:
        check.same(name, ours, expected, detail)


def verify_tokenizer(case: GoldenCase) -> Check:
    """Ids, pieces and texts of the recorded slow tokenizer."""
    check = Check(case)
    model_file = case.path.with_name(case.info["tokenizer_file"])
    for legacy in (False, True):
        with llama_tokenizer(model_file, legacy=legacy) as tokenizer:
            check.same(f"output.vocab_size.legacy={legacy}", len(tokenizer), case.info["vocab_size"])
            for kind, verify in (("encode", _verify_encoding), ("decode", _verify_decoding)):
                for index, entry in enumerate(case.info[kind]):
                    if entry["legacy"] == legacy:
                        verify(check, f"output.{kind}.{index}", tokenizer, entry)
    return check


def _verify_encoding(check: Check, name: str, tokenizer: PreTrainedTokenizerBase, entry: Mapping[str, Any]) -> None:
    ids, offsets = encode_text(tokenizer, entry["text"])
    check.same(f"{name}.ids", bos_ids(tokenizer) + ids, entry["ids"], repr(entry["text"]))
    check.same(f"{name}.pieces", tokenizer.convert_ids_to_tokens(entry["ids"]), entry["pieces"])
    covered = {position for start, end in offsets for position in range(start, end)}
    check.same(f"{name}.offsets", covered, set(range(len(entry["text"]))), repr(entry["text"]))
    decoded = tokenizer.decode(entry["ids"], skip_special_tokens=True)
    detail = ""
    if entry["legacy"] and decoded == f" {entry['decoded']}":
        # such a tokenizer deletes the space it put in front, and then SentencePiece one more
        decoded, detail = entry["decoded"], "one leading space more than the slow tokenizer of the older kind"
    check.same(f"{name}.decoded", decoded, entry["decoded"], detail)


def _verify_decoding(check: Check, name: str, tokenizer: PreTrainedTokenizerBase, entry: Mapping[str, Any]) -> None:
    check.same(name, tokenizer.decode(entry["ids"], skip_special_tokens=True), entry["text"], str(entry["ids"]))


def verify_masks(case: GoldenCase) -> Check:
    """Prompts, ids and intended labels of training samples, with one token per image."""
    check = Check(case)
    info = case.info
    model_file = case.path.with_name(info["tokenizer_file"])
    for legacy in (False, True):
        with llama_tokenizer(model_file, legacy=legacy) as tokenizer:
            add_image_token(tokenizer)
            for entry in info["cases"]:
                if entry["legacy"] == legacy:
                    _verify_mask(check, f"output.{entry['case']}.legacy={legacy}", tokenizer, entry)
    return check


def _verify_mask(check: Check, name: str, tokenizer: PreTrainedTokenizerBase, entry: Mapping[str, Any]) -> None:
    public, image_id = check.case.info["special_ids"], tokenizer.convert_tokens_to_ids(IMAGE_TAG)
    template = TEMPLATES.get(check.case.info["template"], check.case.info["template"])
    settings = {"image_token_id": image_id, "image_seq_length": 1, "has_images": entry["has_image"]}
    read = partial(messages_from_llava, entry["conversation"], has_image=entry["has_image"])

    def encode(max_length: int | None = None) -> EncodedConversation:
        return encode_conversation(tokenizer, read(), chat_template=template, max_length=max_length, **settings)

    def ids_of(messages: Sequence[Mapping[str, Any]]) -> list[int]:
        prompt, _ = render_conversation(messages, chat_template=template, tokenizer=tokenizer)
        return encode_prompt(tokenizer, prompt, **settings)

    if "exception" in entry:
        check.refuses(f"{name}.exception", encode)
        return
    messages = check.attempt(f"{name}.messages", read, refused_conversation(entry["conversation"]))
    if messages is None:
        return
    prompt, _ = render_conversation(messages, chat_template=template, tokenizer=tokenizer)
    check.same(f"{name}.prompt", prompt, entry["prompt"])
    ids, limit = ids_of(messages), None
    if "untruncated_length" in entry:
        check.same(f"{name}.untruncated_length", len(ids), entry["untruncated_length"])
        limit = entry["model_max_length"]
    expected = [image_id if token == public["image"] else token for token in entry["input_ids"]]
    intended = [IGNORE_INDEX if label == public["ignore"] else label for label in entry["intended_labels"]]
    check.same(f"{name}.input_ids", ids[:limit], expected)

    encoded = check.attempt(f"{name}.intended_labels", encode, refused_labels(intended))
    labels = [] if encoded is None else encoded.labels[:limit]
    supervised = sum(label != IGNORE_INDEX for label in labels)
    check.same(f"{name}.n_intended_supervised", supervised, entry["n_intended_supervised"])
    if encoded is not None:
        check.same(f"{name}.input_ids of training", encoded.input_ids[:limit], expected)
        check.same(f"{name}.intended_labels", labels, intended)
    if limit is None:
        return
    # Cut inside of a round by the public code, after a whole one by ours
    lengths = [len(ids_of(messages[: end + 2])) for end in range(0, len(messages), 2)]
    kept = [length for length in lengths if length <= limit]
    reason = refused_labels(intended[: kept[-1]]) if kept else "not even the first round fits"
    encoded = check.attempt(f"{name}.intended_labels cut", partial(encode, limit), reason)
    if encoded is not None:
        check.same(f"{name}.input_ids cut", encoded.input_ids, expected[: kept[-1]])
        check.same(f"{name}.intended_labels cut", encoded.labels, intended[: kept[-1]])
        check.same(f"{name}.turns_cut", encoded.turns_cut, len(lengths) - len(kept))


def _prompt(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    template = TEMPLATES.get(template, template)
    return render_conversation(messages, chat_template=template, add_generation_prompt=add_generation_prompt)[0]
