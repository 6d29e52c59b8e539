"""Unpacking archives and downloading files: whole files or none, and going on after an interruption."""

import http.server
import itertools
import os
import shutil
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from piip_core import archives
from piip_core.archives import ArchiveError, download, unpack_images
from piip_core.errors import SaveError

FILES = {"train2017/1.jpg": b"one" * 900, "train2017/deep/2.jpg": b"two" * 700, "train2017/3.jpg": b""}


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


EXPECTED = {"1.jpg": b"one" * 900, "deep/2.jpg": b"two" * 700, "3.jpg": b""}


@pytest.fixture
def archive(tmp_path) -> Path:
    extra = {"__MACOSX/train2017/._1.jpg": b"x", "train2017/.DS_Store": b"x"}
    return write_zip(tmp_path / "train2017.zip", FILES | extra)


def test_unpacks_below_the_folder_without_leading_folders(archive, tmp_path):
    folder = tmp_path / "coco" / "train2017"
    done = unpack_images(archive, folder)
    assert (done.written, done.present) == (3, 0)
    assert tree(tmp_path / "coco") == {f"train2017/{name}": content for name, content in EXPECTED.items()}
    again = unpack_images(archive, folder)
    assert (again.written, again.present) == (0, 3)


def test_archive_without_leading_folder_and_prefixed_archive(tmp_path):
    folder = tmp_path / "images"
    unpack_images(write_zip(tmp_path / "a.zip", {"00000/1.jpg": b"1"}), folder)
    assert tree(folder) == {"00000/1.jpg": b"1"}
    # a second archive into the same folder adds its files
    unpack_images(write_zip(tmp_path / "b.zip", {"data/images/00001/2.jpg": b"2"}), folder)
    assert tree(folder) == {"00000/1.jpg": b"1", "00001/2.jpg": b"2"}


def test_fills_a_folder_that_is_there_and_keeps_the_rest(archive, tmp_path):
    folder = tmp_path / "train2017"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"one")  # cut off
    (folder / "mine.jpg").write_bytes(b"mine")
    done = unpack_images(archive, folder)
    assert (done.written, done.present) == (3, 0)
    assert tree(folder) == EXPECTED | {"mine.jpg": b"mine"}
    (folder / "deep" / "2.jpg").write_bytes(b"a repaired image" * 200)  # longer than in the archive
    assert unpack_images(archive, folder).written == 0


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "C:\\evil.jpg", "a/..\\evil.jpg"]
)
def test_entries_that_lead_out_are_refused_before_anything_is_written(tmp_path, name):
    archive = write_zip(tmp_path / "a.zip", {"train2017/1.jpg": b"1", name: b"evil"})
    with pytest.raises(ArchiveError, match=r"evil.jpg' leads out of the folder: nothing was unpacked"):
        unpack_images(archive, tmp_path / "in" / "train2017")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_links_and_two_entries_for_one_file_are_refused(tmp_path):
    info = zipfile.ZipInfo("train2017/1.jpg")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
        archive.writestr("train2017/2.jpg", b"1")
        archive.writestr("2.jpg", b"2")
    with pytest.raises(ArchiveError, match=r"is a link; .* would be the same file"):
        unpack_images(tmp_path / "a.zip", tmp_path / "train2017")


def test_incomplete_missing_and_empty_archives_are_named(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(ArchiveError, match=r"train2017.zip: not a complete zip archive .* continue or repeat"):
        unpack_images(archive, tmp_path / "train2017")
    with pytest.raises(ArchiveError, match="no such file"):
        unpack_images(tmp_path / "absent.zip", tmp_path / "train2017")
    with pytest.raises(ArchiveError, match="holds no files"):
        unpack_images(write_zip(tmp_path / "empty.zip", {}), tmp_path / "train2017")
    archive.with_name("file").write_text("x")
    with pytest.raises(ArchiveError, match="is a file"):
        unpack_images(tmp_path / "empty.zip", tmp_path / "file")
    assert not (tmp_path / "train2017").exists()


def test_damaged_entry_is_named_and_not_written(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as opened:
        opened.writestr("train2017/1.jpg", b"good" * 100)
        opened.writestr("train2017/2.jpg", b"fine" * 100)
    archive.write_bytes(archive.read_bytes().replace(b"finefine", b"rottrott"))
    with pytest.raises(ArchiveError, match=r"'train2017/2.jpg' is damaged .*CRC"):
        unpack_images(archive, tmp_path / "train2017")
    assert tree(tmp_path) == {"a.zip": archive.read_bytes(), ".train2017.incomplete/1.jpg": b"good" * 100}


def test_too_little_space_is_told_before_writing(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ArchiveError, match="still to be unpacked"):
        unpack_images(archive, tmp_path / "train2017")
    assert not (tmp_path / "train2017").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_unpacking_leaves_whole_files_only(archive, tmp_path, monkeypatch, error):
    copy, calls = shutil.copyfileobj, itertools.count(1)

    def failing(source, file, length):
        if next(calls) == 2:
            file.write(b"half")
            raise error
        copy(source, file, length)

    monkeypatch.setattr(shutil, "copyfileobj", failing)
    folder = tmp_path / "coco" / "train2017"
    with pytest.raises((SaveError, KeyboardInterrupt)):
        unpack_images(archive, folder)
    assert tree(folder.parent) == {".train2017.incomplete/1.jpg": b"one" * 900}
    assert unpack_images(archive, folder).present == 1


def test_killed_unpacking_leaves_no_folder_and_goes_on(archive, tmp_path):
    folder = tmp_path / "coco" / "train2017"
    copy, calls = shutil.copyfileobj, itertools.count(1)
    child = os.fork()
    if child == 0:

        def dying(source, file, length):
            if next(calls) == 2:
                file.write(b"half")
                file.flush()
                os._exit(9)
            copy(source, file, length)

        shutil.copyfileobj = dying
        unpack_images(archive, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not folder.exists()
    unfinished = folder.with_name(".train2017.incomplete")
    assert tree(unfinished) == {"1.jpg": b"one" * 900, "deep/.2.jpg.incomplete": b"half"}
    before = (unfinished / "1.jpg").stat().st_ino
    done = unpack_images(archive, folder)
    assert (done.written, done.present) == (2, 1)
    assert (folder / "1.jpg").stat().st_ino == before  # not written again
    assert tree(folder.parent) == {f"train2017/{name}": content for name, content in EXPECTED.items()}


CONTENT = bytes(range(256)) * 4000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; `/cut` ends the first answer halfway; `/norange` knows no ranges."""

    ranges: list

    def do_GET(self):
        if self.path == "/absent":
            return self.send_error(404)
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.path != "/norange" else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT) // 2 if self.path == "/cut" and not asked else None
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"ranges": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()
        thread.join()


def test_download_goes_on_where_it_was_cut(server, tmp_path):
    path = tmp_path / "new" / "a.zip"
    with pytest.raises(ArchiveError, match=r"only 512000 of 1024000 bytes .* repeat the command"):
        download(f"{server.url}/cut", path)
    assert not path.exists()
    download(f"{server.url}/cut", path)
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert server.RequestHandlerClass.ranges == [None, "bytes=512000-"]
    download(f"{server.url}/absent", path)  # there already: not asked


@pytest.mark.parametrize("part", ["start", "all", "of another server without ranges"])
def test_download_with_a_part_that_is_there(server, tmp_path, part):
    where, have = {"start": ("/plain", CONTENT[:5]), "all": ("/plain", CONTENT)}.get(part, ("/norange", b"other"))
    (tmp_path / "a.zip.part").write_bytes(have)
    download(server.url + where, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert server.RequestHandlerClass.ranges == [f"bytes={len(have)}-"]


def test_refused_download_is_named(server, tmp_path):
    with pytest.raises(ArchiveError, match=r"/absent: HTTP Error 404"):
        download(f"{server.url}/absent", tmp_path / "a.zip")
    assert list(tmp_path.iterdir()) == []


def test_mutated_archives_are_refused_by_name_or_unpacked_right(archive, tmp_path, mutated):
    content, folder = archive.read_bytes(), tmp_path / "out" / "train2017"
    refused = 0
    for seed in range(150):
        archive.write_bytes(mutated(content, seed))
        try:
            unpack_images(archive, folder)
        except ArchiveError as error:
            assert str(archive) in str(error), seed
            refused += 1
        else:
            assert set(tree(folder).values()) <= set(EXPECTED.values()), seed
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 50
    assert {path.name for path in tmp_path.iterdir()} == {archive.name}
