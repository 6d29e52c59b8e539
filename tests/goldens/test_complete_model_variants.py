"""The checker of complete models takes everything from the case: other orders, tokens, images and kinds of branches."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from checkers import Status, find_cases
from checkers.llava.text import llama_tokenizer
from checkers.multimodal import build_encoder
from llava_piip.conversation import encode_conversation, encode_prompt, messages_from_llava, render_conversation
from written_cases import GOLDENS, failed, recorded, run_written

PLACEHOLDER, IGNORED = -200, -100
ONE_BRANCH = "vision_tower.vision_tower.branch2."
CONVERSATIONS = [
    [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi there"}],
    [
        {"from": "human", "value": "<image>\nOne"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "<image>\nTwo"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "<image>\nThree"},
        {"from": "gpt", "value": "c"},
    ],
]


@pytest.fixture
def reordered():
    """The recorded case with its rows in the other order: text first, and its image second."""
    info, tensors = recorded("llava_full_clip_bl")
    info["conversations"].reverse()
    tensors |= {name: x.flip(0) for name, x in tensors.items() if name.split(".")[0] in ("input", "output")}
    return info, tensors


def test_rows_in_another_order_pass(reordered, tmp_path):
    result = run_written(tmp_path, *reordered)
    assert result.status is Status.PASSED, str(result)


def test_a_row_without_an_answer_is_told_and_the_others_are_compared(reordered, tmp_path):
    info, tensors = reordered
    info["conversations"][0][1]["value"] = ""
    start = int((tensors["input.labels"][0] != IGNORED).nonzero()[0])  # of the answer
    for name, value in {"input.input_ids": 0, "input.attention_mask": 0, "output.attention_mask": 0}.items():
        tensors[name][0, start:] = value
    for name in ("input.labels", "output.labels"):
        tensors[name][0] = IGNORED
    labels, logits = tensors["output.labels"][1, 1:], tensors["output.logits"][1, :-1]
    info["loss"] = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED).item()
    tensors = {name: x for name, x in tensors.items() if not name.startswith("grad.")}
    result = run_written(tmp_path, info, tensors)
    assert result.status is Status.PASSED, str(result)
    assert [c.name for c in result.comparisons if c.refused] == ["conversation.0"]
    tensors["input.input_ids"][1, 60] += 1
    assert "input_ids.1" in failed(run_written(tmp_path, info, tensors))


@pytest.fixture(params=["llava_convnext_clip", "llava_clip_nocls_outshape"])
def assembled(request, tmp_path):
    """A checkpoint of a recorded vision encoder and projector, whose visual tokens are recorded, and a random Llama.

    A row of text comes first; the second has three images.
    """
    (golden,) = find_cases([GOLDENS / f"{request.param}.json"])
    weights, image, tokens = golden.below("state."), golden.below("input.")["image"], golden.tensors["output.tokens"]
    config = LlamaConfig(
        vocab_size=909,
        hidden_size=golden.info["llm_hidden_size"],
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(config).eval()
    decoder.load_state_dict({name: 0.2 * torch.randn_like(x) for name, x in decoder.state_dict().items()})
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDENS / "llava_full_clip_bl_ckpt", folder, ignore=shutil.ignore_patterns("model*", "*.py"))
    fields = config.to_dict() | {"model_type": "llava_llama", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    (folder / "vision.py").write_text(
        f"model = dict(backbone={golden.config!r}, projector={golden.info['projector']!r})"
    )
    state = {f"model.{name}": x for name, x in weights.items()} | decoder.state_dict()
    save_file(state, folder / "model.safetensors")
    info = {
        "name": "assembled",
        "family": "llava_full",
        "checkpoint_dir": "checkpoint",
        "clip_configs": golden.info["clip_configs"],
        "n_tensors": len(state),
        "conversations": CONVERSATIONS,
        "tolerance": golden.info["tolerance"],
    }
    projector = {name: x for name, x in state.items() if name.startswith("model.mm_projector.")}
    torch.save(projector, tmp_path / "mm_projector.bin")
    info["stage1_file"] = {"path": "mm_projector.bin", "keys": list(projector)}
    tensors = {"input.pixel_values": image.repeat(4, 1, 1, 1), "output.image_tokens": tokens.repeat(4, 1, 1)}
    add_decoding(info, tensors, decoder)
    model, merging, gradients = build_encoder(golden)
    merging(model["pyramid"](image)).backward(tensors.pop("tokens.grad"))
    published = gradients()
    for start in ("mm_projector.branch1", "vision_tower.vision_tower.interactions", ONE_BRANCH):
        name = next(key for key in published if key.startswith(start))
        tensors[f"grad.model.{name}"] = published[name]
    return info, tensors


def add_decoding(info, tensors, decoder):
    """What the decoder makes of the conversations, one by one, with given visual tokens."""
    tokens = tensors["output.image_tokens"][:1].clone().requires_grad_()
    length, eos = tokens.shape[1], decoder.config.eos_token_id
    settings = {"image_token_id": 909, "image_seq_length": 1}
    with llama_tokenizer(GOLDENS / "llava_tokenizer_A.model", legacy=False) as tokenizer:
        samples = []
        for turns in CONVERSATIONS:
            images = any("<image>" in turn["value"] for turn in turns)
            messages = messages_from_llava(turns, has_image=images)
            samples.append(
                encode_conversation(tokenizer, messages, chat_template="vicuna_v1", has_images=images, **settings)
            )
        messages = messages_from_llava(CONVERSATIONS[1][:-1], has_image=True)
        info["generation_prompt"], _ = render_conversation(
            messages, chat_template="vicuna_v1", add_generation_prompt=True
        )
        prompt = encode_prompt(tokenizer, info["generation_prompt"], **settings)

    def embedded(ids):
        embed = decoder.get_input_embeddings()
        return torch.cat([tokens[0] if token == 909 else embed(torch.tensor([token])) for token in ids])

    def expanded(ids, values, fill):
        return [
            v for token, value in zip(ids, values, strict=True) for v in ([fill] * length if token == 909 else [value])
        ]

    rows = [embedded(sample.input_ids) for sample in samples]
    labels = [expanded(sample.input_ids, sample.labels, IGNORED) for sample in samples]
    logits = [decoder(inputs_embeds=row[None]).logits[0] for row in rows]
    targets = torch.cat([torch.tensor(row[1:]) for row in labels])
    loss = torch.nn.functional.cross_entropy(torch.cat([x[:-1] for x in logits]), targets, ignore_index=IGNORED)
    loss.backward()
    info["loss"] = loss.item()
    for name in ("layers.0.self_attn.q_proj.weight", "norm.weight"):
        tensors[f"grad.model.{name}"] = decoder.model.get_parameter(name).grad
    tensors["tokens.grad"] = tokens.grad

    def padded(found, value=0):
        return pad_sequence([torch.as_tensor(x) for x in found], batch_first=True, padding_value=value)

    public = [[PLACEHOLDER if token == 909 else token for token in sample.input_ids] for sample in samples]
    tensors["input.input_ids"], tensors["input.labels"] = padded(public), padded([s.labels for s in samples], IGNORED)
    tensors["input.attention_mask"] = padded([torch.ones(len(ids), dtype=torch.long) for ids in public])
    tensors["output.attention_mask"] = padded([torch.ones(len(row), dtype=torch.long) for row in labels])
    tensors["output.labels"], tensors["output.logits"] = padded(labels, IGNORED), padded([x.detach() for x in logits])
    new, row = [], embedded(prompt)
    while len(new) < 8 and eos not in new:
        new.append(decoder(inputs_embeds=row[None]).logits[0, -1].argmax().item())
        row = torch.cat([row, embedded(new[-1:])])
    tensors["gen.input_ids"] = torch.tensor([[PLACEHOLDER if token == 909 else token for token in prompt]])
    tensors["gen.output_ids"] = torch.tensor([[1, *new]])


def test_other_branches_tokens_and_images_pass(assembled, tmp_path):
    result = run_written(tmp_path, *assembled)
    assert result.status is Status.PASSED, str(result)


@pytest.mark.parametrize("name", ["output.logits", "grad.model.norm.weight", "gen.output_ids", "output.image_tokens"])
def test_wrong_numbers_fail(name, assembled, tmp_path):
    info, tensors = assembled
    tensors[name] = tensors[name] + 1
    assert failed(run_written(tmp_path, info, tensors)) == [name]
