"""Trained branches, which several tests need."""

import pytest

from llava_piip.demo import vision


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """What an update of Branch 1 and three of Branch 2 bring."""
    return vision.train_branches(tmp_path_factory.mktemp("vision"), steps=(1, 3), num_val=32)
