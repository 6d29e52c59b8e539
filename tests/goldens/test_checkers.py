"""The verification itself: goldens pass, and nothing wrong passes."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from checkers import (
    VERIFIERS,
    Check,
    GoldenCase,
    GoldenError,
    Status,
    find_cases,
    find_verifier,
    run_cases,
    summary_line,
)
from piip_core.errors import NotSupportedYet
from written_cases import GOLDENS, failed, recorded, run_path, run_written

CASES = {case.name: case for case in find_cases([GOLDENS])}


@pytest.fixture
def copied(tmp_path):
    """Runs a golden case, changed by the caller."""

    def change_and_run(name, change_tensors=None, change_info=None):
        info, tensors = recorded(name)
        if change_tensors:
            change_tensors(tensors)
        if change_info:
            change_info(info)
        return run_written(tmp_path, info, tensors)

    return change_and_run


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_cases_pass(name):
    result = run_path(CASES[name].path)
    if result.status is Status.NOT_SUPPORTED and "not installed" in result.reason:
        pytest.skip(result.reason)
    assert result.status is Status.PASSED, str(result)


def test_the_recorded_families_are_all_there():
    assert set(VERIFIERS) - {case.family for case in CASES.values()} == {"dino_neck"}  # no small case is recorded


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("msdeform_fp32", "grad.mask.value_proj.weight"),
        ("msdeform_fp32", "output.nomask"),
        ("interaction_deform_proj_ln", "grad.branch1to2_injector.ffn.dwconv.dwconv.bias"),
        ("interaction_regular_attn", "output.x2"),
        ("det2_deit", "inter.0.x2"),
        ("det2_deit", "grad.input"),
        ("det2_deit", "grad.w1"),
        ("det3_deit_mixed_window_dino", "output.1"),
        ("load_deit_cls_pos", "output.blocks.1.gamma_2"),
    ],
)
def test_one_wrong_number_fails_and_is_named(name, tensor, copied):
    def spoil(tensors):
        flat = tensors[tensor].reshape(-1).clone()
        flat[-1] += 1e-3 * max(1.0, flat.abs().max().item())
        tensors[tensor] = flat.reshape(tensors[tensor].shape)

    result = copied(name, spoil)
    assert result.status is Status.FAILED
    assert failed(result) == [tensor]
    assert tensor in str(result)


@pytest.mark.parametrize("name", ["llava_splice", "llava_full_clip_bl"])
@pytest.mark.parametrize("part", ["logits", "output_ids"])
def test_wrong_numbers_of_complete_models_fail(name, part, copied):
    changed = next(key for key in recorded(name)[1] if key.split(".")[-1] == part)
    result = copied(name, lambda tensors: tensors.update({changed: tensors[changed] + 1}))
    assert result.status is Status.FAILED and failed(result) == [changed]


def test_swapped_weights_fail(copied):
    def swap(tensors):
        first, second = (f"state.branch1.blocks.0.gamma_{i}" for i in (1, 2))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    assert copied("det2_deit", swap).status is Status.FAILED


def test_a_result_that_nothing_compares_fails(copied):
    result = copied("msdeform_fp32", lambda tensors: tensors.update({"output.extra": torch.zeros(3)}))
    assert result.status is Status.FAILED
    assert "output.extra" in str(result) and "not compared" in str(result)


def test_a_state_dict_with_an_unknown_key_fails(copied):
    result = copied("det2_deit", lambda tensors: tensors.update({"state.branch1.surprise": torch.zeros(3)}))
    assert result.status is Status.FAILED and "surprise" in str(result)


def test_an_unknown_field_is_not_supported_yet(copied):
    result = copied("det2_deit", change_info=lambda info: info["config"].update(shiny=True))
    assert result.status is Status.NOT_SUPPORTED and "shiny" in str(result)


def test_an_unknown_loss_is_not_supported_yet(copied):
    result = copied("det2_deit", change_info=lambda info: info.update(loss="something else"))
    assert result.status is Status.NOT_SUPPORTED and "something else" in str(result)


def test_wrong_shapes_fail(copied):
    result = copied("msdeform_fp32", lambda tensors: tensors.update({"output.mask": torch.zeros(1)}))
    assert result.status is Status.FAILED and "expected (1,)" in str(result)


@pytest.fixture
def check(tmp_path):
    save_file({"output.a": torch.tensor([1.0, -4.0]), "output.b": torch.tensor([1, 2])}, tmp_path / "case.safetensors")
    info = {"name": "case", "family": "op", "tolerance": {"atol": 1e-3}}
    return Check(GoldenCase(tmp_path / "case.json", info))


def test_the_tolerance_is_relative_to_the_largest_reference_value(check):
    check.close("output.a", torch.tensor([1.0039, -4.0]))
    check.close("output.a", torch.tensor([1.0041, -4.0]))
    assert [c.passed for c in check.comparisons] == [True, False]
    assert check.comparisons[0].error == pytest.approx(0.0039 / 4, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_fail(value, check):
    check.close("output.a", torch.tensor([1.0, value]))
    assert not check.comparisons[0].passed


def test_integers_must_be_equal(check):
    check.equal("output.b", torch.tensor([1, 3]))
    check.equal("output.b", torch.tensor([1, 3]), allowed=0.5)
    assert [c.passed for c in check.comparisons] == [False, True]
    assert "1 of 2 differ" in check.comparisons[0].detail


def test_counts_may_differ_a_little_in_total(check):
    check.counts("output.b", torch.tensor([2, 3]), allowed=1.5)
    check.counts("output.b", torch.tensor([2, 3]), allowed=2.0)
    check.counts("output.b", torch.tensor([1, 2, 3]), allowed=9.0)
    assert [c.passed for c in check.comparisons] == [False, True, False]


def test_the_last_line_counts(copied):
    def not_yet(_case):
        raise NotSupportedYet("nothing")

    def broken(_case):
        raise RuntimeError("out of order")

    cases = find_cases([GOLDENS / f"{name}.json" for name in ("msdeform_fp32", "load_mae_no_ls", "det2_deit")])
    verifiers = {"op": find_verifier("op"), "load_mapping": not_yet, "detection": broken}
    results = list(run_cases(cases, verifiers.__getitem__))
    assert summary_line(results) == "1 passed, 1 failed, 1 not supported yet"
    assert "RuntimeError" in str(results[2]) and "out of order" in str(results[2])


def test_cases_are_found_in_files_and_folders_once(tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDENS / f"msdeform_fp32{suffix}", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "list.json").write_text("[1]")
    paths = [tmp_path, tmp_path / "msdeform_fp32.json", tmp_path / "msdeform_fp32.safetensors"]
    assert [case.name for case in find_cases(paths)] == ["msdeform_fp32"]


@pytest.mark.parametrize("name", ["missing", "config.json", "broken.json", "empty"])
def test_paths_without_a_case_are_named(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GoldenError, match=name):
        find_cases([tmp_path / name])


def test_a_case_without_its_tensors_fails(tmp_path):
    shutil.copy(GOLDENS / "msdeform_fp32.json", tmp_path)
    result = run_path(tmp_path)
    assert result.status is Status.FAILED and "msdeform_fp32.safetensors" in str(result)
