"""Token ids and character positions of plain text, as the published slow tokenizers give them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase

from piip_core.errors import ConfigError

Encoded = tuple[list[int], list[tuple[int, int]]]
Encode = Callable[[str], Encoded]

# What `Metaspace` takes for a space that is there already, and then adds no prefix space
SPACES = (" ", "\u2581")

# Backends in which a token's name is ordinary text, by tokenizer, its size and the names
_LITERAL_BACKENDS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int | str, ...], Tokenizer]]
_LITERAL_BACKENDS = WeakKeyDictionary()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, literals: Sequence[str] = ()) -> Encoded:
    """Ids of a text without bos, and which characters each of them covers.

    Llama's SentencePiece puts a space in front of every text; its fast tokenizer leaves it out where the text starts
    with a space, and this function does not. With a tokenizer of the older kind (`legacy=True`) each piece between
    special tokens gets its own space. Other tokenizers (byte-level BPE) are used as they are.

    Args:
        tokenizer: A fast tokenizer.
        text: The text; names of special tokens in it become those tokens.
        literals: Names of tokens that are ordinary characters here.

    Returns:
        The ids, and for each the first character and the one after the last. A prefix space counts as a part of the
        first character.

    Raises:
        ConfigError: If the tokenizer is not a fast one: others do not tell positions.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} gives no character positions: load the fast tokenizer")
    encode = _encoder(tokenizer, literals, text)
    prefix = _prefix_scheme(tokenizer)
    if prefix not in ("first", "always"):
        return encode(text)
    if prefix == "first":
        return _encode_with_prefix(encode, text)

    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    end = 0
    for token, start, stop in _added_tokens(tokenizer, encode, text) + [(None, len(text), len(text))]:
        if start > end:
            piece_ids, piece_offsets = _encode_with_prefix(encode, text[end:start])
            ids += piece_ids
            offsets += [(first + end, last + end) for first, last in piece_offsets]
        if token is not None:
            ids.append(token)
            offsets.append((start, stop))
        end = stop
    return ids, offsets


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids a sequence starts with: `[bos]`, or nothing for tokenizers that put none in front (Qwen)."""
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def keep_legacy_setting(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `save_pretrained` write `legacy`, which transformers 5 forgets: a saved tokenizer would be another one."""
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def _prefix_scheme(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where SentencePiece puts a prefix space ("first" piece, "always", "never"); None for other tokenizers."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return pre_tokenizer.prepend_scheme if isinstance(pre_tokenizer, Metaspace) else None


def _encoder(tokenizer: PreTrainedTokenizerBase, literals: Sequence[str], text: str) -> Encode:
    hidden = tuple(name for name in literals if name in text and name in tokenizer.get_added_vocab())
    if not hidden:
        return partial(_encode_whole, tokenizer)
    backends = _LITERAL_BACKENDS.setdefault(tokenizer, {})
    key = (len(tokenizer), *hidden)  # tokens may be added later
    if key not in backends:
        backends[key] = _without_tokens(tokenizer.backend_tokenizer, hidden)
    return partial(_encode_backend, backends[key])


def _encode_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [tuple(offset) for offset in encoded["offset_mapping"]]


def _encode_backend(backend: Tokenizer, text: str) -> Encoded:
    encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _encode_with_prefix(encode: Encode, text: str) -> Encoded:
    if not text.startswith(SPACES):
        return encode(text)
    ids, offsets = encode(" " + text)
    return ids, [(max(start - 1, 0), max(stop - 1, 1)) for start, stop in offsets]


def _added_tokens(tokenizer: PreTrainedTokenizerBase, encode: Encode, text: str) -> list[tuple[int | None, int, int]]:
    """Tokens of the text that are matched by name: id, first character, the one after the last."""
    names = {token: str(name) for token, name in tokenizer.added_tokens_decoder.items()}
    return [
        (token, start, stop)
        for token, (start, stop) in zip(*encode(text), strict=True)
        if token in names and text[start:stop].strip() == names[token]  # an unknown character has the id of <unk> too
    ]


def _without_tokens(backend: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """A copy that does not look for these tokens; the ids of all others stay."""
    content = json.loads(backend.to_str())
    kept = []
    for token in content["added_tokens"]:
        if token["content"] in names:
            if token["content"] in content["model"]["vocab"]:
                continue
            token["content"] = f"\ufffe{token['content']}\ufffe"  # a noncharacter: found in no text, but keeps the id
        kept.append(token)
    copy = Tokenizer.from_str(json.dumps(content | {"added_tokens": kept}))
    copy.no_truncation()
    copy.no_padding()
    return copy
