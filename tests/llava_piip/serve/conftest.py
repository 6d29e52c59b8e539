"""A small model that answers, and pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava_piip.assembly import assemble
from llava_piip.serve.generation import ChatModel


@pytest.fixture
def tiny_chat(tiny_llava):
    """A small model with random weights, ready to answer; its attention is sharp enough for pictures to matter."""
    model, processor = tiny_llava
    with torch.no_grad():
        for projection in model.model.multi_modal_projector.projections.values():
            projection.linear_2.weight.mul_(10)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(5)
            layer.self_attn.o_proj.weight.mul_(5)
    return ChatModel(model, processor)


@pytest.fixture(scope="session")
def pictures():
    """Pictures that a model with random weights tells apart: blocks of strong colours."""
    generator = np.random.default_rng(0)
    blocks = (generator.integers(0, 2, (12, 3, 4, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(picture).resize((64, 48), Image.Resampling.NEAREST) for picture in blocks]


@pytest.fixture(scope="session")
def png():
    """Writes a picture as a PNG file's content."""

    def write(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    return write


@pytest.fixture(scope="session")
def model_folder(tiny_entry, language_model_folder, tmp_path_factory):
    """A model as the training saves it, in bfloat16."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(0)
    model, processor = assemble(
        tiny_entry(), language_model=language_model_folder, pretrained_vision=False, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
