"""A trained language model, which several tests need."""

import pytest

from llava_piip.demo.dataset import imagine_conversations
from llava_piip.demo.language import train_language_model


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """The folder of a language model after ten updates, and its loss."""
    folder = tmp_path_factory.mktemp("language") / "model"
    return folder, train_language_model(folder, imagine_conversations(160), batch_size=16)
