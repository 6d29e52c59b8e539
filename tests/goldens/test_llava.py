"""Golden cases of the multimodal model pass, and wrong numbers do not."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from checkers import Status
from written_cases import GOLDENS, failed, run_path


@pytest.mark.parametrize("name", ["llava_splice", "llava_full_clip_bl"])
@pytest.mark.parametrize("part", ["logits", "output_ids"])
def test_wrong_numbers_fail(name, part, tmp_path):
    for suffix in (".json", ".safetensors", "_ckpt", "_stage1"):
        source = GOLDENS / f"{name}{suffix}"
        if source.is_dir():
            shutil.copytree(source, tmp_path / source.name)
        elif source.exists():
            shutil.copy(source, tmp_path)
    if name == "llava_full_clip_bl":
        shutil.copy(GOLDENS / json.loads((tmp_path / f"{name}.json").read_text())["tokenizer_file"], tmp_path)
    tensors = load_file(tmp_path / f"{name}.safetensors")
    changed = next(key for key in tensors if key.split(".")[-1] == part)
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, tmp_path / f"{name}.safetensors")
    result = run_path(tmp_path / f"{name}.json")
    assert result.status is Status.FAILED
    assert failed(result) == [changed]
