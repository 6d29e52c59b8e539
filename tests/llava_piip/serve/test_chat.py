"""The terminal chat: history and pictures, commands, pipes, and what Ctrl-C does."""

import base64
import io
import json
import shutil

import pytest
import torch
from PIL import Image

from llava_piip.conversation import ConversationError
from llava_piip.inference import ChatModel
from llava_piip.serve.chat import Terminal, main
from llava_piip.serve.dialogue import Conversation, open_image
from piip_core.errors import UserError


class Typed(io.StringIO):
    """Lines of the input, from a terminal or a pipe."""

    def __init__(self, *lines, terminal=True):
        super().__init__("".join(f"{line}\n" for line in lines))
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def talk(monkeypatch, chat, *lines, terminal=True, conversation=None, settings=None):
    """Says some lines; the exit status."""
    monkeypatch.setattr("sys.stdin", Typed(*lines, terminal=terminal))
    return Terminal(chat, conversation or Conversation(), settings or {}).run()


def test_history_and_pictures_go_with_every_question(monkeypatch, prepared, files, capsys):
    chat = prepared(["A", " cup."], ["Red."], ["No."], ["Hello."])
    lines = ["What?", "Which colour?", f"/image {files[1]}", "Like this?", "/reset", "Hi", "/exit", "never read"]
    conversation = Conversation("Be brief.", pending=[("a.png", open_image(str(files[0])))])
    assert talk(monkeypatch, chat, *lines, conversation=conversation, settings={"temperature": 0.5}) == 0
    assert chat.asked == [
        ["Be brief.", "[image] What?"],
        ["Be brief.", "[image] What?", "A cup.", "Which colour?"],
        ["Be brief.", "[image] What?", "A cup.", "Which colour?", "Red.", "[image] Like this?"],
        ["Be brief.", "Hi"],
    ]
    assert [len(images) for images in chat.images] == [1, 1, 2, 0]
    assert chat.images[2] == [Image.open(file).convert("RGB") for file in files[:2]]
    assert chat.settings == [{"temperature": 0.5}] * 4
    assert "model: A cup.\n" in capsys.readouterr().out


def test_images_go_in_front_and_a_tag_is_text(pictures, tiny_chat):
    conversation = Conversation(pending=[*zip("ab", pictures, strict=False)])
    conversation.ask("What does <image> mean in HTML?")
    assert "".join(conversation.answer(tiny_chat, max_new_tokens=3))
    conversation.pending = [("b", pictures[1])]
    conversation.ask("And <image>\n<image>?")
    addresses = [part.get("url") for message in conversation.messages[::2] for part in message["content"][:-1]]
    assert addresses == ["a", "b", "b"] and conversation.images == [pictures[0], pictures[1], pictures[1]]
    inputs = tiny_chat.encode(conversation.messages, conversation.images, max_new_tokens=8)
    text = tiny_chat.processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert len(inputs["pixel_values"]) == 3 and text.endswith("And <image>\n<image>? ASSISTANT:")
    assert (inputs["input_ids"] == tiny_chat.processor.image_token_id).sum() == 3 * 4
    with pytest.raises(ConversationError, match="empty"):
        conversation.ask("  ")


def test_taking_back_gives_the_question_and_its_images(pictures, prepared):
    conversation, chat = Conversation("Be brief."), prepared(["Answer"], ["Answer"])
    for number, name in enumerate("ab"):
        conversation.pending.append((name, pictures[number]))
        conversation.ask(f"Question {name}")
        list(conversation.answer(chat))
    before = conversation.messages[:3]
    conversation.pending.append(("c", pictures[2]))
    assert conversation.retract() == "Question b"
    assert conversation.messages == before and conversation.images == [pictures[0]]
    assert conversation.pending == [("b", pictures[1]), ("c", pictures[2])]
    conversation.retract()
    with pytest.raises(UserError, match="no question"):
        conversation.retract()


def test_a_pipe_gets_the_answers_and_nothing_else(monkeypatch, prepared, files, capsys):
    chat = prepared(["One."], ["Two", " lines\nhere."])
    assert talk(monkeypatch, chat, f"/image '{files[0]}'", "First?", "", "Second?", terminal=False) == 0
    printed = capsys.readouterr()
    assert printed.out == "One.\nTwo lines\nhere.\n"
    assert "images with the next question: 1" in printed.err


def test_the_first_mistake_ends_a_pipe_and_not_a_conversation(monkeypatch, prepared, tmp_path, capsys):
    (tmp_path / "notes.json").write_text("mine")
    wrong = [
        (f"/image {tmp_path}/none.png", "none.png: no such file"),
        ("/image", "/image: expected /image FILE|URL, /reset, "),
        ("/reset now", "/reset now: expected"),
        ("/load x", "/load x: expected"),
        ("/ is what?", "put a space before a question that starts with /"),
        (f"/save {tmp_path}/notes.json", "notes.json: exists; expected the name of a new file"),
        (f"/save {tmp_path}/none/chat.json", "could not be written (no such folder)"),
    ]
    for line, message in wrong:
        assert talk(monkeypatch, prepared(), line, "Hello", terminal=False) == 2
        assert message in capsys.readouterr().err
    chat = prepared(["Fine."], ["A root."])
    assert talk(monkeypatch, chat, *[line for line, _ in wrong], "How are you?", " / is what?") == 0
    printed = capsys.readouterr().out
    assert all(message in printed for _, message in wrong)
    assert chat.asked == [["How are you?"], ["How are you?", "Fine.", "/ is what?"]]


def test_bytes_that_are_no_text_are_told(monkeypatch, prepared, capsys):
    lines = iter([UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no text"), "Hi", EOFError()])

    def typed(_):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    chat = prepared(["Hello."])
    assert talk(monkeypatch, chat) == 0
    assert "error: the line is not UTF-8 text" in capsys.readouterr().out and chat.asked == [["Hi"]]


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(monkeypatch, prepared, capsys):
    chat = prepared(["A very", " long", KeyboardInterrupt(), " never"], [KeyboardInterrupt()], ["Good."])
    assert talk(monkeypatch, chat, "Tell me", "Again", "And now?") == 0
    assert chat.asked[2] == ["Tell me", "A very long", "And now?"]  # without the question nobody answered
    assert [stream.finish_reason for stream in chat.streams] == ["cancelled", "cancelled", "stop"]
    assert "(stopped; /exit or Ctrl-D ends the program)" in capsys.readouterr().out
    assert talk(monkeypatch, prepared(["A", KeyboardInterrupt()]), "Tell me", "More", terminal=False) == 130


def test_ctrl_c_at_the_prompt_says_how_to_end(monkeypatch, prepared, capsys):
    typed = iter([KeyboardInterrupt, EOFError])

    def interrupted(_):
        raise next(typed)

    monkeypatch.setattr("builtins.input", interrupted)
    assert talk(monkeypatch, prepared()) == 0
    assert "/exit or Ctrl-D ends" in capsys.readouterr().out


def test_a_question_that_fails_is_taken_back(monkeypatch, prepared, pictures, capsys):
    chat = prepared(["Par", UserError("too long")], ["  "], ["Yes."])
    conversation = Conversation(pending=[("a", pictures[0])])
    assert talk(monkeypatch, chat, "First", "Second", "Third", conversation=conversation) == 0
    assert chat.asked[1:] == [["[image] Second"], ["[image] Third"]]
    printed = capsys.readouterr().out
    assert "error: too long" in printed and "(no answer; the question is taken back)" in printed


def test_a_cut_answer_is_said_and_control_characters_are_not_shown(monkeypatch, prepared, capsys):
    chat = prepared(["\x1b[2J", "no\x07thing\there é 你 🔥"], finish_reason="length")
    talk(monkeypatch, chat, "Show it")
    printed = capsys.readouterr().out
    assert "model: [2Jnothing\there é 你 🔥\n" in printed and "\x1b" not in printed
    assert "(the answer was cut, see --max-new-tokens)" in printed


def test_saved_conversations_hold_everything(monkeypatch, prepared, files, tmp_path, tiny_chat):
    chat = prepared(["A cup."])
    conversation = Conversation("Be brief.", pending=[(str(file), open_image(str(file))) for file in files])
    talk(monkeypatch, chat, "Are they alike?", f"/save {tmp_path}/chat.json", conversation=conversation)
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    again = tiny_chat.processor.apply_chat_template(
        saved[:2], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = tiny_chat.encode(saved[:2], chat.images[0], max_new_tokens=8)
    assert all(torch.equal(again[name], expected[name]) for name in ("input_ids", "pixel_values"))
    assert saved[2] == {"role": "assistant", "content": "A cup."}


def test_images_are_opened_by_content(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_image("~/a.png") == Image.open(files[0]).convert("RGB")
    address = "data:image/png;base64," + base64.b64encode(files[0].read_bytes()).decode()
    assert open_image(address) == open_image(str(files[0]))
    half = Image.new("LA", (2, 1), (0, 255))
    half.putpixel((1, 0), (0, 0))
    half.save(tmp_path / "half.png")  # transparency is shown on white
    assert open_image(str(tmp_path / "half.png")).tobytes() == bytes([0] * 3 + [255] * 3)
    (tmp_path / "text.png").write_text("no image")
    for source, message in [
        (str(tmp_path / "text.png"), "is no image"),
        (str(tmp_path), "no such file"),
        ("http://127.0.0.1:1/a.png", "no image could be read"),
        ("data:image/png", "no image could be read"),
        ("data:text/plain;base64,aGk=", "is no image"),
        ("HTTP://127.0.0.1:1/a.png", "no image could be read from there"),
    ]:
        with pytest.raises(UserError, match=message):
            open_image(source)


def test_command_line_answers_questions_out_of_a_pipe(model_folder, files, monkeypatch, capsys):
    chat = ChatModel.load(model_folder, device="cpu")
    question = [{"role": "user", "content": "<image>\n<image>\nWhat is it?"}]
    expected = "".join(chat.stream(question, [Image.open(file) for file in files[:2]], max_new_tokens=5)).strip()
    monkeypatch.setattr("sys.stdin", Typed("What is it?", terminal=False))
    pictures = [part for file in files[:2] for part in ("--image", str(file))]
    command = ["--model", str(model_folder), "--device", "cpu", "--max-new-tokens", "5", *pictures]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_command_line_names_mistakes_before_the_first_question(model_folder, tmp_path, capsys):
    for options, message in [
        (["--model", str(tmp_path / "none")], "none: has no config.json"),
        (["--model", str(model_folder), "--image", "none.png"], "none.png: no such file"),
        (["--model", str(model_folder), "--device", "cpu", "--temperature", "-1"], "temperature=-1.0: expected"),
        ([], "expected --model DIR, the folder of a model, or --server URL"),
    ]:
        assert main(options) == 2
        assert message in capsys.readouterr().err


def test_without_a_limit_an_answer_ends_with_the_context(tiny_chat):
    question = [{"role": "user", "content": "Hi"}]
    room = tiny_chat.context_length - tiny_chat.encode(question, max_new_tokens=1)["input_ids"].shape[1]
    stream = tiny_chat.stream(question)
    whole = "".join(stream)
    assert stream.finish_reason == "stop" or stream.answer_tokens == room
    assert "".join(tiny_chat.stream(question, max_new_tokens=room)) == whole
    for too_much in (
        {"messages": question, "max_new_tokens": room + 1},
        {"messages": [question[0] | {"content": "Hi " * 600}]},
    ):
        with pytest.raises(UserError, match="nothing is cut"):
            tiny_chat.stream(**too_much)


def test_a_broken_chat_template_names_its_file(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for x in %} {{ broken")
    with pytest.raises(UserError, match=r"model: its chat template \(chat_template.jinja\) cannot be used: Expected"):
        ChatModel.load(folder, device="cpu")
