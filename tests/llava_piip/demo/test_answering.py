"""Answers in batches are those of single questions, and the chat in the terminal keeps its history."""

import pytest
from PIL import Image

from llava_piip.demo import answering
from llava_piip.demo.answering import answer_all, chat
from llava_piip.demo.questions import Question


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 40, 200)).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def test_batches_answer_as_single_questions_do(tiny_llava, pictures):
    model, processor = tiny_llava
    questions = [
        Question("which", "Which digit?", "1", "0.png"),
        Question("text", "What is 1 + 1, by the way?", "2"),
        Question("count", "How many?", "1", "1.png"),
        Question("where", "Where in the picture is it?", "left", "2.png"),
    ]
    root = pictures[0].parent
    together = answer_all(model, processor, questions, root, batch_size=3)
    assert together == [answer_all(model, processor, [question], root)[0] for question in questions]
    assert len(set(together)) > 1


def say(monkeypatch, *lines):
    """Types lines, then ends the input."""
    typed = iter(lines)

    def answer(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


def test_chat_goes_on_about_a_picture_and_starts_anew_with_the_next(tiny_llava, pictures, monkeypatch, capsys):
    asked = []

    def remember(model, processor, conversations, images):
        asked.append(([message["content"] for message in conversations[0]], len(images[0])))
        return [f"answer {len(asked)}"]

    monkeypatch.setattr(answering, "_generate", remember)
    say(monkeypatch, "Which <image> digit?", "", "/help", "Where?", "/next", "What colour?", "/quit", "never read")
    chat(*tiny_llava, pictures)
    assert asked == [
        (["<image>\nWhich  digit?"], 1),
        (["<image>\nWhich  digit?", "answer 1", "Where?"], 1),
        (["<image>\nWhat colour?"], 1),
    ]
    printed = capsys.readouterr().out
    assert str(pictures[0]) in printed and str(pictures[1]) in printed and str(pictures[2]) not in printed
    assert "model: answer 3" in printed and printed.count("/next for another picture") == 3


def test_chat_ends_with_the_input_and_with_the_pictures(tiny_llava, pictures, monkeypatch, capsys):
    say(monkeypatch)
    chat(*tiny_llava, pictures)
    say(monkeypatch, "/next", "/next", "/next")
    chat(*tiny_llava, pictures)
    assert "These were all the pictures." in capsys.readouterr().out


def test_a_real_answer_is_text(tiny_llava, pictures, monkeypatch, capsys):
    say(monkeypatch, "Which digit?", "/quit")
    chat(*tiny_llava, pictures)
    assert "model: " in capsys.readouterr().out
