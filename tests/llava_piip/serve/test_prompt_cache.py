"""Answers are the same whatever is kept of earlier prompts, and what was kept is not computed again."""

import copy
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MistralConfig, MistralForCausalLM

from llava_piip.assembly import join
from llava_piip.image_processing import ImageError
from llava_piip.serve import chat, prompt_cache
from llava_piip.serve.generation import ChatModel
from piip_core.errors import ConfigError

NEW_TOKENS = 10


class Talk:
    """A conversation of one model that keeps and one that keeps nothing; their answers must agree."""

    def __init__(self, chat, pictures, **options):
        model = chat.model.double()  # rounding cannot change which token is the most probable
        self.kept = ChatModel(model, chat.processor, **options)
        self.fresh = ChatModel(model, chat.processor, kept_tokens=0)
        self.cache, self.pictures = self.kept.prompt_cache, pictures
        self.messages, self.images = [], []

    def ask(self, text, *numbers):
        self.messages = [*self.messages, {"role": "user", "content": "<image>\n" * len(numbers) + text}]
        self.images = [*self.images, *(self.pictures[number] for number in numbers)]
        return self.answer()

    def answer(self):
        """The answer, and how many tokens were reused and pictures encoded."""
        stream = self.kept.stream(self.messages, self.images, max_new_tokens=NEW_TOKENS)
        answer = "".join(stream)
        expected = "".join(self.fresh.stream(self.messages, self.images, max_new_tokens=NEW_TOKENS))
        assert answer == expected
        self.messages = [*self.messages, {"role": "assistant", "content": expected.strip()}]
        return self.cache.reused_tokens, self.cache.encoded_pictures, stream.prompt_tokens


@pytest.fixture
def talk(tiny_chat, pictures):
    return lambda **options: Talk(tiny_chat, pictures, **options)


def test_a_conversation_that_goes_on_computes_what_is_new(talk):
    talk = talk()
    reused, encoded, prompt = talk.ask("What is it?", 0)
    assert (reused, encoded) == (0, 1)
    for question, numbers in (("And why?", ()), ("Is this the same?", (1, 2)), ("Or this?", (0,)), ("So?", ())):
        before = prompt
        reused, encoded, prompt = talk.ask(question, *numbers)
        # Decoding what a random model said and encoding it again need not give the same tokens
        assert reused >= before and encoded == len(set(numbers) - {0})


def test_changes_anywhere_in_the_conversation_are_found(talk):
    talk = talk()
    first = talk.ask("What is it?", 0)[2]
    second = talk.ask("And what is behind it?", 1)[2]
    talk.messages, talk.images = talk.messages[:-1], talk.images  # retried
    assert talk.answer()[:2] == (second - 1, 0)
    talk.messages = [*talk.messages[:2], {"role": "user", "content": "<image>\nAnd what is left of it?"}]
    reused, encoded, _ = talk.answer()
    assert first <= reused < second and encoded == 0  # up to the words that were changed
    talk.messages, talk.images = talk.messages[:3], [talk.pictures[0], talk.pictures[3]]
    reused, encoded, _ = talk.answer()
    assert first - 1 <= reused < second - 10 and encoded == 1
    talk.messages, talk.images = talk.messages[:3], [talk.pictures[4], talk.pictures[3]]
    reused, encoded, _ = talk.answer()
    assert reused < first - 4 and encoded == 1  # 3 is kept as features, not as keys and values
    talk.messages, talk.images = [], []
    assert talk.ask("What is it?", 0)[1] == 0


def test_a_stopped_answer_is_gone_on_from(talk):
    talk = talk()
    event = threading.Event()
    messages, images = [{"role": "user", "content": "<image>\nWhat?"}], talk.pictures[:1]
    with talk.kept.stream(messages, images, max_new_tokens=300, stop_event=event) as stream:
        pieces = [next(stream) for _ in range(4)]
        event.set()
        pieces += stream
    assert stream.finish_reason == "cancelled"
    talk.messages, talk.images = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}], images
    reused, encoded, _ = talk.ask("Go on.")
    assert reused >= stream.prompt_tokens and encoded == 0
    talk.messages = messages
    assert talk.answer()[:2] == (stream.prompt_tokens - 1, 0)


def test_what_fails_leaves_nothing_half_done(talk, monkeypatch):
    talk = talk()
    talk.ask("What is it?", 0)
    with monkeypatch.context() as patch:
        patch.setattr(talk.kept.model.lm_head, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.ask("And this?", 1)
    talk.messages, talk.images = talk.messages[:-1], talk.images[:-1]
    assert talk.ask("And that?", 2)[:2] == (0, 1)  # a cache that was written into in part is not used again
    with pytest.raises(ImageError, match="mode 'F'"):
        talk.kept.stream(talk.messages[:1], [Image.new("F", (8, 8))], max_new_tokens=4)


def test_nothing_is_kept_when_memory_runs_out(talk, monkeypatch):
    talk = talk()
    talk.ask("What is it?", 0)
    messages, images = talk.messages, talk.images
    talk.messages, talk.images = [], []

    def fail(_):
        raise torch.OutOfMemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(talk.kept.model.lm_head, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            talk.ask("Or this?", 1)
    talk.messages, talk.images = messages, images
    assert talk.ask("And then?")[:2] == (0, 1)


def test_the_command_line_says_how_much_is_kept(model_folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ChatModel, "load", classmethod(lambda cls, *_, **options: asked.append(options) or 1 / 0))
    for options in ([], ["--kept-tokens", "100", "--compile"]):
        with pytest.raises(ZeroDivisionError):
            chat.main(["--model", str(model_folder), *options])
    assert [(found["kept_tokens"], found["compiled"]) for found in asked] == [(None, False), (100, True)]
    monkeypatch.undo()
    assert chat.main(["--model", str(model_folder), "--device", "cpu", "--kept-tokens", "-1"]) == 2
    assert "kept_tokens=-1: expected 0" in capsys.readouterr().err


def test_conversations_of_several_visitors_are_kept_side_by_side_within_the_bound(talk):
    talk = talk(kept_tokens=330)
    visitors = []
    for number in range(3):
        talk.messages, talk.images = [], []
        prompt = talk.ask("What is it?", number)[2]
        visitors.append((talk.messages, talk.images))
    assert 100 <= prompt < 110
    assert sum(len(kept.tokens) for kept in talk.cache._conversations) <= 330
    assert len(talk.cache._conversations) == 2
    # The oldest one had to go, its features did not
    for number, found in ((2, True), (1, True), (0, False)):
        talk.messages, talk.images = visitors[number]
        reused, encoded, _ = talk.ask("Why?")
        assert (reused >= prompt) == found and encoded == 0
    talk.cache.clear()
    assert talk.ask("And?")[:2] == (0, 1)


def test_nothing_is_kept_where_nothing_should_be(tiny_chat, pictures):
    talk = Talk(tiny_chat, pictures, kept_tokens=0)
    talk.cache._kept_pictures = 0
    talk.ask("What is it?", 0, 0, 1)
    assert talk.ask("Why?")[:2] == (0, 2) and not talk.cache._features
    with pytest.raises(ConfigError, match="kept_tokens=-1"):
        ChatModel(tiny_chat.model, tiny_chat.processor, kept_tokens=-1)


def test_the_least_recently_used_picture_makes_room(talk):
    talk = talk(kept_tokens=0)
    talk.cache._kept_pictures = 2
    for numbers, encoded in (((0,), 1), ((1,), 1), ((0,), 0), ((2,), 1), ((0,), 0), ((1,), 1)):
        talk.messages, talk.images = [], []
        assert talk.ask("What is it?", *numbers)[1] == encoded


def test_pictures_are_told_apart_by_what_the_model_sees(talk):
    palette = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8), "P")
    palette.putpalette(list(range(144)))
    other = palette.copy()
    other.putpalette(list(range(143, -1, -1)))
    tensor = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    talk = talk()
    talk.pictures = [palette, other, palette.convert("RGB"), palette.copy(), tensor]
    for number, encoded in enumerate((1, 1, 1, 0, 1)):
        talk.messages, talk.images = [], []
        assert talk.ask("What is it?", number)[1] == encoded


def test_threads_do_not_disturb_one_another(talk):
    talk = talk()
    questions = [[{"role": "user", "content": f"<image>\n{word}?"}] for word in ("What", "Where", "When", "Who")]
    expected = ["".join(talk.fresh.stream(question, talk.pictures[:1], max_new_tokens=20)) for question in questions]
    for _ in range(3):
        streams = [talk.kept.stream(question, talk.pictures[:1], max_new_tokens=20) for question in questions]
        assert ["".join(stream) for stream in streams] == expected


def test_compiled_steps_give_the_same_answers(talk, monkeypatch):
    config = prompt_cache._compilation(torch.device("cpu"))
    assert config.backend == "inductor" and config.dynamic is False
    config.backend = "aot_eager"  # traces the same graphs and spares the test half a minute of C++ compilation
    monkeypatch.setattr(prompt_cache, "_compilation", lambda _: config)
    talk = talk(compiled=True)
    _, _, first = talk.ask("What is it?", 0)
    cache = talk.cache._static
    reused, encoded, second = talk.ask("And this?", 1)
    assert reused >= first and encoded == 1
    talk.messages = talk.messages[:-1]
    assert talk.answer()[:2] == (second - 1, 0)
    talk.messages, talk.images = [], []
    reused, encoded, _ = talk.ask("Something else?", 2)
    assert reused < first and encoded == 1
    assert talk.cache._static is cache  # its place in memory is part of a CUDA graph
    assert talk.kept.model._last_compile_config.backend == "aot_eager"


def test_a_static_cache_grows_with_the_conversation(talk, monkeypatch):
    monkeypatch.setattr(prompt_cache, "_LEAST_PLACES", 32)
    monkeypatch.setattr(prompt_cache, "_compilation", lambda _: None)  # transformers does not compile on CPUs then
    talk = talk(compiled=True)
    talk.ask("What is it?", 0)
    assert talk.cache._static.get_max_length() == 128
    assert talk.ask("And this?", 1)[:2] == (0, 1)  # of 2 pictures: visual tokens are kept all the same
    assert talk.cache._static.get_max_length() == 256
    assert talk.ask("And that?", 1)[0] > 128
    for _ in range(3):
        talk.ask("What else is to be seen behind it, and to the left of it, and to the right of it?")
    assert talk.cache._static.get_max_length() == 512 == talk.kept.context_length


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cache_that_cannot_be_cropped_is_not_kept(tiny_llava, pictures, monkeypatch, compiled):
    monkeypatch.setattr(prompt_cache, "_compilation", lambda _: None)
    model, processor = tiny_llava
    sizes = {**model.config.text_config.to_dict(), "model_type": "mistral", "sliding_window": 24}
    decoder = MistralForCausalLM(MistralConfig(**sizes))
    config = copy.deepcopy(model.config)
    config.text_config = decoder.config
    slides = join(config, model.model.vision_tower, decoder)
    talk = Talk(ChatModel(slides, processor), pictures, compiled=compiled)
    talk.ask("What is it?", 0)
    assert talk.ask("And this?", 1)[:2] == (0, 1)
    assert talk.ask("And this?", 0)[:2] == (0, 0)
