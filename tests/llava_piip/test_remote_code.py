"""Python files in a folder of weights are never run, whatever its JSON says and whoever answers at the terminal."""

import ast
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import llava_piip
from llava_piip.checkpoints import convert_folder, export_folder
from llava_piip.inference import ChatModel
from llava_piip.serve import chat
from llava_piip.train import merge, train
from piip_tools.benchmarks.chat import load_pair

ROOT = Path(llava_piip.__file__).parents[1]
AUTO_MAP = {
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), "evil.Thing"),
    **dict.fromkeys(("AutoConfig", "AutoImageProcessor", "AutoProcessor"), "evil.Thing"),
    "AutoTokenizer": ["evil.Thing", "evil.Thing"],
}
KINDS = ("tokenizer_class", "image_processor_type", "processor_class", "model_type")


def spoil(folder: Path, mark: Path, files: str = "*.json") -> Path:
    """Has the folder's JSON name Python files, and no kinds that transformers knows itself."""
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (folder / "evil.py").write_text(f"{code}class Thing: pass\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{code}def generate(**_): pass\n")

    def strange(content):
        inner = {key: strange(value) for key, value in content.items() if isinstance(value, dict)}
        renamed = {kind: "EvilThing" for kind in KINDS if kind in content and content[kind] != "piip_llava"}
        return content | inner | renamed | {"auto_map": AUTO_MAP}

    for path in folder.glob(files):
        if path.name not in ("tokenizer.json", "model.safetensors.index.json"):
            path.write_text(json.dumps(strange(json.loads(path.read_text()))))
    return folder


def in_child(action, answers: str | None) -> str:
    """Runs it in a copy of this process whose standard input says yes, or is closed; what it printed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for stream in (1, 2):
                os.dup2(writing, stream)
            sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
            os.close(0)
            sys.stdin = None
            if answers is not None:
                given, answering = os.pipe()
                os.write(answering, answers.encode())
                os.close(answering)
                sys.stdin = os.fdopen(given)
            action()
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as file:
        printed = file.read()
    os.waitpid(pid, 0)
    return printed


def training(*more: str) -> list[str]:
    files = ("--annotations", "data.json", "--output_dir", "out")
    device = ("--use_cpu", "true", "--bf16", "false", "--tf32", "false", "--deepspeed", "none")
    return ["stage2", *files, *device, *more]


ENTRIES = {
    "chat": lambda model, language: chat.main(["--model", str(model)]),
    "web, eval, integrations": lambda model, language: ChatModel.load(model, device="cpu"),
    "benchmark": lambda model, language: load_pair(model, model),
    "merge": lambda model, language: merge.main([str(model), "out"]),
    "convert back": lambda model, language: export_folder(model, "out"),
    "train": lambda model, language: train.main(training("--model", str(model))),
    "assembly": lambda model, language: train.main(
        training("--model", "piip_llava_clip_bl_512_256_7b", "--language_model", str(language))
    ),
}


@pytest.fixture
def folders(model_folder, language_model_folder, tmp_path, monkeypatch):
    """Copies of a whole model and a language model, below the current folder."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    return [shutil.copytree(source, tmp_path / source.name) for source in (model_folder, language_model_folder)]


@pytest.mark.parametrize("answers", ["y\n" * 40, None], ids=["yes", "closed"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_entry_point_runs_the_code_of_a_folder(entry, answers, folders, tmp_path):
    for folder in folders:
        spoil(folder, tmp_path / "mark")
    printed = in_child(lambda: ENTRIES[entry](*folders), answers)
    assert not (tmp_path / "mark").exists() and "[y/N]" not in printed, printed
    assert "cannot be loaded" in printed, printed


@pytest.mark.parametrize("answers", ["y\n" * 40, None], ids=["yes", "closed"])
@pytest.mark.parametrize("files", ["config.json", "tokenizer_config.json", "*processor_config.json", "gen*.json"])
def test_no_file_of_a_folder_makes_its_code_run(files, answers, folders, tmp_path):
    spoil(folders[0], tmp_path / "mark", files)
    printed = in_child(lambda: ChatModel.load(folders[0], device="cpu"), answers)
    assert not (tmp_path / "mark").exists() and "[y/N]" not in printed, printed


def test_a_published_folder_that_is_converted_runs_none_either(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_piip.checkpoints.find_vision", lambda *_: ({}, ""))  # tells what the weights are of
    printed = in_child(lambda: convert_folder(spoil(folders[1], tmp_path / "mark"), "out"), "y\n" * 40)
    assert not (tmp_path / "mark").exists() and "cannot be loaded" in printed, printed


def test_who_trusts_the_folder_runs_its_code(folders, tmp_path):
    """What the tests above rely on."""
    printed = in_child(lambda: AutoTokenizer.from_pretrained(spoil(folders[1], tmp_path / "mark")), "y\n" * 40)
    assert (tmp_path / "mark").exists() and "[y/N]" in printed


def test_it_is_said_at_every_call():
    silent = []
    for path in (path for folder in ("llava_piip", "piip_core", "tools") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            loads = called.endswith(".from_pretrained") or (called.startswith("Auto") and ".from_config" in called)
            if loads and not any(w.arg == "trust_remote_code" and w.value.value is False for w in node.keywords):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
    assert not silent
