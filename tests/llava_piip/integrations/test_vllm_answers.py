"""vLLM's answers are those of transformers' `generate`, for a model in single precision on the CPU.

Needs the environment that tests/vllm_environment.py makes.
"""

import gc
import importlib
import os
from contextlib import contextmanager
from operator import attrgetter

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: tests/vllm_environment.py makes an environment with it")

from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

TOKENS = 12
PROMPTS = {
    0: "USER: What is a pyramid? ASSISTANT:",
    1: "USER: <image>\nWhat is this? ASSISTANT:",
    3: "USER: <image>\nand  <image> <image>\n  Which one? ASSISTANT:",
}
LONG = "USER: <image>\nHow many things are to be seen here, and which of them is the largest one of all? ASSISTANT:"

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


class Reference:
    """Answers of transformers' `generate`."""

    def __init__(self, folder):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def ask(self, prompt, images):
        """Ids of the prompt, ids of the answer, and log probabilities of its first token."""
        inputs = self.processor(text=[prompt], images=[images])
        answer = self.model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        ids = inputs["input_ids"][0].tolist()
        return ids, answer.sequences[0, len(ids) :].tolist(), answer.logits[0][0].log_softmax(-1)


@contextmanager
def engine(folder, **options):
    """vLLM with a model; blocks so short that small prompts fill several of them, for prefix caching."""
    settings = dict(dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, block_size=32)
    llm = LLM(str(folder), max_logprobs=-1, seed=0, disable_log_stats=False, **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def ask(llm, questions):
    """As `Reference.ask`, for several questions at once."""
    requests = [
        {"prompt": prompt} | ({"multi_modal_data": {"image": list(images)}} if images else {})
        for prompt, images in questions
    ]
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=-1), use_tqdm=False)
    found = []
    for output in outputs:
        first = output.outputs[0].logprobs[0]
        logprobs = torch.tensor([first[token].logprob for token in range(len(first))])
        found.append((output.prompt_token_ids, list(output.outputs[0].token_ids), logprobs))
    return found


def in_table(ids):
    """Ids as vLLM has them: 0 for a visual token, where the image token has no row in the embedding."""
    return [0 if token == 960 else token for token in ids]


def assert_same(found, expected):
    for (ids, tokens, logprobs), (expected_ids, expected_tokens, expected_logprobs) in zip(
        found, expected, strict=True
    ):
        assert in_table(ids) == in_table(expected_ids)
        torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-4, rtol=0)
        assert tokens == expected_tokens


@pytest.fixture(scope="module")
def reference(vllm_folder):
    return Reference(vllm_folder)


@pytest.fixture(scope="module")
def llm(vllm_folder):
    with engine(vllm_folder) as running:
        yield running


@pytest.fixture(scope="module")
def questions(pictures):
    """One without an image, some with one, and some with three."""
    return [
        (PROMPTS[0], []),
        (PROMPTS[1], pictures[:1]),
        (LONG, pictures[1:2]),
        (PROMPTS[3], pictures[2:5]),
        (PROMPTS[3], [pictures[4], pictures[3], pictures[2]]),
    ]


@pytest.fixture(scope="module")
def expected(reference, questions):
    answers = [reference.ask(*question) for question in questions]
    assert not torch.allclose(answers[3][2], answers[4][2], atol=1e-2), "the order of images does not matter"
    return answers


@pytest.mark.parametrize(
    "name",
    [
        "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
        "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config",
        "vllm.multimodal.processing:BaseMultiModalProcessor._call_hf_processor",
        "vllm.multimodal.processing:BaseMultiModalProcessor._get_mm_fields_config",
        "vllm.multimodal.processing:BaseMultiModalProcessor._get_prompt_updates",
        "vllm.model_executor.models.llava:LlavaDummyInputsBuilder",
        "vllm.model_executor.models.llava:LlavaForConditionalGeneration._mark_language_model",
        "vllm.model_executor.models.llava:LlavaForConditionalGeneration._mark_tower_model",
        "vllm.model_executor.models.llava:LlavaForConditionalGeneration.embed_input_ids",
        "vllm.model_executor.models.utils:init_vllm_registered_model",
        "vllm.renderers.hf:HfRenderer.render_messages_async",
        "vllm.renderers.hf:HfRenderer.tokenize_prompt_async",
        "vllm.renderers.registry:RENDERER_REGISTRY.register",
        "vllm.tokenizers.hf:CachedHfTokenizer",
    ],
)
def test_vllm_has_what_the_plugin_builds_on(name):
    """Seen in vLLM 0.32 and 0.33. Underscores are in the names that its guide has multimodal models override or use."""
    module, attribute = name.split(":")
    assert attrgetter(attribute)(importlib.import_module(module)) is not None


def test_alone(llm, questions, expected):
    for question, answer in zip(questions, expected, strict=True):
        assert_same(ask(llm, [question]), [answer])


def test_text_and_images_in_one_batch(llm, questions, expected):
    assert_same(ask(llm, questions), expected)


def test_two_images_under_the_same_question_are_not_mixed_up(llm, reference, pictures):
    """The second time all is in the prefix cache, and each question has to find its own."""
    questions = [(LONG, [picture]) for picture in pictures[:4]]
    expected = [reference.ask(*question) for question in questions]
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(expected[first][2], expected[second][2], atol=1e-2)
    for _ in range(2):
        for question, answer in zip(questions, expected, strict=True):
            assert_same(ask(llm, [question]), [answer])
    assert_same(ask(llm, [*questions, *reversed(questions)]), [*expected, *reversed(expected)])
    (hits,) = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
    assert hits > 0


def test_ids_of_the_tokenizer_are_not_the_models(reference, expected):
    """What makes a renderer of our own necessary: the text after an image is tokenized by itself."""
    prompt = PROMPTS[3]
    expanded = []
    for token in reference.processor.tokenizer(prompt)["input_ids"]:
        expanded += [token] * (reference.processor.image_seq_length if token == 960 else 1)
    assert expanded != expected[3][0]


def test_chat_uses_the_template_of_the_folder(llm, reference, pictures):
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "Compare"},
            {"type": "image_pil", "image_pil": pictures[0]},
            {"type": "text", "text": "with"},
            {"type": "image_pil", "image_pil": pictures[1]},
        ],
    }
    plain = [{"type": part["type"].removesuffix("_pil"), "text": part.get("text")} for part in message["content"]]
    prompt = reference.processor.apply_chat_template([{"role": "user", "content": plain}], add_generation_prompt=True)
    ids, tokens, _ = reference.ask(prompt, pictures[:2])
    (output,) = llm.chat([message], SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    assert output.prompt_token_ids == in_table(ids)
    assert list(output.outputs[0].token_ids) == tokens


def test_the_image_tag_is_text_where_there_is_no_image(llm, reference):
    question = ("USER: What does <image> mean? ASSISTANT:", [])
    assert_same(ask(llm, [question]), [reference.ask(*question)])


@pytest.mark.parametrize("tags, images", [(2, 1), (1, 2), (0, 1)])
def test_images_and_tags_must_match(llm, pictures, tags, images):
    with pytest.raises(VLLMValidationError, match=f"{tags} <image> for {images} images"):
        ask(llm, [("USER: " + "<image>\n" * tags + "What? ASSISTANT:", pictures[:images])])


@pytest.mark.parametrize("ids", [[1, 960, 5], [1, 961, 5], [1, 5000, 5], [1, -1, 5]])
def test_ids_outside_of_the_table_are_refused(llm, ids):
    with pytest.raises(VLLMValidationError, match="1 <image> for 0 images" if 960 in ids else "out of vocabulary"):
        llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1), use_tqdm=False)


def test_chunked_prefill_in_the_middle_of_an_image(vllm_folder, questions, expected):
    """Six tokens at a time: every image of 16 takes several steps."""
    with engine(vllm_folder, max_num_batched_tokens=6, max_num_seqs=4, enable_prefix_caching=False) as llm:
        for question, answer in zip(questions, expected, strict=True):
            assert_same(ask(llm, [question]), [answer])
        assert_same(ask(llm, questions), expected)


def test_tensor_parallel(vllm_folder, questions, expected):
    with engine(vllm_folder, tensor_parallel_size=2) as llm:
        assert_same(ask(llm, questions), expected)


@pytest.mark.parametrize("kind", ["qwen", "baseline"])
def test_other_models(kind, request, questions):
    folder = request.getfixturevalue(f"vllm_{kind}_folder")
    reference = Reference(folder)
    expected = [reference.ask(*question) for question in questions]
    with engine(folder) as llm:
        assert_same(ask(llm, questions), expected)


def test_another_tokenizer_mode_is_refused(vllm_folder):
    with pytest.raises(ValueError, match=r"tokenizer_mode='hf'.*needs 'piip_llava'"):
        LLM(str(vllm_folder), tokenizer_mode="hf")
