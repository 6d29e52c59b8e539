"""tools/benchmark.py chat: table, JSON and picture of a comparison."""

import json

import pytest

from piip_tools import chat_benchmark as benchmark
from piip_tools.chat_benchmark import SideResult


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("benchmark")


def run(tool, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "chat", *map(str, arguments)])
    tool.main()


def result(name, seconds):
    return SideResult(
        name=name,
        visual_tokens=16,
        prompt_tokens=32,
        vision_parameters=10**6,
        weight_bytes=10**8,
        working_bytes=10**7,
        prepare_s=0.01,
        vision_s=0.2,
        first_token_s=seconds,
        tokens_per_s=5.0,
        second_s={"nothing": 1.2, "keys and values": 0.1},
    )


def test_options_reach_the_benchmark_and_results_the_files(tool, monkeypatch, tmp_path, capsys):
    asked = {}

    def published_pair(row, **options):
        asked.update(options, row=row)
        return "ours", "baseline"

    def compare(sides, workload, **options):
        asked.update(options, sides=sides, workload=workload)
        return [result("ours", 1.0), result("baseline", 0.5)]

    monkeypatch.setattr(benchmark, "published_pair", published_pair)
    monkeypatch.setattr(benchmark, "compare", compare)
    files = tmp_path / "chat.json", tmp_path / "chat.png"
    options = ("--divide-widths", 4, "--dtype", "float32", "--new-tokens", 7, "--visual-grid", 24)
    run(tool, monkeypatch, *options, "--json", files[0], "--picture", files[1])
    assert asked["row"] == "piip_llava_clip_bl_512_256_7b" and str(asked["dtype"]) == "torch.float32"
    assert (asked["divide_widths"], asked["projector_grid"]) == (4, 24)
    assert asked["workload"].new_tokens == 7 and asked["sides"] == ("ours", "baseline")
    lines = [line for line in capsys.readouterr().out.splitlines() if "first token, ms" in line]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["first token, ms", "1000.0", "500.0", "2.00"]
    assert [entry["vision_share"] for entry in json.loads(files[0].read_text())] == [0.2, 0.4]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_named(tool, monkeypatch, tmp_path, capsys):
    for arguments, message in (
        (("--model", tmp_path), "--model and --baseline: expected both or none"),
        (("--model", tmp_path, "--baseline", tmp_path), "no readable config.json"),
        (("--vision-only", "--picture", "x.png"), "expected no --vision-only"),
        (("--row", "llava_1_5_7b"), "invalid choice"),
        (("--divide-widths", 7), "divide_widths=7"),
    ):
        with pytest.raises(SystemExit) as end:
            run(tool, monkeypatch, *arguments)
        assert end.value.code == 2 and message in capsys.readouterr().err
