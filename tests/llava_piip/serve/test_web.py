"""The web page: conversation and limits without a page, then the page over HTTP and in a browser."""

import html
import itertools
import json
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_piip.conversation import IMAGE_TAG
from llava_piip.serve.fetching import FetchPolicy
from llava_piip.serve.generation import ChatModel
from llava_piip.serve.looking import look, network_view
from llava_piip.serve.web import main
from llava_piip.serve.web_session import WebChat, WebLimits, shown_messages
from piip_core.errors import UserError

SETTINGS = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}
MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>**bold**</b> $x^2$ `code`"


class Stream:
    """Gives prepared pieces until the stop event; an exception among them is raised, an event is waited for."""

    def __init__(self, pieces, stop_event):
        self.pieces, self.stop_event, self.finish_reason = pieces, stop_event, None

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            while isinstance(piece, threading.Event) and not (piece.is_set() or self.stop_event.is_set()):
                time.sleep(0.005)
            if self.stop_event.is_set():
                self.finish_reason = "cancelled"
                return
            if isinstance(piece, str):
                yield piece
        self.finish_reason = "stop"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Answers:
    """A small model whose answers are prepared; remembers what it was asked."""

    def __init__(self, chat, *answers):
        self.chat, self.answers, self.asked, self.streams = chat, list(answers), [], []
        self.processor, self.model, self.context_length = chat.processor, chat.model, chat.context_length

    def stream(self, messages, images, *, stop_event, **settings):
        self.asked.append([message["content"] for message in messages])
        self.streams.append(Stream(self.answers.pop(0), stop_event))
        return self.streams[-1]


@pytest.fixture
def prepared(tiny_chat):
    """Makes a page's logic with prepared answers, and a visitor."""

    def make(*answers, **limits):
        web = WebChat(Answers(tiny_chat, *answers), WebLimits(**limits))
        return web, web.session()

    return make


@pytest.fixture
def files(pictures, tmp_path):
    """Three pictures in files."""
    for name, picture in zip("abc", pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in "abc"]


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
        tiny_chat.stream([{"role": "user", "content": f"{IMAGE_TAG}\nWhat is it?"}], [image], max_new_tokens=8)
    ).strip()
    grown = [texts(view.messages)[-1][1] for view in views[1:-1]]
    assert expected and len(grown) > 1 and grown[-1].strip() == expected
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))
    assert [view.running for view in views] == [True] * (len(views) - 1) + [False]
    assert texts(views[-1].messages) == [("user", "What is it?"), ("assistant", expected)]
    assert views[-1].messages[0]["content"][0] == {"path": str(files[0]), "alt_text": "picture 1"}
    assert views[-1].notice == "the answer was cut: raise the longest answer"  # random weights never end one

    list(web.ask(visitor, "And these?", files[1:], SETTINGS))
    assert [turn["content"] for turn in visitor.conversation.turns[:3]] == [
        f"{IMAGE_TAG}\nWhat is it?",
        expected,
        f"{IMAGE_TAG}\n{IMAGE_TAG}\nAnd these?",
    ]
    assert len(visitor.conversation.images) == 3


@pytest.mark.parametrize("size", [(64, 48), (37, 211), (300, 300), (5, 7)])
def test_a_picture_as_the_model_sees_it_is_the_same_to_the_model(tiny_chat, size):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    processor = tiny_chat.processor.image_processor
    kept = network_view(tiny_chat, picture)
    assert kept.size == (64, 64)
    direct, again = (processor(images=[image], return_tensors="pt")["pixel_values"] for image in (picture, kept))
    assert torch.equal(direct, again)


def test_limits_are_said_and_leave_the_conversation_as_it_was(prepared, files, tmp_path):
    policy = FetchPolicy(max_bytes=5000, max_pixels=10_000, max_images=2)
    web, visitor = prepared(["yes"], pictures=policy, max_characters=50, max_new_tokens=16)
    list(web.ask(visitor, "Well?", files[:1], SETTINGS))
    before = shown_messages(visitor.conversation)
    Image.new("RGB", (101, 100)).save(tmp_path / "many.png")
    (tmp_path / "large.png").write_bytes(files[0].read_bytes() + bytes(5000))
    (tmp_path / "drawing.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    (tmp_path / "half.png").write_bytes(files[0].read_bytes()[:90])
    for text, given, settings, expected in (
        ("Well?", files[:2], {}, "would have 3 pictures: at most 2"),
        ("Well?", [tmp_path / "many.png"], {}, "many.png: the picture has 101 x 100 pixels"),
        ("Well?", [tmp_path / "large.png"], {}, "large.png: the picture has more than 5000 bytes"),
        ("Well?", [tmp_path / "drawing.png"], {}, "drawing.png: not a complete picture: expected one of JPEG"),
        ("Well?", [tmp_path / "half.png"], {}, "half.png: not a complete picture"),
        ("Well?", [tmp_path / "gone.png"], {}, "gone.png: the uploaded file is gone"),
        ("W" * 51, [], {}, "has 51 characters: at most 50"),
        ("  ", [], {}, "the question is empty"),
        (f"What is {IMAGE_TAG}?", [], {}, "the question has 1 <image> for 0 new pictures"),
        ("Well?", [], {"max_new_tokens": 17}, "max_new_tokens: is 17, expected at most 16"),
    ):
        [view] = web.ask(visitor, text, given, SETTINGS | settings)
        assert view.notice.startswith("error: ") and expected in view.notice, view.notice
        assert view.refused and not view.running and view.messages == before
        assert visitor.stop is None and not visitor.conversation.pending
    assert len(web.chat.asked) == 1


def test_what_the_model_refuses_comes_back_too(tiny_chat):
    web = WebChat(tiny_chat)
    visitor = web.session()
    last = list(web.ask(visitor, "word " * 600, [], SETTINGS))[-1]
    assert "the model's context is 512" in last.notice and last.refused and last.messages == []
    last = list(web.ask(visitor, "Hi", [], SETTINGS | {"temperature": -1.0}))[-1]
    assert "temperature: is -1.0, expected 0 or more" in last.notice and visitor.conversation.turns == []


def test_the_longest_answer_leaves_room_in_the_context(tiny_chat):
    assert tiny_chat.context_length == 512
    web = WebChat(tiny_chat)
    assert (web.most_new_tokens, web.default_new_tokens) == (256, 128)


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
    assert last.messages == [] and visitor.conversation.pictures == []


def test_what_is_said_is_never_markup(prepared):
    web, visitor = prepared([MARKUP, " &lt;"])
    last = list(web.ask(visitor, MARKUP, [], SETTINGS))[-1]
    assert texts(last.messages) == [("user", MARKUP), ("assistant", f"{MARKUP} &lt;")]


def test_retry_replaces_the_last_answer_or_leaves_it(prepared, files):
    web, visitor = prepared(["one"], ["two"], ["thr", RuntimeError("/secret/path")])
    assert "no question" in next(web.retry(visitor, SETTINGS)).notice
    list(web.ask(visitor, "Well?", files[:1], SETTINGS))
    assert texts(list(web.retry(visitor, SETTINGS))[-1].messages) == [("user", "Well?"), ("assistant", "two")]
    assert web.chat.asked[0] == web.chat.asked[1] and len(visitor.conversation.pictures) == 1
    last = list(web.retry(visitor, SETTINGS))[-1]
    assert texts(last.messages) == [("user", "Well?"), ("assistant", "two")]
    assert len(visitor.conversation.pictures) == 1


def test_an_error_inside_is_logged_and_not_shown(prepared, caplog):
    web, visitor = prepared(["par", RuntimeError("/secret/path")], [torch.OutOfMemoryError("0x7f")])
    last = list(web.ask(visitor, "Well?", [], SETTINGS))[-1]
    assert last.notice == "error: internal error" and last.refused and last.messages == []
    assert "/secret/path" in caplog.text
    assert "too little memory" in list(web.ask(visitor, "Well?", [], SETTINGS))[-1].notice


def test_clear_while_an_answer_comes(prepared):
    web, visitor = prepared(["It ", threading.Event()], ["new"])
    views = web.ask(visitor, "Well?", [], SETTINGS)
    while next(views).messages[-1]["role"] == "user":
        pass
    assert web.clear(visitor).messages == []
    last = list(views)[-1]
    assert (last.messages, last.notice, last.refused) == ([], "", False) and visitor.conversation.turns == []
    list(web.ask(visitor, "Again?", [], SETTINGS))
    assert web.chat.asked[-1] == ["Again?"]


def test_a_visitor_who_leaves_ends_the_answer(prepared):
    web, visitor = prepared(["It ", threading.Event()], ["for others"])
    views = web.ask(visitor, "Well?", [], SETTINGS)
    while next(views).messages[-1]["role"] == "user":
        pass
    assert next(web.ask(visitor, "Me too", [], SETTINGS)).notice == "an answer is on its way: stop it, or wait"
    views.close()
    other = list(web.ask(web.session(), "And me?", [], SETTINGS))[-1]  # the model is free again
    assert texts(other.messages)[-1] == ("assistant", "for others")
    assert web.chat.streams[0].finish_reason == "cancelled" and visitor.stop is None
    assert texts(shown_messages(visitor.conversation)) == [("user", "Well?"), ("assistant", "It")]


def test_look_draws_branches_and_leaves_the_model_as_it_was(tiny_chat, files):
    web = WebChat(tiny_chat)
    visitor = web.session()
    before = texts(list(web.ask(visitor, "Well?", files[:1], SETTINGS))[-1].messages)
    middle, corner = (web.look(visitor, 1, at=place, depth=1.0) for place in (None, (0, 0)))
    assert middle.attention.width > 2 * middle.attention.height  # the picture and two branches
    assert middle.sampling is not None and middle.attention.tobytes() != corner.attention.tobytes()
    assert middle.attention.tobytes() != web.look(visitor, 1, at=None, depth=0.0).attention.tobytes()
    assert texts(list(web.ask(web.session(), "Well?", files[:1], SETTINGS))[-1].messages) == before
    for number, options, expected in (
        (2, {"at": None, "depth": 0.5}, "picture 2: the conversation has 1"),
        (1, {"at": (64, 0), "depth": 0.5}, "outside of the image of 64 x 64"),
        (1, {"at": None, "depth": 1.5}, "depth=1.5: expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=expected):
            web.look(visitor, number, **options)


def test_look_takes_models_in_bfloat16(model_folder, pictures):
    assert look(ChatModel.load(model_folder, device="cpu"), pictures[0]).attention.width > 0


def test_mistakes_of_the_command_line(capsys, tmp_path):
    pytest.importorskip("gradio", reason="the web page needs gradio")
    (tmp_path / "empty").mkdir()
    for options, expected in (
        (["--max-waiting", "0"], "--max-waiting 0: expected 1 or more"),
        (["--examples", str(tmp_path / "none")], "none: no such folder"),
        (["--examples", str(tmp_path / "empty")], "has 0 pictures, expected 1 to 8"),
        ([], "is no folder"),
    ):
        assert main(["--model", str(tmp_path / "missing"), *options]) == 2
        assert expected in capsys.readouterr().err


@pytest.fixture
def served(files, tmp_path, monkeypatch):
    """Serves a page; gives its address. Everything in `policy` is small."""
    pytest.importorskip("gradio", reason="the web page needs gradio")
    from llava_piip.serve.web_page import build_page, serve_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")
    pages = []

    def serve(web, port):
        pages.append(build_page(web, examples=files[:1], title="a <b>model</b>"))
        return serve_page(pages[-1], web.limits, host="127.0.0.1", port=port, block=False)

    yield serve
    for page in pages:
        page.close(verbose=False)


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def send(address, question, session="by-hand"):
    """Sends a question as the page does; what the server says when it is done."""
    with urllib.request.urlopen(f"{address}config", timeout=10) as answer:
        functions = json.load(answer)["dependencies"]
    [function] = [found["id"] for found in functions if any(target[1] == "submit" for target in found["targets"])]
    body = {"data": [question, None, 0, 1, 8], "fn_index": function, "session_hash": session}
    headers = {"Content-Type": "application/json"}
    join = urllib.request.Request(f"{address}gradio_api/queue/join", json.dumps(body).encode(), headers)
    urllib.request.urlopen(join, timeout=10).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=10) as events:
        return next(line.decode() for line in events if b"process_completed" in line)


def test_questions_sent_by_hand_reach_no_file_and_no_address(prepared, served, free_port, tmp_path, monkeypatch):
    web, _ = prepared(["yes"])
    address = served(web, int(free_port()))
    (tmp_path / "private.png").write_bytes(b"secret")
    asked, resolve = [], socket.getaddrinfo

    def watched(host, *arguments, **options):
        asked.append(host)
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    for path in ("http://192.0.2.1/a.png", "https://host.invalid/a.png", str(tmp_path / "private.png")):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        said = send(address, {"text": "Well?", "files": [file]})
        assert '"success":false' in said and "Traceback" not in said and "cache dir" not in said
    assert set(asked) <= {"127.0.0.1"} and web.chat.asked == []
    assert '"success":true' in send(address, {"text": "Well?", "files": []}) and web.chat.asked == [["Well?"]]


def test_the_page_is_for_this_machine_and_loads_nothing_from_elsewhere(prepared, served, free_port, tmp_path):
    web, _ = prepared(pictures=FetchPolicy(max_bytes=2000))
    address = served(web, int(free_port()))
    assert address.startswith("http://127.0.0.1:")
    code, headers = status(address)
    assert code == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
    assert "https:" not in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert status(address, Host="rebound.example:7860")[0] == 400
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(2001)
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 413
    (tmp_path / "private.txt").write_text("secret")
    assert status(f"{address}gradio_api/file={tmp_path / 'private.txt'}")[0] == 403


BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]


@pytest.fixture
def browser():
    """A page of a real browser, what it asked for, and what it complained about."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    found = next(filter(None, BROWSERS), None)
    if found is None:
        pytest.skip("the browser test needs chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 1400})
        seen = SimpleNamespace(page=page, urls=[], errors=[])
        page.on("request", lambda request: seen.urls.append(request.url))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        yield seen
        chromium.close()


def open_page(page, address):
    page.goto(address)
    page.wait_for_selector("#question textarea")
    # Every text that the answer had, to see that it grew
    page.evaluate(
        """() => { window.grown = []; new MutationObserver(() => {
            const bots = document.querySelectorAll('[data-testid=bot]');
            if (bots.length) { const text = bots[bots.length - 1].innerText;
              if (text !== window.grown.at(-1)) window.grown.push(text); }
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )


def ask(page, text, file=None):
    if file is not None:
        page.set_input_files("#question input[type=file]", file)
        page.wait_for_selector("#question .thumbnail-item, #question img")
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")


def test_a_real_browser_uploads_asks_and_sees_the_answer_grow(tiny_chat, served, browser, free_port, files, tmp_path):
    web = WebChat(tiny_chat, WebLimits(max_new_tokens=24))
    address, page = served(web, int(free_port())), browser.page
    open_page(page, address)
    ask(page, "What is it?", files[0])
    page.wait_for_selector("#notice textarea, #notice input")
    expected = "".join(
        tiny_chat.stream(
            [{"role": "user", "content": f"{IMAGE_TAG}\nWhat is it?"}], [Image.open(files[0])], max_new_tokens=24
        )
    )
    page.wait_for_function("text => window.grown.at(-1)?.trim() === text", arg=expected.strip())
    assert len(page.evaluate("window.grown")) > 2
    page.wait_for_function("document.querySelector('#seen img')?.naturalWidth === 64")
    page.click("#seen img")
    page.wait_for_function("document.querySelector('#attention img')?.naturalWidth > 500")
    screenshot = os.environ.get("PIIP_SCREENSHOT", tmp_path / "page.png")
    page.screenshot(path=screenshot, full_page=True)
    with Image.open(screenshot) as shown:
        assert len(shown.convert("RGB").getcolors(1 << 24)) > 100  # something is on it
    assert {url.split("/")[2] for url in browser.urls if url.startswith("http")} == {address.split("/")[2]}
    assert not browser.errors

    page.click("#clear")
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length === 0")
    (tmp_path / "drawing.png").write_text("<svg/>")
    ask(page, "And this?", tmp_path / "drawing.png")
    page.wait_for_function(
        "document.querySelector('#notice textarea, #notice input')?.value.includes('not a complete picture')"
    )
    assert page.input_value("#question textarea") == "And this?"


def test_a_real_browser_shows_markup_as_text_and_stops_answers(prepared, served, browser, free_port):
    web, _ = prepared([MARKUP], ["It ", "is ", threading.Event()], ["again"], ["gone ", threading.Event()])
    page = browser.page
    open_page(page, served(web, int(free_port())))
    ask(page, "<u>Hello</u>")
    page.wait_for_function("text => window.grown.at(-1)?.trim() === text", arg=MARKUP)
    assert page.title() == "a <b>model</b>" and page.query_selector("[data-testid=bot] b") is None
    assert page.inner_text("[data-testid=user]").strip() == "<u>Hello</u>"
    assert page.inner_text("h2") == "a <b>model</b>"

    ask(page, "More?")
    page.wait_for_function("window.grown.at(-1)?.trim() === 'It is'")
    page.click("#question .stop-button")
    page.wait_for_function("document.querySelector('#notice textarea, #notice input')?.value === 'stopped'")
    page.click("#retry")
    page.wait_for_function("window.grown.at(-1)?.trim() === 'again'")

    page.wait_for_selector("#question .submit-button")
    ask(page, "Still there?")
    page.wait_for_function("window.grown.at(-1)?.trim() === 'gone'")
    page.goto("about:blank")  # leaves while the answer comes
    until = time.monotonic() + 10
    while web.chat.streams[-1].finish_reason is None and time.monotonic() < until:
        time.sleep(0.05)
    assert web.chat.streams[-1].finish_reason == "cancelled"
    assert not browser.errors
