"""The terminal chat: history and pictures, commands, pipes, and what Ctrl-C does."""

import base64
import io
import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image

from llava_piip.conversation import ConversationError
from llava_piip.inference import ChatModel
from llava_piip.serve import terminal
from llava_piip.serve.arguments import exit_status
from llava_piip.serve.chat import main
from llava_piip.serve.dialogue import ChatImage, Conversation, open_image, parts_of
from llava_piip.serve.terminal import Terminal
from piip_core.errors import UserError


class Typed(io.StringIO):
    """Lines of the input, from a terminal or a pipe."""

    def __init__(self, *lines, terminal=True):
        super().__init__("".join(f"{line}\n" for line in lines))
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class Answers:
    """Stands for a model: remembers what it is asked, and gives prepared pieces; an exception among them is raised."""

    def __init__(self, *answers, finish_reason="stop"):
        self.answers, self.asked, self.closed = list(answers), [], 0
        self.finish_reason, self.answer_tokens = finish_reason, 7

    def stream(self, messages, images, **settings):
        self.asked.append(([dict(message) for message in messages], list(images), settings))
        self.pieces = iter(self.answers.pop(0))
        return self

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self.pieces)
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self):
        self.closed += 1
        self.finish_reason = "cancelled"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def files(pictures, tmp_path):
    """Two pictures in files."""
    for name, picture in zip("ab", pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    return [tmp_path / "a.png", tmp_path / "b.png"]


def talk(monkeypatch, chat, *lines, terminal=True, **options):
    """Says some lines; the exit status."""
    monkeypatch.setattr("sys.stdin", Typed(*lines, terminal=terminal))
    return Terminal(chat, **options).run()


def contents(asked):
    """What was asked, with a mark for each image."""
    return [
        ["[image] " * len(parts_of(message)[0]) + parts_of(message)[1] for message in messages]
        for messages, _, _ in asked
    ]


def test_history_and_pictures_go_with_every_question(monkeypatch, files, capsys):
    chat = Answers(["A", " cup."], ["Red."], ["No."], ["Hello."])
    lines = ["What?", "Which colour?", f"/image {files[1]}", "Like this?", "/reset", "Hi", "/exit", "never read"]
    conversation = Conversation("Be brief.", pending=[open_image(str(files[0]))])
    assert talk(monkeypatch, chat, *lines, conversation=conversation, settings={"temperature": 0.5}) == 0
    assert contents(chat.asked) == [
        ["Be brief.", "[image] What?"],
        ["Be brief.", "[image] What?", "A cup.", "Which colour?"],
        ["Be brief.", "[image] What?", "A cup.", "Which colour?", "Red.", "[image] Like this?"],
        ["Be brief.", "Hi"],
    ]
    assert [len(images) for _, images, _ in chat.asked] == [1, 1, 2, 0]
    assert chat.asked[2][1] == [Image.open(file).convert("RGB") for file in files]
    assert all(settings == {"temperature": 0.5} for _, _, settings in chat.asked)
    assert "model: A cup.\n" in capsys.readouterr().out


def test_images_go_in_front_and_a_tag_is_text(pictures, tiny_chat):
    first, second = (ChatImage(picture, name) for picture, name in zip(pictures, "ab", strict=False))
    conversation = Conversation(pending=[first, second])
    conversation.ask("What does <image> mean in HTML?")
    conversation.answer(" It is no tag: use <image>. ")
    conversation.pending = [second]
    conversation.ask("And <image>\n<image>?")
    assert [image.source for turn in conversation.turns for image in parts_of(turn)[0]] == ["a", "b", "b"]
    inputs = tiny_chat.encode(conversation.messages, conversation.images, max_new_tokens=8)
    text = tiny_chat.processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert len(inputs["pixel_values"]) == 3 and text.endswith("And <image>\n<image>? ASSISTANT:")
    assert (inputs["input_ids"] == tiny_chat.processor.image_token_id).sum() == 3 * 4
    assert "".join(tiny_chat.stream(conversation.messages, conversation.images, max_new_tokens=3))
    with pytest.raises(ConversationError, match="empty"):
        conversation.ask("  ")


def test_taking_back_gives_the_question_and_its_images(pictures):
    conversation = Conversation()
    for number, name in enumerate("ab"):
        conversation.pending.append(ChatImage(pictures[number], name))
        conversation.ask(f"Question {name}")
        conversation.answer("Answer")
    before = conversation.turns[:2]
    conversation.pending.append(ChatImage(pictures[2], "c"))
    assert conversation.retract() == "Question b"
    assert conversation.turns == before and [image.source for image in conversation.pending] == ["b", "c"]
    conversation.retract()
    with pytest.raises(UserError, match="no question"):
        conversation.retract()


def test_a_pipe_gets_the_answers_and_nothing_else(monkeypatch, files, capsys):
    chat = Answers(["One."], ["Two", " lines\nhere."])
    assert talk(monkeypatch, chat, f"/image '{files[0]}'", "First?", "", "Second?", terminal=False) == 0
    printed = capsys.readouterr()
    assert printed.out == "One.\nTwo lines\nhere.\n"
    assert "1 image with the next question" in printed.err


def test_the_first_mistake_ends_a_pipe_and_not_a_conversation(monkeypatch, tmp_path, capsys):
    wrong = [
        (f"/image {tmp_path}/none.png", "none.png: no such file"),
        ("/image", "expected: /image FILE|URL"),
        ("/reset now", "expected: /reset"),
        ("/load x", "/load: no such command; known: /image, /reset"),
        ("/ is what?", "put a space before a question that starts with /"),
        ("/save chat.txt", "chat.txt: expected a name that ends in .json or .md"),
        (f"/save {tmp_path}/none/chat.md", "could not be written (no such folder)"),
    ]
    for line, message in wrong:
        assert talk(monkeypatch, Answers(), line, "Hello", terminal=False) == 2
        assert message in capsys.readouterr().err
    chat = Answers(["Fine."], ["A root."])
    assert talk(monkeypatch, chat, *[line for line, _ in wrong], "How are you?", " / is what?") == 0
    printed = capsys.readouterr().out
    assert all(message in printed for _, message in wrong)
    assert contents(chat.asked) == [["How are you?"], ["How are you?", "Fine.", "/ is what?"]]


@pytest.mark.parametrize("broken", ["caf\udce9", UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no text")])
def test_bytes_that_are_no_text_are_told(monkeypatch, capsys, broken):
    """They come as halves of characters or as an error, by the settings of Python."""
    lines = iter([broken, "Hi", EOFError(), broken])

    def typed(_):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr(terminal, "input", typed, raising=False)
    chat = Answers(["Hello."])
    assert talk(monkeypatch, chat) == 0
    assert "error: the line is not UTF-8 text" in capsys.readouterr().out and contents(chat.asked) == [["Hi"]]
    assert talk(monkeypatch, chat, terminal=False) == 2


def test_a_reader_who_has_left_ends_the_program_quietly(monkeypatch, capfd):
    replaced = []
    monkeypatch.setattr(os, "dup2", lambda _, descriptor: replaced.append(descriptor))

    def answer():
        raise BrokenPipeError

    assert exit_status(answer) == 141 and replaced == [sys.stdout.fileno()]


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is_of_it(monkeypatch, capsys):
    chat = Answers(["A very", " long", KeyboardInterrupt(), " never"], [KeyboardInterrupt()], ["Good."])
    assert talk(monkeypatch, chat, "Tell me", "Again", "And now?") == 0
    assert contents(chat.asked)[2] == ["Tell me", "A very long", "And now?"]  # without the question nobody answered
    assert chat.closed == 2
    assert "(stopped)" in capsys.readouterr().out
    assert talk(monkeypatch, Answers(["A", KeyboardInterrupt()]), "Tell me", "More", terminal=False) == 130


def test_ctrl_c_at_the_prompt_says_how_to_end(monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, EOFError])

    def interrupted(_):
        raise next(typed)

    monkeypatch.setattr("sys.stdin", Typed())
    monkeypatch.setattr("builtins.input", interrupted)
    assert Terminal(Answers()).run() == 0
    assert "/exit or Ctrl-D ends" in capsys.readouterr().out


def test_a_question_that_fails_is_taken_back(monkeypatch, pictures, capsys):
    chat = Answers(["Par", UserError("too long")], ["Yes."])
    conversation = Conversation(pending=[ChatImage(pictures[0], "a")])
    assert talk(monkeypatch, chat, "First", "Second", conversation=conversation) == 0
    assert contents(chat.asked)[1] == ["[image] Second"]
    assert "error: too long" in capsys.readouterr().out


def test_a_cut_answer_is_said_and_control_characters_are_not_shown(monkeypatch, capsys):
    chat = Answers(["\x1b[2J", "no\x07thing\there"], finish_reason="length")
    talk(monkeypatch, chat, "Show it")
    printed = capsys.readouterr().out
    assert "model: [2Jnothing\there\n" in printed and "\x1b" not in printed
    assert "cut after 7 tokens" in printed
    assert terminal._printable("é 你 🔥\n") == "é 你 🔥\n"


def test_saved_conversations_hold_everything(monkeypatch, files, tmp_path, tiny_chat):
    chat = Answers(["A cup."])
    conversation = Conversation("Be brief.", pending=[open_image(str(file)) for file in files])
    lines = ["Are they alike?", f"/save {tmp_path}/chat.json", f"/save {tmp_path}/chat.md"]
    talk(monkeypatch, chat, *lines, conversation=conversation)
    saved = json.loads((tmp_path / "chat.json").read_text())["messages"]
    again = tiny_chat.processor.apply_chat_template(
        saved[:2], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = tiny_chat.encode(*chat.asked[0][:2], max_new_tokens=8)
    assert all(torch.equal(again[name], expected[name]) for name in ("input_ids", "pixel_values"))
    assert saved[2] == {"role": "assistant", "content": "A cup."}
    assert (tmp_path / "chat.md").read_text() == (
        "**System**\n\nBe brief.\n\n"
        f"**You**\n\n![image](<{files[0]}>)\n![image](<{files[1]}>)\nAre they alike?\n\n"
        "**Model**\n\nA cup.\n"
    )


def test_saving_replaces_its_own_files_and_no_others(monkeypatch, tmp_path, capsys):
    (tmp_path / "notes.md").write_text("mine")
    lines = [f"/save {tmp_path}/{name}" for name in ("notes.md", "chat.md", "chat.md")]
    assert talk(monkeypatch, Answers(["Hello."]), *lines[:2], "Hi", lines[2]) == 0
    assert "notes.md: exists" in capsys.readouterr().out
    assert (tmp_path / "notes.md").read_text() == "mine" and "Hello." in (tmp_path / "chat.md").read_text()


def test_ctrl_c_before_the_first_piece_takes_the_question_back(monkeypatch, capsys):
    chat = Answers()
    monkeypatch.setattr(chat, "stream", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    conversation = Conversation()
    assert talk(monkeypatch, chat, "Hi", conversation=conversation) == 0
    assert conversation.turns == [] and "(stopped)" in capsys.readouterr().out


def test_images_are_opened_by_content(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_image("~/a.png") == ChatImage(Image.open(files[0]).convert("RGB"), str(files[0]))
    address = "data:image/png;base64," + base64.b64encode(files[0].read_bytes()).decode()
    assert open_image(address).image == open_image(str(files[0])).image
    half = Image.new("LA", (2, 1), (0, 255))
    half.putpixel((1, 0), (0, 0))
    half.save(tmp_path / "half.png")  # transparency is shown on white
    assert open_image(str(tmp_path / "half.png")).image.tobytes() == bytes([0] * 3 + [255] * 3)
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
    expected = "".join(chat.stream(question, [Image.open(file) for file in files], max_new_tokens=5)).strip()
    monkeypatch.setattr("sys.stdin", Typed("What is it?", terminal=False))
    pictures = [part for file in files for part in ("--image", str(file))]
    command = ["--model", str(model_folder), "--device", "cpu", "--max-new-tokens", "5", *pictures]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_command_line_names_mistakes_before_the_first_question(model_folder, tmp_path, capsys):
    for options, message in [
        (["--model", str(tmp_path / "none")], "none: is no folder"),
        (["--model", str(model_folder), "--image", "none.png"], "none.png: no such file"),
        (["--model", str(model_folder), "--device", "cpu", "--temperature", "-1"], "temperature=-1.0: expected"),
    ]:
        assert main(options) == 2
        assert message in capsys.readouterr().err


SERVER = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server", SERVER, "--device", "cpu"], f"--device with --server {SERVER}: the server decides that"),
        (["--server", SERVER, "--dtype", "float32"], "--dtype with --server"),
        (["--server", SERVER, "--load-in", "4bit"], "--load-in with --server"),
        (["--server", SERVER, "--seed", "0"], "--seed with --server"),
        (["--model", "none", "--seed", str(2**64)], f"--seed {2**64}: expected a number of 64 bits"),
        (["--model", "none", "--seed", str(-(2**63) - 1)], "expected a number of 64 bits"),
        (["--model", "none", "--system", "caf\udce9"], "--system is not UTF-8 text"),
        (["--server", SERVER], "names no model (Connection error: "),
    ],
)
def test_options_that_cannot_work_are_told_in_one_line(capsys, options, message):
    if "Connection" in message:
        pytest.importorskip("openai")
    assert main(options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message in line


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


def test_help_shows_examples_that_parse(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "--load-in" in printed
    examples = [line.partition("serve.chat ")[2].split() for line in printed.splitlines() if "--model output" in line]
    assert len(examples) == 3
    for example in examples:
        assert main([part if part != "photo.jpg" else "none.jpg" for part in example]) == 2  # and 2 from argparse exits
