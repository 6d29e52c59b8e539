"""Recorded benchmark runs: a single wrong prompt, word, score or line is noticed."""

import json
from pathlib import Path

import pytest

from llava_piip.verification import VERIFIERS
from piip_core.verification import Status, find_cases, run_cases

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"

# Where a recorded value stands, and another one
CHANGES = {
    "bench_gqa": (("runs", 0, "per_item", "200000003", "correct"), True),
    "bench_mmbench": (("runs", 0, "table", 2, 6), "B"),
    "bench_mmvet": (("output_text",), "{}"),
    "bench_pope": (("runs", 0, "summary_line"), ["POPE: 72.2"]),
    "bench_prompts": (("runs", 0, "calls", 0, "prompt"), "USER: <image>\nIs there a dog in the image? ASSISTANT:"),
    "bench_scienceqa": (("runs", 0, "per_item", "5", "correct"), True),
    "bench_seed": (("runs", 0, "stdout", 5), "image accuracy: 40.00%"),
    "bench_textvqa": (("processor", 20, "processed"), "11"),
    "bench_vqav2": (("output", 2, "answer"), "two dogs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_record_fails(name, tmp_path):
    case = json.loads((GOLDENS / f"{name}.json").read_text())
    *path, last = CHANGES[name][0]
    place = case
    for key in path:
        place = place[key]
    assert place[last] != CHANGES[name][1]
    place[last] = CHANGES[name][1]
    (tmp_path / f"{name}.json").write_text(json.dumps(case))
    (result,) = run_cases(find_cases([tmp_path]), VERIFIERS)
    assert result.status is Status.FAILED and sum(not c.passed for c in result.comparisons) == 1
