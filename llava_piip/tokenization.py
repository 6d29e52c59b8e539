"""Token ids and character positions of plain text, as the published slow tokenizers give them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase

from piip_core.errors import ConfigError

Encoded = tuple[list[int], list[tuple[int, int]]]

# What `Metaspace` takes for a space that is there already, and then adds no prefix space
SPACES = (" ", "\u2581")

# Copies of backends, some with names of tokens that are ordinary text in them; by tokenizer, its size and these names
_BACKENDS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int | str, ...], Tokenizer]] = WeakKeyDictionary()


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, literals: Sequence[str] = ()) -> Encoded:
    """Ids of a text without bos, and which characters each of them covers.

    Llama's SentencePiece puts a space in front of every text; its fast tokenizer leaves it out where the text starts
    with a space, and this function does not. With a tokenizer of the older kind (`legacy=True`) each piece between
    special tokens gets its own space. Other tokenizers (byte-level BPE) are used as they are.

    Names of special tokens in the text become those tokens, but for the `literals`.

    Returns:
        The ids, and for each the first character and the one after the last. A prefix space counts as a part of the
        first character.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"{type(tokenizer).__name__} gives no character positions: load the fast tokenizer")
    backend = _backend(tokenizer, tuple(name for name in literals if name in text))
    pre_tokenizer = backend.pre_tokenizer
    # Where SentencePiece puts a prefix space: "first" piece, "always", "never"
    prefix = pre_tokenizer.prepend_scheme if isinstance(pre_tokenizer, Metaspace) else "never"
    if prefix == "never":
        return _encode(backend, text)
    if prefix == "first":
        return _encode_with_prefix(backend, text)

    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    end = 0
    for token, start, stop in _added_tokens(backend, text) + [(None, len(text), len(text))]:
        if start > end:
            piece_ids, piece_offsets = _encode_with_prefix(backend, text[end:start])
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


def _encode(backend: Tokenizer, text: str) -> Encoded:
    encoding = backend.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _encode_with_prefix(backend: Tokenizer, text: str) -> Encoded:
    if not text.startswith(SPACES):
        return _encode(backend, text)
    ids, offsets = _encode(backend, " " + text)
    return ids, [(max(start - 1, 0), max(stop - 1, 1)) for start, stop in offsets]


def _added_tokens(backend: Tokenizer, text: str) -> list[tuple[int | None, int, int]]:
    """Tokens of the text that are matched by name: id, first character, the one after the last."""
    names = {token: added.content for token, added in backend.get_added_tokens_decoder().items()}
    return [
        (token, start, stop)
        for token, (start, stop) in zip(*_encode(backend, text), strict=True)
        if token in names and text[start:stop].strip() == names[token]  # an unknown character has the id of <unk> too
    ]


def _backend(tokenizer: PreTrainedTokenizerBase, literals: tuple[str, ...]) -> Tokenizer:
    """A copy that cuts and pads nothing and does not look for these tokens; the ids of all others stay."""
    backends = _BACKENDS.setdefault(tokenizer, {})
    key = (len(tokenizer), *literals)  # tokens may be added later
    if key not in backends:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = []
        for token in content["added_tokens"]:
            if token["content"] in literals:
                if token["content"] in content["model"]["vocab"]:
                    continue
                token["content"] = f"\ufffe{token['content']}\ufffe"  # a noncharacter: in no text, but keeps the id
            kept.append(token)
        backends[key] = Tokenizer.from_str(json.dumps(content | {"added_tokens": kept}))
        backends[key].no_truncation()
        backends[key].no_padding()
    return backends[key]
