"""Listings (name, shape) of released models and pretrained files, and state dicts made from them."""

import gzip
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parents[2] / "data" / "state_dicts"


def read_listing(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(DATA / f"{name}.tsv.gz", "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith(("#", "key\t"))]
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, *_ in rows}


def numbered_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of any size that take no memory: the i-th is full of i."""
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(shapes.items(), 1)}


@pytest.fixture(scope="session")
def listing():
    """Reads the listing of a released file: name -> shape."""
    return read_listing


@pytest.fixture(scope="session")
def state_of():
    """A state dict with the names and shapes of a listing, each tensor full of its own number."""
    return numbered_state
