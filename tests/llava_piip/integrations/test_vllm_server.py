"""`vllm serve FOLDER` and the `openai` client: answers are those of transformers' `generate`, whatever others ask.

Needs the environment that tests/vllm_environment.py makes.
"""

import base64
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed: tests/vllm_environment.py makes an environment with it")

from openai import BadRequestError, OpenAI
from transformers import AutoModelForImageTextToText, AutoProcessor

TOKENS = 12
OPTIONS = "--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 8 --block-size 32".split()


def data_uri(image, **options):
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def server(vllm_folder, free_port):
    """Address of a server."""
    port = free_port()
    settings = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(vllm_folder), "--served-model-name", "tiny"]
    log = vllm_folder.parent / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", port, *OPTIONS], env=os.environ | settings, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while not _is_healthy(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield url
        assert _is_healthy(url), log.read_text()[-4000:]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_healthy(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def expect(vllm_folder):
    """Ids of the prompt and of the answer that transformers' `generate` gives to a user's parts."""
    processor = AutoProcessor.from_pretrained(vllm_folder)
    model = AutoModelForImageTextToText.from_pretrained(vllm_folder, dtype=torch.float32).eval()

    def ask(*parts):
        images = [part for part in parts if not isinstance(part, str)]
        content = [text_part(part) if isinstance(part, str) else {"type": "image"} for part in parts]
        prompt = processor.apply_chat_template(user(*content), add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[images])
        answer = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        ids = inputs["input_ids"][0].tolist()
        # in vLLM a visual token is 0, where the image token has no row in the embedding
        return [0 if token == 960 else token for token in ids], answer[0, len(ids) :].tolist()

    return ask


def ask(client, messages, **options):
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True},
        **options,
    )
    if not options.get("stream"):
        (choice,) = answer.choices
        return answer.prompt_token_ids, choice.token_ids, choice.message.content
    prompt, ids, text = None, [], ""
    for chunk in answer:
        prompt = getattr(chunk, "prompt_token_ids", None) or prompt
        for choice in chunk.choices:
            ids += getattr(choice, "token_ids", None) or []
            text += choice.delta.content or ""
    return prompt, ids, text


def test_an_answer_whole_and_streamed(client, expect, pictures):
    messages = user(image_part(data_uri(pictures[0])), text_part("What is this?"))
    expected = expect(pictures[0], "What is this?")
    whole = ask(client, messages)
    assert whole[:2] == expected
    assert ask(client, messages, stream=True) == whole


def test_parts_keep_their_order(client, expect, pictures):
    content = ("First", pictures[0], "then", "and at last", pictures[1], "Which?")
    parts = [text_part(part) if isinstance(part, str) else image_part(data_uri(part)) for part in content]
    assert ask(client, user(*parts))[:2] == expect(*content)


def test_many_clients_at_once(client, expect, pictures):
    """Each question with an image of its own, or with none; half of the answers are streamed."""
    questions = [f"What is thing number {i} here?" for i in range(8)]
    images = [*pictures[:3], None]
    cases = [(question, image) for question in questions for image in images] * 2

    def asked(i):
        question, image = cases[i]
        parts = [text_part(question)] if image is None else [image_part(data_uri(image)), text_part(question)]
        return ask(client, user(*parts), stream=i >= 32)[:2]

    expected = {
        (question, id(image)): expect(*([] if image is None else [image]), question) for question, image in cases[:32]
    }
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(asked, range(len(cases))))
    assert answers == [expected[question, id(image)] for question, image in cases]


def test_an_image_of_two_clients_at_once(client, expect):
    """With vLLM's cache of processed images, one of two such requests fails when they overtake each other."""
    images = [Image.new("RGB", (64, 48), (40 * i, 255 - 40 * i, 128)) for i in range(6)]

    def asked(i):
        image = image_part(data_uri(images[i // 2]))
        return ask(client, user(image, text_part(f"What is {i}?")), stream=i % 2 == 1)[:2]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(asked, range(12)))
    assert answers == [expect(images[i // 2], f"What is {i}?") for i in range(12)]


def test_a_refused_image_is_taken_in_another_request(client, expect, pictures):
    image = image_part(data_uri(pictures[5]))
    with pytest.raises(BadRequestError):
        ask(client, user(image, text_part("What? " * 500)))
    assert ask(client, user(image, text_part("What is this?")))[:2] == expect(pictures[5], "What is this?")


def test_the_image_tag_in_a_text_is_text(client, expect, pictures):
    text = "What does <image> mean in HTML?"
    ids, answer, _ = ask(client, [{"role": "user", "content": text}])
    assert (ids, answer) == expect(text)
    assert 0 not in ids
    messages = user(image_part(data_uri(pictures[0])), text_part(text))
    assert ask(client, messages)[:2] == expect(pictures[0], text)
    assert ask(client, user(text_part(text)))[:2] == expect(text)


BAD = {
    "broken base64": lambda image: user(image_part("data:image/png;base64,!!!"), text_part("What?")),
    "no image": lambda image: user(
        image_part("data:image/png;base64," + base64.b64encode(b"GIF89a no").decode()), text_part("What?")
    ),
    "cut image": lambda image: user(image_part(data_uri(image)[:-400]), text_part("What?")),
    "endless image": lambda image: user(image_part(data_uri(Image.new("L", (60000, 1)))), text_part("What?")),
    "sound": lambda image: user({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
    "two users": lambda image: user(text_part("What?")) * 2,
    "an answer first": lambda image: [{"role": "assistant", "content": "Yes."}, *user(text_part("What?"))],
    "unknown role": lambda image: [{"role": "pope", "content": "What?"}],
    "too long": lambda image: user(text_part("What? " * 500)),
    "too many images": lambda image: user(*[image_part(data_uri(image))] * 40, text_part("What?")),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_harms_nobody_else(client, expect, pictures, what):
    good = user(image_part(data_uri(pictures[0])), text_part("What is this?"))
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, client, good) for _ in range(3)]
        with pytest.raises(BadRequestError) as caught:
            ask(client, BAD[what](pictures[1]))
        assert caught.value.body["message"]
        for other in others:
            assert other.result()[:2] == expect(pictures[0], "What is this?")


@pytest.mark.parametrize("prompt", [[1, 960, 5], [1, 961], [1, 100000], [-1]])
def test_ids_outside_of_the_table(client, prompt):
    with pytest.raises(BadRequestError, match=r"960|<image>|out of vocabulary|greater than or equal to 0"):
        client.completions.create(model="tiny", prompt=prompt, max_tokens=2)


@pytest.mark.parametrize("count", [0, 3])
def test_log_probabilities_of_a_prompt_with_an_image(client, expect, pictures, count):
    """The image token has none: it is in no table."""
    messages = user(image_part(data_uri(pictures[0])), text_part("What is this?"))
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, extra_body={"prompt_logprobs": count}
    )
    assert len(answer.prompt_logprobs) == len(expect(pictures[0], "What is this?")[0])


def test_truncation_does_not_cut_images(client, pictures):
    messages = user(image_part(data_uri(pictures[0])), text_part("What is this?"))
    with pytest.raises(BadRequestError, match="0 <image> for 1 images"):
        client.chat.completions.create(model="tiny", messages=messages, extra_body={"truncate_prompt_tokens": 5})


def test_settings_of_the_image_processor(client, pictures):
    messages = user(image_part(data_uri(pictures[0])), text_part("What?"))
    with pytest.raises(BadRequestError, match="mm_processor_kwargs"):
        client.chat.completions.create(
            model="tiny", messages=messages, extra_body={"mm_processor_kwargs": {"size": 32}}
        )


def test_clients_that_go_away(server, client, expect, pictures):
    """Their answers are generated no longer, and others get theirs."""
    messages = user(image_part(data_uri(pictures[0])), text_part("What is this?"))
    tokens, leaving = 400, 12

    def leave(_):
        options = dict(max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True})
        with client.chat.completions.create(model="tiny", messages=messages, **options) as stream:
            next(iter(stream))

    before = _metric(server, "vllm:generation_tokens_total")
    with ThreadPoolExecutor(leaving) as pool:
        list(pool.map(leave, range(leaving)))
    assert ask(client, messages)[:2] == expect(pictures[0], "What is this?")
    deadline = time.monotonic() + 60
    while _metric(server, "vllm:num_requests_running") or _metric(server, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert _metric(server, "vllm:generation_tokens_total") - before < leaving * tokens / 2


def _metric(server, name):
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))
