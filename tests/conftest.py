"""What tests of several packages share."""

import importlib.util
import random
import socket
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from piip_core import BranchConfig, DensePIIP, InteractionConfig, MergingConfig, PIIPConfig, ViTConfig

ROOT = Path(__file__).parents[1]


def _load(folder: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"piip_{folder}_{name}", ROOT / folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / folder))  # as for a script that is started
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture(scope="session")
def load_tool():
    """Imports tools/NAME.py, a script outside any package, as a module."""
    return partial(_load, "tools")


@pytest.fixture(scope="session")
def load_script():
    """Imports datasets/NAME.py, a script outside any package, as a module."""
    return partial(_load, "datasets")


def _randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


@pytest.fixture(scope="session")
def randomize():
    """Adds noise to all parameters of a module, the zero-initialised ones too, so that every path matters."""
    return _randomize


def _free_port() -> str:
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as taken:
            if taken.connect_ex(("127.0.0.1", port)):
                return str(port)
    raise AssertionError("no free port")


@pytest.fixture(scope="session")
def free_port():
    """Finds a port below those that the system itself hands out, which others may get before the launcher binds it."""
    return _free_port


SIMPLE = MergingConfig()


def tiny_branch(embed_dim: int, image_size: int, depth: int = 2, **options) -> BranchConfig:
    network = ViTConfig(embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 8, pos_grid=4)
    return BranchConfig(network=network, image_size=image_size, **options)


def tiny_config(dims=(32, 24, 16), sizes=(64, 96, 128), interaction=None, merging=SIMPLE, **options) -> PIIPConfig:
    interaction = interaction or InteractionConfig(num_interactions=2, num_heads=4)
    branches = tuple(tiny_branch(dim, size, **options) for dim, size in zip(dims, sizes, strict=True))
    return PIIPConfig(branches=branches, interaction=interaction, merging=merging)


@pytest.fixture(name="tiny_config", scope="session")
def tiny_config_fixture():
    """Builds a small PIIPConfig; see `tiny_config`."""
    return tiny_config


@pytest.fixture(name="tiny_branch", scope="session")
def tiny_branch_fixture():
    """Builds a small BranchConfig; see `tiny_branch`."""
    return tiny_branch


@pytest.fixture
def tiny_model(randomize) -> DensePIIP:
    """A three-branch model with windows, every parameter random."""
    return randomize(DensePIIP(tiny_config(window_size=3))).eval()
