"""Recorded benchmark runs: a single wrong prompt, word, score or line is noticed."""

import pytest

from checkers import Status
from written_cases import failed, recorded, run_written

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
    case, _ = recorded(name)
    *path, last = CHANGES[name][0]
    place = case
    for key in path:
        place = place[key]
    assert place[last] != CHANGES[name][1]
    place[last] = CHANGES[name][1]
    result = run_written(tmp_path, case)
    assert result.status is Status.FAILED and len(failed(result)) == 1
