"""Ids and positions of text: the recorded slow tokenizers, positions, saving, literal tags, other tokenizers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkers import find_cases
from checkers.llava.text import llama_tokenizer, verify_tokenizer
from llava_piip.tokenization import bos_ids, encode_text, keep_legacy_setting
from piip_core.errors import ConfigError

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
TEXTS = ["", "a", " a", "  a", "\u2581a", "x y", "caf\u00e9 \U0001f436!", "\n", " \n "]
TEXTS += ["</s>", " </s> a", "a<s>b </s>", "<unk> 7"]
SNIPPETS = [*"abcXYZ 123.,!?\n\t</s", "  ", "\u2581", "\u00e9", "\u4e2d", "\U0001f436", "\u00a0", "the ", "USER:"]


def sentence_pieces(file):
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture(params=[("A", False), ("A", True), ("C", False), ("C", True)], ids=str)
def llama(request):
    name, legacy = request.param
    with llama_tokenizer(GOLDENS / f"llava_tokenizer_{name}.model", legacy=legacy) as tokenizer:
        yield tokenizer


@pytest.fixture
def byte_level():
    """One token per byte, no bos, a special token: the kind of Qwen's tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@pytest.mark.parametrize("name", ["A", "C"])
def test_recorded_slow_tokenizer(name):
    (case,) = find_cases([GOLDENS / f"llava_tokenizer_{name}.json"])
    comparisons = verify_tokenizer(case).comparisons
    recorded = len(case.info["encode"]) * 4 + len(case.info["decode"]) + 2
    assert len(comparisons) == recorded and not [c for c in comparisons if not c.passed]


def test_wrong_ids_are_noticed():
    (case,) = find_cases([GOLDENS / "llava_tokenizer_C.json"])
    first, *others = case.info["encode"]
    wrong = case.info | {"encode": [first | {"ids": [1, 3]}] + others}
    failed = [c.name for c in verify_tokenizer(replace(case, info=wrong)).comparisons if not c.passed]
    assert failed == ["output.encode.0.ids", "output.encode.0.pieces", "output.encode.0.decoded"]


def test_ids_are_those_of_sentencepiece(llama):
    """Random texts without special tokens, against the library that made the vocabulary."""
    size = len(llama)
    (model,) = [file for file in GOLDENS.glob("llava_tokenizer_*.model") if len(sentence_pieces(file)) == size]
    reference, rng = sentence_pieces(model), random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice(SNIPPETS) for _ in range(rng.randint(0, 25)))
        ids, offsets = encode_text(llama, text)
        assert ids == reference.encode(text.replace("\u2581", " ")), text
        assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text))), text


@pytest.mark.parametrize("text", TEXTS)
def test_positions_say_where_a_token_comes_from(llama, text):
    """Every character belongs to a token, in order, and a token's own characters are the ones it covers."""
    ids, offsets = encode_text(llama, text)
    assert {i for start, end in offsets for i in range(start, end)} == set(range(len(text)))
    assert offsets == sorted(offsets) and all(start < end for start, end in offsets)
    for token, (start, end) in zip(llama.convert_ids_to_tokens(ids), offsets, strict=True):
        covered = text[start:end].replace("\u2581", " ")
        if not token.startswith("<0x"):
            # the prefix space is a part of the first character of its piece
            assert token.replace("\u2581", " ") in (covered, " " + covered, " ")


def test_older_kind_puts_a_space_after_every_special_token():
    with llama_tokenizer(GOLDENS / "llava_tokenizer_A.model", legacy=True) as older:
        ids, offsets = encode_text(older, "a</s>b")
        assert older.convert_ids_to_tokens(ids) == ["\u2581a", "</s>", "\u2581b"]
        assert offsets == [(0, 1), (1, 5), (5, 6)]
    with llama_tokenizer(GOLDENS / "llava_tokenizer_A.model", legacy=False) as newer:
        assert newer.convert_ids_to_tokens(encode_text(newer, "a</s>b")[0]) == ["\u2581a", "</s>", "b"]


def test_saving_keeps_the_kind(llama, tmp_path):
    keep_legacy_setting(llama)
    llama.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.legacy == llama.legacy
    assert [encode_text(loaded, text) for text in TEXTS] == [encode_text(llama, text) for text in TEXTS]


def test_literal_tag_is_ordinary_text_although_a_token_has_its_name(llama):
    texts = ["<image>", "a <image> b</s>", "<image>\n<image>"]
    without = [encode_text(llama, text) for text in texts]
    size = len(llama)
    llama.add_tokens(["<image>", "<pad>"], special_tokens=True)
    assert size in encode_text(llama, "a <image>")[0]
    assert [encode_text(llama, text, literals=("<image>",)) for text in texts] == without
    assert encode_text(llama, "<image><pad>", literals=("<image>",))[0][-1] == size + 1  # other ids stay


def test_other_tokenizers_are_used_as_they_are(byte_level):
    text = " caf\u00e9<|im_end|> x"
    ids, offsets = encode_text(byte_level, text)
    assert ids == byte_level(text).input_ids
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert offsets[4:6] == [(4, 5), (4, 5)]  # the two bytes of one letter
    assert offsets[6] == (5, 15)


def test_start_of_sequence(llama, byte_level):
    assert bos_ids(llama) == [1]
    assert bos_ids(byte_level) == []
    llama.add_bos_token = False
    assert bos_ids(llama) == []


def test_tokenizer_without_positions_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow gives no character positions"):
        encode_text(Slow(), "a")
