"""What the web page does, without a browser: questions, limits, stop, retry, and what the branches looked at."""

import html
import itertools
import threading

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the web page needs gradio")

from llava_piip.inference import ChatModel
from llava_piip.serve import web_page
from llava_piip.serve.dialogue import Conversation
from llava_piip.serve.web_page import MAX_CHARACTERS, MAX_IMAGES, look
from piip_core.errors import UserError

SETTINGS = (0.0, 1.0, 8)
MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>**bold**</b> $x^2$ `code`"


@pytest.fixture
def notices(monkeypatch):
    """What the page says beside the conversation."""
    said = []
    for kind in ("Warning", "Info"):
        monkeypatch.setattr(web_page.gr, kind, said.append)
    return said


def texts(view):
    """Who said what; the page gets texts as HTML."""
    messages = view[0]
    assert not any("<" in message["content"][-1]["text"] for message in messages)
    return [(message["role"], html.unescape(message["content"][-1]["text"])) for message in messages]


def ask(chat, kept, text, files=(), settings=SETTINGS):
    """All views of a question, the last one first."""
    return list(web_page.ask(chat, kept, {"text": text, "files": list(map(str, files))}, *settings))[::-1]


def returned(view):
    """The question that comes back into its box."""
    return view[1].value


def test_an_answer_is_streamed_and_the_next_question_knows_it(tiny_chat, files, notices):
    kept = Conversation("Be brief.")
    last, *views = ask(tiny_chat, kept, "What is it?", files[:1])
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat is it?"}]
    expected = "".join(tiny_chat.stream(question, [Image.open(files[0])], max_new_tokens=8)).strip()
    *grown, first = [texts(view) for view in views]
    assert first == [("user", "What is it?")] and len(grown) > 1
    assert all(later[-1][1].startswith(earlier[-1][1]) for later, earlier in itertools.pairwise(grown))
    assert texts(last) == [("user", "What is it?"), ("assistant", expected)]
    assert last[0][0]["content"][0] == {"path": str(files[0]), "alt_text": "an image"}
    assert notices == ["the answer was cut: raise the longest answer"]  # random weights never end one
    ask(tiny_chat, kept, "And these?", files[1:])
    assert len(kept.images) == 3 and [len(message["content"]) for message in kept.messages[1::2]] == [2, 3]


def test_limits_are_said_and_leave_the_conversation_as_it_was(prepared, files, tmp_path, notices):
    chat, kept = prepared(["yes"]), Conversation()
    before = texts(ask(chat, kept, "Well?", files[:1])[0])
    (tmp_path / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    (tmp_path / "half.png").write_bytes(files[0].read_bytes()[:90])
    for text, given, expected in (
        ("Well?", files[:1] * MAX_IMAGES, "would have 9 images: at most 8"),
        ("Well?", [tmp_path / "drawing.png"], "is no image"),
        ("Well?", [tmp_path / "half.png"], "is broken"),
        ("Well?", [tmp_path / "gone.png"], "no such file"),
        ("W" * (MAX_CHARACTERS + 1), [], "has 20001 characters: at most 20000"),
        ("  ", [], "the question is empty"),
    ):
        [view] = ask(chat, kept, text, given)
        assert expected in notices.pop() and returned(view)["text"] == text
        assert texts(view) == before and not kept.pending and len(kept.images) == 1
    assert len(chat.asked) == 1


def test_what_the_model_refuses_comes_back_too(tiny_chat, notices):
    last = ask(tiny_chat, Conversation(), "word " * 600)[0]
    assert "the model's context is 512" in notices.pop() and last[0] == [] and returned(last)["text"] == "word " * 600


def test_stop_keeps_what_came_and_takes_back_a_question_without_answer(prepared, files, notices):
    chat, kept = prepared(["It ", "is ", threading.Event(), "more"], [threading.Event(), "late"]), Conversation()
    for view in web_page.ask(chat, kept, {"text": "Well?", "files": []}, *SETTINGS):
        if texts(view)[-1] == ("assistant", "It is "):
            kept.stream.close()
    assert texts(view) == [("user", "Well?"), ("assistant", "It is")] and not notices
    views = web_page.ask(chat, kept, {"text": "And?", "files": [str(files[0])]}, *SETTINGS)
    next(views)
    threading.Timer(0.2, lambda: kept.stream.close()).start()
    last = list(views)[-1]
    assert notices == ["stopped before the answer began"] and returned(last)["text"] == "And?"
    assert texts(last) == [("user", "Well?"), ("assistant", "It is")] and kept.images == []


def test_what_is_said_is_never_markup(prepared):
    last = ask(prepared([MARKUP, " &lt;"]), Conversation(), MARKUP)[0]
    assert texts(last) == [("user", MARKUP), ("assistant", f"{MARKUP} &lt;")]


def test_retry_replaces_the_last_answer_or_leaves_it(prepared, files, notices, caplog):
    chat, kept = prepared(["one"], ["two"], ["thr", RuntimeError("/secret/path")]), Conversation()
    list(web_page.ask_again(chat, kept, *SETTINGS))
    assert "no question" in notices.pop()
    ask(chat, kept, "Well?", files[:1])
    for _ in range(2):
        last = list(web_page.ask_again(chat, kept, *SETTINGS))[-1]
        assert texts(last) == [("user", "Well?"), ("assistant", "two")] and len(kept.images) == 1
    assert chat.asked[0] == chat.asked[1] == ["[image] Well?"]
    assert notices == ["internal error"] and "/secret/path" in caplog.text


def test_a_visitor_who_leaves_ends_the_answer(prepared):
    chat, kept = prepared(["It ", threading.Event()]), Conversation()
    views = web_page.ask(chat, kept, {"text": "Well?", "files": []}, *SETTINGS)
    while len(texts(next(views))) == 1:
        pass
    views.close()
    assert chat.streams[0].finish_reason == "cancelled" and kept.messages[-1]["content"] == "It"


def test_look_draws_branches_and_leaves_the_model_as_it_was(tiny_chat, pictures):
    question = [{"role": "user", "content": "<image>\nWell?"}]
    before, after = [], []
    before += tiny_chat.stream(question, pictures[:1], max_new_tokens=8)
    middle, corner = (look(tiny_chat, pictures[0], at=place, depth=1.0) for place in (None, (0, 0)))
    after += tiny_chat.stream(question, pictures[:1], max_new_tokens=8)
    (attention, sampling), (other, _) = middle, corner
    assert attention.width > 2 * attention.height  # the image and two branches
    assert sampling is not None and attention.tobytes() != other.tobytes() and before == after
    assert attention.tobytes() != look(tiny_chat, pictures[0], depth=0.0)[0].tobytes()
    with pytest.raises(UserError, match="outside of the image of 64 x 64"):
        look(tiny_chat, pictures[0], at=(64, 0))


def test_look_takes_models_in_bfloat16(model_folder, pictures):
    assert look(ChatModel.load(model_folder, device="cpu"), pictures[0])[0].width > 0
