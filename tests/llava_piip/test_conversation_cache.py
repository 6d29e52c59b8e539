"""Answers are the same whatever is kept of the earlier prompt, and what was kept is not computed again."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from llava_piip.assembly import join
from llava_piip.inference import ChatModel

NEW_TOKENS = 10


class Talk:
    """A conversation whose answers must be those of transformers by itself."""

    def __init__(self, chat, pictures):
        model = chat.model.double()  # rounding cannot change which token is the most probable
        self.chat = ChatModel(model, chat.processor)
        self.pictures, self.messages, self.images = pictures, [], []

    def ask(self, text, *numbers):
        content = [{"type": "image"} for _ in numbers] + [{"type": "text", "text": text}]
        self.messages = [*self.messages, {"role": "user", "content": content}]
        self.images = [*self.images, *(self.pictures[number] for number in numbers)]
        return self.answer()

    def answer(self):
        """How many tokens were reused and computed, and images encoded."""
        encoded, computed = [], []
        network = self.chat.model.model
        hooks = [
            network.vision_tower.register_forward_hook(lambda _, args, output: encoded.append(len(args[0]))),
            network.language_model.register_forward_hook(
                lambda _, args, options, output: computed.append(options["inputs_embeds"].shape[1]), with_kwargs=True
            ),
        ]
        stream = self.chat.stream(self.messages, self.images, max_new_tokens=NEW_TOKENS)
        answer = "".join(stream).rstrip()
        for hook in hooks:
            hook.remove()
        inputs = self.chat.encode(self.messages, self.images, max_new_tokens=NEW_TOKENS)
        expected = self.chat.generate(inputs, max_new_tokens=NEW_TOKENS)
        assert [answer] == expected
        reused = self.chat.cache.reused_tokens
        assert computed[0] == stream.prompt_tokens - reused
        self.messages = [*self.messages, {"role": "assistant", "content": answer}]
        return reused, sum(encoded), stream.prompt_tokens


@pytest.fixture
def talk(tiny_chat, pictures):
    return Talk(tiny_chat, pictures)


def test_a_conversation_that_goes_on_computes_what_is_new(talk):
    reused, encoded, prompt = talk.ask("What is it?", 0)
    assert (reused, encoded) == (0, 1)
    for question, numbers in (("And why?", ()), ("Is this the same?", (1, 2)), ("Or this?", (0,)), ("So?", ())):
        before = prompt
        reused, encoded, prompt = talk.ask(question, *numbers)
        # Decoding what a random model said and encoding it again need not give the same tokens
        assert reused >= before and encoded == len(numbers)


def test_changes_anywhere_in_the_conversation_are_found(talk):
    first = talk.ask("What is it?", 0)[2]
    second = talk.ask("And what is behind it?", 1)[2]
    talk.messages = talk.messages[:-1]  # retried
    assert talk.answer()[:2] == (second - 1, 0)
    talk.messages = [*talk.messages[:3]]
    talk.images = [talk.pictures[0], talk.pictures[3]]
    reused, encoded, _ = talk.answer()
    assert first - 1 <= reused < second - 4 and encoded == 1
    talk.messages, talk.images = talk.messages[:3], [talk.pictures[4], talk.pictures[3]]
    reused, encoded, _ = talk.answer()
    assert reused < first - 4 and encoded == 2
    talk.messages, talk.images = [], []
    assert talk.ask("What is it?", 0)[1] == 1


def test_a_stopped_answer_is_gone_on_from(talk):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    images = talk.pictures[:1]
    with talk.chat.stream(messages, images, max_new_tokens=300) as stream:
        pieces = [next(stream) for _ in range(4)]
    assert stream.finish_reason == "cancelled"
    talk.messages, talk.images = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}], images
    reused, encoded, _ = talk.ask("Go on.")
    assert reused >= stream.prompt_tokens and encoded == 0


def test_what_fails_leaves_nothing_half_done(talk, monkeypatch):
    talk.ask("What is it?", 0)
    with monkeypatch.context() as patch:
        patch.setattr(talk.chat.model.lm_head, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.ask("And this?", 1)
    talk.messages, talk.images = talk.messages[:-1], talk.images[:-1]
    assert talk.ask("And that?", 2)[:2] == (0, 2)  # a cache that was written into in part is not used again


def test_threads_do_not_disturb_one_another(talk):
    questions = [[{"role": "user", "content": f"<image>\n{word}?"}] for word in ("What", "Where", "When", "Who")]
    expected = [talk.chat.answer([(question, talk.pictures[:1])], max_new_tokens=20)[0] for question in questions]
    for _ in range(3):
        streams = [talk.chat.stream(question, talk.pictures[:1], max_new_tokens=20) for question in questions]
        assert ["".join(stream).rstrip() for stream in streams] == expected


def test_a_sliding_window_is_kept_too(tiny_llava, pictures):
    model, processor = tiny_llava
    sizes = {**model.config.text_config.to_dict(), "model_type": "mistral", "sliding_window": 24}
    torch.manual_seed(0)
    decoder = MistralForCausalLM(MistralConfig(**sizes))
    config = copy.deepcopy(model.config)
    config.text_config = decoder.config
    talk = Talk(ChatModel(join(config, model.model.vision_tower, decoder), processor), pictures)
    prompt = talk.ask("What is it?", 0)[2]
    assert talk.ask("And this?", 1)[0] >= prompt > 24
    talk.messages = talk.messages[:-1]
    talk.answer()
