"""The audit of conversation files: each defect is found, at its entry, and nothing else."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_piip.conversation import EncodedConversation
from llava_piip.data import ConversationDataset, DataError, Problem, read_records
from llava_piip.data import audit as module
from llava_piip.data.audit import EMPTY_ANSWER, UNUSABLE_FILE
from llava_piip.data.published import PUBLISHED
from piip_core.errors import ConfigError, UserError


def audit(annotations, image_roots, **settings):
    files, roots = ([given] if isinstance(given, Path) else given for given in (annotations, image_roots))
    return module.audit(files, roots, **settings)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def entry(number: int, image: str | None = None, conversations=None, **more) -> dict:
    conversations = conversations or turns("<image>\nWhat is this?" if image else "Hello?", "It is a thing.")
    return {"id": f"id{number}"} | ({"image": image} if image else {}) | {"conversations": conversations} | more


def picture(path: Path, format: str = "JPEG", size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((size, size), 60).convert("RGB").save(path, format=format)
    return path


def write(path: Path, entries: list) -> Path:
    path.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def found(report) -> list[tuple]:
    return [(problem.entry, problem.kind) for problem in problems(report)]


def problems(report) -> list:
    return [problem for part in report.sets for problem in part.problems]


def sizes(report, root: Path) -> dict[str, int]:
    """Numbers of images by folder."""
    return {os.path.relpath(part.title, root): part.found for part in report.sets[1:]}


# What is in the tree of `broken`, and what has to be found with full decoding
BROKEN = [
    (entry(0, "coco/good.jpg", model="kept as it is \u00e9"), []),
    (entry(1), []),
    (entry(2, "coco/absent.jpg"), [Problem.MISSING.value]),
    (entry(3, "coco/empty.jpg"), [Problem.EMPTY.value]),
    (entry(4, "coco/html.jpg"), [Problem.BROKEN.value]),
    (entry(5, "coco/cut.jpg"), [Problem.BROKEN.value]),
    (entry(6, "../outside.jpg"), [Problem.OUTSIDE.value]),
    (entry(7, "coco/link.jpg"), [Problem.OUTSIDE.value]),
    (entry(8, "ocr_vqa/gif.jpg"), []),
    (entry(9, "coco/good.jpg", turns("<image>\nWhat?", "")), [EMPTY_ANSWER]),
    (entry(10, None, turns("Hello?", "Hi.", "Who are you?")), [EMPTY_ANSWER]),
    (entry(11, None, turns("Hello?", " \n", "And?", "Yes.")), [EMPTY_ANSWER]),
    (entry(12, None, turns("Hello?") * 2), [Problem.CONVERSATION.value]),
    (entry(13, None, [{"from": "robot", "value": "x"}]), [Problem.CONVERSATION.value]),
    (entry(14, "coco/good.jpg", turns("What?", "A cat.")), [Problem.PLACEHOLDERS.value]),
    (entry(15, "coco/good.jpg", turns("<image>\nOne.", "Yes", "<image>\nTwo.", "No")), [Problem.PLACEHOLDERS.value]),
    (entry(16, None, turns("<image>\nForgotten field", "Yes")), [Problem.PLACEHOLDERS.value]),
    (entry(17, None, turns("What does the tag <image> do in HTML?", "Nothing")), []),
    (entry(0), []),
    ("text", [Problem.RECORD.value]),
    ({"id": 20}, [Problem.RECORD.value]),
    (entry(21, ["coco/good.jpg", "coco/absent.jpg"], turns("<image> and <image>", "Two")), [Problem.MISSING.value]),
    (entry(22, "coco/absent.jpg", turns("<image>\nWhat?", "")), [Problem.MISSING.value, EMPTY_ANSWER]),
    (entry(23, None, [{"from": "gpt", "value": ""}, *turns("Hello?", "Yes")]), []),
]


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with a conversation file that has every defect."""
    root = tmp_path / "data"
    picture(root / "coco" / "good.jpg")
    picture(root / "ocr_vqa" / "gif.jpg", "GIF")
    (root / "coco" / "empty.jpg").write_bytes(b"")
    (root / "coco" / "html.jpg").write_text("<html>Not found</html>")
    content = picture(root / "coco" / "cut.jpg").read_bytes()
    (root / "coco" / "cut.jpg").write_bytes(content[: len(content) // 2])
    picture(tmp_path / "outside.jpg")
    (root / "coco" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    write(root / "all.json", [value for value, _ in BROKEN])
    return root


@pytest.mark.parametrize("decode", ["none", "header", "full"])
def test_every_defect_is_found_at_its_entry(broken, decode):
    report = audit(broken / "all.json", broken, decode=decode)
    expected = [(number, kind) for number, (_, kinds) in enumerate(BROKEN) for kind in kinds]
    unseen = {"full": [], "header": [5], "none": [4, 5]}[decode]  # what needs more than this to be seen
    assert Counter(found(report)) == Counter(item for item in expected if item[0] not in unseen)
    assert not report.ok
    for problem in problems(report):
        assert problem.message.startswith(f"{broken / 'all.json'}: entry {problem.entry}")
    entries = report.sets[0]
    assert (entries.title, entries.found) == (str(broken / "all.json"), len(BROKEN))
    assert entries.columns == {"text only": 9}
    assert sizes(report, broken) == {"coco": 6, "ocr_vqa": 1, "..": 1}


def test_the_audit_agrees_with_training(broken, tmp_path):
    """What the data set of training refuses is what a full audit calls a problem, in the same words."""

    class Processor:
        token_size = None

        @staticmethod
        def encode_conversation(messages, *, has_images, **_):
            count = sum(message["content"].count("<image>") for message in messages) if has_images else 0
            return EncodedConversation([1], [1], num_images=count)

        @staticmethod
        def image_processor(images, **_):
            return {"pixel_values": images}

    path = write(tmp_path / "well-formed.json", [value for value, kinds in BROKEN if Problem.RECORD.value not in kinds])
    report = audit(path, broken, decode="full")
    dataset = ConversationDataset(read_records(path), Processor, broken)
    for number in range(len(dataset)):
        # an answer that is missing is found when labels are made, which the stand-in does not do
        expected = [f for f in problems(report) if f.entry == number and f.kind != EMPTY_ANSWER]
        if expected:
            with pytest.raises(DataError) as error:
                dataset[number]
            assert str(error.value) in [f.message for f in expected if f.kind == error.value.problem.value]
        else:
            dataset[number]


def test_only_the_largest_folders_are_told_apart(tmp_path):
    for number in range(30):
        picture(tmp_path / f"{number:02}" / "1.jpg", size=8)
    names = [f"{number:02}/1.jpg" for number in range(30)]
    report = audit(write(tmp_path / "a.json", [entry(i, name) for i, name in enumerate(names)]), tmp_path)
    assert report.ok and len(report.sets) == 1 + 20 + 1
    assert report.sets[-1].title == f"{tmp_path}: other folders" and report.sets[-1].found == 10


def test_worker_processes_find_the_same(tmp_path):
    image = picture(tmp_path / "0.jpg", size=8)
    entries = [entry(number, f"{number}.jpg") for number in range(600)]
    for number in range(1, 600):
        if number % 7:
            os.link(image, tmp_path / f"{number}.jpg")
    path = write(tmp_path / "many.json", entries)
    alone, together = (audit(path, tmp_path, workers=workers) for workers in (1, 2))
    assert found(alone) == [(number, Problem.MISSING.value) for number in range(7, 600, 7)]
    assert alone == together


def test_worker_process_that_ends_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_look_at", lambda *_: os._exit(1))
    path = write(tmp_path / "many.json", [entry(number, f"{number}.jpg") for number in range(600)])
    with pytest.raises(UserError, match="workers=1 shows which"):
        audit(path, tmp_path, workers=2)


def test_links_that_were_made_on_purpose(broken):
    report = audit(broken / "all.json", broken, follow_links=True)
    assert (7, Problem.OUTSIDE.value) not in found(report) and (6, Problem.OUTSIDE.value) in found(report)


def test_several_files_with_their_own_folders(broken, tmp_path):
    picture(tmp_path / "mine" / "1.jpg")
    other = tmp_path / "mine.jsonl"
    other.write_text("\n".join(json.dumps(entry(number, "1.jpg")) for number in range(2)))
    report = audit([other, broken / "all.json"], [tmp_path / "mine", broken])
    assert [part.found for part in report.sets] == [2, 1, len(BROKEN), 1, 6, 1]
    assert not report.sets[0].problems and not report.sets[1].problems


def test_published_sizes(tmp_path):
    published = replace(
        PUBLISHED["finetune"], records=4, records_by_folder={"coco": 1, "vg": 2, "gqa": 1, "": 1}, title="small"
    )
    names = ["coco/train2017/1.jpg", "vg/VG_100K/1.jpg", "vg/VG_100K_2/1.jpg"]
    for name in names:
        picture(tmp_path / name)
    path = write(tmp_path / "a.json", [*(entry(i, name) for i, name in enumerate(names)), entry(3)])
    report = audit(path, tmp_path, published=published)
    (problem,) = problems(report)
    assert problem.message == f"{path}: 0 entries with images in gqa: expected 1" and not report.ok
    assert sizes(report, tmp_path) == {"coco": 1, "vg": 2} and report.sets[0].expected == 4
    exact = replace(published, records_by_folder={"coco": 1, "vg": 2, "": 1})
    assert audit(path, tmp_path, published=exact).ok


def test_sizes_of_the_published_sets():
    assert PUBLISHED["pretrain"].records == 558_128
    assert PUBLISHED["finetune"].records == 665_298 == sum(PUBLISHED["finetune"].records_by_folder.values())
    for dataset in PUBLISHED.values():
        for folder in dataset.folders:
            assert Path(folder.archive).parent == Path(folder.folder).parent  # as wget and unzip would be used


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[]", "has no entries"),
        (b'{"id": 1}', r"must be named \.jsonl"),
        (b'[{"id": 1}, {"id', "incomplete file"),
        (b"[\xff]", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_unusable_file_is_a_problem_and_the_next_is_checked(tmp_path, content, match):
    bad, good = tmp_path / "bad.json", write(tmp_path / "good.json", [entry(0)])
    if content is not None:
        bad.write_bytes(content)
    report = audit([bad, good], [tmp_path])
    (problem,) = [problem for problem in problems(report) if problem.entry is None]
    assert problem.path == str(bad) and problem.kind == UNUSABLE_FILE and not report.ok
    assert re.search(match, problem.message)
    assert report.sets[1].title == str(good) and report.sets[1].found == 1


def test_json_report_and_summary(broken, tmp_path):
    report = audit(broken / "all.json", broken, decode="full")
    report.write_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["ok"] is False and "All images were decoded" in content["note"]
    assert [(f["entry"], f["kind"]) for part in content["sets"] for f in part["problems"]] == found(report)
    summary = report.summary(examples=1)
    assert f"PROBLEM in {broken / 'coco'}: {Problem.MISSING.value}: 3\n" in summary
    assert summary.count("is missing in") == 1
    assert report.verdict() == "Something is wrong, see above. (All images were decoded.)"


def test_arguments_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a.json", [entry(0)])
    with pytest.raises(ConfigError, match="2 image folders for 1"):
        audit(path, [tmp_path, tmp_path])
    with pytest.raises(ConfigError, match="decode='all'"):
        audit(path, tmp_path, decode="all")
    with pytest.raises(ConfigError, match="is no folder"):
        audit(path, tmp_path / "absent")
