"""tools/reproduce.py on a chat model, against the scores of `python -m llava_piip.eval` itself."""

import json

import llava_piip.checkpoints
from llava_piip.eval.__main__ import main as evaluate

NAME = "piip_llava_clip_bl_512_256_7b"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "llava_piip.eval"]


def test_a_chat_model_is_evaluated_and_compared(load_tool, pope_data, model_folder, tmp_path, monkeypatch, capfd):
    tool = load_tool("reproduce")
    # fetching is tested in ../test_released.py, the estimate builds 7 billion parameters
    monkeypatch.setattr(llava_piip.checkpoints, "fetch_released", lambda name: {NAME: model_folder}[name])
    monkeypatch.setattr(tool, "needed_memory", lambda released, args: 0.1)

    def run_here(arguments):
        assert arguments[: len(LAUNCHER)] == LAUNCHER
        assert evaluate(arguments[len(LAUNCHER) :]) == 0

    monkeypatch.setattr(tool, "run_python", run_here)
    output, options = tmp_path / "reproduced", ["--chat", str(pope_data), "--device", "cpu", "--benchmarks", "pope"]
    assert tool.main([NAME, *options, "--output", str(output)]) == 0
    answers = output / NAME / "pope" / "answers.jsonl"
    again = ["pope", "--data", str(pope_data), "--answers", str(answers), "--output", str(tmp_path / "again")]
    assert evaluate(again) == 0
    wanted = json.loads((tmp_path / "again" / "pope" / "scores.json").read_text())["value"]
    (row,) = json.loads((output / NAME / "reproduced.json").read_text())["numbers"]
    assert row == {"metric": "pope", "ours": wanted, "published": 86.5, "paper": None, "difference": wanted - 86.5}
    assert "precision: float32 (published: float16)" in capfd.readouterr().out
