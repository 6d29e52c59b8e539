"""Models from parts: any language model, pretrained vision, errors."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava_piip.assembly import assemble
from llava_piip.configuration import PIIPVisionConfig
from llava_piip.modeling import PIIPVisionModel
from piip_core import BranchConfig, PIIPConfig, ViTConfig, zoo
from piip_core.errors import CheckpointError, ConfigError


def test_padding_without_a_row_in_the_embedding_is_refused(tiny_entry, language_model_folder, tmp_path):
    shutil.copytree(language_model_folder, tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "padded")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    with pytest.raises(ConfigError, match=r"'\[PAD\]' has the id 909, and the embedding has 909 rows.*'</s>'"):
        assemble(tiny_entry(), language_model=tmp_path / "padded", pretrained_vision=False)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A folder with a small Qwen2: byte-level tokenizer without bos, tied embeddings, a padded vocabulary."""
    folder = tmp_path_factory.mktemp("qwen")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["USER: What is it? ASSISTANT: A cat."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_assembled_model_speaks_as_its_language_model(tiny_entry, language_model_folder):
    model, processor = assemble(tiny_entry(), language_model=language_model_folder)
    inputs = processor(text="USER: Who are you? ASSISTANT:")
    reference = AutoModelForCausalLM.from_pretrained(language_model_folder).eval()
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)
    assert model.config.image_token_id == 909 and model.get_input_embeddings().num_embeddings == 909


@torch.no_grad()
def test_any_language_model_by_name_trains_generates_and_comes_back(tiny_entry, qwen_folder, tmp_path):
    model, processor = assemble(tiny_entry(), language_model=qwen_folder)
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    inputs = processor(text=["USER: <image>\nWhat? ASSISTANT:", "USER: Hi ASSISTANT:"], images=[[picture], []])
    assert inputs["input_ids"][0, 0] != processor.tokenizer.eos_token_id  # no bos in this family
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    encoded = processor.encode_conversation(
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    )
    assert processor.decode([t for t in encoded.labels if t >= 0]) == " A cat.<|endoftext|>"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), output)


def test_branches_start_from_the_weights_they_name(tiny_entry, language_model_folder, tmp_path):
    entry = tiny_entry()
    donor = PIIPVisionModel(PIIPVisionConfig(pyramid=entry.vision.to_dict()))
    paths = []
    for i, branch in enumerate(donor.pyramid.branches):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file({key: torch.randn_like(value) for key, value in branch.model.state_dict().items()}, paths[-1])
    data = entry.vision.to_dict()
    for branch, path in zip(data["branches"], paths, strict=True):
        branch["pretrained"] = str(path)
    entry = type(entry)(**{**entry.__dict__, "vision": PIIPConfig.from_dict(data)})
    model, _ = assemble(entry, language_model=language_model_folder)
    random, _ = assemble(entry, language_model=language_model_folder, pretrained_vision=False)
    from safetensors.torch import load_file

    for path, branch, other in zip(
        paths, model.model.vision_tower.pyramid.branches, random.model.vision_tower.pyramid.branches, strict=True
    ):
        for key, value in load_file(path).items():
            assert torch.equal(branch.model.state_dict()[key], value)
        assert not torch.equal(other.model.state_dict()[key], value)
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"branch 1: .*0\.safetensors: no such file"):
        assemble(entry, language_model=language_model_folder)


def test_unknown_rows_and_language_models_are_named(tiny_entry, tmp_path, language_model_folder):
    with pytest.raises(ConfigError, match="piip_llava_clip_bl_512_256_7b"):
        assemble("piip_llava_clip_bl_512_257_7b", language_model=language_model_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: cannot be loaded .*expected the name of a model"):
        assemble(tiny_entry(), language_model=tmp_path / "empty")


def test_widths_that_the_group_norm_does_not_divide_are_named(tiny_entry, tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=909,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="num_groups=32: expected a divisor of the merged width 40"):
        assemble(tiny_entry(), language_model=tmp_path)


def test_decoder_of_another_kind_is_refused(tiny_entry, tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=909)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not built like Llama or Qwen"):
        assemble(tiny_entry(), language_model=tmp_path)


@torch.no_grad()
def test_llava_15_is_the_case_of_one_branch_and_equals_transformers(tokenizer_folder, language_model_folder):
    """CLIP's second-to-last layer and a projector of two linears: against transformers' own LLaVA."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    clip = ViTConfig(
        embed_dim=32,
        depth=3,
        num_heads=4,
        patch_size=8,
        pos_grid=4,
        norm_eps=1e-5,
        layer_scale=None,
        activation="quick_gelu",
        pre_norm=True,
        class_token=True,
        class_position=True,
    )
    row = zoo.multimodal("llava_1_5_7b")
    vision = PIIPConfig(
        branches=(BranchConfig(network=clip, image_size=32),), interaction=row.vision.interaction, merging=None
    )
    entry = type(row)(**{**row.__dict__, "vision": vision, "feature_block": 1})
    model, processor = assemble(entry, language_model=language_model_folder, pretrained_vision=False)
    text = LlamaConfig.from_pretrained(language_model_folder)
    text.vocab_size = 910  # theirs needs a row for the image token
    reference = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            ),
            text_config=text,
            image_token_index=909,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    ).eval()
    from piip_core.checkpoints.pretrained import convert_pretrained

    branch = model.model.vision_tower.pyramid.branches[0].model
    state, report = convert_pretrained(reference.model.vision_tower.state_dict(), branch.state_dict())
    branch.load_state_dict(report.check() and state)
    projection = model.model.multi_modal_projector.projections["1"]
    projection.load_state_dict(reference.model.multi_modal_projector.state_dict())
    theirs = reference.model.language_model.state_dict()
    theirs["embed_tokens.weight"] = theirs["embed_tokens.weight"][:909]
    model.model.language_model.load_state_dict(theirs)
    model.lm_head.weight.copy_(reference.lm_head.weight[:909])
    inputs = processor(
        text="USER: <image>\nHi ASSISTANT:", images=torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    )
    assert model.config.image_seq_length == 16
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits[..., :909], rtol=1e-4, atol=1e-5)
