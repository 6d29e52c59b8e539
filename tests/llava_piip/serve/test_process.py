"""The server as a process, and the load test against a server."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import openai
import pytest

from llava_piip.serve.replicas import RAY_ENVIRONMENT
from llava_piip.serve.replicas import main as run_replicas
from llava_piip.serve.server import main


def test_sigterm_lets_answers_finish(tiny_chat, tmp_path, free_port, load_tool, capsys):
    folder, port = tmp_path / "tiny", free_port()
    tiny_chat.model.save_pretrained(folder)
    tiny_chat.processor.save_pretrained(folder)
    command = [sys.executable, "-m", "llava_piip.serve.server", "--model", str(folder), "--port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process)

            arguments = ["--url", f"http://127.0.0.1:{port}/v1", "--clients", "1", "4"]
            assert load_tool("load_test").main([*arguments, "--requests", "8", "--max-tokens", "4"]) == 0
            rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
            table = [dict(zip(map(str.strip, rows[0]), map(str.strip, row), strict=True)) for row in rows[2:]]
            assert [(row["clients"], row["failed"], row["differing"]) for row in table] == [
                ("1", "0", "0"),
                ("4", "0", "0"),
            ]
            assert table[0]["gain"] == "1.00" and float(table[1]["p99 s"]) >= float(table[1]["p50 s"]) > 0

            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            stream = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=100, stream=True
            )
            chunks = [next(iter(stream))]
            process.send_signal(signal.SIGTERM)
            chunks += list(stream)
            assert chunks[-1].choices[0].finish_reason == "length"
            process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGTERM)
        finally:
            process.kill()


def _wait_for(url, process):
    for _ in range(1800):  # a busy machine takes long to import everything
        assert process.poll() is None, process.stdout.read().decode()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert json.load(answer) == {"status": "ok"}
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not start")


def test_mistakes_are_told_without_a_traceback(tmp_path, capsys):
    empty, foreign = tmp_path / "key", tmp_path / "schlüssel"
    empty.write_text("\n")
    foreign.write_text("gehéim\n", encoding="utf-8")
    for arguments, words in (
        (["--model", str(tmp_path / "nothing")], "nothing"),
        (["--model", str(tmp_path), "--api-key-file", str(empty)], "is empty"),
        (["--model", str(tmp_path), "--api-key-file", str(foreign)], "expected a key in one line of ASCII characters"),
        (["--model", str(tmp_path), "--api-key-file", str(tmp_path)], "cannot be read"),
        (["--model", str(tmp_path), "--timeout", "0"], "timeout=0"),
        (["--model", str(tmp_path), "--max-waiting", "-1"], "max_waiting=-1"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m llava_piip.serve.server --model" in capsys.readouterr().out


def test_replicas_say_what_they_need(monkeypatch, capsys):
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run_replicas(["--model", "tiny"]) == 2
    assert ".[serve-ray]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_replicas(["--help"])
    assert "serve run llava_piip.serve.deployment:build" in capsys.readouterr().out
