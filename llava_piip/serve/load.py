"""Measures a server under load, as its clients see it."""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np
from openai import AsyncOpenAI, OpenAIError
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

__all__ = ["LoadResult", "format_results", "measure"]

_QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class LoadResult:
    """What some clients saw that asked one question after the other.

    Attributes:
        clients: That ask at a time.
        seconds: From the first question to the last answer.
        durations: Of each request that was answered, in seconds.
        first_texts: Until the first text of each, in seconds.
        tokens: Generated in all.
        failed: Requests without a whole answer.
        differing: Answers that come out otherwise when they are asked for again, alone.
    """

    clients: int
    seconds: float
    durations: tuple[float, ...]
    first_texts: tuple[float, ...]
    tokens: int
    failed: int
    differing: int

    @property
    def throughput(self) -> float:
        """Answered requests per second."""
        return len(self.durations) / self.seconds


@dataclass(frozen=True)
class _Reply:
    text: str
    duration: float
    first_text: float
    tokens: int


async def measure(
    url: str, *, clients: Sequence[int], requests: int, max_tokens: int, api_key: str = "none", image_size: int = 336
) -> list[LoadResult]:
    """Asks about pictures that the server has not seen, with one number of clients after the other.

    Afterwards a part of the questions is asked again one at a time, to find answers that were mixed up.

    Args:
        url: Of the server, such as http://127.0.0.1:8000/v1.
        clients: Numbers of clients that ask at a time.
        requests: For each number of clients.
        max_tokens: Most tokens of an answer.
        api_key: The server's key.
        image_size: Side of the pictures in pixels.

    Raises:
        OpenAIError: If the server does not answer at all.
    """
    found = []
    async with AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=600) as client:
        (model, *_) = [entry.id async for entry in client.models.list()]
        for warm in range(2):
            await _ask(client, model, _picture(image_size, warm, 0), max_tokens)
        for level, count in enumerate(clients, 1):
            pictures = [_picture(image_size, level, number) for number in range(1, requests + 1)]
            start = time.perf_counter()
            replies = await _ask_all(client, model, pictures, max_tokens, count)
            seconds = time.perf_counter() - start
            checked = range(0, requests, max(1, requests // 8))
            again = [await _ask(client, model, pictures[number], max_tokens) for number in checked]
            pairs = [(replies[number], reply) for number, reply in zip(checked, again, strict=True)]
            answered = [reply for reply in replies if reply is not None]
            found.append(
                LoadResult(
                    clients=count,
                    seconds=seconds,
                    durations=tuple(reply.duration for reply in answered),
                    first_texts=tuple(reply.first_text for reply in answered),
                    tokens=sum(reply.tokens for reply in answered),
                    failed=requests - len(answered),
                    differing=sum(first is not None and first.text != reply.text for first, reply in pairs),
                )
            )
    return found


def format_results(results: Sequence[LoadResult]) -> str:
    """A table; gain is the throughput by that of the first row."""
    rows = [
        {
            "clients": result.clients,
            "requests/s": f"{result.throughput:.2f}",
            "gain": f"{result.throughput / results[0].throughput:.2f}",
            "tokens/s": f"{result.tokens / result.seconds:.0f}",
            **{f"p{p} s": f"{_percentile(result.durations, p):.3f}" for p in (50, 90, 99)},
            "first text p50 s": f"{_percentile(result.first_texts, 50):.3f}",
            "failed": result.failed,
            "differing": result.differing,
        }
        for result in results
    ]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, stralign="right")


async def _ask_all(
    client: AsyncOpenAI, model: str, pictures: Sequence[str], max_tokens: int, clients: int
) -> list[_Reply | None]:
    replies: list[_Reply | None] = [None] * len(pictures)
    waiting = iter(range(len(pictures)))
    with tqdm(total=len(pictures), desc=f"{clients} clients", unit="request") as progress:

        async def work() -> None:
            for number in waiting:
                try:
                    replies[number] = await _ask(client, model, pictures[number], max_tokens)
                except (OpenAIError, httpx.TransportError) as error:  # the second in the middle of an answer
                    progress.write(f"request {number}: {error}")
                progress.update()

        await asyncio.gather(*(work() for _ in range(clients)))
    return replies


async def _ask(client: AsyncOpenAI, model: str, picture: str, max_tokens: int) -> _Reply:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": _QUESTION}]
    start, first, text, tokens = time.perf_counter(), None, "", 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
            text += chunk.choices[0].delta.content
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    end = time.perf_counter()
    return _Reply(text, end - start, (first or end) - start, tokens)


def _picture(size: int, *seed: int) -> str:
    """A data URI of a picture like no other: blocks of colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
