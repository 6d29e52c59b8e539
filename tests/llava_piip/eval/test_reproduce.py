"""tools/reproduce.py on a chat model, against the scores of `python -m llava_piip.eval` itself."""

import json

import llava_piip.checkpoints
from llava_piip.eval.__main__ import main as evaluate

NAME = "piip_llava_clip_bl_512_256_7b"
LAUNCH = """
import runpy, sys
assert sys.argv.pop(1) == "-m"
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_a_chat_model_is_evaluated_and_compared(
    load_tool, pope_data, model_folder, run_python, tmp_path, monkeypatch, capfd
):
    tool = load_tool("reproduce")
    # fetching is tested in ../test_released.py, the estimate builds 7 billion parameters
    monkeypatch.setattr(llava_piip.checkpoints, "fetch_released", lambda name: {NAME: model_folder}[name])
    monkeypatch.setattr(tool, "needed_memory", lambda released, args: 0.1)
    launched = []  # the launcher sooner; what it starts is a process of its own
    monkeypatch.setattr(tool, "run_python", lambda arguments: launched.append(run_python(LAUNCH, *arguments)))
    output, options = tmp_path / "reproduced", ["--chat", str(pope_data), "--device", "cpu", "--benchmarks", "pope"]
    assert tool.main([NAME, *options, "--output", str(output)]) == 0
    assert launched[0].returncode == 0, launched[0].stderr
    direct = tmp_path / "direct"
    assert (
        evaluate(["pope", "--cpu", "--model", str(model_folder), "--data", str(pope_data), "--output", str(direct)])
        == 0
    )
    wanted = json.loads((direct / "pope" / "scores.json").read_text())["value"]
    (row,) = json.loads((output / NAME / "reproduced.json").read_text())["numbers"]
    assert row == {"metric": "pope", "ours": wanted, "published": 86.5, "paper": None, "difference": wanted - 86.5}
    assert "precision: float32 (published: float16)" in capfd.readouterr().out
