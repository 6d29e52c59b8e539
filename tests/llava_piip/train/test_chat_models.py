"""Today's chat models: their presets on the meta device, and trained a few steps, narrow, around a small Qwen3."""

import math

import pytest
import torch
from PIL import Image
from transformers import Qwen3Config

from llava_piip import PIIPLlavaForConditionalGeneration
from llava_piip.assembly import assemble_config
from llava_piip.inference import ChatModel
from llava_piip.train.presets import load_preset, parse_arguments
from llava_piip.train.train import prepare, run
from piip_core import zoo
from piip_core.meta import on_meta

NAMES = [entry.name for entry in zoo.chat_models()]
# As Qwen3's configurations on the hub have them
QWEN3 = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
}


@pytest.mark.parametrize(
    ("name", "size"), [*((NAMES[0], size) for size in QWEN3), *((name, "1.7B") for name in NAMES[1:])]
)
def test_models_with_any_qwen3(name, size):
    """The largest square has 576 tokens and one at the end of each row; projectors fit the language model."""
    text_config = Qwen3Config(**QWEN3[size], num_key_value_heads=8, head_dim=128, vocab_size=151936)
    with on_meta():
        config = assemble_config(zoo.multimodal(name), text_config, image_token_id=151669)
        model = PIIPLlavaForConditionalGeneration(config)
        image = torch.empty(1, 3, 768, 384)
        tokens = model.get_image_features(image).pooler_output
    assert config.image_seq_length == 24 * 25 and config.size_multiple == 32 == config.token_size
    assert [tuple(row.shape) for row in tokens] == [(24 * 13, QWEN3[size]["hidden_size"])]
    large, small = (sum(p.numel() for p in branch.parameters()) for branch in model.model.vision_tower.pyramid.branches)
    assert large > 2 * small


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage2_lora", "stage2_qlora"])
def test_presets_speak_as_qwen3(name, stage):
    preset = load_preset(f"{name}/{stage}")
    assert preset["chat_template"] == ("plain" if stage == "stage1" else "qwen3") and preset["images_as_viewed"]
    assert preset.get("lora", False) == ("lora" in stage) and preset.get("bits", 16) == (4 if "q" in stage else 16)


@pytest.mark.parametrize(
    ("name", "stage", "more"),
    [(NAMES[0], "stage2", ()), (NAMES[1], "stage2_lora", ("--lora_rank", "4")), (NAMES[2], "stage2", ())],
)
def test_presets_train_and_answer(name, stage, more, files, chat_model_zoo, qwen3_folder, tmp_path):
    """Images of two shapes and text alone; what was trained answers as Qwen3 does without thinking."""
    command = files.chat_command(f"{name}/{stage}", qwen3_folder, tmp_path / "run", "--max_steps", "3", *more)
    trainer, checkpoint = prepare(*parse_arguments(command))
    if stage == "stage2":
        shapes = [
            tuple(size) for i in range(24) for size in trainer.train_dataset[i].get("image_sizes", torch.empty(0))
        ]
        assert {(64, 32), (64, 64)} == {tuple(map(int, shape)) for shape in shapes}
        ids, labels = (trainer.train_dataset[2][key] for key in ("input_ids", "labels"))
        text = trainer.processing_class.tokenizer.decode(ids)
        assert (
            text.startswith("<|im_start|>user\nwhat colour")
            and "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is" in text
        )
        learned = trainer.processing_class.tokenizer.decode(labels[labels >= 0])
        assert learned.startswith("It is ") and learned.endswith(".<|im_end|>")
    run(trainer, checkpoint)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    chat = ChatModel.load(tmp_path / "run")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat.prompt(asked) == prompt
    assert chat.processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in chat.end_ids and not chat.end_texts
    image = Image.open(files.images / "0.png")
    assert (
        "".join(chat.stream(asked, [image], max_new_tokens=3)).strip()
        == chat.answer([(asked, [image])], max_new_tokens=3)[0]
    )
