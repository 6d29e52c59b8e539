"""A small model, its parts and its processor, shared by the tests of this folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import add_image_token, assemble_config, assemble_processor
from piip_core import BranchConfig, ConvNeXtConfig, InteractionConfig, PIIPConfig, ViTConfig
from piip_core.zoo import MultimodalEntry, MultimodalScores

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "legacy": False,
    "add_bos_token": True,
    "model_max_length": 2048,
}
TEXT_SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    vocab_size=909,  # that of the tokenizer
)


def tiny_entry(image_size: int = 64) -> MultimodalEntry:
    """A row with a CLIP branch and a ConvNeXt branch: 4 visual tokens at 64 pixels."""
    clip = ViTConfig(
        embed_dim=32,
        depth=2,
        num_heads=4,
        pos_grid=4,
        norm_eps=1e-5,
        layer_scale=None,
        activation="quick_gelu",
        pre_norm=True,
        class_token=True,
        class_position=True,
    )
    convnext = ConvNeXtConfig(depths=(1, 1, 1, 1), stage_dims=(8, 16, 24, 32))
    vision = PIIPConfig(
        branches=(
            BranchConfig(network=clip, image_size=image_size // 2),
            BranchConfig(network=convnext, image_size=image_size),
        ),
        interaction=InteractionConfig(num_interactions=2, num_heads=4),
        merging=None,
    )
    return MultimodalEntry(
        name="tiny",
        title="tiny",
        vision=vision,
        language_model="none",
        embed_dim=32,
        scores=MultimodalScores(*[0.0] * 9),
        flops_g=0.0,
    )


@pytest.fixture(name="tiny_entry", scope="session")
def tiny_entry_fixture():
    """Builds a small row of the zoo; see `tiny_entry`."""
    return tiny_entry


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A folder with a small Llama-like tokenizer of 909 tokens, as published models have theirs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(GOLDENS / "llava_tokenizer_A.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


@pytest.fixture(scope="session")
def language_model_folder(tokenizer_folder, tmp_path_factory):
    """A folder with a small Llama and its tokenizer, to start training from."""
    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TEXT_SIZES)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_llava(tokenizer_folder, randomize):
    """A small model with random weights everywhere, in evaluation mode, and its processor."""
    tokenizer = add_image_token(AutoTokenizer.from_pretrained(tokenizer_folder))
    config = assemble_config(tiny_entry(), LlamaConfig(**TEXT_SIZES), image_token_id=len(tokenizer) - 1)
    torch.manual_seed(0)
    model = randomize(PIIPLlavaForConditionalGeneration(config)).eval()
    return model, assemble_processor(config, tokenizer)
