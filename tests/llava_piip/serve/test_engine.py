"""Answers made together are those made alone, whoever comes, goes and shares."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llava_piip.serve.application import ServerSettings, create_app
from llava_piip.serve.engine import Engine, EngineError, EngineSettings, Sampling
from llava_piip.serve.generation import ContextLengthError
from piip_core.errors import ConfigError

SAMPLING = Sampling(max_new_tokens=24)


def run(chat, work, **settings):
    """Result of `work(engine)` on an engine that runs."""

    async def main():
        engine = Engine(chat, EngineSettings(**settings))
        await engine.start()
        try:
            return await asyncio.wait_for(work(engine), 120)
        finally:
            await engine.stop()

    return asyncio.run(main())


async def tokens_of(engine, messages, images, sampling=SAMPLING):
    answer = await engine.prepare(messages, images, sampling)
    async for _ in answer.pieces():
        pass
    return answer.tokens


def questions(pictures):
    """Conversations of different lengths, with no, one and two pictures."""
    found = []
    for number, picture in enumerate(pictures):
        images = [[picture], [], [picture, pictures[number - 1]]][number % 3]
        text = "<image>\n" * len(images) + "What is it? " + "And then? " * (number % 4)
        found.append(([{"role": "user", "content": text}], images))
    return found


def alone(chat, messages, images, new_tokens=SAMPLING.max_new_tokens):
    """The answer that generate gives, without the engine."""
    inputs = chat.encode(messages, images, max_new_tokens=new_tokens)
    with torch.inference_mode():
        ids = chat.model.generate(**inputs, generation_config=chat.generation_config(max_new_tokens=new_tokens))
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_together_as_alone(tiny_chat, pictures):
    asked = questions(pictures)
    expected = [alone(tiny_chat, *question) for question in asked]
    assert len(set(map(tuple, expected))) > 8

    async def work(engine):
        return await asyncio.gather(*(tokens_of(engine, *question) for question in asked * 2))

    # Fewer places than pictures, fewer at a time than questions: some wait for others
    assert run(tiny_chat, work, image_places=3, max_batch=5) == expected * 2


def test_prompts_are_made_by_many_threads(tiny_chat, pictures):
    rounds = [{"role": "assistant", "content": "A thing."}, {"role": "user", "content": "Which?"}]
    conversations = [
        ([*messages, *rounds * (n % 4)], images) for n, (messages, images) in enumerate(questions(pictures))
    ]

    def ids(conversation):
        return tiny_chat.encode(*conversation, max_new_tokens=1)["input_ids"].tolist()

    expected = [ids(conversation) for conversation in conversations]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ids, conversations * 8)) == expected * 8
    finally:
        sys.setswitchinterval(interval)


def test_pictures_are_told_apart_in_shared_prompts(tiny_chat, pictures):
    # Equal but for the picture, which lies in a whole block of the cache (32 tokens)
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    ids = tiny_chat.encode(messages, pictures[:1], max_new_tokens=1)["input_ids"][0].tolist()
    assert ids.index(tiny_chat.processor.image_token_id) // 32 < len(ids) // 32
    expected = [alone(tiny_chat, messages, [picture]) for picture in pictures]
    assert len(set(map(tuple, expected))) > 6

    async def work(engine):
        first = [await tokens_of(engine, messages, [picture]) for picture in pictures]
        again = await asyncio.gather(*(tokens_of(engine, messages, [picture]) for picture in pictures))
        return first, again

    assert run(tiny_chat, work, image_places=4) == (expected, expected)


def test_those_who_leave_disturb_nobody(tiny_chat, pictures):
    asked = questions(pictures)
    expected = [alone(tiny_chat, *question) for question in asked]

    async def leave(engine, question):
        answer = await engine.prepare(*question, SAMPLING)
        pieces = answer.pieces()
        await anext(pieces)
        await pieces.aclose()

    async def work(engine):
        stayed = [asyncio.ensure_future(tokens_of(engine, *question)) for question in asked]
        gone = [asyncio.ensure_future(leave(engine, question)) for question in asked]
        cancelled = [asyncio.ensure_future(tokens_of(engine, *question)) for question in asked]
        await asyncio.sleep(0.02)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*gone)
        answers = await asyncio.gather(*stayed)
        for _ in range(1000):  # the engine hears of it at its next step
            if not engine._manager.batch_processor.scheduler.has_pending_requests():
                break
            await asyncio.sleep(0.02)
        scheduler = engine._manager.batch_processor.scheduler
        assert not scheduler.has_pending_requests() and not engine._manager.output_router.result_handlers
        assert all(not picture.users for picture in engine._features._pictures.values())
        return answers

    assert run(tiny_chat, work, image_places=3) == expected


def test_sampling_settings_are_each_request_s_own(tiny_chat, pictures):
    (question, *_) = questions(pictures)
    greedy = alone(tiny_chat, *question)

    async def work(engine):
        hot = Sampling(max_new_tokens=24, temperature=2.0)
        narrow = Sampling(max_new_tokens=24, temperature=2.0, top_p=1e-6)  # leaves the most probable token
        return await asyncio.gather(*(tokens_of(engine, *question, way) for way in (SAMPLING, hot, narrow, hot) * 3))

    answers = run(tiny_chat, work)
    assert answers[0::4] == [greedy] * 3 and answers[2::4] == [greedy] * 3
    assert len(set(map(tuple, [*answers[1::4], *answers[3::4], greedy]))) == 7


def test_counts_reason_and_stop_text(tiny_chat, pictures):
    (question, *_) = questions(pictures)
    tokens = alone(tiny_chat, *question)
    whole = tiny_chat.processor.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]

    async def work(engine):
        full = await engine.prepare(*question, SAMPLING)
        assert "".join([piece async for piece in full.pieces()]) == whole
        short = await engine.prepare(*question, Sampling(max_new_tokens=24, stop=(stop,)))
        assert "".join([piece async for piece in short.pieces()]) == whole[: whole.index(stop)]
        assert (full.finish_reason, short.finish_reason) == ("length", "stop")
        assert full.tokens == tokens and 0 < len(short.tokens) < 24
        assert full.prompt_tokens == tiny_chat.encode(*question, max_new_tokens=1)["input_ids"].shape[1]
        everything = await engine.prepare(*question, Sampling())
        assert everything._config.max_new_tokens == min(512, tiny_chat.context_length - full.prompt_tokens)
        with pytest.raises(ContextLengthError):
            await engine.prepare(*question, Sampling(max_new_tokens=tiny_chat.context_length))

    run(tiny_chat, work)


def test_failure_reaches_those_who_wait(tiny_chat, pictures, monkeypatch):
    (question, *_) = questions(pictures)

    async def work(engine):
        assert engine.alive
        broken = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))  # noqa: E731
        monkeypatch.setattr(engine._features, "embed", broken)
        results = await asyncio.gather(*(tokens_of(engine, *question) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, EngineError) for result in results)
        assert not engine.alive
        with pytest.raises(EngineError):
            await tokens_of(engine, *question)

    run(tiny_chat, work)


def test_model_is_given_back(tiny_chat, pictures):
    (question, *_) = questions(pictures)
    before = alone(tiny_chat, *question)

    async def work(engine):
        return await tokens_of(engine, *question)

    assert run(tiny_chat, work) == before
    assert alone(tiny_chat, *question) == before


def test_settings_that_cannot_work(tiny_chat):
    with pytest.raises(ConfigError, match="max_batch=0"):
        EngineSettings(max_batch=0)
    with pytest.raises(ConfigError, match="image_places=7: a request may have 8 pictures"):
        create_app(Engine(tiny_chat, EngineSettings(image_places=7)), ServerSettings(name="tiny"))


def test_steps_are_compiled_where_that_is_asked_for(tiny_chat):
    # Compiling them takes minutes on a CPU, which is why they are not run here
    levels = [Engine(tiny_chat, EngineSettings(compiled=on))._batching_config() for on in (False, True)]
    assert [config.default_compile_level for config in levels] == [0, 1]
