"""The orchestration: what is started, what is printed, what is left out."""

import functools
import re
import subprocess
import sys

import pytest

from piip.digit_demo import run


@pytest.fixture
def small_data(monkeypatch):
    small = functools.partial(run.prepare_digits, num_train=8, num_val=4)
    monkeypatch.setattr(run, "prepare_digits", small)


def test_without_detectron2_the_classifier_runs_and_the_last_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "run_classifier", functools.partial(run.run_classifier, num_train=64, num_val=8, epochs=1))
    run.main(["--output", str(tmp_path)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"Left out: the Mask R-CNN detector, because Detectron2 is not installed.*", lines[-1])
    assert any(line.startswith("Validation accuracy") for line in lines)
    assert (tmp_path / "classifier" / "classified.png").is_file()


def test_restart_forgets_the_earlier_run(tmp_path, monkeypatch):
    calls = []

    def fake(output):
        calls.append(list(output.iterdir()) if output.exists() else [])
        output.mkdir(parents=True, exist_ok=True)
        (output / "classifier.pth").touch()
        return []

    monkeypatch.setattr(run, "run_classifier", fake)
    for options in ([], [], ["--restart"]):
        run.main(["--classifier", "--output", str(tmp_path), *options])
    assert [len(found) for found in calls] == [0, 1, 0]


def test_failed_training_is_an_error_that_names_the_log(tmp_path, monkeypatch, small_data):
    monkeypatch.setattr(run, "_why_no_detector", lambda: None)
    monkeypatch.setattr(run, "_run_and_show", lambda *_: 3)
    with pytest.raises(SystemExit, match=r"exit status 3, see above and .*log\.txt"):
        run.main(["--output", str(tmp_path / "out"), "--data", str(tmp_path / "digits")])


@pytest.mark.parametrize(("status", "shown"), [(0, ["Starting training from iteration 0", "step"]), (1, None)])
def test_listings_before_training_are_shown_only_on_failure(status, shown, capsys):
    before = ["config", "model"]
    after = ["Starting training from iteration 0", "step"] if status == 0 else ["Traceback"]
    code = f"import sys\nfor line in {before + after}: print(line)\nsys.exit({status})"
    assert run._run_and_show([sys.executable, "-c", code], {}) == status
    assert capsys.readouterr().out.splitlines() == (shown or before + after)


def test_foreign_data_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_why_no_detector", lambda: None)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="not a digit data set"):
        run.main(["--output", str(tmp_path / "out"), "--data", str(tmp_path)])


def test_importing_the_demo_needs_no_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import piip.digit_demo.run"
    subprocess.run([sys.executable, "-c", code], check=True)
