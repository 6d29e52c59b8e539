"""Runs the tests in fresh clones and fresh environments, and prints what passed as rows of docs/environments.md.

    python tests/environment_matrix.py --pythons 3.10 3.11                # every kind of environment
    python tests/environment_matrix.py --kinds newest --with transformers==5.23.0 --tests tests/llava_piip

Kinds of environments: "oldest" has the floor of every range in pyproject.toml and is made with the first Python alone,
"locked" is constraints.txt, "newest" is whatever the package index has today. What is committed is what is tested.
Variables of the Makefile, such as DETECTRON2, are taken from the environment.
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
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("oldest", "locked", "newest")
SHOWN = ("torch", "transformers", "timm", "deepspeed", "gradio")  # versions in the rows


def floors(project: dict) -> list[str]:
    """`name==version` for every lower bound that a pyproject.toml's dependencies and extras state."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    found = {r.name: s.version for r in requirements for s in r.specifier if s.operator == ">="}
    return [f"{name}=={version}" for name, version in found.items()]


def constraints(kind: str, pins: Sequence[str]) -> str:
    """The text of the constraints file of an environment; `pins` are requirements that go before the kind's."""
    lines = []
    if kind == "oldest":
        lines = floors(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    elif kind == "locked":
        lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(pin).name) for pin in pins}
    kept = [line for line in lines if canonicalize_name(Requirement(line).name) not in pinned]
    return "\n".join([*pins, *kept, ""])


def run_tests(kind: str, python: str, pins: Sequence[str], folder: Path, tests: Sequence[str]) -> tuple[str, bool]:
    """Clones the project into `folder`, makes the environment as the README says, and runs the tests there.

    Returns:
        A row of the table, and whether tests ran and none failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkout, log, results = folder / "checkout", folder / "log", folder / "results.xml"
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    wanted = folder / "constraints.txt"
    wanted.write_text(constraints(kind, pins))
    command = ["make", "test", f"PYTHON=python{python}", "VENV=.venv", f"CONSTRAINTS={wanted}"]
    command.append(f"PYTEST_ARGS=--junitxml={results} {' '.join(tests)}")
    name = ", ".join([kind, f"Python {python}", *pins])
    print(f"{name}: {log}", flush=True)
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    with log.open("w") as output:
        subprocess.run(command, cwd=checkout, stdout=output, stderr=subprocess.STDOUT, env=environment)
    minutes = round((time.monotonic() - start) / 60, 1)
    versions, counts = read_versions(checkout / ".venv" / "bin" / "python"), read_counts(results)
    shown = [versions.get(package, "none") for package in SHOWN]
    cells = [name, " ".join(tests) or "all", *shown, *counts.values(), minutes, datetime.date.today()]
    return f"| {' | '.join(map(str, cells))} |", counts["passed"] != 0 and counts["failed"] == 0


def read_counts(results: Path) -> dict[str, int | str]:
    """Tests by their outcome, from pytest's report; an error in a fixture or a module is a failure."""
    if not results.exists():
        return dict.fromkeys(("passed", "failed", "skipped"), "not installed")
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def read_versions(python: Path) -> dict[str, str]:
    """What is installed for an interpreter."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    if not python.exists():
        return {}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=python.parent)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def starts(python: str) -> bool:
    """Whether a version of Python starts here; of pyenv's, a name alone says nothing."""
    path = shutil.which(f"python{python}")
    return path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0


def main() -> None:
    """Tests the environments one after the other; ends with status 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="default: all")
    this = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("--pythons", nargs="+", default=[this], metavar="3.N", help=f"oldest first; default: {this}")
    parser.add_argument("--with", nargs="+", default=[], dest="pins", metavar="NAME==VERSION", help="other versions")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="default: the whole suite")
    options = parser.parse_args()
    if missing := [python for python in options.pythons if not starts(python)]:
        parser.error(f"--pythons {missing[0]}: expected an installed Python")
    if wrong := [pin for pin in options.pins if not re.fullmatch(r"[\w.-]+==\S+", pin)]:
        parser.error(f"--with {wrong[0]}: expected NAME==VERSION")
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout:
        print("Uncommitted changes are not tested: every environment has a clone.", flush=True)
    failed = False
    for python in options.pythons:
        for kind in options.kinds:
            if kind == "oldest" and python != options.pythons[0]:
                continue
            folder = ROOT / "build" / "matrix" / re.sub(r"[^\w.]+", "-", " ".join([kind, python, *options.pins]))
            row, passed = run_tests(kind, python, options.pins, folder, options.tests)
            print(row, flush=True)
            failed |= not passed
    sys.exit(failed)


if __name__ == "__main__":
    main()
