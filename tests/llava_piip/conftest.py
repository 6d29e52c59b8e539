"""A small model, its parts and its processor, shared by the tests of this folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import add_image_token, assemble, assemble_config, assemble_processor
from llava_piip.inference import ChatModel
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


@pytest.fixture(scope="session")
def make_llava(tokenizer_folder, randomize):
    """Makes a small model with random weights everywhere, in evaluation mode, and its processor.

    `sharp` makes its attention sharp enough for images to matter; other options are of the language model.
    """

    def make(*, sharp=False, entry=None, text_config=None, extra_tokens=(), **sizes):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.add_tokens(list(extra_tokens))
        tokenizer = add_image_token(tokenizer)
        text_config = text_config or LlamaConfig(**TEXT_SIZES | sizes)
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        tokenizer.add_tokens([f"<more_{i}>" for i in range(text_config.vocab_size - len(tokenizer))])
        config = assemble_config(entry or tiny_entry(), text_config, image_token_id=image_token_id)
        torch.manual_seed(0)
        model = randomize(PIIPLlavaForConditionalGeneration(config)).eval()
        with torch.no_grad():
            for projection in model.model.multi_modal_projector.projections.values() if sharp else ():
                projection.linear_2.weight.mul_(10)
            for layer in model.model.language_model.layers if sharp else ():
                layer.self_attn.q_proj.weight.mul_(5)
                layer.self_attn.o_proj.weight.mul_(5)
        return model, assemble_processor(config, tokenizer)

    return make


@pytest.fixture
def tiny_llava(make_llava):
    """A small model with random weights, and its processor."""
    return make_llava()


@pytest.fixture
def tiny_chat(make_llava):
    """A small model with random weights for which images matter, ready to answer."""
    return ChatModel(*make_llava(sharp=True))


@pytest.fixture(scope="session")
def pictures():
    """Images that a model with random weights tells apart: blocks of strong colours."""
    generator = np.random.default_rng(0)
    blocks = (generator.integers(0, 2, (12, 3, 4, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(picture).resize((64, 48), Image.Resampling.NEAREST) for picture in blocks]


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
