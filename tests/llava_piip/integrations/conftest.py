"""Small models in folders, as other projects' programs load them."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig, Qwen2Config

from piip_core import InteractionConfig

# vLLM's attention on the CPU takes no smaller heads. It fills the embedding table up to a multiple of 64 rows, which
# would hide ids outside of it: there is nothing to fill up here, and the image token has the first id outside.
VLLM_TEXT_SIZES = dict(
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    vocab_size=960,
)


@pytest.fixture(scope="session")
def save_llava(make_llava, tmp_path_factory):
    """Saves a model with random weights for which images matter; gives its folder."""

    def save(**options):
        model, processor = make_llava(sharp=True, **options)
        folder = tmp_path_factory.mktemp("harness") / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def save_for_vllm(save_llava):
    """Saves a model with as many tokens as rows, and the image token after them."""

    def save(entry, text_config):
        extra = [f"<extra_{i}>" for i in range(VLLM_TEXT_SIZES["vocab_size"] - 909)]
        return save_llava(entry=entry, text_config=text_config, extra_tokens=extra)

    return save


@pytest.fixture(scope="session")
def chat_folder(save_llava):
    """A model with a context of 224 tokens."""
    return save_llava(max_position_embeddings=224)


@pytest.fixture(scope="session")
def vllm_folder(tiny_entry, save_for_vllm):
    """A model around a Llama that vLLM takes: 16 visual tokens per image."""
    return save_for_vllm(tiny_entry(image_size=128), LlamaConfig(**VLLM_TEXT_SIZES))


@pytest.fixture(scope="session")
def vllm_qwen_folder(tiny_entry, save_for_vllm):
    """One around a Qwen: its output layer is the embedding table, which has a row for the image token."""
    sizes = VLLM_TEXT_SIZES | dict(vocab_size=1024)
    text_config = Qwen2Config(**sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    return save_for_vllm(tiny_entry(image_size=128), text_config)


@pytest.fixture(scope="session")
def vllm_baseline_folder(tiny_entry, save_for_vllm):
    """One like LLaVA-1.5: a single CLIP branch, whose last block is left out."""
    entry = tiny_entry(image_size=128)
    (branch, _) = entry.vision.branches
    vision = replace(entry.vision, branches=(branch,), interaction=InteractionConfig(num_interactions=0))
    entry = replace(entry, vision=vision, feature_block=0, projector_norm="none")
    return save_for_vllm(entry, LlamaConfig(**VLLM_TEXT_SIZES))
