"""Trained branches and a language model, which several tests need."""

import pytest

from llava_piip.demo import vision
from llava_piip.demo.dataset import imagine_conversations
from llava_piip.demo.language import train_language_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of branches after an update of Branch 1 and three of Branch 2, and their accuracies."""
    folder = tmp_path_factory.mktemp("vision")
    return folder, vision.train_branches(folder, steps=(1, 3), num_val=32)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """The folder of a language model after ten updates, and its loss."""
    folder = tmp_path_factory.mktemp("language") / "model"
    return folder, train_language_model(folder, imagine_conversations(640), batch_size=64)
