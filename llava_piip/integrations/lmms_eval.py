"""PIIP-LLaVA as a model of lmms-eval 0.7: `lmms-eval --model piip_llava --model_args pretrained=FOLDER`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from accelerate import PartialState
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from piip_core.errors import UserError

from ..conversation import IGNORE_INDEX, IMAGE_TAG, Messages
from ..eval.running import default_dtype
from ..inference import ChatModel, MemoryLimitError, Quantization, explain_memory_limit

DEFAULT_NEW_TOKENS = 1024  # of lmms-eval's own LLaVA where a task says nothing

_OWN_SETTINGS = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "until", "stop_sequences")
_OTHER_SETTINGS = ("top_k", "repetition_penalty")
# `image_aspect_ratio`: LLaVA-1.5 reads it from its own configuration, and pads; here the model's processor says it.
# The others steer other programs or models: tasks that name them are asked as without
_IGNORED_SETTINGS = ("image_aspect_ratio", "max_agentic_steps", "seed", "skip_special_tokens", "visual_cot")

_log = logging.getLogger(__name__)

Conversation = tuple[Messages, Sequence[Image.Image]]


class _Value(tuple, GenerationResult):
    """What `loglikelihood` returns for a request: (number, whether greedy).

    lmms-eval 0.7.3's evaluator makes text of tuples, which its scoring then cannot read; a `GenerationResult` is handed
    on as its `text` is.
    """

    def __new__(cls, number: float, is_greedy: bool) -> _Value:
        return super().__new__(cls, (number, is_greedy))

    def __init__(self, number: float, is_greedy: bool) -> None:
        self.text, self.token_counts = (number, is_greedy), None


class PIIPLlava(lmms):
    """A model that gets a task's text and images ("simple" in lmms-eval), which covers all kinds of tasks.

    Images stand in front of the text, each in a line of its own, unless the text says `<image>` where they belong.
    docs/harnesses.md says what the arguments are.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        quantization: Quantization | None = None,
        likelihood: Literal["loss", "logprob"] = "loss",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size!r}: expected a number from 1 on; 'auto' is not supported")
        if likelihood not in ("loss", "logprob"):
            raise UserError(f"likelihood={likelihood!r}: expected 'loss' or 'logprob'")
        self.batch_size = int(batch_size)
        self.likelihood = likelihood
        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        target = torch.device(device) if device is not None and state.num_processes == 1 else state.device
        self.chat = ChatModel.load(
            pretrained, device=target, dtype=dtype or default_dtype(target), quantization=quantization
        )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.chat.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers to requests with the arguments (text, settings, images of a document, document, task, split)."""
        settings = [_settings(request.args[1]) for request in requests]
        answers: dict[int, str] = {}
        while left := [i for i in range(len(requests)) if i not in answers]:
            same = [i for i in left if settings[i] == settings[left[0]]]
            work = partial(self.chat.answer, **settings[left[0]])
            found = self._batched([requests[i] for i in same], self._asked, work, "", "lmms-eval: answers")
            answers |= zip(same, found, strict=True)
        return self._remembered("generate_until", requests, [answers[i] for i in range(len(requests))])

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuses tasks of several rounds."""
        raise NotImplementedError("PIIP-LLaVA's adapter answers no tasks of several rounds: leave them out of --tasks")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """How probable given answers are, and whether greedy generation gives them; see `likelihood`.

        The arguments are (text, answer or how to get it, images of a document, document, task, split), or
        (text, answer). An answer counts as the training has it: after the role, with its end token.
        """
        work, impossible = partial(_likelihoods, self.chat), (-math.inf, 1, False)
        found = self._batched(requests, self._answered, work, impossible, "lmms-eval: likelihoods")
        values = [
            _Value(total if self.likelihood == "logprob" else -total / num_tokens, is_greedy)
            for total, num_tokens, is_greedy in found
        ]
        return self._remembered("loglikelihood", requests, values)

    def _asked(self, request: Instance) -> Conversation:
        text, _, to_visuals, *_ = request.args
        return _question(text, to_visuals(self._document(request)))

    def _answered(self, request: Instance) -> Conversation:
        text, answer, *document = request.args
        visuals = None
        if document:
            doc = self._document(request)
            visuals = document[0](doc)
            answer = answer if isinstance(answer, str) else answer(doc)
        messages, images = _question(text, visuals)
        # The template puts the blank in front of an answer where it needs one
        return [*messages, {"role": "assistant", "content": answer.strip()}], images

    def _document(self, request: Instance) -> Any:
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _batched(
        self,
        requests: Sequence[Instance],
        make: Callable[[Instance], Conversation],
        work: Callable[[list[Conversation]], list[Any]],
        failed: Any,
        title: str,
    ) -> list[Any]:
        """Results of batches; each conversation is made when its turn comes, for it holds images.

        A document that cannot be asked costs the others nothing: it gets `failed`, and the log names it.

        Raises:
            UserError: If none can be asked, or memory is too small.
        """
        errors = []

        def attempt(batch: Sequence[Instance]) -> list[Any]:
            try:
                return work([make(request) for request in batch])
            except MemoryLimitError:
                raise
            except UserError as error:
                if len(batch) > 1:
                    return [result for request in batch for result in attempt([request])]
                errors.append(f"{_where(batch[0])}: {error}")
                return [failed]

        results = []
        with tqdm(total=len(requests), desc=title, unit="request", disable=self.rank != 0) as bar:
            for start in range(0, len(requests), self.batch_size):
                results += attempt(requests[start : start + self.batch_size])
                bar.update(len(results) - bar.n)
        if errors and len(errors) == len(requests):
            raise UserError(errors[0])
        for message in errors:
            _log.error("cannot be asked, and counts as %r: %s", failed, message)
        return results

    def _remembered(self, kind: str, requests: Sequence[Instance], results: list[Any]) -> list[Any]:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def _where(request: Instance) -> str:
    """What to call a request."""
    if len(request.args) <= 2:
        return "a request without a document"
    *_, doc_id, task, _split = request.args
    return f"{task}, document {doc_id}"


def _question(text: str, visuals: Any) -> Conversation:
    """A question with images in front of it, or where it says `<image>`."""
    images = [_image(visual) for visual in visuals or []]
    tags = text.count(IMAGE_TAG)
    if images and tags not in (0, len(images)):
        raise UserError(f"the text has {tags} {IMAGE_TAG} for {len(images)} images, expected none or as many")
    content: Any = text
    if images and not tags:
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}], images


def _likelihoods(chat: ChatModel, conversations: Sequence[Conversation]) -> list[tuple[float, int, bool]]:
    """How probable the answers are that conversations end with, all at once.

    Tokens are those of the training: the text after the role, with the end token of the template.

    Returns:
        For each answer its log-probability, its number of tokens, and whether each is the most probable one.

    Raises:
        ContextLengthError: If a conversation is longer than the context.
        UserError: If placeholders and images do not match, or an answer is empty.
    """
    given = [image for _, images in conversations for image in images]
    seen = chat.processor.image_processor(given, return_tensors="pt") if given else {}
    sizes = iter(seen.get("image_sizes", ()))
    encoded = [
        chat.processor.encode_conversation(
            messages, has_images=bool(images), image_sizes=list(islice(sizes, len(images)))
        )
        for messages, images in conversations
    ]
    chat.check_length(max(len(row.input_ids) for row in encoded))
    # Padded on the left: the answers are then in the last columns, the only ones whose logits are needed
    columns = [(row.input_ids, row.labels, [1] * len(row.labels)) for row in encoded]
    input_ids, targets, mask = (
        pad_sequence([torch.tensor(row[i]) for row in columns], True, value, "left").to(chat.device)
        for i, value in enumerate((0, IGNORE_INDEX, 0))
    )
    kept = int((targets != IGNORE_INDEX).sum(0).ne(0).flip(0).nonzero().max()) + 1
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    inputs |= {name: values.to(chat.device) for name, values in seen.items()}
    hint = f"{len(conversations)} conversations at once need too much memory: lower the batch size"
    with explain_memory_limit(hint), torch.inference_mode():
        logits = chat.model(**inputs, logits_to_keep=kept + 1, use_cache=False).logits[:, :-1]
        targets = targets[:, -kept:]
        loss = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
        counted = targets != IGNORE_INDEX
        greedy = ((logits.argmax(-1) == targets) | ~counted).all(1)
        values = -loss.double().sum(1), counted.sum(1), greedy
    return list(zip(*(value.tolist() for value in values), strict=True))


def _image(visual: Any) -> Image.Image:
    if not isinstance(visual, Image.Image):
        raise UserError(
            f"got {str(visual)[:100]!r} of type {type(visual).__name__}, expected an image (PIL); the model takes no "
            "video and no sound"
        )
    return visual


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `ChatModel.generate` from those of a task; none is changed in place, for all its requests share them.

    Raises:
        UserError: For a setting that the model does not have.
    """
    known = (*_OWN_SETTINGS, *_OTHER_SETTINGS, *_IGNORED_SETTINGS)
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"generation_kwargs: {', '.join(unknown)}: no such setting; known: {', '.join(known)}")
    temperature = given.get("temperature")
    sampled = bool(temperature) if given.get("do_sample") is None else given["do_sample"]
    until = given.get("until") or given.get("stop_sequences") or []
    until = [until] if isinstance(until, str) else list(until)
    if until == ["\n\n"]:  # what lmms-eval fills in where a task says nothing; its LLaVA does not stop there either
        until = []
    settings = {
        "max_new_tokens": int(given.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        "temperature": (1.0 if temperature is None else float(temperature)) if sampled else 0.0,
        "top_p": 1.0 if given.get("top_p") is None else float(given["top_p"]),
        "num_beams": int(given.get("num_beams") or 1),
        "until": until,
    }
    return settings | {name: given[name] for name in _OTHER_SETTINGS if given.get(name) is not None}
