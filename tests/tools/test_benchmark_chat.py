"""tools/benchmark.py chat: table, JSON and chart of a comparison."""

import json

import pytest

from piip_tools.benchmarks import chat
from piip_tools.timing import compare


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark")


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "chat", *map(str, arguments)])
    tool.main()


def test_options_reach_the_benchmark_and_results_the_files(tool, monkeypatch, tmp_path, capsys):
    asked = {}

    def build_pair(name, **options):
        asked.update(options, name=name)
        return "ours", "baseline"

    def measure_chat(pair, **options):
        asked.update(options, pair=pair)
        return [compare("first token", "ms", {"ours": [1000.0], "baseline": [500.0]}, "baseline")]

    monkeypatch.setattr(chat, "build_pair", build_pair)
    monkeypatch.setattr(chat, "measure_chat", measure_chat)
    files = tmp_path / "chat.json", tmp_path / "chat.png"
    options = ("--divide-widths", 4, "--dtype", "float32", "--new-tokens", 7, "--visual-grid", 24)
    run(tool, monkeypatch, *options, "--json", files[0], "--chart", files[1])
    assert asked["name"] == "piip_llava_clip_bl_512_256_7b" and str(asked["dtype"]) == "torch.float32"
    assert (asked["divide_widths"], asked["projector_grid"], asked["new_tokens"]) == (4, 24, 7)
    assert asked["pair"] == ("ours", "baseline")
    lines = [line for line in capsys.readouterr().out.splitlines() if "first token, ms" in line]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["first token, ms", "1000 (2)", "500"]
    assert json.loads(files[0].read_text())[0]["ratios"] == {"ours": 2.0, "baseline": 1.0}
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gone"), "--model and --baseline: expected both or none"),
        (("--model", "gone", "--baseline", "gone"), "has no config.json"),
        (("--published", "llava_1_5_7b"), "'llava_1_5_7b' is a baseline: expected one of piip_llava_clip_bl"),
        (("--divide-widths", 7), "divide_widths=7"),
    ],
)
def test_mistakes_are_named(tool, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    with pytest.raises(SystemExit, match=f"benchmark: .*{message}"):
        run(tool, monkeypatch, *arguments)
