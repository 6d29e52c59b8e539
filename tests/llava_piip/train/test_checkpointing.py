"""A save is killed, or fails, at every step that it takes on the disk; what was complete before stays usable."""

import errno
import os
import re
import resource
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
from transformers.trainer_utils import get_last_checkpoint

from llava_piip.train.checkpointing import check_same_processes, prepare_output, run_folder
from llava_piip.train.train import main
from piip_core.errors import OutputFolderError, SaveError
from piip_core.training_checkpoints import RunFolder

# What a program can be interrupted at: everything Python does to files is announced to audit hooks under these names
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}
FAILED = 7


def in_child(action) -> int:
    """Runs a function in a copy of this process; returns its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = action() or 0
        except SaveError as error:
            Path(os.environ["MESSAGE"]).write_text(str(error))
            status = FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_event(folder: Path, number: int | None, action) -> list[str]:
    """Calls `action` when the process is about to do its event `number` below the folder; hooks stay for good."""
    seen: list[str] = []

    def hook(event, args):
        if event in EVENTS and any(str(arg).startswith(str(folder)) for arg in args[:2]):
            seen.append(f"{event} {args[0]}")
            if len(seen) - 1 == number:
                action()

    sys.addaudithook(hook)
    return seen


def content(folder: Path) -> dict[str, int | str | None]:
    """Sizes of the files; PyTorch's vary a little, and have sums to check instead."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sizes[path.name] = path.stat().st_size
        if path.suffix in (".pt", ".pth"):
            sizes[path.name] = ZipFile(path).testzip()
    return sizes


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A trainer after 4 updates, with a checkpoint of updates 2 and 4."""
    output = tmp_path_factory.mktemp("run") / "output"
    trainer, _ = files.trainer(output, "--max_steps", "4", "--save_steps", "2")
    trainer.train()
    return trainer, output


@pytest.fixture
def next_save(run, monkeypatch, tmp_path):
    """Saves the next checkpoint, with the oldest to be deleted after it; undone afterwards."""
    trainer, output = run
    monkeypatch.setattr(trainer.state, "global_step", 6)
    monkeypatch.setattr(trainer.args, "save_total_limit", 2)
    monkeypatch.setenv("MESSAGE", str(tmp_path / "message"))
    backup = tmp_path / "backup"
    os.system(f"cp -r {output} {backup}")

    def restore():
        os.system(f"rm -rf {output} && cp -r {backup} {output}")

    def save():
        trainer._save_checkpoint(trainer.model, None)
        for message in trainer.failed_saves.messages:
            raise SaveError(message)

    yield output, save, restore
    restore()


def count_events(next_save) -> list[str]:
    output, save, _ = next_save
    record = Path(os.environ["MESSAGE"])

    def counted():
        seen = at_event(output, None, lambda: None)
        save()
        record.write_text("\n".join(seen))

    assert in_child(counted) == 0
    assert [path.name for path in run_folder(output).checkpoints()] == ["checkpoint-4", "checkpoint-6"]
    assert not (output / RunFolder.STAGING).exists()
    return record.read_text().splitlines()


def test_killed_at_any_step_of_a_save_a_run_goes_on_from_a_complete_checkpoint(next_save):
    output, save, restore = next_save
    events = count_events(next_save)
    whole = {path.name: content(path) for path in run_folder(output).checkpoints()}
    restore()
    whole |= {path.name: content(path) for path in run_folder(output).checkpoints()}
    assert len(events) >= 16 and {"open", "os.rename", "os.mkdir"} <= {event.split()[0] for event in events}
    published = 0
    for number in range(len(events)):

        def killed(number=number):
            at_event(output, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save()

        assert in_child(killed) == -signal.SIGKILL
        left = run_folder(output).checkpoints()
        assert left and {path.name: content(path) for path in left}.items() <= whole.items(), events[number]
        # transformers' own search, and whoever looks at the folder, sees complete ones alone
        assert get_last_checkpoint(str(output)) == str(left[-1])
        assert left[-1].name in ("checkpoint-4", "checkpoint-6")
        published += left[-1].name == "checkpoint-6"
        assert prepare(output, resume=True) == left[-1]
        assert not (output / RunFolder.STAGING).exists()
        restore()
    assert 0 < published < len(events)  # both sides of the moment of publishing were hit


def test_a_disk_that_fills_at_any_step_ends_in_one_clear_error(next_save):
    output, save, restore = next_save
    events = count_events(next_save)
    restore()

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    published = events.index(f"os.rename {output / RunFolder.STAGING / 'checkpoint-6'}")
    for number in range(published):

        def failing(number=number):
            at_event(output, number, full)
            save()

        if not events[number].startswith("open "):
            continue
        assert in_child(failing) == FAILED, (number, events[number])
        message = Path(os.environ["MESSAGE"]).read_text()
        assert re.search(r"checkpoint-6: could not be written .*No space left", message)
        assert f"The last complete checkpoint is {output / 'checkpoint-4'}" in message and "--resume true" in message
        assert [path.name for path in run_folder(output).checkpoints()] == ["checkpoint-2", "checkpoint-4"]
        assert not (output / RunFolder.STAGING).exists()
        restore()


@pytest.mark.parametrize("limit", [1_000, 20_000, 100_000])
def test_the_systems_own_refusal_to_write_more_is_reported(next_save, limit):
    output, save, _ = next_save

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)  # the test has a message to write

    assert in_child(limited) == FAILED
    assert "checkpoint-6: could not be written" in Path(os.environ["MESSAGE"]).read_text()
    assert [path.name for path in run_folder(output).checkpoints()] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    ("failing", "status", "left"),
    [
        ("checkpoint-2", 0, [".lock", "checkpoint-4", "final"]),
        ("final", 2, [".lock", "checkpoint-2", "checkpoint-4"]),
    ],
)
def test_a_full_disk_stops_a_training_at_its_end_alone(
    failing, status, left, files, tmp_path, monkeypatch, capfd, caplog
):
    publish = RunFolder.publish

    def full(run, name):
        if name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(run, name)

    monkeypatch.setattr(RunFolder, "publish", full)
    assert main(files.command(tmp_path / "run", "--max_steps", "4", "--save_steps", "2")) == status
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == left
    printed = capfd.readouterr().err
    expected = rf"{failing}: could not be written \(No space left on device; .*free some space"
    if status:
        assert re.search(rf"^error: .*/{expected}", printed.splitlines()[-1]) and "Traceback" not in printed
    else:
        assert re.search(rf"{expected}.*Training goes on \(1 failed so far\)", caplog.text)
        assert re.search(rf"1 saves failed during the training; the last: .*{expected}", caplog.text)


def test_a_second_training_in_a_folder_is_refused(files, held_folder, capfd):
    assert main(files.command(held_folder[0])) == 2
    assert re.search(
        r"error: .*held: process \d+ on .* is writing to it: .*another --output_dir", capfd.readouterr().err
    )
    assert [path.name for path in held_folder[0].iterdir()] == [".lock"]


def prepare(run: Path, **settings) -> Path | None:
    settings = {"resume": False, "resume_from_checkpoint": None, "overwrite_output_dir": False, **settings}
    return prepare_output(SimpleNamespace(output_dir=str(run), should_save=True, **settings))


def make(run: Path, *steps: int, complete=True):
    for step in steps:
        (run / f"checkpoint-{step}").mkdir(parents=True)
        if complete:
            (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")


def test_a_folder_that_is_not_empty_is_refused_with_the_three_ways_out(tmp_path):
    make(tmp_path / "run", 3)
    with pytest.raises(OutputFolderError, match=r"is not empty \(checkpoint-3\)\. Give --resume true .*--overwrite"):
        prepare(tmp_path / "run")
    assert prepare(tmp_path / "run", resume=True) == tmp_path / "run" / "checkpoint-3"
    assert prepare(tmp_path / "run", overwrite_output_dir=True) is None
    assert not run_folder(tmp_path / "run").checkpoints()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="is a file"):
        prepare(tmp_path / "file")
    assert prepare(tmp_path / "new" / "run", resume=True) is None  # nothing to resume: from the beginning


def test_the_last_checkpoint_is_the_one_of_the_highest_update_that_is_complete(tmp_path):
    make(tmp_path, 9, 10, 100)
    make(tmp_path, 200, complete=False)  # of another program: ours publish whole folders
    make(tmp_path / RunFolder.STAGING, 300)
    assert [path.name for path in run_folder(tmp_path).checkpoints()] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert prepare(tmp_path, resume=True) == tmp_path / "checkpoint-100"
    assert prepare(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-9") == tmp_path / "checkpoint-9"
    with pytest.raises(OutputFolderError, match=r"checkpoint-200: is no complete checkpoint.*checkpoint-100"):
        prepare(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-200")


@pytest.mark.parametrize(("limit", "left"), [(None, [1, 2, 3]), (0, [1, 2, 3]), (2, [2, 3]), (1, [3])])
def test_old_checkpoints_are_deleted_up_to_the_limit(tmp_path, limit, left):
    make(tmp_path, 1, 2, 3)
    run_folder(tmp_path).keep_last(limit)
    assert [path.name for path in run_folder(tmp_path).checkpoints()] == [f"checkpoint-{step}" for step in left]
    run_folder(tmp_path).discard(tmp_path / "checkpoint-77")  # nothing there is nothing to do
    assert not (tmp_path / RunFolder.STAGING).exists()


def test_zero_checkpoints_of_another_number_of_processes_are_refused(tmp_path):
    make(tmp_path, 5)
    check_same_processes(tmp_path / "checkpoint-5", 4)  # says nothing about it
    (tmp_path / "checkpoint-5" / "training_arguments.json").write_text('{"num_processes": 8}')
    check_same_processes(tmp_path / "checkpoint-5", 8)
    with pytest.raises(OutputFolderError, match="is of a run with 8 processes, this one has 4"):
        check_same_processes(tmp_path / "checkpoint-5", 4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_killed_at_eight_points_of_a_save_under_deepspeed_a_run_goes_on_bit_by_bit(stage, files, kill_saves):
    arguments = files.command(Path("run"), "--deepspeed", stage, "--max_steps", "6", "--save_steps", "2")
    kill_saves(program="chat", arguments=arguments)
