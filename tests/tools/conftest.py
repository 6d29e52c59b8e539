"""Tools are scripts outside any package: tests load them by file."""

import importlib.util
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def load_tool():
    """Imports tools/NAME.py as a module."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"piip_tool_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
