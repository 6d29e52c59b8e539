"""A small model in a folder, small data, and a trainer on them."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import add_image_token, assemble_config, assemble_processor
from llava_piip.train.presets import parse_arguments
from llava_piip.train.train import prepare

NUM_SAMPLES = 24
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
