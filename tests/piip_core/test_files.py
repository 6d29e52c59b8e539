"""Files and folders: whole or not at all, of one process alone, and one clear line where the system refuses."""

import os
import resource
import signal

import pytest
import torch

from piip_core import files
from piip_core.checkpoints import write_checkpoint
from piip_core.errors import OutputFolderError, SaveError, UserError
from piip_core.files import atomic_path, explain_write_errors, lock_folder, publish_folder, read_json, write_atomically

STATE = {"a": torch.zeros(100_000)}


def write_text(path):
    with write_atomically(path, "w") as file:
        file.write("x" * 50_000)


def write_folder(path):
    with publish_folder(path, overwrite=True) as folder:
        (folder / "a").write_text("x" * 50_000)


WRITERS = [
    write_text,
    write_folder,
    lambda path: write_checkpoint(f"{path}.safetensors", STATE),
    lambda path: write_checkpoint(f"{path}.safetensors", STATE | {"b": STATE["a"]}, max_shard_bytes=400_000),
    lambda path: write_checkpoint(f"{path}.pth", STATE),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_refusal_to_write_is_one_line_with_a_remedy_and_leaves_what_was_there(write, tmp_path):
    write(tmp_path / "x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(SaveError, match=rf"^{tmp_path}/x.*: could not be written \(File too large\): .*$") as error:
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file/x", "a file is where a folder is expected"),
        ("folder", "a folder is where a file"),
        ("no/x", "no such folder"),
        ("/proc/x", "no such"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(place, words, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(SaveError, match=f"{place}.*{words}"):
        write_text(tmp_path / place)


def test_errors_that_are_not_of_the_writing_stay_what_they_are(tmp_path):
    for error in (KeyError("a"), UserError("b"), FileNotFoundError(2, "c"), RuntimeError("d")):
        with pytest.raises(type(error)) as raised, write_atomically(tmp_path / "x"):
            raise error
        assert raised.value is error
    with pytest.raises(KeyError), explain_write_errors(tmp_path):
        try:
            (tmp_path / "x").mkdir()
            (tmp_path / "x").mkdir()
        except FileExistsError as error:
            raise KeyError from error


def in_child(action) -> None:
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    os.waitpid(pid, 0)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("writer", [atomic_path, publish_folder])
def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_not(writer, tmp_path):
    def die_in_it():
        with writer(tmp_path / "x"):
            die()

    in_child(die_in_it)
    (left,) = tmp_path.iterdir()
    with writer(tmp_path / "x") as mine:
        assert list(tmp_path.iterdir()) == [mine] and mine != left

        def write_too():
            with writer(tmp_path / "x"):
                pass

        in_child(write_too)
        assert mine.exists() and (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_was_moved_aside_by_a_killed_process_comes_back(tmp_path, monkeypatch):
    write_folder(tmp_path / "x")

    def replace_half():
        monkeypatch.setattr(files, "rename_durably", die)
        write_folder(tmp_path / "x")

    in_child(replace_half)
    assert not (tmp_path / "x").exists()
    with pytest.raises(KeyError), publish_folder(tmp_path / "x", overwrite=True):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "a").stat().st_size == 50_000


def test_a_folder_is_of_one_process_until_that_is_dead(held_folder):
    folder, holder = held_folder
    with pytest.raises(OutputFolderError, match=f"process {holder} on .* is writing to it: wait .*, or go"):
        with lock_folder(folder, "go"):
            pass
    os.kill(holder, signal.SIGKILL)  # its child goes on
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    for _ in range(2):
        with lock_folder(folder, "go"):
            assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf[1]", "holds a JSON list; expected an object"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\xfd", "cannot be read as JSON"),
        (b'{"a":' * 5000, "cannot be read as JSON"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "cannot be read as JSON"),
        (None, "is a pipe or device"),
    ],
)
def test_json_that_is_none_is_named(content, words, tmp_path):
    path = tmp_path / "x.json"
    path.symlink_to("/dev/zero") if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {words}"):
        read_json(path)
