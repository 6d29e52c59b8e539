"""Runs the tests in fresh clones and fresh environments, and keeps the table of what passed.

    python tools/environment_matrix.py                                    # every kind on every Python of this machine
    python tools/environment_matrix.py --kinds newest --with transformers==5.23.0 --tests tests/llava_piip

Kinds of environments: "oldest" has the floor of every range in pyproject.toml and is made with the oldest Python alone,
"locked" is constraints.txt, "newest" is whatever the package index has today. What is committed is what is tested.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("oldest", "locked", "newest")
SHOWN = ("torch", "transformers", "timm", "deepspeed", "gradio")  # versions in the table
COLUMNS = ("environment", "tests", *SHOWN, "passed", "failed", "skipped", "minutes, set-up included", "date")
BEGIN, END = "<!-- begin: tools/environment_matrix.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Cell:
    """One environment: a kind, a Python such as "3.11", and requirements that go before the kind's."""

    kind: str
    python: str
    pins: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.kind, f"Python {self.python}", *self.pins])


def floors(project: dict) -> list[str]:
    """`name==version` for every lower bound that a pyproject.toml's dependencies and extras state."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {}
    for requirement in (each for requirements in lists for each in requirements):
        match = re.fullmatch(r"([\w.-]+)(?:\[[^\]]*\])?>=([\w.]+)(?:,.*)?", requirement.split(";")[0].strip())
        if match:
            found[match[1]] = match[2]
    return [f"{name}=={version}" for name, version in found.items()]


def constraints(cell: Cell) -> str:
    """The text of the constraints file of a cell."""
    if cell.kind == "oldest":
        lines = floors(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    else:
        lines = (ROOT / "constraints.txt").read_text().splitlines() if cell.kind == "locked" else []
    pinned = {_name(pin) for pin in cell.pins}
    return "\n".join([*cell.pins, *(line for line in lines if _name(line) not in pinned)]) + "\n"


def _name(requirement: str) -> str:
    """The package that a requirement is about, as the package index spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def runnable_pythons() -> list[str]:
    """The versions 3.10 to 3.14 of Python that start here; of pyenv's, a name alone says nothing."""
    found = []
    for version in (f"3.{minor}" for minor in range(10, 15)):
        path = shutil.which(f"python{version}")
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            found.append(version)
    return found


def run_cell(cell: Cell, folder: Path, tests: Sequence[str], make_options: Sequence[str]) -> tuple[str, bool]:
    """Clones the project into `folder`, makes the environment as the README says, and runs the tests there.

    Returns:
        A row of the table, and whether tests ran and none failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkout, log, results = folder / "checkout", folder / "log", folder / "results.xml"
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    wanted = folder / "constraints.txt"
    wanted.write_text(constraints(cell))
    command = ["make", "test", f"PYTHON=python{cell.python}", "VENV=.venv", f"CONSTRAINTS={wanted}", *make_options]
    command.append(f"PYTEST_ARGS=--junitxml={results} {' '.join(tests)}")
    print(f"{cell}: {log}", flush=True)
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with log.open("w") as output:
        subprocess.run(command, cwd=checkout, stdout=output, stderr=subprocess.STDOUT, env=environment)
    versions = _versions(checkout / ".venv" / "bin" / "python")
    counts = _counts(results)
    minutes = round((time.monotonic() - start) / 60, 1)
    return table_row(cell, tests, versions, counts, minutes), bool(counts and counts["passed"] and not counts["failed"])


def table_row(
    cell: Cell, tests: Sequence[str], versions: dict[str, str], counts: dict[str, int] | None, minutes: float
) -> str:
    """A row of the table; `counts` is None where the environment could not be made."""
    shown = [versions.get(name, "none") for name in SHOWN]
    numbers = counts or dict.fromkeys(("passed", "failed", "skipped"), "not installed")
    return _line([cell, " ".join(tests) or "all", *shown, *numbers.values(), minutes, datetime.date.today()])


def _counts(results: Path) -> dict[str, int] | None:
    """Tests by their outcome, from pytest's report; an error in a fixture or a module is a failure."""
    if not results.exists():
        return None
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def _versions(python: Path) -> dict[str, str]:
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    if not python.exists():
        return {}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=python.parent)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def _line(columns: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, columns))} |"


def keep(row: str, document: Path) -> None:
    """Puts a row into the table of a document, in the place of an earlier one of the same cell and tests."""
    before, rest = document.read_text().split(BEGIN)
    table, after = rest.split(END, 1)
    lines = table.strip().splitlines()[2:]
    lines = [line for line in lines if line.split("|")[:3] != row.split("|")[:3]] + [row]
    lines.sort(key=lambda line: KINDS.index(line.strip("| ").split(",")[0]))
    table = "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *lines])
    aside = document.with_name(f".{document.name}.incomplete")
    aside.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    aside.replace(document)


def main() -> None:
    """Runs the cells one after the other; ends with status 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pythons = runnable_pythons()
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="default: all")
    parser.add_argument("--pythons", nargs="+", default=pythons, metavar="3.N", help=f"default: {' '.join(pythons)}")
    parser.add_argument("--with", nargs="+", default=[], dest="pins", metavar="NAME==VERSION", help="other versions")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="default: the whole suite")
    parser.add_argument("--make", nargs="+", default=[], metavar="NAME=VALUE", help="such as DETECTRON2=FOLDER")
    parser.add_argument("--document", type=Path, help="keep the rows in the table of this file (docs/environments.md)")
    options = parser.parse_args()
    if not options.pythons or not set(options.pythons) <= set(pythons):
        expected = f"expected some of {' '.join(pythons) or 'none'}, which run here"
        parser.error(f"--pythons {' '.join(options.pythons)}: {expected}")
    if wrong := [pin for pin in options.pins if not re.fullmatch(r"[\w.-]+==\S+", pin)]:
        parser.error(f"--with {wrong[0]}: expected NAME==VERSION")
    if options.document and not (options.document.is_file() and BEGIN in options.document.read_text()):
        parser.error(f"--document {options.document}: expected a file with the lines {BEGIN} and {END}")
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout:
        print("Uncommitted changes are not tested: every environment has a clone.", flush=True)
    failed = False
    for python in options.pythons:
        for kind in options.kinds:
            if kind == "oldest" and python != options.pythons[0]:
                continue
            cell = Cell(kind, python, tuple(options.pins))
            folder = ROOT / "build" / "matrix" / re.sub(r"[^\w.]+", "-", str(cell))
            row, passed = run_cell(cell, folder, options.tests, options.make)
            print(row, flush=True)
            failed |= not passed
            if options.document:
                keep(row, options.document)
    sys.exit(failed)


if __name__ == "__main__":
    main()
