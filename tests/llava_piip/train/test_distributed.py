"""Two processes under the launchers, one of them with text alone: the losses of one process, also after kill -9."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import llava_piip
from llava_piip import PIIPLlavaConfig
from llava_piip.data import read_records
from llava_piip.loading import load_trained
from llava_piip.train.checkpointing import run_folder
from llava_piip.train.presets import parse_arguments
from llava_piip.train.train import prepare
from llava_piip.train.train import run as run_here
from piip_core import zoo
from piip_core.training_checkpoints import RunFolder
from piip_tools.timing import limited_threads

ROOT = Path(llava_piip.__file__).parents[1]
LAUNCHED = Path(__file__).with_name("launched.py")
# Processes add up in another order than one does, in float32 (2^-24 relative); 6 updates at a rate of 0.01 enlarge it.
# Another order of samples, or a gradient that is missing, changes losses by 1e-3 and more
TOLERANCE = dict(rel=0, abs=2e-5)


@pytest.fixture(scope="module")
def mixed(files, tmp_path_factory):
    """12 samples, 3 updates: the last one of each epoch has images in its first half and text alone in the other."""
    entries = json.loads(files.annotations.read_text())
    images, texts = ([e for e in entries if ("image" in e) is kind] for kind in (True, False))
    path = tmp_path_factory.mktemp("mixed") / "annotations.json"
    path.write_text(json.dumps(images[:6] + texts[:6]))
    return path


@pytest.fixture(scope="module")
def settings(mixed):
    return ["--annotations", str(mixed), "--save_steps", "2"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled: importing the compiler takes longer than the run
        "PYTHONPATH": str(ROOT),  # the processes test what this one does
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **more,
    }


def launch(command: list[str], **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> list[int]:
    """Exit statuses; what was printed is shown if the test fails."""
    for process in processes:
        try:
            print(process.communicate(timeout=240)[0][-6000:])
        finally:
            process.kill()
    return [process.returncode for process in processes]


def deepspeed(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner", *arguments]


def specified(path: Path, *specs: dict) -> list[str]:
    """Command of runs that are interrupted; see launched.py."""
    path.write_text(json.dumps([{"kill_at": None, "stop_after": None, "tiny": None, **spec} for spec in specs]))
    return [str(LAUNCHED), str(path)]


def one_process(files, losses, output: Path, *arguments: str) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Losses and weights to compare with, on one thread as the launched processes: AdamW enlarges another order of
    sums."""
    trainer, _ = files.trainer(output, *arguments)
    with limited_threads(1):
        run_here(trainer, None)
    return losses(trainer), load_trained(output)[0].state_dict()


def compare(run: Path, expected) -> None:
    """Every loss and the weights are those of one process."""
    losses, weights = expected
    last = run_folder(run).checkpoints()[-1]
    assert last.name == f"checkpoint-{max(losses)}" and len(run_folder(run).checkpoints()) == max(losses) / 2
    assert not (run / RunFolder.STAGING).exists()
    state = json.loads((last / "trainer_state.json").read_text())
    found = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert found == pytest.approx(losses, **TOLERANCE)
    saved = load_trained(run)[0].state_dict()
    assert set(saved) == set(weights)
    # AdamW makes whole steps of gradients that are zero but for rounding: under 1 % of the weights
    apart = sum(int(((saved[name] - tensor).abs() > 1e-4).sum()) for name, tensor in weights.items())
    assert apart < 0.02 * sum(tensor.numel() for tensor in weights.values())


def test_one_process_has_images_while_the_other_has_text_alone(files, mixed, tmp_path):
    trainer, _ = files.trainer(tmp_path / "run", "--annotations", str(mixed))
    kinds = [bool(record.images) for record in read_records([mixed])]
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert [kinds[index] for index in orders[-1][-4:]] == [True, True, False, False]
    assert orders[0] != orders[1]


@dataclass(frozen=True)
class Launched:
    """Runs that were launched one after the other, and the arguments of each."""

    folder: Path
    arguments: dict[str, list[str]]
    statuses: list[int]


ADAPTERS = ("--train_parts", "projector", "vision_tower", "--lora", "true", "--lora_rank", "4", "--lora_dropout", "0")


@pytest.fixture(scope="module")
def launched(files, settings, language_model_folder, tmp_path_factory, free_port) -> Launched:
    """Runs from one launch because what the processes import takes longer than the runs: under ZeRO-3, each interrupted
    and resumed, and one under ZeRO-2 that is killed."""
    folder, arguments, specs = tmp_path_factory.mktemp("launched"), {}, []
    # of the zoo: one process puts it together for all
    new = ("--model", "tiny", "--language_model", str(language_model_folder), "--pretrained_vision", "false")
    for kind, more in {"everything": (), "adapters": (*ADAPTERS, *new)}.items():
        arguments[kind] = [*settings, "--max_steps", "4", *more]
        command = files.command(folder / kind, *arguments[kind], "--deepspeed", "zero3", "--resume", "true")
        specs += [{"arguments": command, "stop_after": stop, "tiny": str(files.model)} for stop in (2, None)]
    arguments["killed"] = [*settings, "--max_steps", "6"]
    command = files.command(folder / "killed", *arguments["killed"], "--deepspeed", "zero2")
    specs.append({"arguments": command, "kill_at": "checkpoint-6"})
    launcher = ("--num_accelerators", "2", "--master_addr", "127.0.0.1", "--master_port", free_port())
    program = specified(folder / "runs.json", *specs)
    return Launched(folder, arguments, finish(launch(deepspeed(*launcher, *program))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["everything", "adapters"])
def test_zero3_on_two_processes_has_the_losses_of_one_process_also_when_it_was_interrupted(
    kind, launched, files, losses, tmp_path, monkeypatch, tiny_entry
):
    row = replace(tiny_entry(), vision=PIIPLlavaConfig.from_pretrained(files.model).vision_config.piip)
    monkeypatch.setattr(zoo, "multimodal", lambda name, known=zoo.multimodal: row if name == "tiny" else known(name))
    compare(launched.folder / kind, one_process(files, losses, tmp_path, *launched.arguments[kind]))


@pytest.mark.slow
def test_zero2_killed_while_it_saves_goes_on_under_slurm_to_the_losses_of_one_process(
    launched, files, losses, tmp_path, free_port
):
    run = launched.folder / "killed"
    assert 0 not in launched.statuses
    assert [path.name for path in run_folder(run).checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert (run / RunFolder.STAGING / "checkpoint-6").is_dir()  # written, not published

    # update 4 is the first of the second epoch, so the rest of it has to come in the order of that epoch
    stubs = tmp_path / "bin"
    stubs.mkdir()
    # slow, as with many nodes: whoever reads no further than the first line ends it by SIGPIPE
    (stubs / "scontrol").write_text(
        '#!/bin/bash\n[ "$*" = "show hostnames n[1-2]" ] && printf "127.0.0.1\\n" && sleep 0.5 && printf "n2\\n"\n'
    )
    (stubs / "srun").write_text('#!/bin/bash\nshift\nSLURM_NODEID=1 "$@" &\nSLURM_NODEID=0 "$@" && wait $!\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    arguments = files.command(run, *launched.arguments["killed"], "--deepspeed", "zero2", "--resume", "true")
    job = launch(
        ["bash", str(ROOT / "tools" / "slurm.sh"), "-m", "llava_piip.train.train", *arguments],
        PATH=f"{stubs}{os.pathsep}{environment()['PATH']}",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_JOB_ID=free_port(),
        MASTER_PORT=free_port(),
    )
    assert finish(job) == [0]
    compare(run, one_process(files, losses, tmp_path / "alone", *launched.arguments["killed"]))


@pytest.mark.slow
def test_chat_models_under_zero3_and_zero2_have_the_losses_of_one_process(
    files, mixed, qwen3_folder, chat_model_zoo, losses, tmp_path, free_port
):
    """Each runs the tower for every shape that it has images of, and for none as often as the other one."""
    first, second, _ = (entry.name for entry in zoo.chat_models())
    commands, more = {}, ("--annotations", str(mixed), "--save_steps", "2", "--max_steps", "4")
    for name, zero, extra in ((first, "zero3", ()), (second, "zero2", ADAPTERS)):
        command = files.chat_command(f"{name}/stage2", qwen3_folder, tmp_path / zero, *more, *extra)
        commands[zero] = [*command, "--deepspeed", zero]
    launcher = ("--num_accelerators", "2", "--master_addr", "127.0.0.1", "--master_port", free_port())
    program = specified(tmp_path / "runs.json", *({"arguments": command} for command in commands.values()))
    assert finish(launch(deepspeed(*launcher, *program))) == [0]
    for zero, command in commands.items():
        trainer, _ = prepare(*parse_arguments([*command, "--deepspeed", "none", "--output_dir", str(tmp_path / "one")]))
        with limited_threads(1):
            run_here(trainer, None)
        expected = losses(trainer), load_trained(tmp_path / "one")[0].state_dict()
        compare(tmp_path / zero, expected)
        shutil.rmtree(tmp_path / "one")
