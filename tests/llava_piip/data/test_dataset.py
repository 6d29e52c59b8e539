from __future__ import annotations

import logging
import pickle

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from llava_piip.conversation import IGNORE_INDEX
from llava_piip.data import Collator, ConversationDataset, DataError, Problem, read_records
from piip_core.errors import ConfigError

RED, GREEN, BLUE = (255.0, 0.0, 0.0), (0.0, 255.0, 0.0), (0.0, 0.0, 254.0)
QUESTION = "<image>\nwhat is this"


def colors(sample):
    return [tuple(image[:, 0, 0].tolist()) for image in sample["pixel_values"]]


@pytest.fixture
def make(write, processor, images, talk):
    """A dataset of (image, texts) pairs."""

    def make(*entries, image_root=images, **settings):
        records = [
            {"id": f"id{i}", "conversations": talk(*texts)} | ({"image": image} if image else {})
            for i, (image, texts) in enumerate(entries)
        ]
        return ConversationDataset(read_records(write(records)), processor, image_root, **settings)

    return make


def failure(dataset, index=0):
    with pytest.raises(DataError) as error:
        dataset[index]
    record = dataset.records[index]
    assert str(error.value).startswith(f"{record.source}: entry {index} (id 'id{index}'): ")
    return error.value.problem, str(error.value)


def test_samples(make):
    dataset = make(("red.png", [QUESTION, "a dog"]), (None, ["say <image> now", "ok then"]))
    assert len(dataset) == 2
    sample = dataset[0]
    assert sample["input_ids"].tolist() == [99, 99, 99, 4, 2, 4, 1, 3]
    assert sample["labels"].tolist() == [IGNORE_INDEX] * 6 + [1, 3]
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert sample["pixel_values"].shape == (1, 3, 4, 4) and sample["pixel_values"].dtype == torch.float32
    assert colors(sample) == [RED]
    text = dataset[-1]
    assert text["input_ids"].tolist() == [3, 7, 3, 2, 4] and "pixel_values" not in text
    with pytest.raises(IndexError):
        dataset[2]


def test_one_image_follows_llavas_rule_and_several_stay_in_place(make, processor):
    one = make(("red.png", ["left <image> right <image>", "a"]))
    assert colors(one[0]) == [RED]
    assert processor.seen[-1][0]["content"] == "<image>\nleft  right"
    several = make(
        (["red.png", "blue.jpg", "sub/green.png"], ["is <image> or <image> darker", "a", "and <image>", "b"])
    )
    assert colors(several[0]) == [RED, BLUE, GREEN]
    assert processor.seen[-1][0]["content"] == "is <image> or <image> darker"


@pytest.mark.parametrize(
    ("image", "texts", "found", "given"),
    [
        ("red.png", ["no tag", "a"], 0, 1),
        ("red.png", [QUESTION, "a", QUESTION, "b"], 2, 1),
        (["red.png", "blue.jpg"], [QUESTION, "a"], 1, 2),
        (["red.png", "blue.jpg"], ["<image> <image> <image>", "a"], 3, 2),
        (None, [QUESTION, "a"], 1, 0),
        (None, ["what\n<image>", "a"], 1, 0),
        (None, ["hi", "a", "<image>", "a"], 1, 0),
    ],
)
def test_placeholders_that_do_not_match(make, image, texts, found, given):
    kind, text = failure(make((image, texts)))
    assert kind is Problem.PLACEHOLDERS
    assert f"{found} placeholders <image>" in text and f"{given} images" in text and "correct the entry" in text


def test_conversations_are_cut_between_rounds_and_counted(make, caplog):
    caplog.set_level(logging.WARNING)
    rounds = ["<image> one", "two three", "<image> four", "five six", "seven", "eight"]
    two = ["red.png", "blue.jpg"]
    dataset = make((two, rounds), (two, rounds), (None, ["a", "b"]), max_length=9)
    for index in (0, 1):
        sample = dataset[index]
        assert len(sample["input_ids"]) == 6 and colors(sample) == [RED]  # the cut image is not read
    assert len(make((two, rounds))[0]["input_ids"]) == 14
    dataset[2]
    assert dataset.conversations_cut == 2 and dataset.skipped == {}
    assert len(caplog.records) == 1 and "entry 0 (id 'id0')" in caplog.text and "2 rounds cut" in caplog.text


def test_a_cut_does_not_excuse_wrong_placeholders(make):
    rounds = ["<image> one", "two three", "<image> four", "five six"]
    assert failure(make(("red.png", rounds), max_length=8))[0] is Problem.PLACEHOLDERS


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([QUESTION, ""], {}, "no token to train on"),
        ([QUESTION], {}, "no token to train on"),
        ([QUESTION, "a b c"], {"max_length": 8}, "the first round does not fit"),
    ],
)
def test_conversations_that_cannot_be_used(make, texts, settings, message):
    kind, text = failure(make(("red.png", texts), **settings))
    assert kind is Problem.CONVERSATION and message in text


def test_skipping_takes_the_next_of_the_same_kind(make, caplog):
    caplog.set_level(logging.WARNING)
    entries = [
        ("gone.png", [QUESTION, "a"]),
        (None, ["hello", "b"]),
        ("gone2.png", [QUESTION, "a"]),
        ("red.png", ["no tag", "a"]),
        ("blue.jpg", [QUESTION, "a"]),
        (None, ["hello", ""]),
    ]
    dataset = make(*entries, on_error="skip")
    assert colors(dataset[0]) == colors(dataset[0]) == colors(dataset[2]) == [BLUE]
    assert dataset[5]["input_ids"].tolist() == dataset[1]["input_ids"].tolist()  # around the end
    assert dataset.skipped == {
        Problem.MISSING.value: 5,
        Problem.PLACEHOLDERS.value: 3,
        Problem.CONVERSATION.value: 1,
    }
    assert len(caplog.records) == 3  # once per kind
    assert "entry 0 (id 'id0'): image 'gone.png' is missing" in caplog.text
    assert [colors(item) for item in dataset if "pixel_values" in item] == [[BLUE]] * 4


@pytest.mark.parametrize("number", [3, 300])
def test_skipping_gives_up(make, number):
    """With a wrong image folder everything is missing: no search through a million entries."""
    dataset = make(*[("gone.png", [QUESTION, "a"])] * number, (None, ["a", "b"]), on_error="skip")
    with pytest.raises(DataError, match=rf"entry 1 .* none of {min(number, 100)} entries .* is the image folder right"):
        dataset[1]
    assert dataset.skipped == {Problem.MISSING.value: min(number, 100)}


def test_one_folder_per_file(write, processor, images, talk):
    for name, image in (("a.json", "red.png"), ("b.jsonl", "green.png"), ("c.json", None)):
        write(
            [
                {"id": name, "conversations": talk(QUESTION if image else "hi", "a")}
                | ({"image": image} if image else {})
            ],
            name,
        )
    paths = [images.parent / name for name in ("a.json", "b.jsonl", "c.json")]
    records = read_records(paths)
    dataset = ConversationDataset(records, processor, {str(paths[0]): images, paths[1]: images / "sub"})
    assert [colors(dataset[0]), colors(dataset[1])] == [[RED], [GREEN]] and len(dataset[2]["input_ids"]) == 2
    lacking = ConversationDataset(records, processor, {paths[0]: images}, on_error="skip")
    with pytest.raises(ConfigError, match=r"b\.jsonl: entry 0 .*no image_root was given for its file .*a\.json"):
        lacking[1]
    with pytest.raises(ConfigError, match="no image_root was given"):
        ConversationDataset(records, processor)[0]


def test_lengths(make):
    dataset = make(
        ("red.png", ["<image>\nWhat is it?", "A cat.", "Sure?", "Yes"]),
        (None, ["Say  hi", " hi\tthere\n"]),
        image_root=None,
    )
    assert dataset.modality_lengths == [8, -4] and dataset.lengths == [136, 4]


def test_a_conversation_without_words(make):
    entries = [("red.png", [QUESTION, "a"]), (None, [" \n", ""])]
    with pytest.raises(DataError, match=r"entry 1 \(id 'id1'\): the conversation has no words"):
        make(*entries).modality_lengths  # noqa: B018
    assert make(*entries, on_error="skip").modality_lengths == [5, -1]


def test_settings_that_cannot_work(make, images):
    with pytest.raises(ConfigError, match="on_error='ignore': expected one of 'raise', 'skip'"):
        make((None, ["a", "b"]), on_error="ignore")
    with pytest.raises(ConfigError, match="is no folder"):
        make((None, ["a", "b"]), image_root=images / "gone")


def test_workers_count_for_all(make):
    """Two workers yield the samples in order and add to the counts of the process that owns them."""
    entries = [("red.png" if i % 3 else "gone.png", [QUESTION, f"answer {i}", "and", "b"]) for i in range(12)]
    dataset = make(*entries, on_error="skip", max_length=9)
    batches = list(DataLoader(dataset, 2, num_workers=2, collate_fn=Collator(0)))
    assert len(batches) == 6 and all(batch["pixel_values"].shape == (2, 3, 4, 4) for batch in batches)
    assert dataset.skipped == {Problem.MISSING.value: 4}
    assert dataset.conversations_cut == 12


def test_errors_of_workers_keep_their_type(make):
    """As a DataLoader's worker sends them: class and text, from which the main process makes the error anew."""
    dataset = make(("red.png", [QUESTION, "a"]), ("gone.png", [QUESTION, "a"]))
    try:
        dataset[1]
    except DataError:
        sent = pickle.dumps(ExceptionWrapper(where="in DataLoader worker process 0"))
    with pytest.raises(DataError, match=r"entry 1 \(id 'id1'\): image 'gone.png' is missing"):
        pickle.loads(sent).reraise()


PAD = 7


def sample(ids, images=0, value=0.0):
    result = {"input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORE_INDEX, *ids[1:]])}
    return result | ({"pixel_values": torch.full((images, 3, 2, 2), value)} if images else {})


def test_right_padding():
    batch = Collator(PAD)([sample([1, 2, 3], 1, 0.5), sample([4, 5]), sample([6], 2, 1.5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.5, 1.5, 1.5]
    assert {key: value.dtype for key, value in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "attention_mask": torch.int64,
        "pixel_values": torch.float32,
    }


def test_the_padding_id_inside_of_a_text_stays_visible():
    batch = Collator(PAD)([sample([1, PAD, 3, PAD]), sample([4])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [-100, PAD, 3, PAD]


def test_text_alone_has_no_pixels():
    assert set(Collator(PAD)([sample([1]), sample([1, 2])])) == {"input_ids", "labels", "attention_mask"}


def test_bad_input():
    with pytest.raises(DataError, match="a batch of no samples"):
        Collator(0)([])
