"""tools/environment_matrix.py: what its environments are made of, how tests are counted, the table that it keeps."""

import pytest

REPORT = """<testsuites><testsuite tests="7" failures="1" errors="2" skipped="1" time="3.2"/></testsuites>"""


@pytest.fixture(scope="module")
def matrix(load_tool):
    return load_tool("environment_matrix")


def test_floors_are_the_lower_bounds_of_all_extras(matrix):
    project = {
        "dependencies": ["torch>=2.10", "pillow"],
        "optional-dependencies": {"a": ["ray[serve]>=2.6,<3", "piip[b]"], "b": ["setuptools<81", "x @ git+https://y"]},
    }
    assert matrix.floors(project) == ["torch==2.10", "ray==2.6"]


def test_every_kind_has_its_versions_and_pins_win(matrix):
    locked = (matrix.ROOT / "constraints.txt").read_text()
    assert matrix.constraints(matrix.Cell("locked", "3.11")).strip() == locked.strip()
    assert matrix.constraints(matrix.Cell("newest", "3.11")).strip() == ""
    pinned = matrix.constraints(matrix.Cell("locked", "3.11", ("transformers==5.19.0",))).splitlines()
    assert [line for line in pinned if line.startswith("transformers")] == ["transformers==5.19.0"]
    assert len(pinned) == len(locked.splitlines())
    other = matrix.constraints(matrix.Cell("locked", "3.11", ("Open_CLIP.torch==1",))).splitlines()
    assert "Open_CLIP.torch==1" in other and not any(line.startswith("open-clip-torch") for line in other)
    oldest = matrix.constraints(matrix.Cell("oldest", "3.10")).splitlines()
    assert any(line.startswith("torch==2.") for line in oldest) and all("==" in line for line in oldest)


def test_errors_count_as_failures(matrix, tmp_path):
    (tmp_path / "results.xml").write_text(REPORT)
    counts = matrix._counts(tmp_path / "results.xml")
    assert counts == {"passed": 3, "failed": 3, "skipped": 1}
    assert matrix._counts(tmp_path / "missing.xml") is None


@pytest.mark.parametrize(
    ("attributes", "passes"),
    [
        ('tests="6" failures="0" errors="0" skipped="1"', True),
        ('tests="6" failures="1" errors="0" skipped="0"', False),
        ('tests="1" failures="0" errors="0" skipped="1"', False),
        (None, False),
    ],
)
def test_nothing_that_failed_or_never_ran_passes(matrix, tmp_path, monkeypatch, attributes, passes):
    def make(command, **_):
        if command[0] == "make" and attributes:
            (tmp_path / "results.xml").write_text(f"<testsuites><testsuite {attributes}/></testsuites>")

    monkeypatch.setattr(matrix.subprocess, "run", make)
    row, passed = matrix.run_cell(matrix.Cell("newest", "3.11"), tmp_path, [], [])
    assert passed == passes and row.startswith("| newest, Python 3.11 | all | none |")


def test_table_replaces_the_row_of_the_same_cell(matrix, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{matrix.BEGIN}\n{matrix.END}\nafter\n")
    counts = {"passed": 5, "failed": 0, "skipped": 1}
    newest, oldest = matrix.Cell("newest", "3.11"), matrix.Cell("oldest", "3.10")
    for cell, found, minutes in (
        (newest, counts, 1.0),
        (oldest, None, 1.0),
        (newest, counts | {"passed": 9}, 2.5),
    ):
        matrix.keep(matrix.table_row(cell, [], {"torch": "2.14.1"}, found, minutes), document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    lines = [line for line in text.splitlines() if "Python" in line]
    assert [line.split(", ")[0] for line in lines] == ["| oldest", "| newest"]
    assert "not installed" in lines[0] and "| 9 | 0 | 1 | 2.5 |" in lines[1]
    assert all(line.count("|") == len(matrix.COLUMNS) + 1 for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pythons", "2.7"], "expected some of 3.11"),
        (["--with", "transformers"], "--with transformers: expected NAME==VERSION"),
        (["--document", "missing.md"], "--document missing.md: expected a file with the lines"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(matrix, monkeypatch, capsys, options, said):
    monkeypatch.setattr(matrix, "runnable_pythons", lambda: ["3.11"])
    monkeypatch.setattr("sys.argv", ["environment_matrix.py", *options])
    with pytest.raises(SystemExit) as stopped:
        matrix.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
