"""Answers in batches are those of single questions, and the chat goes from image to image."""

import io

import pytest
from PIL import Image

from llava_piip.demo.answering import answer_all, chat_about
from llava_piip.demo.questions import Question
from llava_piip.inference import ChatModel


@pytest.fixture
def images(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 40, 200)).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def test_batches_answer_as_single_questions_do(tiny_llava, images):
    chat = ChatModel(*tiny_llava)
    questions = [
        Question("which", "Which digit?", "1", "0.png"),
        Question("text", "What is 1 + 1, by the way?", "2"),
        Question("count", "How many?", "1", "1.png"),
        Question("where", "Where in the picture is it?", "left", "2.png"),
    ]
    root = images[0].parent
    together = answer_all(chat, questions, root, batch_size=3)
    assert together == [answer_all(chat, [question], root)[0] for question in questions]
    assert len(set(together)) > 1


class Typed(io.StringIO):
    """Lines that come from a terminal, and then its end."""

    def __init__(self, *lines):
        super().__init__("".join(f"{line}\n" for line in lines))

    def isatty(self):
        return True


def test_chat_is_about_the_first_image_and_those_that_are_added(tiny_llava, images, monkeypatch, capsys):
    asked = []

    def remember(self, messages, images, **settings):
        texts = [message["content"][-1]["text"] for message in messages[::2]]
        asked.append((texts, [image.getpixel((0, 0)) for image in images]))
        return stream(self, messages, images, **settings)

    stream = ChatModel.stream
    monkeypatch.setattr(ChatModel, "stream", remember)
    lines = ["Which digit?", "Where?", "/reset", f"/image {images[1]}", "What colour?", "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", Typed(*lines))
    chat_about(ChatModel(*tiny_llava), images)
    assert asked == [
        (["Which digit?"], [(0, 40, 200)]),
        (["Which digit?", "Where?"], [(0, 40, 200)]),
        (["What colour?"], [(80, 40, 200)]),
    ]
    printed = capsys.readouterr().out
    assert f"/image FILE take another: {images[1]}" in printed and printed.count("model: ") == 3
