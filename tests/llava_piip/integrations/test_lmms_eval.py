"""lmms-eval finds the model, and gets the answers and likelihoods that the model gives by itself."""

import pytest
import torch

pytest.importorskip("lmms_eval.api.model", exc_type=ImportError)
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models.registry_v2 import ModelRegistryV2

from llava_piip.inference import ChatModel
from llava_piip.integrations import lmms_eval_models
from llava_piip.integrations.lmms_eval import PIIPLlava
from piip_core.errors import UserError

QUESTIONS = ["What is it?", "Is there a cup in the picture, and a red one?", "Say it.", "Why?", "How many are there?"]
NUM_PICTURES = [1, 1, 0, 2, 1]
SHORT = {"max_new_tokens": 8, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def docs(pictures):
    return [
        {"question": question, "pictures": pictures[i : i + count]}
        for i, (question, count) in enumerate(zip(QUESTIONS, NUM_PICTURES, strict=True))
    ]


@pytest.fixture(scope="module")
def reference(chat_folder):
    """The same weights, without the adapter."""
    return ChatModel.load(chat_folder, device="cpu", dtype="float32")


@pytest.fixture
def adapter(chat_folder, docs):
    """Makes adapters as lmms-eval does."""

    def make(options="", batch_size=1):
        model = PIIPLlava.create_from_arg_string(f"pretrained={chat_folder}{options}", {"batch_size": batch_size})
        model.task_dict = {"drawn": {"test": docs}}
        return model

    return make


def visuals_of(doc):
    return doc["pictures"]


def instance(kind, *arguments, idx=0):
    return Instance(kind, arguments, idx, metadata={"task": "drawn", "doc_id": 0, "repeats": 1})


def questions_for(docs, settings=SHORT):
    return [
        instance("generate_until", doc["question"], settings, visuals_of, i, "drawn", "test")
        for i, doc in enumerate(docs)
    ]


def alone(reference, doc, new_tokens=8, **settings):
    """transformers' greedy answer to one document."""
    content = "<image>\n" * len(doc["pictures"]) + doc["question"]
    inputs = reference.encode([{"role": "user", "content": content}], doc["pictures"], max_new_tokens=new_tokens)
    with torch.no_grad():
        ids = reference.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **settings)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return reference.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_lmms_eval_finds_the_class():
    registry = ModelRegistryV2()
    for manifest in registry._coerce_payload_to_manifests(lmms_eval_models):
        registry.register_manifest(manifest)
    assert registry.get_model_class("piip_llava") is PIIPLlava


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_the_models_own_in_any_batch(adapter, reference, docs, batch_size):
    expected = [alone(reference, doc) for doc in docs]
    assert len(set(expected)) == len(docs)
    answers = adapter(batch_size=batch_size).generate_until(questions_for(docs))
    assert [unwrap_generation_output(answer)[0] for answer in answers] == expected


def test_requests_with_other_settings_are_not_mixed(adapter, reference, docs):
    settings = [SHORT, {"max_new_tokens": 3, "until": ["\n\n"]}]
    requests = questions_for(docs)
    for number, request in enumerate(requests):
        request.arguments = (request.args[0], settings[number % 2], *request.args[2:])
    answers = adapter(batch_size=4).generate_until(requests)
    assert answers == [alone(reference, doc, (8, 3)[number % 2]) for number, doc in enumerate(docs)]
    assert settings == [SHORT, {"max_new_tokens": 3, "until": ["\n\n"]}]


def test_beams_are_those_of_transformers(adapter, reference, docs):
    answers = adapter(batch_size=5).generate_until(questions_for(docs, {**SHORT, "num_beams": 4}))
    assert answers == [alone(reference, doc, num_beams=4) for doc in docs]
    assert answers != [alone(reference, doc) for doc in docs]


def test_a_temperature_samples_unless_the_task_says_not_to(adapter, docs):
    model, hot = adapter(), {"max_new_tokens": 8, "temperature": 5.0}
    requests = questions_for(docs[:1] * 6, hot)
    torch.manual_seed(0)
    assert len(set(model.generate_until([requests[0]] * 6))) > 1
    greedy = questions_for(docs[:1], {**hot, "do_sample": False})
    assert len(set(model.generate_until(greedy * 6))) == 1


def test_an_answer_ends_before_a_stop_text(adapter, reference, docs):
    whole = alone(reference, docs[0])
    stop = whole[3:6]
    answer, _ = adapter(batch_size=2).generate_until(questions_for(docs[:2], {**SHORT, "until": [stop]}))
    assert answer == whole[: whole.index(stop)].strip()


def test_an_answer_is_as_long_as_the_context_allows(adapter, reference, docs):
    def room(doc):
        messages = [{"role": "user", "content": "<image>\n" + doc["question"]}]
        return (
            reference.context_length
            - reference.encode(messages, doc["pictures"], max_new_tokens=1)["input_ids"].shape[1]
        )

    long = dict(docs[0])
    while room(long) > 12:
        long["question"] += " Why?"
    model = adapter(batch_size=2)
    model.task_dict["drawn"]["test"] = [long, docs[1]]
    answers = model.generate_until(questions_for([long, docs[1]], {"max_new_tokens": 24}))
    assert answers == [alone(reference, long, room(long)), alone(reference, docs[1], 24)]


def by_hand(model, prompt, answer, pictures):
    """Log-probability of the tokens of an answer, one after the other, in double precision."""
    processor = model.processor
    start, whole = (
        processor(text=[text], images=[pictures])["input_ids"][0].tolist() for text in (prompt, prompt + answer)
    )
    assert whole[: len(start)] == start
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"] if pictures else None
    total, greedy = 0.0, True
    for end in range(len(start), len(whole)):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([whole[:end]]), pixel_values=pixels).logits[0, -1]
        assert logits.dtype == torch.float64
        total += torch.log_softmax(logits, 0)[whole[end]].item()
        greedy &= logits.argmax().item() == whole[end]
    return total, len(whole) - len(start), greedy


@pytest.fixture(scope="module")
def choices(chat_folder, docs):
    """Requests for likelihoods, and for each the log-probability, the number of tokens, and whether it is greedy."""
    double = ChatModel.load(chat_folder, device="cpu", dtype=torch.float64)
    requests, expected = [], []
    for number, doc in enumerate(docs[:4]):
        for index, (text, answer) in enumerate([("A", " A"), ("Red cup.", lambda doc: " Red cup.")]):
            arguments = (doc["question"], answer, visuals_of, number, "drawn", "test")
            requests.append(instance("loglikelihood", *arguments, idx=index))
            question = {"role": "user", "content": "<image>\n" * len(doc["pictures"]) + doc["question"]}
            prompt = double.processor.apply_chat_template([question], add_generation_prompt=True)
            expected.append(by_hand(double, prompt, f" {text}</s>", doc["pictures"]))
    return requests, expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_computed_by_hand(adapter, choices, batch_size):
    requests, expected = choices
    found = adapter(options=",likelihood=logprob", batch_size=batch_size).loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([total for total, _, _ in expected], rel=2e-5)
    assert [greedy for _, greedy in found] == [greedy for _, _, greedy in expected]


def test_by_default_likelihoods_are_losses_as_of_other_models(adapter, choices):
    requests, expected = choices
    # The evaluator unwraps what models return
    losses = [unwrap_generation_output(found)[0] for found in adapter(batch_size=8).loglikelihood(requests)]
    assert [value for value, _ in losses] == pytest.approx([-total / n for total, n, _ in expected], rel=2e-5)


def test_only_what_the_model_would_say_is_greedy(adapter, docs):
    model = adapter(batch_size=2)
    network, processor = model.chat.model, model.chat.processor
    question = [{"role": "user", "content": "<image>\n" + docs[0]["question"]}]
    inputs = processor(
        text=[processor.apply_chat_template(question, add_generation_prompt=True) + " A"], images=[docs[0]["pictures"]]
    )
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        before, after = network.model(**inputs).last_hidden_state[0, -2:]
        # The answer's token follows the prompt, and the end token follows that, each with a direction of its own
        network.lm_head.weight[ids[-1]] = 10 * (before - before @ after / (after @ after) * after)
        network.lm_head.weight[processor.tokenizer.eos_token_id] = 10 * (
            after - before @ after / (before @ before) * before
        )
    assert model.generate_until(questions_for(docs[:1], {"max_new_tokens": 4})) == ["A"]
    requests = [
        instance("loglikelihood", docs[0]["question"], text, visuals_of, 0, "drawn", "test")
        for text in (" A", "A A", "No")
    ]
    assert [greedy for _, greedy in model.loglikelihood(requests)] == [True, False, False]


def test_lmms_eval_chooses_the_most_probable_answer(adapter, docs):
    """Its scoring takes the smallest number that `loglikelihood` gives."""
    task = pytest.importorskip("lmms_eval.api.task", exc_type=ImportError)
    letters = ["A", "B", "C"]
    requests = [
        instance("loglikelihood", docs[0]["question"], f" {letter}", visuals_of, 0, "drawn", "test", idx=i)
        for i, letter in enumerate(letters)
    ]
    results = [unwrap_generation_output(found)[0] for found in adapter(batch_size=3).loglikelihood(requests)]
    values = [value for value, _ in adapter(options=",likelihood=logprob").loglikelihood(requests)]
    probable = values.index(max(values))
    scored = task.ConfigurableTask.__new__(task.ConfigurableTask)
    scored.__dict__.update(OUTPUT_TYPE="multiple_choice", multiple_input=0, multiple_target=0)
    scored._metric_fn_list = {"acc": None}
    scored._config = type("Config", (), {"process_results": None})()
    scored.doc_to_choice, scored.doc_to_target = (lambda doc: letters), (lambda doc: probable)
    assert scored.process_results(docs[0], results) == {"acc": 1.0}


@pytest.mark.parametrize(
    ("settings", "visuals", "error", "words"),
    [
        ({"beams": 3}, None, UserError, "beams: no such setting"),
        (SHORT, ["a.mp4"], UserError, r"drawn, document 0.*'a.mp4'.*no video"),
        ({"top_p": 2.0, "temperature": 1.0}, None, UserError, "top_p=2.0: expected"),
    ],
)
def test_what_cannot_work_is_named(adapter, docs, settings, visuals, error, words):
    request = instance("generate_until", "Why?", settings, lambda doc: visuals or doc["pictures"], 0, "drawn", "test")
    with pytest.raises(error, match=words):
        adapter().generate_until([request])


def test_a_document_that_cannot_be_asked_fails_alone_and_is_named(adapter, reference, docs, caplog):
    bad = [
        {"question": "<image> or <image>?", "pictures": docs[0]["pictures"]},
        {"question": "very " * 200, "pictures": []},
        {"question": "Why?", "pictures": ["a.mp4"]},
    ]
    for batch_size in (1, 3, 8):
        caplog.clear()
        mixed = [docs[0], bad[0], docs[1], bad[1], bad[2], docs[2]]
        model = adapter(batch_size=batch_size)
        model.task_dict["drawn"]["test"] = mixed
        answers = model.generate_until(questions_for(mixed))
        assert answers == ["" if doc in bad else alone(reference, doc) for doc in mixed]
        named = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert [next(i for i in range(6) if f"document {i}:" in line) for line in sorted(named)] == [1, 3, 4]
        assert any("2 <image> for 1 images" in line for line in named) and any("context is 224" in n for n in named)
    requests = [
        instance("loglikelihood", doc["question"], " A", visuals_of, i, "drawn", "test") for i, doc in enumerate(mixed)
    ]
    values = [value for value, _ in adapter_with(adapter, mixed).loglikelihood(requests)]
    assert [value == float("inf") for value in values] == [doc in bad for doc in mixed]


def adapter_with(adapter, docs):
    model = adapter(batch_size=4)
    model.task_dict["drawn"]["test"] = docs
    return model


def test_placeholders_and_images_must_match(adapter):
    request = instance("generate_until", "<image> or <image>?", SHORT, visuals_of, 0, "drawn", "test")
    with pytest.raises(UserError, match="document 0: the text has 2 <image> for 1 images"):
        adapter().generate_until([request])


def test_nothing_is_cut(adapter):
    model = adapter()
    for kind in ("generate_until", "loglikelihood"):
        middle = SHORT if kind == "generate_until" else " A"
        request = instance(kind, "very " * 200, middle, visuals_of, 0, "drawn", "test")
        with pytest.raises(UserError, match=r"document 0: .*context is 224"):
            getattr(model, kind)([request])


@pytest.mark.parametrize("options", [",batch_size=auto", ",likelihood=mean"])
def test_settings_of_the_model_are_checked(chat_folder, options):
    with pytest.raises(UserError, match="expected"):
        PIIPLlava.create_from_arg_string(f"pretrained={chat_folder}{options}")
