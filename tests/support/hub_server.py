"""A stand-in for the hub: as much of its HTTP API as its client needs to make repositories, commit and download.

Repositories are in memory, a commit is a dictionary of files. Faults are planted by a test: see `Hub`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_of_the_tests"
# What the real one takes without being told of a licence of one's own; not all.
LICENSES = {"apache-2.0", "mit", "openrail", "other", "unknown", "creativeml-openrail-m"}
LARGE_BYTES = 512  # from there on a file is not part of the commit, but uploaded by itself


@dataclass
class Repository:
    """commits: id -> files; refs: branch -> id of its last commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name], self.refs[branch] = files, name
        return name

    def at(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The stand-in's state. damaged: files that are sent with a byte changed; short: with the second half missing;
    read_only: commits are forbidden; gated: downloads are; requests: "METHOD path" of all that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.damaged: set[str] = set()
        self.short: set[str] = set()
        self.read_only = self.gated = False
        self.requests: list[str] = []
        self.address = ""

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        commit = repository.at(revision)
        assert commit is not None
        return repository.commits[commit]

    def add(self, name: str, folder: Path, private: bool = False) -> None:
        """A repository with the files of a folder, as if they had been uploaded."""
        rows = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(private)
        self.repositories[name].commit("main", rows)


class _Refused(Exception):
    """An answer that is no success. code: the hub's own word for it; commit: at which a file was looked for."""

    def __init__(self, status: int, code: str = "", document: object = None, commit: str | None = None) -> None:
        super().__init__(code)
        self.status, self.code, self.document, self.commit = status, code, document, commit


class Handler(BaseHTTPRequestHandler):
    """Answers of the stand-in."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing: it is a test's."""

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, answer in ROUTES:
                if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                    match := re.fullmatch(pattern, path)
                ):
                    answer(self, body, *match.groups())
                    return
            raise _Refused(404)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code} if refused.code else {}
            headers |= {"X-Repo-Commit": refused.commit} if refused.commit else {}
            self._answer(refused.status, json.dumps(refused.document or {"error": refused.code}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # --- who may do what ------------------------------------------------------------------------------------------

    @property
    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._logged_in):
            raise _Refused(401 if not self._logged_in else 404, "RepoNotFound")
        return repository

    def _to_write(self, name: str) -> Repository:
        repository = self._found(name)
        if not self._logged_in:
            raise _Refused(401)
        if self.hub.read_only:
            raise _Refused(403)
        return repository

    def _commit(self, name: str, revision: str) -> str:
        commit = self._found(name).at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        return commit

    # --- answers --------------------------------------------------------------------------------------------------

    def _json(self, document: object) -> None:
        self._answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def create(self, body: bytes) -> None:
        if not self._logged_in:
            raise _Refused(401)
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            raise _Refused(
                409, "", {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}
            )
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repositories[name].commit("main", {".gitattributes": b"*.onnx filter=lfs\n"})
        self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._to_write(name)
        if branch in repository.refs:
            raise _Refused(409)
        repository.refs[branch] = repository.refs["main"]
        self._json({})

    def validate(self, body: bytes) -> None:
        """The front matter of a card, as strictly as a card needs."""
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        stated = yaml.safe_load(front[1]) if front else None
        wrong = not isinstance(stated, dict) or stated.get("license") not in LICENSES
        if wrong or not all(isinstance(row, str) for row in stated["tags"]):
            raise _Refused(400, "", {"errors": [{"message": f"license {stated and stated.get('license')}"}]})
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._to_write(name)
        rows = json.loads(body)["files"]
        modes = ["lfs" if row["size"] > LARGE_BYTES and row["path"] != "README.md" else "regular" for row in rows]
        files = [
            {"path": row["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
            for row, mode in zip(rows, modes, strict=True)
        ]
        self._json({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        self._to_write(name)
        objects = []
        for row in json.loads(body)["objects"]:
            new = row["oid"] not in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.address}/blobs/{row['oid']}"}}
            objects.append({"oid": row["oid"], "size": row["size"], **({"actions": upload} if new else {})})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer(200, b"")

    def post_commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self._to_write(name)
        files = dict(repository.commits[self._commit(name, revision)])
        for line in body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert row["key"] == "header", row
        commit = repository.commit(revision, files)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        commit = self._commit(name, revision)
        self._json({"id": name, "sha": commit, "siblings": [], "tags": [], "private": False})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        files = self._found(name).commits[self._commit(name, revision)]
        self._json([{"type": "file", "path": key, "size": len(data), "oid": _oid(data)} for key, data in files.items()])

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        if self.hub.gated:
            raise _Refused(403, "GatedRepo")
        headers = {"X-Repo-Commit": commit, "ETag": ""}
        data = self._found(name).commits[commit].get(path)
        if data is None:
            raise _Refused(404, "EntryNotFound", commit=commit)
        headers["ETag"] = f'"{_oid(data)}"'
        sent = data[:-1] + bytes([data[-1] ^ 1]) if path in self.hub.damaged else data
        if path in self.hub.short and self.command == "GET":
            sent = sent[: len(sent) // 2]
        self._answer(200, sent, headers)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.post_commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/blobs/([0-9a-f]{64})", Handler.put),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)/?", Handler.tree),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in that listens."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, folder: Path, token: str | None = TOKEN) -> dict[str, str]:
    """What leads a process of its own to the stand-in, with a cache in `folder`."""
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_XET": "1",  # the native protocol of storage, which the stand-in does not speak
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }


def lead(patch: pytest.MonkeyPatch, address: str, folder: Path, token: str | None = TOKEN) -> None:
    """Lead this process, whose client has read the environment by now, to an address, with a cache in `folder`."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    if token:
        patch.setenv("HF_TOKEN", token)
    else:
        patch.delenv("HF_TOKEN", raising=False)
