"""Small models in folders, as other projects' programs load them, and images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import add_image_token, assemble_config, assemble_processor
from piip_core import InteractionConfig

TEXT_SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=224,
    vocab_size=909,  # that of the tokenizer
)


def _sharpen(model):
    """Makes the attention of a model with random weights sharp enough for images to matter."""
    with torch.no_grad():
        for projection in model.model.multi_modal_projector.projections.values():
            projection.linear_2.weight.mul_(10)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(5)
            layer.self_attn.o_proj.weight.mul_(5)


@pytest.fixture(scope="session")
def chat_folder(tiny_entry, tokenizer_folder, randomize, tmp_path_factory):
    """A model with random weights, for which pictures matter."""
    tokenizer = add_image_token(AutoTokenizer.from_pretrained(tokenizer_folder))
    config = assemble_config(tiny_entry(), LlamaConfig(**TEXT_SIZES), image_token_id=len(tokenizer) - 1)
    torch.manual_seed(0)
    model = randomize(PIIPLlavaForConditionalGeneration(config)).eval()
    _sharpen(model)
    folder = tmp_path_factory.mktemp("harness") / "model"
    model.save_pretrained(folder)
    assemble_processor(config, tokenizer).save_pretrained(folder)
    return folder


# vLLM's attention on the CPU takes no smaller heads. It fills the embedding table up to a multiple of 64 rows, which
# would hide ids outside of it: there is nothing to fill up here, and the image token has the first id outside.
VLLM_TEXT_SIZES = TEXT_SIZES | dict(hidden_size=128, intermediate_size=128, vocab_size=960, max_position_embeddings=512)


def _save_for_vllm(folder, entry, text_config, tokenizer_folder, randomize):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(VLLM_TEXT_SIZES["vocab_size"] - len(tokenizer))])
    tokenizer = add_image_token(tokenizer)
    tokenizer.add_tokens([f"<more_{i}>" for i in range(text_config.vocab_size - len(tokenizer))])
    config = assemble_config(entry, text_config, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    assert config.image_token_index == VLLM_TEXT_SIZES["vocab_size"]
    torch.manual_seed(0)
    model = randomize(PIIPLlavaForConditionalGeneration(config)).eval()
    _sharpen(model)
    model.save_pretrained(folder)
    assemble_processor(config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_folder(tiny_entry, tokenizer_folder, randomize, tmp_path_factory):
    """A model around a Llama that vLLM takes: 16 visual tokens per image."""
    folder = tmp_path_factory.mktemp("vllm") / "llama"
    return _save_for_vllm(
        folder, tiny_entry(image_size=128), LlamaConfig(**VLLM_TEXT_SIZES), tokenizer_folder, randomize
    )


@pytest.fixture(scope="session")
def vllm_qwen_folder(tiny_entry, tokenizer_folder, randomize, tmp_path_factory):
    """One around a Qwen: its output layer is the embedding table, which has a row for the image token."""
    folder = tmp_path_factory.mktemp("vllm") / "qwen"
    sizes = VLLM_TEXT_SIZES | dict(vocab_size=1024)
    text_config = Qwen2Config(**sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    return _save_for_vllm(folder, tiny_entry(image_size=128), text_config, tokenizer_folder, randomize)


@pytest.fixture(scope="session")
def vllm_baseline_folder(tiny_entry, tokenizer_folder, randomize, tmp_path_factory):
    """One like LLaVA-1.5: a single CLIP branch, whose last block is left out."""
    entry = tiny_entry(image_size=128)
    (branch, _) = entry.vision.branches
    vision = replace(entry.vision, branches=(branch,), interaction=InteractionConfig(num_interactions=0))
    folder = tmp_path_factory.mktemp("vllm") / "baseline"
    return _save_for_vllm(
        folder,
        replace(entry, vision=vision, feature_block=0, projector_norm="none"),
        LlamaConfig(**VLLM_TEXT_SIZES),
        tokenizer_folder,
        randomize,
    )


@pytest.fixture(scope="session")
def pictures():
    """Pictures that a model with random weights tells apart: blocks of strong colours."""
    generator = np.random.default_rng(0)
    blocks = (generator.integers(0, 2, (6, 3, 4, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(picture).resize((64, 48), Image.Resampling.NEAREST) for picture in blocks]
