"""Recorded runs in json files: a single wrong prompt, word, score, line, order or batch is noticed."""

import pytest

from checkers import Status
from written_cases import GOLDENS, failed, recorded, run_path, run_written


def changed(name, path, value):
    """The recorded case with another value in one place."""
    info, _ = recorded(name)
    *outer, last = path
    node = info
    for key in outer:
        node = node[key]
    assert node[last] != value
    node[last] = value
    return info


# Where a recorded value stands, and another one
@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("bench_gqa", ("runs", 0, "per_item", "200000003", "correct"), True),
        ("bench_mmbench", ("runs", 0, "table", 2, 6), "B"),
        ("bench_mmvet", ("output_text",), "{}"),
        ("bench_pope", ("runs", 0, "summary_line"), ["POPE: 72.2"]),
        ("bench_prompts", ("runs", 0, "calls", 0, "prompt"), "USER: <image>\nIs there a dog in the image? ASSISTANT:"),
        ("bench_scienceqa", ("runs", 0, "per_item", "5", "correct"), True),
        ("bench_seed", ("runs", 0, "stdout", 5), "image accuracy: 40.00%"),
        ("bench_textvqa", ("processor", 20, "processed"), "11"),
        ("bench_vqav2", ("output", 2, "answer"), "two dogs"),
        ("llava_collate", ("lengths", 3), 1),
        ("llava_collate", ("modality_lengths", 3), 1),
    ],
)
def test_wrong_record_fails(name, path, value, tmp_path):
    result = run_written(tmp_path, changed(name, path, value))
    assert result.status is Status.FAILED and len(failed(result)) == 1


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ((0, "input_ids", 1, 90), 5, "output.0.input_ids"),
        ((0, "labels", 0, -1), -100, "output.0.labels"),
        ((0, "attention_mask", 0, 3), 0, "output.0.attention_mask.public"),
        ((0, "image_is_zero", 0), True, "output.0.image_shape"),
        ((0, "image_shape", 3), 48, "output.0.image_shape"),
        ((1, "printed"), [], "output.1.missing"),
        ((4, "input_ids", 1, 95), 5, "output.4.labels"),
        ((5, "labels", 1, -1), -100, "output.5.labels"),
        ((6, "labels", 0, -1), 5, "output.6.refused.6"),
    ],
)
def test_another_batch_is_noticed(path, value, expected, tmp_path):
    assert expected in failed(run_written(tmp_path, changed("llava_collate", ("batches", *path), value)))


@pytest.mark.parametrize("number", range(6))
def test_another_order_is_noticed(number, tmp_path):
    info, _ = recorded("llava_sampler")
    entry = info["cases"][number]
    if "exception" in entry:
        entry["lengths"] = [abs(length) + 1 for length in entry["lengths"]]
    else:
        entry["indices"][0], entry["indices"][1] = entry["indices"][1], entry["indices"][0]
    assert len(failed(run_written(tmp_path, info))) == 1


@pytest.mark.parametrize(("name", "comparisons"), [("llava_sampler", 6), ("llava_collate", 74)])
def test_everything_recorded_is_compared(name, comparisons):
    assert len(run_path(GOLDENS / f"{name}.json").comparisons) == comparisons
