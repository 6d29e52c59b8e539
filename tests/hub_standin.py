"""A stand-in for the Hugging Face hub on loopback: repositories in memory, downloads, uploads, failures on demand."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch

from piip_core import zoo

DATA = Path(__file__).parent / "data" / "state_dicts"


class Hub:
    """The server; a context that runs it.

    Attributes:
        repositories: Files of each repository by their names.
        failures: What the next downloads get instead: by method ("HEAD", "GET"), a list of a status with headers, or
            of a number of bytes after which the connection is cut.
        requests: Method, path and token of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.failures: dict[str, list[tuple[int, dict[str, str]] | int]] = {"HEAD": [], "GET": []}
        self.requests: list[tuple[str, str, str | None]] = []
        self.uploads: dict[str, bytes] = {}
        self.wrong_etag: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that lead processes of their own here, with a cache in `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def release(self, name: str, *, content: bytes | None = None) -> zoo.Released:
        """Serves a released detector, segmentor or classifier at its address; by default `released_file(name)`."""
        released = zoo.released(name)
        files = self.repositories.setdefault(released.repository, {})
        files[released.file] = released_file(name) if content is None else content
        return released


def read_listing(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a released file."""
    with gzip.open(DATA / f"{name}.tsv.gz", "rt") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if not line.startswith(("#", "key\t"))]
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape, *_ in rows}


def released_file(name: str, *, dtype: torch.dtype = torch.float16) -> bytes:
    """A small file with the names and shapes of a released one, of constant tensors, which are stored as a number each.

    Classifiers have a moving average, too, with other numbers.
    """
    released = zoo.released(name)
    stem, entry = Path(released.file).stem, released.entry
    if isinstance(entry, zoo.ClassificationEntry):
        shapes = read_listing(f"cls_{stem}")
        content = {"model": _constant(shapes, 0, dtype), "model_ema": _constant(shapes, 1, dtype), "epoch": 19}
    else:
        shapes = read_listing(stem) | read_listing(_head_listing(entry))
        content = {"state_dict": _constant(shapes, 0, dtype), "meta": {"epoch": 12}}
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _constant(shapes: dict[str, tuple[int, ...]], offset: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    numbers = enumerate(shapes.items(), offset)
    return {key: torch.tensor(0.01 * (i % 7) - 0.02, dtype=dtype).expand(shape) for i, (key, shape) in numbers}


def _head_listing(entry: zoo.ZooEntry) -> str:
    merging = entry.config.merging
    widths = {entry.config.dims_after(interaction)[0] for interaction in (*merging.intermediate_after, None)}
    if len(widths) > 1:
        return "head_mask_rcnn_convnext_b"
    kind = {"dino": "dino_4scale"}.get(entry.head, entry.head)
    return f"head_{kind}_dim{widths.pop()}" + ("_ch1536" if entry.head == "upernet" else "")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        return path

    def _get(self, *, body: bool) -> None:
        path = self._path()
        if path == "/api/whoami-v2":
            return self._json(
                {"name": "somebody", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._about(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups(), body=body)
        return self._refuse(404)

    def _commit(self, repository: str) -> str:
        files = self.hub.repositories[repository]
        return hashlib.sha1(repr(sorted((name, _sha256(data)) for name, data in files.items())).encode()).hexdigest()

    def _about(self, repository: str, kind: str | None, revision: str | None) -> None:
        if repository not in self.hub.repositories:
            return self._refuse(401, "RepoNotFound")
        files, commit = self.hub.repositories[repository], self._commit(repository)
        if kind == "tree":
            return self._json([_described(name, data) for name, data in files.items()])
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []})

    def _file(self, repository: str, revision: str, name: str, *, body: bool) -> None:
        failures = self.hub.failures[self.command]
        failure = failures.pop(0) if failures else None
        if isinstance(failure, tuple):
            return self._refuse(failure[0], **failure[1])
        if repository not in self.hub.repositories:
            return self._refuse(401, "RepoNotFound")
        commit = self._commit(repository)
        if revision not in ("main", commit):
            return self._refuse(404, "RevisionNotFound")
        if name not in self.hub.repositories[repository]:
            return self._refuse(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        data = self.hub.repositories[repository][name]
        first = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        etag = self.hub.wrong_etag or _sha256(data)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        for header, value in {
            "Content-Length": len(data) - first,
            "Accept-Ranges": "bytes",
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": len(data),
            "X-Repo-Commit": commit,
        }.items():
            self.send_header(header, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data[first : None if failure is None else first + failure])
        if failure is not None:
            self.close_connection = True

    def do_POST(self) -> None:
        path = self._path()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            given = json.loads(content)
            repository = f"{given.get('organization') or 'somebody'}/{given['name']}"
            self.hub.repositories.setdefault(repository, {})
            return self._json({"url": f"{self.hub.endpoint}/{repository}", "name": repository})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            # As the hub's rule for weights: kept apart from the commit
            large = (".safetensors", ".bin", ".pth")
            return self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular"}
                        | {"shouldIgnore": False, "oid": None}
                        for f in json.loads(content)["files"]
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{o['oid']}", "header": {}}}}
                for o in json.loads(content)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            files = self.hub.repositories[match[1]]
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.uploads[value["oid"]]
            commit = self._commit(match[1])
            return self._json({"commitUrl": f"{self.hub.endpoint}/{match[1]}/commit/{commit}", "commitOid": commit})
        return self._refuse(404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.uploads[self._path().rpartition("/")[2]] = data
        self._json({})

    def _json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str | None = None, **headers: str) -> None:
        self.send_response(status)
        for header, value in {**headers, **({"X-Error-Code": code} if code else {}), "Content-Length": "0"}.items():
            self.send_header(header, value)
        self.end_headers()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _described(name: str, data: bytes) -> dict[str, object]:
    lfs = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(), "lfs": lfs}
