"""Trained branches, which several tests need."""

import pytest

from llava_piip.demo import vision


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of branches after an update of Branch 1 and three of Branch 2, and their accuracies."""
    folder = tmp_path_factory.mktemp("vision")
    return folder, vision.train_branches(folder, steps=(1, 3), num_val=32)
