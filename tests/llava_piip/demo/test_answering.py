"""Answers in batches are those of single questions, and the chat goes from image to image."""

import io

import pytest
from PIL import Image

from llava_piip.demo.answering import answer_all, chat_about
from llava_piip.demo.questions import Question
from llava_piip.inference import ChatModel
from llava_piip.serve.dialogue import parts_of


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


def test_chat_goes_on_about_an_image_and_starts_anew_with_the_next(tiny_llava, images, monkeypatch, capsys):
    asked = []

    def remember(self, messages, images, **settings):
        asked.append(
            ([parts_of(message)[1] for message in messages[::2]], [image.getpixel((0, 0)) for image in images])
        )
        return stream(self, messages, images, **settings)

    stream = ChatModel.stream
    monkeypatch.setattr(ChatModel, "stream", remember)
    monkeypatch.setattr("sys.stdin", Typed("Which digit?", "Where?", "/next", "What colour?", "/exit", "never read"))
    chat_about(ChatModel(*tiny_llava), images)
    assert asked == [
        (["Which digit?"], [(0, 40, 200)]),
        (["Which digit?", "Where?"], [(0, 40, 200)]),
        (["What colour?"], [(80, 40, 200)]),
    ]
    printed = capsys.readouterr().out
    assert str(images[0]) in printed and str(images[1]) in printed and str(images[2]) not in printed
    assert printed.count("model: ") == 3


def test_chat_ends_with_the_input_and_with_the_images(tiny_llava, images, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Typed())
    chat_about(ChatModel(*tiny_llava), images)
    assert "These were all the images." not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", Typed("/next", "/next", "/next"))
    chat_about(ChatModel(*tiny_llava), images)
    assert "These were all the images." in capsys.readouterr().out
