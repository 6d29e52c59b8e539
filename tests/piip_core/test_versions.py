"""The versions that this release says it was tested with, against what it declares and locks; warnings beyond them."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from piip_core import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines]
LOCKED = {
    line.split("==")[0]: re.split(r"[ ;]", line.split("==")[1])[0]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("package", doctor.TESTED)
def test_tested_range_starts_at_the_floor_and_holds_the_locked_version(package):
    oldest, newest = map(Version, doctor.TESTED[package])
    floors = [each for each in REQUIREMENTS if canonical(each.name) == canonical(package)]
    assert floors, package
    for requirement in floors:
        (floor,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
        assert floor.release[:2] == oldest.release[:2] and floor <= oldest
    assert oldest <= Version(LOCKED[canonical(package)]) <= newest


def test_every_dependency_has_a_floor_that_the_locked_version_meets():
    for requirement in REQUIREMENTS:
        if requirement.name in ("piip", "detectron2", "vllm"):
            continue
        locked = LOCKED.get(canonical(requirement.name))
        if locked is not None:
            assert requirement.specifier.contains(locked), requirement
        assert any(part.operator in (">=", "<") for part in requirement.specifier), f"{requirement}: no floor"


def test_lock_has_every_dependency_of_the_tests():
    def names(extra):
        for requirement in map(Requirement, EXTRAS[extra]):
            if requirement.name == "piip":
                for inner in requirement.extras:
                    yield from names(inner)
            else:
                yield canonical(requirement.name)

    needed = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]} | set(names("dev"))
    assert needed <= set(LOCKED)


@pytest.fixture
def transformers_version(monkeypatch):
    found = {name: newest for name, (_, newest) in doctor.TESTED.items()}
    monkeypatch.setattr(doctor, "installed_version", found.get)
    return lambda version: found.update(transformers=version)


def test_newer_and_older_versions_are_named(transformers_version):
    assert doctor.untested() == []
    transformers_version("99.1.0")
    (line,) = doctor.untested()
    assert line.startswith("transformers 99.1.0 is newer than anything this release was tested with")
    transformers_version("4.57.6")
    (line,) = doctor.untested()
    assert line.startswith("transformers 4.57.6 is older than anything this release was tested with")
    transformers_version("unknown")
    assert doctor.untested()[0].startswith("transformers unknown has no version that compares")
    transformers_version(doctor.TESTED["transformers"][1] + "+local")
    assert doctor.untested() == []


def test_importing_the_chat_model_says_it_once(run_python):
    pytest.importorskip("transformers")
    code = "import piip_core.doctor as d; d.TESTED = {'transformers': ('1.0', '5.0.0')}; import llava_piip, llava_piip"
    assert run_python(code).stderr.count("is newer than anything this release was tested with (up to 5.0.0)") == 1
