"""The logic of the web page without a page: conversation, limits, stop, retry."""

import html
import itertools
import threading

from PIL import Image

from llava_piip.serve.dialogue import parts_of
from llava_piip.serve.web_session import MAX_CHARACTERS, MAX_IMAGES, WebChat, shown_messages

SETTINGS = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}
MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>**bold**</b> $x^2$ `code`"


def texts(messages):
    """Who said what; the page gets texts as HTML."""
    assert not any("<" in message["content"][-1]["text"] for message in messages)
    return [(message["role"], html.unescape(message["content"][-1]["text"])) for message in messages]


def test_an_answer_is_streamed_and_the_next_question_knows_it(tiny_chat, files):
    web = WebChat(tiny_chat)
    visitor = web.session()
    views = list(web.ask(visitor, "What is it?", files[:1], SETTINGS))
    image = Image.open(files[0])
    expected = "".join(
        tiny_chat.stream([{"role": "user", "content": "<image>\nWhat is it?"}], [image], max_new_tokens=8)
    ).strip()
    grown = [texts(view.messages)[-1][1] for view in views[1:-1]]
    assert expected and len(grown) > 1 and grown[-1].strip() == expected
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))
    assert [view.running for view in views] == [True] * (len(views) - 1) + [False]
    assert texts(views[-1].messages) == [("user", "What is it?"), ("assistant", expected)]
    assert views[-1].messages[0]["content"][0] == {"path": str(files[0]), "alt_text": "image 1"}
    assert views[-1].notice == "the answer was cut: raise the longest answer"  # random weights never end one

    list(web.ask(visitor, "And these?", files[1:], SETTINGS))
    assert [(len(parts_of(turn)[0]), parts_of(turn)[1]) for turn in visitor.conversation.turns[:3]] == [
        (1, "What is it?"),
        (0, expected),
        (2, "And these?"),
    ]
    assert len(visitor.conversation.images) == 3


def test_limits_are_said_and_leave_the_conversation_as_it_was(prepared, files, tmp_path):
    web, visitor = prepared(["yes"], max_new_tokens=16)
    list(web.ask(visitor, "Well?", files[:1], SETTINGS))
    before = shown_messages(visitor.conversation)
    (tmp_path / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    (tmp_path / "half.png").write_bytes(files[0].read_bytes()[:90])
    for text, given, settings, expected in (
        ("Well?", files[:1] * MAX_IMAGES, {}, "would have 9 images: at most 8"),
        ("Well?", [tmp_path / "drawing.png"], {}, "is no image"),
        ("Well?", [tmp_path / "half.png"], {}, "is broken"),
        ("Well?", [tmp_path / "gone.png"], {}, "no such file"),
        ("W" * (MAX_CHARACTERS + 1), [], {}, "has 20001 characters: at most 20000"),
        ("  ", [], {}, "the question is empty"),
        ("Well?", [], {"max_new_tokens": 17}, "max_new_tokens=17: expected at most 16"),
    ):
        [view] = web.ask(visitor, text, given, SETTINGS | settings)
        assert view.notice.startswith("error: ") and expected in view.notice, view.notice
        assert view.refused and not view.running and view.messages == before
        assert visitor.stop is None and not visitor.conversation.pending
    assert len(web.model.asked) == 1


def test_what_the_model_refuses_comes_back_too(tiny_chat):
    web = WebChat(tiny_chat)
    visitor = web.session()
    last = list(web.ask(visitor, "word " * 600, [], SETTINGS))[-1]
    assert "the model's context is 512" in last.notice and last.refused and last.messages == []
    last = list(web.ask(visitor, "Hi", [], SETTINGS | {"temperature": -1.0}))[-1]
    assert "temperature=-1.0: expected 0, or 1e-20 or more" in last.notice and visitor.conversation.turns == []


def test_the_longest_answer_leaves_room_in_the_context(tiny_chat):
    assert tiny_chat.context_length == 512 and WebChat(tiny_chat).max_new_tokens == 256


def test_stop_keeps_what_came(prepared):
    web, visitor = prepared(["It ", "is ", threading.Event(), "more"])
    views = web.ask(visitor, "Well?", [], SETTINGS)
    for view in views:
        if view.messages[-1]["content"][-1]["text"] == "It is ":
            web.stop(visitor)
    assert view.notice == "stopped" and not view.running
    assert texts(view.messages) == [("user", "Well?"), ("assistant", "It is")]


def test_stop_before_the_first_word_takes_the_question_back(prepared, files):
    web, visitor = prepared([threading.Event(), "late"])
    views = web.ask(visitor, "Well?", files[:1], SETTINGS)
    assert next(views).running
    web.stop(visitor)
    last = list(views)[-1]
    assert last.notice == "stopped before the answer began" and last.refused
    assert last.messages == [] and visitor.conversation.images == []


def test_what_is_said_is_never_markup(prepared):
    web, visitor = prepared([MARKUP, " &lt;"])
    last = list(web.ask(visitor, MARKUP, [], SETTINGS))[-1]
    assert texts(last.messages) == [("user", MARKUP), ("assistant", f"{MARKUP} &lt;")]


def test_retry_replaces_the_last_answer_or_leaves_it(prepared, files):
    web, visitor = prepared(["one"], ["two"], ["thr", RuntimeError("/secret/path")])
    assert "no question" in next(web.retry(visitor, SETTINGS)).notice
    list(web.ask(visitor, "Well?", files[:1], SETTINGS))
    assert texts(list(web.retry(visitor, SETTINGS))[-1].messages) == [("user", "Well?"), ("assistant", "two")]
    assert web.model.asked[0] == web.model.asked[1] and len(visitor.conversation.images) == 1
    last = list(web.retry(visitor, SETTINGS))[-1]
    assert texts(last.messages) == [("user", "Well?"), ("assistant", "two")]
    assert len(visitor.conversation.images) == 1


def test_an_error_inside_is_logged_and_not_shown(prepared, caplog):
    web, visitor = prepared(["par", RuntimeError("/secret/path")])
    last = list(web.ask(visitor, "Well?", [], SETTINGS))[-1]
    assert last.notice == "error: internal error" and last.refused and last.messages == []
    assert "/secret/path" in caplog.text


def test_clear_while_an_answer_comes(prepared):
    web, visitor = prepared(["It ", threading.Event()], ["new"])
    views = web.ask(visitor, "Well?", [], SETTINGS)
    while next(views).messages[-1]["role"] == "user":
        pass
    assert web.clear(visitor).messages == []
    last = list(views)[-1]
    assert (last.messages, last.notice, last.refused) == ([], "", False) and visitor.conversation.turns == []
    list(web.ask(visitor, "Again?", [], SETTINGS))
    assert web.model.asked[-1] == ["Again?"]


def test_a_visitor_who_leaves_ends_the_answer(prepared):
    web, visitor = prepared(["It ", threading.Event()], ["for others"])
    views = web.ask(visitor, "Well?", [], SETTINGS)
    while next(views).messages[-1]["role"] == "user":
        pass
    assert next(web.ask(visitor, "Me too", [], SETTINGS)).notice == "an answer is on its way: stop it, or wait"
    views.close()
    other = list(web.ask(web.session(), "And me?", [], SETTINGS))[-1]  # the model is free again
    assert texts(other.messages)[-1] == ("assistant", "for others")
    assert web.model.streams[0].finish_reason == "cancelled" and visitor.stop is None
    assert texts(shown_messages(visitor.conversation)) == [("user", "Well?"), ("assistant", "It")]
