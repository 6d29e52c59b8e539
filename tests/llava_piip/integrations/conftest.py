"""A small model in a folder, as harnesses load it, and pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import add_image_token, assemble_config, assemble_processor

TEXT_SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=224,
    vocab_size=909,  # that of the tokenizer
)


@pytest.fixture(scope="session")
def chat_folder(tiny_entry, tokenizer_folder, randomize, tmp_path_factory):
    """A model with random weights, for which pictures matter."""
    tokenizer = add_image_token(AutoTokenizer.from_pretrained(tokenizer_folder))
    config = assemble_config(tiny_entry(), LlamaConfig(**TEXT_SIZES), image_token_id=len(tokenizer) - 1)
    torch.manual_seed(0)
    model = randomize(PIIPLlavaForConditionalGeneration(config)).eval()
    with torch.no_grad():
        for projection in model.model.multi_modal_projector.projections.values():
            projection.linear_2.weight.mul_(10)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(5)
            layer.self_attn.o_proj.weight.mul_(5)
    folder = tmp_path_factory.mktemp("harness") / "model"
    model.save_pretrained(folder)
    assemble_processor(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures():
    """Pictures that a model with random weights tells apart: blocks of strong colours."""
    generator = np.random.default_rng(0)
    blocks = (generator.integers(0, 2, (6, 3, 4, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(picture).resize((64, 48), Image.Resampling.NEAREST) for picture in blocks]
