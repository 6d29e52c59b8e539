"""Ids and labels of conversations: recorded samples, exact masks on random ones, cutting, errors."""

import random
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from checkers import find_cases
from checkers.llava.text import llama_tokenizer, verify_masks
from llava_piip.chat_templates import CHAT_TEMPLATES
from llava_piip.conversation import (
    IGNORE_INDEX,
    IMAGE_TAG,
    ConversationError,
    encode_conversation,
    encode_prompt,
    messages_from_llava,
    render_conversation,
)
from piip_core.errors import ConfigError

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
IMAGE_ID, IMAGE_LENGTH = 5000, 3
SETTINGS = {"image_token_id": IMAGE_ID, "image_seq_length": IMAGE_LENGTH}
WORDS = ["cat", "USER:", "ASSISTANT:", "7", "caf\u00e9", "\U0001f436", "\u4e2d", "\n", " ", "", "x\ty", "###", "A."]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def small_bpe():
    """A byte-level BPE tokenizer as Qwen's, trained here: no bos, another end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    prompt, _ = render_conversation([user("the cat"), assistant("a cat")] * 3, chat_template="vicuna_v1")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    backend.train_from_iterator([prompt], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")


@pytest.fixture(scope="module", params=["A", "A older", "C", "C older", "byte-level"])
def tokenizer(request):
    if request.param == "byte-level":
        yield small_bpe()
    else:
        name, *older = request.param.split()
        with llama_tokenizer(GOLDENS / f"llava_tokenizer_{name}.model", legacy=bool(older)) as loaded:
            yield loaded


def characters(tokenizer, ids):
    """What ids stand for, by the names of their tokens: independent of positions."""
    names = tokenizer.convert_ids_to_tokens(ids)
    if tokenizer.bos_token is None:
        return tokenizer.decode(ids, skip_special_tokens=False)
    pieces = (
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("\u2581", " ").encode()
        for name in names
    )
    return b"".join(pieces).decode()


def parts(tokenizer, encoded):
    """Texts of the parts between which supervision changes; images as tags."""
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    for is_supervised, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        group = list(group)
        if is_supervised:
            assert all(token == label for token, label in group)
        text = ""
        for is_image, run in groupby([token for token, _ in group], key=lambda token: token == IMAGE_ID):
            run = list(run)
            if is_image:
                assert len(run) % IMAGE_LENGTH == 0
            text += IMAGE_TAG * (len(run) // IMAGE_LENGTH) if is_image else characters(tokenizer, run)
        yield is_supervised, text


def random_messages(rng, *, images):
    def text(most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))

    messages = []
    for _ in range(rng.randint(1, 4)):
        tag = f"{IMAGE_TAG}\n" if images and rng.random() < 0.5 else ""
        messages += [user(tag + text(6)), assistant(text(6))]
    return messages


@pytest.mark.parametrize("name", ["llava_mask_v1", "llava_mask_plain", "llava_mask_v1_othervocab"])
def test_recorded_samples(name):
    (case,) = find_cases([GOLDENS / f"{name}.json"])
    comparisons = verify_masks(case).comparisons
    assert not [c for c in comparisons if not c.passed]
    compared = {c.name for c in comparisons}
    for entry in case.info["cases"]:
        names = ["exception"] if "exception" in entry else ["prompt", "input_ids", "intended_labels"]
        assert {f"output.{entry['case']}.legacy={entry['legacy']}.{field}" for field in names} <= compared


def test_wrong_labels_are_noticed():
    (case,) = find_cases([GOLDENS / "llava_mask_v1_othervocab.json"])
    first, *others = case.info["cases"]
    labels = [IGNORE_INDEX] * len(first["input_ids"])
    wrong = case.info | {"cases": [first | {"intended_labels": labels}] + others}
    failed = [c.name for c in verify_masks(replace(case, info=wrong)).comparisons if not c.passed]
    assert failed == ["output.single_turn_image.legacy=False.intended_labels"]


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llava_v0"])
def test_supervised_are_exactly_the_answers(tokenizer, template):
    rng = random.Random(template)
    end = "###" if template == "llava_v0" else tokenizer.eos_token
    for _ in range(60):
        messages = random_messages(rng, images=True)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        expected = [f" {answer}{end}" for answer in answers if answer]
        if not expected:
            with pytest.raises(ConversationError, match="no token to train on"):
                encode_conversation(tokenizer, messages, chat_template=template, **SETTINGS)
            continue
        encoded = encode_conversation(tokenizer, messages, chat_template=template, **SETTINGS)
        found = list(parts(tokenizer, encoded))
        assert [text for is_supervised, text in found if is_supervised] == expected
        assert encoded.num_images == sum(message["content"].count(IMAGE_TAG) for message in messages)

        # nothing is lost or added but bos and, with SentencePiece, a space in front of every piece
        prompt, _ = render_conversation(messages, chat_template=template, tokenizer=tokenizer)
        whole = "".join(text for _, text in found).removeprefix(tokenizer.bos_token or "")
        if tokenizer.bos_token is None:
            assert whole == prompt
        assert whole.replace(" ", "") == prompt.replace(" ", "")
        assert encoded.input_ids == encode_prompt(tokenizer, prompt, **SETTINGS)


def test_caption_with_its_newline_is_supervised(tokenizer):
    encoded = encode_conversation(
        tokenizer, [user("<image>\nDescribe."), assistant("a cat")], chat_template="plain", **SETTINGS
    )
    prefix = " " if tokenizer.bos_token else ""
    bos = tokenizer.bos_token or ""
    assert list(parts(tokenizer, encoded)) == [(False, f"{bos}<image>"), (True, f"{prefix}a cat\n")]


def test_generation_continues_where_training_supervises(tokenizer):
    """What a model is given at inference is what stands in front of the answer in training."""
    messages = [user("<image>\nHow many?"), assistant("two"), user("Sure?"), assistant("yes")]
    encoded = encode_conversation(tokenizer, messages, chat_template="vicuna_v1", **SETTINGS)
    prompt, spans = render_conversation(
        messages[:-1], chat_template="vicuna_v1", tokenizer=tokenizer, add_generation_prompt=True
    )
    ids = encode_prompt(tokenizer, prompt, **SETTINGS)
    assert encoded.input_ids[: len(ids)] == ids
    assert encoded.labels[len(ids)] != IGNORE_INDEX
    assert encoded.labels[len(ids) :] == encoded.input_ids[len(ids) :]
    assert len(spans) == 1


def test_bos_is_not_written_twice(tokenizer):
    if tokenizer.bos_token is None:
        assert encode_prompt(tokenizer, "a", **SETTINGS) == tokenizer("a").input_ids
    else:
        assert encode_prompt(tokenizer, "<s>", **SETTINGS) == [1]
        assert encode_prompt(tokenizer, "", **SETTINGS) == [1]


def test_tag_without_images_is_ordinary_text(tokenizer):
    messages = [user("a <image> b"), assistant("<image>")]
    encoded = encode_conversation(tokenizer, messages, chat_template="vicuna_v1", has_images=False, **SETTINGS)
    assert encoded.num_images == 0 and IMAGE_ID not in encoded.input_ids
    assert [text for is_supervised, text in parts(tokenizer, encoded) if is_supervised] == [
        f" <image>{tokenizer.eos_token}"
    ]


def test_text_that_is_the_image_token_is_refused():
    tokenizer = small_bpe()
    tokenizer.add_tokens(["<img>"], special_tokens=True)
    settings = {"image_token_id": len(tokenizer) - 1, "image_seq_length": 1}
    with pytest.raises(ConversationError, match=r"text contains '<img>', which has the id of the image token"):
        encode_prompt(tokenizer, "a <img>", **settings)


@pytest.mark.parametrize("max_rounds", [1, 2, 3])
def test_cutting_keeps_whole_rounds(tokenizer, max_rounds):
    rounds = [[user("<image>\nfirst"), assistant("one")], [user("<image>\nsecond"), assistant("two two")]]
    rounds += [[user("third"), assistant("three three three")], [user("no answer")]]
    system = [{"role": "system", "content": "Be brief."}]
    whole = [system + list(chain.from_iterable(rounds[:count])) for count in range(1, 5)]
    encoded = [encode_conversation(tokenizer, part, chat_template="vicuna_v1", **SETTINGS) for part in whole]
    shortest, longest = len(encoded[max_rounds - 1].input_ids), len(encoded[max_rounds].input_ids) - 1
    for max_length in range(shortest, longest + 1):
        cut = encode_conversation(tokenizer, whole[-1], chat_template="vicuna_v1", max_length=max_length, **SETTINGS)
        assert cut == replace(encoded[max_rounds - 1], turns_cut=4 - max_rounds)
    assert cut.num_images == min(max_rounds, 2)


def test_images_count_for_the_length(tokenizer):
    messages = [user("<image>\nfirst"), assistant("one")]
    long = SETTINGS | {"image_seq_length": 1000}
    length = len(encode_conversation(tokenizer, messages, chat_template="vicuna_v1", **SETTINGS).input_ids)
    encode_conversation(tokenizer, messages, chat_template="vicuna_v1", max_length=length, **SETTINGS)
    total = length + 1000 - IMAGE_LENGTH
    with pytest.raises(
        ConversationError, match=f"first round has {total} tokens with its 1 images, max_length is {total - 1}"
    ):
        encode_conversation(tokenizer, messages, chat_template="vicuna_v1", max_length=total - 1, **long)


def test_nothing_to_train_on(tokenizer):
    def encode(messages, **options):
        return encode_conversation(tokenizer, messages, chat_template="vicuna_v1", **SETTINGS, **options)

    for messages in ([user("Q")], [user("Q"), assistant("")], [{"role": "system", "content": "s"}]):
        with pytest.raises(ConversationError, match=r"no token to train on: .* an answer that is not empty"):
            encode(messages)
    with pytest.raises(ConversationError, match="no messages"):
        encode([])
    rest = [user("Q"), assistant(""), user("Q2"), assistant("A")]
    length = len(encode(rest).input_ids)
    with pytest.raises(ConversationError, match="no token to train on in what is left after cutting 1 rounds"):
        encode(rest, max_length=length - 1)


def test_template_that_marks_no_answers():
    template = CHAT_TEMPLATES["plain"].replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(ConfigError, match=r"no \{% generation %\} block"):
        encode_conversation(small_bpe(), [user("<image>"), assistant("A")], chat_template=template, **SETTINGS)


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def test_record_without_image_keeps_its_text():
    turns = [human(" a <image> b "), gpt("<image>c")]
    assert messages_from_llava(turns, has_image=False) == [user(" a <image> b "), assistant("<image>c")]
    assert messages_from_llava(turns, has_image=True) == [user("<image>\na  b"), assistant("<image>\nc")]


def test_greeting_is_left_out():
    assert messages_from_llava([gpt("Hi"), human("a"), gpt("b")], has_image=False) == [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([human("a"), human("b"), gpt("c")], "turn 2 is from 'human' like the turn before it"),
        ([human("a"), gpt("b"), gpt("c")], "turn 3 is from 'gpt' like the turn before it"),
        ([gpt("a"), gpt("b"), human("c")], "turn 2 is from 'gpt' like the turn before it"),
        ([human("a"), {"from": "assistant", "value": "b"}], "turn 2 is from 'assistant', expected 'human' or 'gpt'"),
        ([], "no turn from 'human'"),
        ([gpt("a")], "no turn from 'human'"),
    ],
)
def test_unusable_records(turns, text):
    with pytest.raises(ConversationError, match=text):
        messages_from_llava(turns, has_image=False)
