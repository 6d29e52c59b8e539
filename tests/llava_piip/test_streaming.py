"""Pieces of an answer: joined they are what decoding at once gives, and an answer ends where it should."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_piip.streaming import AnswerStream, answer_text, visible_text

TEXTS = [
    "A red cup.",
    "Code:\n    def f():\n        return 1\n\nEnd.",
    "Emoji 🔥🎉, Chinese 你好世界, Greek αβγ, and a\ttab.",
    "  two  blanks   each ",
]


class Scripted:
    """Generates given tokens as transformers' `generate` does: asks after each whether to go on."""

    def __init__(self, tokens, fails_at=None):
        self.tokens, self.fails_at, self.generated = tokens, fails_at, 0

    def __call__(self, streamer, stopping_criteria):
        streamer.put(torch.ones(1, 3, dtype=torch.long))
        for number, token in enumerate(self.tokens):
            if number == self.fails_at:
                raise RuntimeError("the device is gone")
            streamer.put(torch.tensor([token]))
            self.generated += 1
            if stopping_criteria(torch.ones(1, 3, dtype=torch.long), None).all():
                break
        streamer.end()


@pytest.fixture
def llama(tiny_llava):
    return tiny_llava[1].tokenizer


def byte_level():
    """A tokenizer as Qwen's: every byte has a token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def stream_of(tokenizer, tokens, ends=(), **options):
    """A stream of given tokens after a colon, and what generates them."""
    generate = Scripted(tokens, **options)
    prompt = tokenizer("USER:", add_special_tokens=False).input_ids
    return generate, AnswerStream(
        generate, tokenizer=tokenizer, prompt_ids=prompt, end_ids=[2], end_texts=ends, max_new_tokens=len(tokens)
    )


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_text_and_none_ends_within_a_character(llama, text):
    tokens = llama(text, add_special_tokens=False).input_ids
    _, stream = stream_of(llama, [*tokens, 2])
    pieces = list(stream)
    assert "".join(pieces) == text.lstrip()
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 3
    assert stream.finish_reason == "stop" and stream.answer_tokens == len(tokens) + 1


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_joined_pieces_of_any_tokens_are_what_decoding_at_once_gives(llama, kind):
    tokenizer = llama if kind == "llama" else byte_level()
    rng = random.Random(0)
    vocabulary = tokenizer.get_vocab()
    broken = [token for name, token in vocabulary.items() if name.startswith("<0x") or len(name) == 1]
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    whole = tokenizer("🔥 你 a", add_special_tokens=False).input_ids
    prompt = tokenizer("USER:", add_special_tokens=False).input_ids
    before = tokenizer.decode(prompt)
    for _ in range(400):
        tokens = [rng.choice(rng.choice((broken, whole, special, list(vocabulary.values())))) for _ in range(12)]
        tokens[3:3] = whole  # a character made of bytes, between broken ones
        _, stream = stream_of(tokenizer, tokens)
        at_once = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = "".join(stream)
        assert text == at_once.removeprefix(before).lstrip()
        assert answer_text(tokenizer, prompt, tokens) == text.strip()


def test_what_may_start_an_end_is_held_back():
    assert visible_text("  an EN", ("END", "STOP"), finished=False) == ("an ", False)
    assert visible_text("  an EN", ("END", "STOP"), finished=True) == ("an EN", False)
    assert visible_text("one ENtwo END three STOP", ("END", "STOP"), finished=False) == ("one ENtwo ", True)


def test_ends_agree_with_looking_at_every_start_of_the_text():
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice("ab ") for _ in range(rng.randint(0, 14)))
        ends = ["".join(rng.choice("ab ") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        stop = next((i for i in range(len(text) + 1) if text[:i].endswith(tuple(ends))), None)
        if stop is not None:
            found = max((end for end in ends if text[:stop].endswith(end)), key=len)
        expected = text if stop is None else text[: stop - len(found)]
        shown = ""
        for cut in range(len(text) + 1 if stop is None else stop + 1):
            before, (shown, ended) = shown, visible_text(text[:cut], ends, finished=False)
            assert shown.startswith(before) and ended == (cut == stop)  # nothing that has to be taken back
        assert visible_text(text, ends, finished=True) == (expected.lstrip(), stop is not None)


@pytest.mark.parametrize("end", [" END", "\n\nUSER:", "\n", "END"])
def test_an_end_that_starts_with_white_space_is_found_at_the_start(llama, end):
    tokens = llama(f"{end} more", add_special_tokens=False).input_ids
    if end == " END":  # Llama's first token has the space in it, which decoding it alone drops
        tokens = llama("END more", add_special_tokens=False).input_ids
    _, stream = stream_of(llama, tokens, ends=(end,))
    assert "".join(stream) == "" and stream.finish_reason == "stop"
    assert answer_text(llama, llama("USER:").input_ids, tokens, (end,)) == ""


def test_the_generation_ends_with_the_token_that_ends_the_text(llama):
    tokens = llama("A dog ## and # a cat###Human: And", add_special_tokens=False).input_ids
    generate, stream = stream_of(llama, tokens, ends=("###",))
    assert "".join(stream) == "A dog ## and # a cat" and stream.finish_reason == "stop"
    text = llama.decode(tokens[: generate.generated])
    assert "###" in text and "###" not in llama.decode(tokens[: generate.generated - 1])


def test_what_fails_in_the_thread_reaches_the_reader(llama):
    tokens = llama(TEXTS[0], add_special_tokens=False).input_ids
    _, stream = stream_of(llama, tokens, fails_at=4)
    pieces = []
    with pytest.raises(RuntimeError, match="the device is gone"):
        for piece in stream:
            pieces.append(piece)
    assert TEXTS[0].startswith("".join(pieces)) and pieces
    assert list(stream) == []


def test_closing_ends_the_generation(llama):
    tokens = llama(TEXTS[1], add_special_tokens=False).input_ids * 500
    generate, stream = stream_of(llama, tokens)
    with stream:
        next(stream)
    assert stream.finish_reason == "cancelled" and list(stream) == []
    assert stream.answer_tokens == generate.generated < len(tokens)
