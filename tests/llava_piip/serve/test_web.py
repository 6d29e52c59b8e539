"""The web page over HTTP, as anybody may ask it; its command line."""

import json
import urllib.error
import urllib.request

import pytest

from llava_piip.serve.web import main


def test_mistakes_of_the_command_line(capsys, tmp_path):
    pytest.importorskip("gradio", reason="the web page needs gradio")
    assert main(["--model", str(tmp_path / "missing")]) == 2
    assert "missing: has no config.json" in capsys.readouterr().err


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def send(address, question, session="by-hand"):
    """Sends a question as the page does; what the server says when it is done."""
    with urllib.request.urlopen(f"{address}config", timeout=60) as answer:
        functions = json.load(answer)["dependencies"]
    [function] = [found["id"] for found in functions if any(target[1] == "submit" for target in found["targets"])]
    body = {"data": [None, question, 0, 1, 8], "fn_index": function, "session_hash": session}
    headers = {"Content-Type": "application/json"}
    join = urllib.request.Request(f"{address}gradio_api/queue/join", json.dumps(body).encode(), headers)
    urllib.request.urlopen(join, timeout=60).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        return next(line.decode() for line in events if b"process_completed" in line)


def test_questions_sent_by_hand_reach_no_file_and_no_address_inside(prepared, served, tmp_path):
    """Gradio itself takes uploaded files alone, and fetches no address of a private network."""
    chat = prepared(["yes"])
    address = served(chat)
    (tmp_path / "private.png").write_bytes(b"secret")
    for path in (f"{address}a.png", "http://192.168.0.1/a.png", str(tmp_path / "private.png")):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        said = send(address, {"text": "Well?", "files": [file]})
        assert '"success":false' in said and "Traceback" not in said and "cache dir" not in said
    assert chat.asked == []
    assert '"success":true' in send(address, {"text": "Well?", "files": []}) and chat.asked == [["Well?"]]


def test_the_page_is_for_this_machine_and_loads_nothing_from_elsewhere(prepared, served, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_piip.serve.web_page.MAX_BYTES", 2000)
    address = served(prepared())
    assert address.startswith("http://127.0.0.1:")
    code, headers = status(address)
    assert code == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
    assert "https:" not in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    for host in ("rebound.example:7860", "127.0.0.1.example", "10.0.0.6", "localhost@example"):
        assert status(address, Host=host)[0] == 400
    for host in ("localhost:7860", "127.0.0.1:1"):
        assert status(address, Host=host)[0] == 200
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(2001)
        + b"\r\n--x--\r\n"
    )
    request = urllib.request.Request(
        f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413
    (tmp_path / "private.txt").write_text("secret")
    assert status(f"{address}gradio_api/file={tmp_path / 'private.txt'}")[0] == 403
