"""The web page in a real browser."""

import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>**bold**</b> $x^2$ `code`"


BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]


@pytest.fixture
def browser():
    """A page of a real browser, what it asked for, and what it complained about."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    found = next(filter(None, BROWSERS), None)
    if found is None:
        assert "PIIP_REQUIRE_BROWSER" not in os.environ, (
            "no chromium, although PIIP_REQUIRE_BROWSER asks for these tests"
        )
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


def wait_for_notice(page, text):
    page.wait_for_function(
        "text => [...document.querySelectorAll('.toast-body')].some(e => e.innerText.includes(text))", arg=text
    )


def test_a_real_browser_uploads_asks_and_looks(tiny_chat, served, browser, files, tmp_path):
    address, page = served(tiny_chat), browser.page
    open_page(page, address)
    ask(page, "What is it?", files[0])
    page.wait_for_selector(".toast-body")  # the answer was cut
    question = [{"role": "user", "content": "<image>\nWhat is it?"}]
    expected = "".join(tiny_chat.stream(question, [Image.open(files[0])], max_new_tokens=256))
    page.wait_for_function("text => window.grown.at(-1)?.trim() === text", arg=expected.strip())
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
    wait_for_notice(page, "is no image")
    assert page.input_value("#question textarea") == "And this?"


def endless():
    while True:
        time.sleep(0.05)
        yield "gone "


def test_a_real_browser_shows_markup_as_text_and_growing_answers_that_stop(prepared, served, browser):
    chat = prepared([MARKUP], ["It ", "is ", threading.Event()], ["again"], endless())
    page = browser.page
    open_page(page, served(chat))
    ask(page, "<u>Hello</u>")
    page.wait_for_function("text => window.grown.at(-1)?.trim() === text", arg=MARKUP)
    assert page.title() == "a <b>model</b>" and page.query_selector("[data-testid=bot] b") is None
    assert page.inner_text("[data-testid=user]").strip() == "<u>Hello</u>"
    assert page.inner_text("h2") == "a <b>model</b>"

    ask(page, "More?")
    page.wait_for_function("window.grown.at(-1)?.trim() === 'It is'")
    page.click("#question .stop-button")
    page.wait_for_selector("#question .submit-button")
    page.click("#retry")
    page.wait_for_function("window.grown.at(-1)?.trim() === 'again'")

    page.wait_for_selector("#question .submit-button")
    ask(page, "Still there?")
    page.wait_for_function("window.grown.at(-1)?.trim().startsWith('gone')")
    page.goto("about:blank")  # leaves while the answer comes
    until = time.monotonic() + 60
    while chat.streams[-1].finish_reason is None and time.monotonic() < until:
        time.sleep(0.05)
    assert chat.streams[-1].finish_reason == "cancelled"
    assert not browser.errors
