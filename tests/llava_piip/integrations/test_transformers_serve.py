"""transformers' server answers about images, as a client of OpenAI's package asks."""

import base64
import io
import sys
import time
import urllib.request

import pytest

from llava_piip.inference import ChatModel
from llava_piip.integrations.transformers_serve import main
from llava_piip.serve.remote import RemoteModel

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def server(chat_folder, free_port, start_python):
    """Its address, while it runs."""
    port = free_port()
    code = "import runpy; runpy.run_module('llava_piip.integrations.transformers_serve', run_name='__main__')"
    process, *logs = start_python(code, str(chat_folder), "--device", "cpu", "--dtype", "float32", "--port", port)
    try:
        while not answers(f"http://localhost:{port}/health"):
            assert process.is_alive(), "".join(log.read_text() for log in logs)
            time.sleep(0.2)
        yield f"http://localhost:{port}/v1"
    finally:
        process.kill()
        process.join()


def answers(address):
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def content(image, text):
    file = io.BytesIO()
    image.save(file, "PNG")
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": text}]


def test_answers_are_the_models_own(server, chat_folder, pictures):
    chat = ChatModel.load(chat_folder, device="cpu", dtype="float32")
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
    found = []
    for picture in pictures[:2]:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]}]
        [expected] = chat.answer([(asked, [picture])], max_new_tokens=8)
        messages = [{"role": "user", "content": content(picture, "What is <image>?")}]
        options = dict(model=str(chat_folder), messages=messages, max_tokens=8, temperature=0)
        answer = client.chat.completions.create(**options).choices[0]
        assert answer.message.content.strip() == expected and answer.finish_reason == "length"
        found.append(expected)
        stream = RemoteModel(server).stream(asked, [picture], max_new_tokens=8)
        pieces = list(stream)
        assert "".join(pieces).strip() == expected and len(pieces) > 2 and stream.finish_reason == "length"
    assert found[0] != found[1]


def test_a_missing_folder_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["serve", str(tmp_path / "none"), "--port", "1"])
    with pytest.raises(SystemExit, match=r"none: has no config\.json; expected a folder that training"):
        main()
