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


def make_row(matrix, cell, counts, minutes=1.0):
    return matrix.Row(cell, "2026-11-30", "all", {"torch": "2.14.1"}, counts, minutes)


def test_nothing_that_failed_or_never_ran_passes(matrix):
    counts = {"passed": 5, "failed": 0, "skipped": 1}
    assert make_row(matrix, "locked", counts).passed
    assert not make_row(matrix, "locked", counts | {"failed": 1}).passed
    assert not make_row(matrix, "locked", counts | {"passed": 0}).passed
    assert not make_row(matrix, "locked", None).passed


def test_table_replaces_the_row_of_the_same_cell(matrix, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{matrix.BEGIN}\n{matrix.END}\nafter\n")
    counts = {"passed": 5, "failed": 0, "skipped": 1}
    for row in (
        make_row(matrix, "newest, Python 3.11", counts),
        make_row(matrix, "oldest, Python 3.10", None),
        make_row(matrix, "newest, Python 3.11", counts | {"passed": 9}, 2.5),
    ):
        matrix.keep(row, document)
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
