"""The recorded batches and orders of the public code, and that a wrong record would be noticed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from checkers import GoldenCase, find_cases
from checkers.llava.data import verify_collate, verify_sampler

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
VERIFIERS = {"llava_sampler": verify_sampler, "llava_collate": verify_collate}


@pytest.fixture(params=VERIFIERS)
def case(request) -> GoldenCase:
    (found,) = find_cases([GOLDENS / request.param])
    return found


def failures(case: GoldenCase) -> list[str]:
    return [comparison.name for comparison in VERIFIERS[case.family](case).comparisons if not comparison.passed]


def test_recorded_results(case):
    comparisons = VERIFIERS[case.family](case).comparisons
    assert len(comparisons) == {"llava_sampler": 6, "llava_collate": 74}[case.family]
    assert not failures(case)


@pytest.mark.parametrize("number", range(6))
def test_another_order_is_noticed(number):
    (case,) = find_cases([GOLDENS / "llava_sampler"])
    info = copy.deepcopy(case.info)
    entry = info["cases"][number]
    if "exception" in entry:
        entry["lengths"] = [abs(length) + 1 for length in entry["lengths"]]
    else:
        entry["indices"][0], entry["indices"][1] = entry["indices"][1], entry["indices"][0]
    assert len(failures(replace(case, info=info))) == 1


@pytest.mark.parametrize(
    ("batch", "change", "expected"),
    [
        (0, lambda b: b["input_ids"][1].__setitem__(90, 5), "output.0.input_ids"),
        (0, lambda b: b["labels"][0].__setitem__(-1, -100), "output.0.labels"),
        (0, lambda b: b["attention_mask"][0].__setitem__(3, 0), "output.0.attention_mask.public"),
        (0, lambda b: b["image_is_zero"].__setitem__(0, True), "output.0.image_shape"),
        (0, lambda b: b["image_shape"].__setitem__(3, 48), "output.0.image_shape"),
        (1, lambda b: b["printed"].clear(), "output.1.missing"),
        (4, lambda b: b["input_ids"][1].__setitem__(95, 5), "output.4.labels"),
        (5, lambda b: b["labels"][1].__setitem__(-1, -100), "output.5.labels"),
        (6, lambda b: b["labels"][0].__setitem__(-1, 5), "output.6.refused.6"),
    ],
)
def test_another_batch_is_noticed(batch, change, expected):
    (case,) = find_cases([GOLDENS / "llava_collate"])
    info = copy.deepcopy(case.info)
    change(info["batches"][batch])
    assert expected in failures(replace(case, info=info))


@pytest.mark.parametrize("name", ["lengths", "modality_lengths"])
def test_other_lengths_are_noticed(name):
    (case,) = find_cases([GOLDENS / "llava_collate"])
    info = copy.deepcopy(case.info)
    info[name][3] += 1
    assert failures(replace(case, info=info)) == [f"output.{name}"]
