"""Answers in pieces are those of transformers' own generation, end where they should, and report what goes wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.chat_templates import CHAT_TEMPLATES
from llava_piip.inference import ChatModel, ContextLengthError
from llava_piip.loading import ModelSource
from llava_piip.train.arguments import PIIPTrainingArguments
from llava_piip.train.building import add_adapters
from llava_piip.train.checkpointing import save_trained
from piip_core.errors import CheckpointError, ConfigError, UserError

NEVER = ("llava_piip.serve", "llava_piip.train")
ROOT = Path(__file__).parents[2]
QUESTION = [{"role": "user", "content": "<image>\nWhat is it?"}]


@pytest.fixture
def text_chat(tiny_llava, tokenizer_folder):
    """A small model that says whole characters only: a random one also writes bytes that are none."""
    model, processor = tiny_llava
    bytes_ = [i for name, i in processor.tokenizer.get_vocab().items() if name.startswith("<0x")]
    model.generation_config = GenerationConfig(suppress_tokens=bytes_, bos_token_id=1, eos_token_id=2)
    return ChatModel(model, processor)


def whole_answer(chat, messages, images, new_tokens):
    """The tokens of a greedy answer, from transformers by itself."""
    prompt = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = chat.processor(text=[prompt], images=[images])
    with torch.no_grad():
        ids = chat.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :]


def test_pieces_are_transformers_own_answer(text_chat, pictures):
    expected = whole_answer(text_chat, QUESTION, pictures[:1], 40)
    stream = text_chat.stream(QUESTION, pictures[:1], max_new_tokens=40)
    pieces = list(stream)
    assert "".join(pieces) == text_chat.processor.tokenizer.decode(expected, skip_special_tokens=True).lstrip()
    assert len(pieces) > 20 and stream.answer_tokens == len(expected) == 40
    assert stream.finish_reason == "length"
    assert stream.prompt_tokens == text_chat.encode(QUESTION, pictures[:1], max_new_tokens=40)["input_ids"].shape[1]


def test_the_models_end_token_ends_the_answer(text_chat, pictures):
    tokens = whole_answer(text_chat, QUESTION, pictures[:1], 12).tolist()
    end = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    text_chat.model.generation_config.eos_token_id = [2, tokens[end]]
    stream = ChatModel(text_chat.model, text_chat.processor).stream(QUESTION, pictures[:1], max_new_tokens=40)
    text = "".join(stream)
    assert (stream.finish_reason, stream.answer_tokens) == ("stop", end + 1)
    assert text == text_chat.processor.tokenizer.decode(tokens[: end + 1]).lstrip()


def test_template_says_what_ends_an_answer(tiny_llava):
    model, processor = tiny_llava
    processor.chat_template = CHAT_TEMPLATES["llava_v0"]
    assert ChatModel(model, processor).end_texts == ["###"]
    processor.chat_template = CHAT_TEMPLATES["vicuna_v1"]
    assert ChatModel(model, processor).end_texts == [] and 2 in ChatModel(model, processor).end_ids


def test_images_that_messages_name_and_nobody_gives_are_an_error(text_chat):
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(UserError, match="have images, none is given"):
        text_chat.encode([{"role": "user", "content": content}])


def test_sampling_settings_are_those_asked_for_and_not_the_folders(text_chat, pictures):
    def answer(**settings):
        return "".join(text_chat.stream(QUESTION, pictures[:1], max_new_tokens=12, **settings))

    greedy = answer()
    text_chat.model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, top_k=3, max_length=20)
    assert answer() == greedy
    assert answer(temperature=1.0, top_p=1e-6) == greedy  # one token is left
    torch.manual_seed(0)
    first = answer(temperature=20.0)
    torch.manual_seed(0)
    assert answer(temperature=20.0) == first != greedy
    # Near the uniform distribution, nobody may have kept the folder's three best tokens
    settings = text_chat.generation_config(temperature=20.0)
    assert not settings.top_k and settings.do_sample


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-300),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
    ],
)
def test_impossible_settings_are_named(tiny_chat, field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}: expected"):
        tiny_chat.stream([{"role": "user", "content": "Hello"}], **{field: value})


def test_conversation_and_answer_must_fit_and_nothing_is_cut(tiny_chat, pictures):
    length = tiny_chat.encode(QUESTION, pictures[:1], max_new_tokens=1)["input_ids"].shape[1]
    room = tiny_chat.context_length - length
    assert tiny_chat.encode(QUESTION, pictures[:1], max_new_tokens=room)["input_ids"].shape[1] == length
    with pytest.raises(ContextLengthError, match=rf"{length} tokens, .* {room + 1}; .*context is 512"):
        tiny_chat.stream(QUESTION, pictures[:1], max_new_tokens=room + 1)


def test_pictures_of_earlier_questions_stay_in_their_places(tiny_chat, pictures):
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Is it <image> or <image>?"},
    ]
    inputs = tiny_chat.encode(messages, pictures[:3], max_new_tokens=8)
    image = tiny_chat.processor.image_token_id
    runs = "".join("i" if token == image else "t" for token in inputs["input_ids"][0].tolist()).split("t")
    assert [len(run) for run in runs if run] == [4, 4, 4]
    for given, picture in zip(inputs["pixel_values"], pictures[:3], strict=True):
        torch.testing.assert_close(
            given, torch.from_numpy(tiny_chat.processor.image_processor(picture).pixel_values[0])
        )
    with pytest.raises(UserError, match="3 <image> for 2 images"):
        tiny_chat.stream(messages, pictures[:2])


def test_loading_takes_the_files_precision_or_the_one_asked_for(model_folder, tmp_path):
    assert ChatModel.load(model_folder, device="cpu").model.dtype == torch.bfloat16
    shutil.copytree(model_folder, tmp_path / "run" / "final")
    chat = ChatModel.load(tmp_path / "run", device="cpu", dtype="float32")
    assert {parameter.dtype for parameter in chat.model.parameters()} == {torch.float32}
    assert not chat.model.training and chat.device == torch.device("cpu")


def test_quantisation_leaves_the_answers_probabilities_close(model_folder, pictures):
    whole = ChatModel.load(model_folder, device="cpu", dtype="float32")
    small = ChatModel.load(model_folder, device="cpu", dtype="float32", quantization="8bit")
    quantised = {name for name, module in small.model.named_modules() if type(module).__name__ == "Linear8bitLt"}
    assert len(quantised) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in quantised)
    inputs = whole.encode(QUESTION, pictures[:1], max_new_tokens=8)
    with torch.no_grad():
        exact, close = (chat.model(**inputs).logits.log_softmax(-1) for chat in (whole, small))
    assert 0 < (exact - close).abs().max() < 0.1
    assert "".join(small.stream(QUESTION, pictures[:1], max_new_tokens=4))


def test_adapters_are_merged_into_the_model(model_folder, pictures, tmp_path):
    settings = PIIPTrainingArguments(output_dir=str(tmp_path / "unused"), use_cpu=True, lora=True, lora_rank=4)
    start = ChatModel.load(model_folder, device="cpu", dtype="float32")
    inputs = start.encode(QUESTION, pictures[:1], max_new_tokens=8)
    plain = start.model(**inputs).logits.detach()
    adapted = add_adapters(start.model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = adapted.eval()(**inputs).logits
        save_trained(adapted, tmp_path / "lora", ModelSource(str(model_folder)), processor=start.processor)
        loaded = ChatModel.load(tmp_path / "lora", device="cpu", dtype="float32")
        found = loaded.model(**inputs).logits
    assert type(loaded.model) is PIIPLlavaForConditionalGeneration
    assert (found - expected).abs().max() < 1e-3 * (expected - plain).abs().max()


def test_what_cannot_be_loaded_is_named(model_folder, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="has no config"):
            ChatModel.load(folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(CheckpointError, match=r"type 'llava', expected 'piip_llava'.*convert_llava_checkpoint"):
        ChatModel.load(tmp_path)
    shutil.copy(model_folder / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ChatModel.load(tmp_path, device="cpu")
    weights = (model_folder / "model.safetensors").read_bytes()
    for damaged in (b"", weights[: len(weights) // 2], weights):  # the last without the tokenizer's files
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"cannot be loaded .*expected a complete save"):
            ChatModel.load(tmp_path, device="cpu")
    for settings, message in [
        ({"device": "abacus"}, "device='abacus': expected"),
        ({"device": "cuda:99"}, "device='cuda:99': there are"),
        ({"dtype": "int8"}, "dtype='int8': expected one of 'auto', 'bfloat16'"),
        ({"quantization": "2bit"}, "quantization='2bit': expected one of '4bit', '8bit'"),
    ]:
        with pytest.raises(UserError, match=message):
            ChatModel.load(model_folder, **settings)


def test_what_answers_imports_neither_a_server_nor_the_training(run_python):
    code = "import sys, llava_piip.inference, llava_piip.eval.__main__\n"
    code += f"print([name for name in sys.modules if name.startswith({NEVER})])"
    assert run_python(code).stdout.strip() == "[]"
