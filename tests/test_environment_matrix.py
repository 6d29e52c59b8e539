"""environment_matrix.py: what its environments are made of, how tests are counted, the rows that it prints."""

import pytest


@pytest.fixture(scope="module")
def matrix(load_tool):
    return load_tool("environment_matrix", folder="tests")


def test_floors_are_the_lower_bounds_of_all_extras(matrix):
    project = {
        "dependencies": ["torch>=2.10", "pillow"],
        "optional-dependencies": {"a": ["ray[serve]>=2.6,<3", "piip[b]"], "b": ["setuptools<81", "x @ git+https://y"]},
    }
    assert matrix.floors(project) == ["torch==2.10", "ray==2.6"]


def test_every_kind_has_its_versions_and_pins_win(matrix):
    locked = [line for line in (matrix.ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert matrix.constraints("locked", []).splitlines() == locked
    assert matrix.constraints("newest", []).strip() == ""
    pinned = matrix.constraints("locked", ["transformers==5.19.0"]).splitlines()
    assert [line for line in pinned if line.startswith("transformers")] == ["transformers==5.19.0"]
    assert len(pinned) == len(locked)
    other = matrix.constraints("locked", ["Open_CLIP.torch==1"]).splitlines()
    assert "Open_CLIP.torch==1" in other and not any(line.startswith("open-clip-torch") for line in other)
    oldest = matrix.constraints("oldest", []).splitlines()
    assert any(line.startswith("torch==2.") for line in oldest) and all("==" in line for line in oldest)


@pytest.mark.parametrize(
    ("attributes", "shown", "passes"),
    [
        ('tests="6" failures="0" errors="0" skipped="1"', "5 | 0 | 1", True),
        ('tests="7" failures="1" errors="2" skipped="1"', "3 | 3 | 1", False),
        ('tests="1" failures="0" errors="0" skipped="1"', "0 | 0 | 1", False),
        (None, "not installed | not installed | not installed", False),
    ],
)
def test_nothing_that_failed_or_never_ran_passes(matrix, tmp_path, monkeypatch, attributes, shown, passes):
    def make(command, **_):
        if command[0] == "make" and attributes:
            (tmp_path / "results.xml").write_text(f"<testsuites><testsuite {attributes}/></testsuites>")

    monkeypatch.setattr(matrix.subprocess, "run", make)
    row, passed = matrix.run_tests("newest", "3.11", [], tmp_path, [])
    assert passed == passes
    assert row.startswith("| newest, Python 3.11 | all | none |") and f"| {shown} |" in row


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pythons", "2.7"], "--pythons 2.7: expected an installed Python"),
        (["--with", "transformers"], "--with transformers: expected NAME==VERSION"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(matrix, monkeypatch, capsys, options, said):
    monkeypatch.setattr("sys.argv", ["environment_matrix.py", *options])
    with pytest.raises(SystemExit) as stopped:
        matrix.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
