"""The scripts of datasets/ are outside any package: tests load them by file."""

import importlib.util
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="session")
def load_script():
    """Imports datasets/NAME.py as a module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"piip_dataset_script_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
