"""VLMEvalKit's messages become the conversations that the model was trained with.

Where VLMEvalKit is installed these tests use it; elsewhere a stand-in has the parts of its interface that are used.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from llava_piip.inference import ChatModel
from piip_core.errors import UserError


class _BaseModel:
    """What `vlmeval.vlm.base.BaseModel` does with a list of dictionaries."""

    def set_dump_image(self, dump_image):
        self.dump_image_func = dump_image

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        return self.chat_inner(messages, dataset=dataset)


@pytest.fixture(scope="module")
def adapter():
    """The module with the adapter."""
    names = ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.dataset", "vlmeval.config")
    stands_in = importlib.util.find_spec("vlmeval") is None
    if stands_in:
        sys.modules |= {name: ModuleType(name) for name in names}
        sys.modules["vlmeval"].vlm = sys.modules["vlmeval.vlm"]
        sys.modules["vlmeval.vlm.base"].BaseModel = _BaseModel
        sys.modules["vlmeval.dataset"].DATASET_TYPE = {"MMBench_DEV_EN": "MCQ", "POPE": "Y/N"}.get
        sys.modules["vlmeval.config"].supported_VLM = {"llava_v1.5_7b": None}
    try:
        yield importlib.import_module("llava_piip.integrations.vlmevalkit")
    finally:
        torch.set_grad_enabled(True)  # importing VLMEvalKit switches it off
        if stands_in:
            for name in (*names, "llava_piip.integrations.vlmevalkit"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def model(adapter, chat_folder):
    return adapter.PIIPLlava(str(chat_folder), device="cpu", max_new_tokens=8)


@pytest.fixture(scope="module")
def alone(chat_folder):
    """transformers' greedy answer of the same weights to a rendered prompt."""
    reference = ChatModel.load(chat_folder, device="cpu", dtype="float32")
    processor = reference.processor

    def answer(messages, images):
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[images])
        with torch.no_grad():
            ids = reference.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    return answer


@pytest.fixture
def files(pictures, tmp_path):
    """Paths of pictures, as VLMEvalKit writes them."""
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, picture in zip(paths, pictures, strict=False):
        picture.save(path)
    return [str(path) for path in paths]


def image(path):
    return {"type": "image", "value": path}


def text(value):
    return {"type": "text", "value": value}


def user(content):
    return {"role": "user", "content": content}


def test_a_question_gets_the_models_own_answer(model, alone, files, pictures):
    found = {
        "image first": model.generate([image(files[0]), text("What is it?")], "POPE"),
        "text alone": model.generate([text("What is it?")], "POPE"),
        "interleaved": model.generate(
            [text("This"), image(files[0]), text("or this"), image(files[1]), text("?")], "POPE"
        ),
    }
    assert found == {
        "image first": alone([user("<image>\nWhat is it?")], pictures[:1]),
        "text alone": alone([user("What is it?")], []),
        "interleaved": alone([user("This\n<image>\nor this\n<image>\n?")], pictures[:2]),
    }
    assert len(set(found.values())) == 3


def test_a_chat_has_its_history(model, alone, files, pictures):
    turns = [user([image(files[0]), text("What?")]), {"role": "assistant", "content": "A cup."}, user([text("Why?")])]
    messages = [user("<image>\nWhat?"), {"role": "assistant", "content": "A cup."}, user("Why?")]
    assert model.chat_inner(turns, "POPE") == alone(messages, pictures[:1])


def test_choices_are_asked_for_as_in_the_training(model, files):
    model.set_dump_image(lambda line: [files[0]])
    line = {"question": "Which?", "hint": float("nan"), "A": "a cup", "B": "a cat", "C": float("nan"), "answer": "B"}
    assert model.use_custom_prompt("MMBench_DEV_EN") and not model.use_custom_prompt("POPE")
    asked = "Which?\nA. a cup\nB. a cat\nAnswer with the option's letter from the given choices directly."
    assert model.build_prompt(line, "MMBench_DEV_EN") == [image(files[0]), text(asked)]
    hinted = model.build_prompt({**line, "hint": "Look."}, "MMBench_DEV_EN")
    assert hinted == [image(files[0]), text(f"Look.\n{asked}")]


def test_what_is_no_picture_is_named(model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png"):
        model.generate_inner([image(str(broken)), text("What?")])
    with pytest.raises(UserError, match="type 'video'"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}])


def test_the_program_finds_registered_models(adapter, chat_folder, tmp_path, monkeypatch):
    config = sys.modules.get("vlmeval.config") or importlib.import_module("vlmeval.config")
    monkeypatch.setattr(config, "supported_VLM", dict(config.supported_VLM))
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    program = tmp_path / "run.py"
    program.write_text(
        "import sys\n"
        "from vlmeval.config import supported_VLM\n"
        "model = supported_VLM[sys.argv[-1]]()\n"
        "raise SystemExit(f'{sys.argv[1:]} {type(model).__name__}')\n"
    )
    with pytest.raises(SystemExit) as end:
        adapter.main([f"mine={chat_folder}", str(program), "--model", "mine"])
    assert str(end.value) == "['--model', 'mine'] PIIPLlava"
    with pytest.raises(UserError, match=r"'llava_v1\.5_7b' is a model of VLMEvalKit"):
        adapter.register("llava_v1.5_7b", str(chat_folder))
    with pytest.raises(SystemExit, match="usage"):
        adapter.main(["mine=folder"])
