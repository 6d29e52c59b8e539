"""A small model in a folder, small data, and a trainer on them."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import add_image_token, assemble_config, assemble_processor
from llava_piip.train.presets import parse_arguments
from llava_piip.train.train import prepare
from piip_core import InteractionConfig, zoo

NUM_SAMPLES = 24
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    vocab_size=909,
)


@dataclass(frozen=True)
class Files:
    """What a run needs: the folder of a model, and data in which every third sample has no image."""

    model: Path
    annotations: Path
    images: Path

    def command(self, output: Path, *more: str) -> list[str]:
        """Arguments of a run on the CPU: 12 updates of 4 samples in 2 epochs, in full precision."""
        return [
            *("stage2", "--model", str(self.model), "--annotations", str(self.annotations)),
            *("--image_root", str(self.images), "--output_dir", str(output)),
            *("--use_cpu", "true", "--bf16", "false", "--tf32", "false", "--deepspeed", "none"),
            *("--total_batch_size", "4", "--per_device_train_batch_size", "2", "--num_train_epochs", "2"),
            *("--learning_rate", "1e-2", "--loss_average", "batch", "--save_steps", "3", "--save_total_limit", "10"),
            *("--report_to", "none", "--dataloader_num_workers", "0", "--disable_tqdm", "true"),
            *more,
        ]

    def chat_command(self, preset: str, language_model: Path, output: Path, *more: str) -> list[str]:
        """Arguments of such a run of one of today's chat models, from random branches."""
        new = ("--language_model", str(language_model), "--pretrained_vision", "false")
        return [preset, *self.command(output, "--model", preset.partition("/")[0], *new, *more)[1:]]

    def trainer(self, output: Path, *more: str):
        """The trainer of such a run, and the checkpoint to go on from."""
        return prepare(*parse_arguments(self.command(output, *more)))


def losses(trainer) -> dict[int, float]:
    """Loss by update."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture(name="losses", scope="session")
def losses_fixture():
    """Losses of a trainer by update; see `losses`."""
    return losses


@pytest.fixture(scope="session")
def files(tiny_entry, tokenizer_folder, tmp_path_factory) -> Files:
    """A small model and 24 samples."""
    root = tmp_path_factory.mktemp("train")
    tokenizer = add_image_token(AutoTokenizer.from_pretrained(tokenizer_folder))
    entry = tiny_entry()
    # nothing random, so that one process and two have the same losses
    calm = replace(entry.vision, interaction=replace(entry.vision.interaction, drop_path_rate=0.0))
    config = assemble_config(replace(entry, vision=calm), LlamaConfig(**SIZES), image_token_id=len(tokenizer) - 1)
    torch.manual_seed(0)
    model = PIIPLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():  # so that the gates of the interactions are open
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(root / "model")
    assemble_processor(config, tokenizer).save_pretrained(root / "model")
    (root / "images").mkdir()
    return Files(root / "model", _write_data(root), root / "images")


def _write_data(root: Path) -> Path:
    rng, entries = random.Random(0), []
    for number in range(NUM_SAMPLES):
        color = tuple(rng.randrange(256) for _ in range(3))
        question = "what colour is this " + "very " * rng.randrange(4) + "thing?"
        entry = {"id": str(number)}
        if number % 3 != 2:
            Image.new("RGB", (40 + number, 50), color).save(root / "images" / f"{number}.png")
            entry["image"], question = f"{number}.png", f"<image>\n{question}"
        answer = f"It is {color[0]} and {color[1]}."
        entry["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        entries.append(entry)
    (root / "annotations.json").write_text(json.dumps(entries))
    return root / "annotations.json"


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    """A folder with a small Qwen3, and a tokenizer of bytes with its special tokens."""
    folder = tmp_path_factory.mktemp("qwen3")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    config = Qwen3Config(
        **sizes, vocab_size=320, num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def narrow(entry):
    """One of today's chat models, with networks of the same kinds with two blocks and 32 channels, at 64 pixels.

    Its other options, and every other row of the zoo, stay.
    """
    if entry.max_pixels is None:
        return entry
    branches = []
    for branch in entry.vision.branches:
        sizes = dict(depth=2, embed_dim=32, num_heads=2)
        if branch.network.name.startswith("convnext"):
            sizes = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
        network = replace(branch.network, options=sizes)
        branches.append(replace(branch, network=network, image_size=branch.image_size // 12, segments=None))
    interaction = InteractionConfig(num_interactions=2, num_heads=4, drop_path_rate=0.0)
    vision = replace(entry.vision, branches=tuple(branches), interaction=interaction)
    return replace(entry, vision=vision, max_pixels=64 * 64)


@pytest.fixture
def chat_model_zoo(monkeypatch):
    """The zoo with narrow chat models; see `narrow`."""
    monkeypatch.setattr(zoo, "multimodal", lambda name, known=zoo.multimodal: narrow(known(name)))
