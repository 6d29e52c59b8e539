"""Kills a training under DeepSpeed by SIGKILL at eight points of a save, and resumes it; see test_killed_saves.py.

    killed_saves.py SPEC.json RESULTS.json

The specification has the program (detection or chat), the arguments of a run of 6 updates that saves every second, and
its output folder. Each run is a process of its own, forked from one that has imported everything.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

from piip_core.deepspeed_start import import_deepspeed
from piip_core.training_checkpoints import RunFolder

EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
POINTS = 8


class Points:
    """What a save of `checkpoint-4` does on the disk, in order; the process is killed at one of them."""

    def __init__(self, output: Path, kill_at: int | None) -> None:
        self.output, self.kill_at, self.seen, self.active = str(output), kill_at, [], False
        sys.addaudithook(self._hear)
        save, save_torch = RunFolder.save, torch.save

        def observed(run: RunFolder, name: str, write, **options):
            self.active = name == "checkpoint-4"
            return save(run, name, write, **options)  # what follows, until the next save, is the deleting of old ones

        def cut_off(content, file, *args, **kwargs):
            self.reach(f"torch.save {file}")
            save_torch(content, file, *args, **kwargs)
            if self.active and isinstance(file, str | os.PathLike):
                self.reach(f"torch.save, half of {file}", lambda: os.truncate(file, os.path.getsize(file) // 2))

        RunFolder.save, torch.save = observed, cut_off

    def _hear(self, event, args):
        if self.active and event in EVENTS and any(str(arg).startswith(self.output) for arg in args[:2]):
            self.reach(f"{event} {args[0]}")

    def reach(self, name: str, before=lambda: None) -> None:
        if self.active:
            self.seen.append(name.replace(self.output, "RUN"))
            if len(self.seen) - 1 == self.kill_at:
                before()
                os.kill(os.getpid(), signal.SIGKILL)


def train(spec: dict, output: Path, *, kill_at: int | None = None, record: Path | None = None) -> int:
    """Runs or goes on with a training in a process of its own; its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(random.SystemRandom().randrange(20000, 32000))
            points = Points(output, kill_at)
            if spec["program"] == "chat":
                status = chat.main([*spec["arguments"], "--output_dir", str(output), "--resume", "true"])
            else:
                opts = [*spec["arguments"], f"train.output_dir={output}"]
                start(
                    detection.main,
                    argparse.Namespace(config_file=spec["config"], opts=opts, resume=True, eval_only=False),
                )
                status = 0
            if record:
                record.write_text(json.dumps(points.seen))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state(folder: Path):
    """All tensors and numbers in the files of the last checkpoint; the losses, too, where it has them."""
    found = {}

    def add(name, value):
        if isinstance(value, dict):
            for key in value:
                add(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for number, entry in enumerate(value):
                add(f"{name}/{number}", entry)
        elif isinstance(value, torch.Tensor | int | float | str):
            found[name] = value

    for path in sorted((folder / "checkpoint-6").rglob("*.pt")):  # of a run of ours: DeepSpeed's classes are in it
        add(path.name, torch.load(path, map_location="cpu", weights_only=False))
    log = folder / "checkpoint-6" / "trainer_state.json"  # Detectron2's has medians over what one process has seen
    if log.is_file():
        add("losses", {e["step"]: e["loss"] for e in json.loads(log.read_text())["log_history"] if "loss" in e})
    return found


def differences(one, other) -> list[str]:
    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    shared = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + [name for name in shared if not same(one[name], other[name])]


def main(spec: dict) -> dict:
    output, whole, part = (Path(spec["folder"]) / name for name in ("run", "whole", "part"))
    record = Path(spec["folder"]) / "points.json"
    assert train(spec, output, record=record) == 0
    points = json.loads(record.read_text())
    shutil.copytree(output, whole)
    expected = state(whole)
    shutil.copytree(output, part)
    for name in ("checkpoint-4", "checkpoint-6", "final", "model_final.safetensors"):
        shutil.rmtree(part / name) if (part / name).is_dir() else (part / name).unlink(missing_ok=True)
    chosen = sorted({round(number * (len(points) - 1) / (POINTS - 1)) for number in range(POINTS)})
    results = []
    for point in chosen:
        shutil.rmtree(output)
        shutil.copytree(part, output)
        killed = train(spec, output, kill_at=point)
        left = sorted(path.name for path in output.glob("checkpoint-*"))
        resumed = train(spec, output)
        different = differences(state(output), expected) if resumed == 0 else None
        result = dict(point=points[point], killed=killed, left=left, resumed=resumed, different=different)
        result["staged"] = (output / RunFolder.STAGING).exists()
        print("RESULT", json.dumps(result), flush=True)
        results.append(result)
    return {"points": len(points), "tensors": len(expected), "results": results}


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    import_deepspeed("cpu")
    if spec["program"] == "chat":
        from llava_piip.train import train as chat
    else:
        from piip import train as detection
        from piip.distributed import start
    Path(sys.argv[2]).write_text(json.dumps(main(spec)))
