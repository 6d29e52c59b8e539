from __future__ import annotations

import json
import pickle

import pytest

from llava_piip.data import DataError, read_records

TURNS = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": 'Hello ünïcode 🙂 "quoted" ]}, ['}]


@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl"])
def test_entries_come_back_as_written(write, name):
    entries = [
        {"id": "a", "image": "x/1.jpg", "conversations": TURNS, "model": "gpt-4"},
        {"id": 7, "conversations": TURNS[:1]},
        {"image": ["1.jpg", "2.jpg"], "conversations": TURNS},
        {"id": "d", "image": None, "conversations": TURNS},
    ]
    path = write(entries, name)
    records = read_records(path)
    assert len(records) == 4
    assert [record.images for record in records] == [("x/1.jpg",), (), ("1.jpg", "2.jpg"), ()]
    assert [record.id for record in records] == ["a", "7", "2", "d"]
    assert [list(record.conversations) for record in records] == [TURNS, TURNS[:1], TURNS, TURNS]
    assert [(record.source, record.index) for record in records] == [(str(path), i) for i in range(4)]
    assert records[-1] == records[3]
    with pytest.raises(IndexError):
        records[4]


@pytest.mark.parametrize("dump", [dict(indent=2), dict(ensure_ascii=False), dict(separators=(",", ":"))])
def test_any_layout_of_json(tmp_path, dump):
    path = tmp_path / "a.json"
    entries = [{"id": str(i), "conversations": TURNS} for i in range(3)]
    path.write_text("\ufeff " + json.dumps(entries, **dump) + " \n", encoding="utf-8")
    assert [list(record.conversations) for record in read_records(path)] == [TURNS] * 3


def test_a_mixture_is_its_files_in_order(write):
    first = write([{"id": f"a{i}", "conversations": TURNS} for i in range(2)], "a.json")
    second = write([{"id": f"b{i}", "conversations": TURNS} for i in range(3)], "b.jsonl")
    records = pickle.loads(pickle.dumps(read_records([first, second])))
    assert [record.id for record in records] == ["a0", "a1", "b0", "b1", "b2"]
    assert [(record.source, record.index) for record in records] == [
        (str(first), 0),
        (str(first), 1),
        (str(second), 0),
        (str(second), 1),
        (str(second), 2),
    ]
    assert records[3].where == f"{second}: entry 1 (id 'b1')"


def test_memory_is_that_of_the_text(write):
    entries = [{"id": str(i), "image": f"{i}.jpg", "conversations": TURNS * 4} for i in range(2000)]
    path = write(entries)
    assert len(pickle.dumps(read_records(path))) < 1.05 * path.stat().st_size


GOOD = {"id": "1", "conversations": TURNS}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": 1}, "starts with no list .* must be named .jsonl"),
        ([], "has no entries"),
        ([GOOD, 3], "entry 1 is 3, expected an object"),
        ([GOOD, {"id": "x"}], r"entry 1 \(id 'x'\): 'conversations' is missing \(fields: id\)"),
        ([{"id": "x", "conversations": []}], r"entry 0 \(id 'x'\): 'conversations' is \[\], expected a list of turns"),
        ([{"id": "x", "conversations": "hi"}], "'conversations' is 'hi'"),
        ([{"id": "x", "conversations": [{"from": "human"}]}], "turn 0 is .* 'from' and 'value'"),
        ([{"id": "x", "conversations": [*TURNS, {"from": "gpt", "value": None}]}], "turn 2 is"),
        ([{"id": "x", "conversations": [{"from": "gpt", "value": "ab\ud83d"}]}], "turn 0 has half .* position 2"),
        ([{"id": "x", "messages": TURNS}], r"missing \(fields: id, messages\)"),
        ([{**GOOD, "image": ""}], "'image' is '', expected a file name"),
        ([{**GOOD, "image": ["a.jpg", 3]}], "'image' is .* expected a file name or a list"),
        ([{**GOOD, "image": {"path": "a"}}], "'image' is"),
        ([{**GOOD, "images": ["a.jpg"]}], "has 'images', which would be ignored"),
        ([{**GOOD, "video": "a.mp4"}], "has 'video', which would be ignored"),
        ([{**GOOD, "id": [1]}], r"'id' is \[1\], expected a text or a number"),
    ],
)
def test_malformed_entries_are_named(write, entries, message):
    path = write(entries)
    with pytest.raises(DataError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(str(path))


MALFORMED = [
    3,
    None,
    [],
    {"id": "x"},
    {**GOOD, "id": None},
    {**GOOD, "id": 1.0},
    {**GOOD, "id": True},
    {**GOOD, "conversations": None},
    {**GOOD, "conversations": []},
    {**GOOD, "conversations": [None]},
    *[{**GOOD, "conversations": [*TURNS, {"from": "gpt", "value": v}]} for v in (None, 3, ["a"], "ab\ud83d")],
    {**GOOD, "image": ["a.jpg", None]},
    {**GOOD, "image": 3},
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_malformed_entries_are_left_out_and_counted(write, name, caplog):
    path = write([GOOD, *MALFORMED, {**GOOD, "id": 7, "image": None}], name)
    records = read_records([path, path], on_error="skip")
    assert [(r.id, r.index, r.images) for r in records] == [("1", 0, ()), ("7", len(MALFORMED) + 1, ())] * 2
    assert records.malformed == 2 * len(MALFORMED)
    assert f"{path}: entry 1 is 3, expected an object" in caplog.text
    assert f"{2 * len(MALFORMED)} malformed entries left out, 4 entries are used" in caplog.text
    assert len(caplog.records) == 4
    with pytest.raises(DataError, match=r"entry 0 is 3, .* none of \d+ entries can be used"):
        read_records(write(MALFORMED, name), on_error="skip")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"id": "1", "conversations"', "a.json: no JSON .* load an incomplete file again"),
        ("a.json", json.dumps([GOOD])[:-1] + " {}]", "no JSON"),
        ("a.json", json.dumps([GOOD]) + "[]", "Extra data"),
        ("a.json", "[{'id': 1}]", "line 1 column 3"),
        ("a.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD), "an entry per line .jsonl"),
        ("a.jsonl", json.dumps([GOOD], indent=1), "a.jsonl: line 1: .* must be named .json"),
        ("a.jsonl", json.dumps(GOOD) + "\n\n{oops}\n", "a.jsonl: line 3"),
        ("a.jsonl", "\n \n", "has no entries"),
        ("a.json", "[" * 100_000, "no JSON"),
        ("a.jsonl", '{"id": ' + "9" * 5000 + "}", "line 1: no JSON"),
        ("a.txt", json.dumps([GOOD]), r"expected a file named .json .* or .jsonl"),
    ],
)
def test_broken_files_say_where_and_what_to_do(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match=r"gone.json: cannot be read .No such file"):
        read_records(tmp_path / "gone.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "folder.json")
    (tmp_path / "latin.json").write_bytes('[{"id": "ü"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_records(tmp_path / "latin.json")
    with pytest.raises(DataError, match="no conversation file was given"):
        read_records([])
