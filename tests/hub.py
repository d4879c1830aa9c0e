"""A hub of one's own: the part of huggingface.co's protocol that its clients speak when they load models and data.

It serves repositories with commits, branches and tags from a folder, on a thread of this process. What it answers
follows what huggingface_hub 2.4, transformers 5.24 and datasets 5.2 ask for: HEAD and GET of /resolve/, model and
data set info, tree, paths-info, redirects of large files, and errors by their X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".parquet")
"""Endings that the hub keeps elsewhere: it answers with a redirect, and with the content's sha256 as their ETag."""

_REPOSITORY = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_API = re.compile(rf"/api/{_REPOSITORY}(?:/(?P<verb>revision|tree|paths-info)/(?P<rest>.+))?")
_FILE = re.compile(r"/(?P<datasets>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_BLOB = re.compile(r"/blobs/(?P<sha256>[0-9a-f]{64})")


class Missing(Exception):
    """What is asked for is not there, or not for everybody."""

    def __init__(self, code: str, status: HTTPStatus = HTTPStatus.NOT_FOUND, commit: str | None = None) -> None:
        super().__init__(code)
        self.code, self.status, self.commit = code, status, commit


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str


class Hub:
    """The repositories below a folder: <kind>/<owner>/<name>/<commit>/<files>, with refs.json beside the commits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.fails: HTTPStatus | None = None  # with which it answers everything

    def commit(self, kind: str, name: str, files: Path | Mapping[str, str], *, branch: str = "main") -> str:
        """Add a commit of these files, which `branch` then means; returns its 40 hex digits."""
        repository = self.folder / kind / name
        commit = hashlib.sha1(f"{kind}/{name}/{branch}/{len(list(repository.glob('*')))}".encode()).hexdigest()
        if isinstance(files, Path):
            shutil.copytree(files, repository / commit)
        else:
            for path, text in files.items():
                (repository / commit / path).parent.mkdir(parents=True, exist_ok=True)
                (repository / commit / path).write_text(text)
        self._write_refs(repository, {**self._refs(repository), branch: commit})
        return commit

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve on a free port of this machine; yields the endpoint's URL. Afterwards connections are refused."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def find(self, kind: str, name: str, revision: str) -> tuple[str, Path]:
        """(commit, folder of its files) of a branch, tag or commit."""
        repository = self.folder / kind / name
        if not repository.is_dir():
            raise Missing("RepoNotFound", HTTPStatus.UNAUTHORIZED)  # the hub does not say whether it is only private
        commit = self._refs(repository).get(revision, revision)
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not (repository / commit).is_dir():
            raise Missing("RevisionNotFound")
        return commit, repository / commit

    def write(self, method: str, path: str, body: bytes, token: str, host: str) -> Any:
        """What it answers to one who writes; None: that is none of such requests. This hub takes nothing."""
        return None

    def is_private(self, name: str) -> bool:
        """Whether only those who may write see a repository."""
        return False

    def check_access(self, name: str) -> None:
        """Anyone may read the facts of a gated repository, but no one here its files."""
        if name in self.gated:
            raise Missing("GatedRepo", HTTPStatus.UNAUTHORIZED)

    def blob(self, sha256: str) -> bytes:
        """A large file by its content."""
        for path in self.folder.rglob("*"):
            if path.suffix in LARGE and hashlib.sha256(content := path.read_bytes()).hexdigest() == sha256:
                return content
        raise Missing("EntryNotFound")

    def _refs(self, repository: Path) -> dict[str, str]:
        path = repository / "refs.json"
        refs: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        return refs

    def _write_refs(self, repository: Path, refs: Mapping[str, str]) -> None:
        (repository / "refs.json").write_text(json.dumps(refs))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one piece: the second would wait 40 ms for the first one's receipt

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        """The requests are kept, not printed."""

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path))
        try:
            if self.hub.fails is not None:
                raise Missing("Unavailable", self.hub.fails)
            token, host = self.headers.get("Authorization", "").removeprefix("Bearer "), self.headers["Host"]
            if (written := self.hub.write(self.command, path, body, token, host)) is not None:
                self._send_json(written)
            elif match := _API.fullmatch(path):
                self._send_json(self._api(match, body.decode()))
            elif match := _FILE.fullmatch(path):
                self._send_file(match)
            elif match := _BLOB.fullmatch(path):
                self._send(HTTPStatus.OK, self.hub.blob(match["sha256"]), {})
            else:
                raise Missing("NotFound")
        except Missing as missing:
            headers = {"X-Error-Code": missing.code, "X-Error-Message": f"{missing.code} at {path}"}
            if missing.commit is not None:  # clients remember what a branch means, and that this file is not there
                headers["X-Repo-Commit"] = missing.commit
            self._send(missing.status, json.dumps({"error": missing.code}).encode(), headers)

    def _api(self, match: re.Match[str], body: str) -> Any:
        kind, name, verb, rest = match["kind"], match["name"], match["verb"], match["rest"] or "main"
        revision, _, below = (rest, "", "") if verb == "revision" else rest.partition("/")
        commit, folder = self.hub.find(kind, name, revision)
        if verb in (None, "revision"):
            names = [entry["path"] for entry in _entries(folder, folder, recursive=True) if entry["type"] == "file"]
            facts = {"id": name, "sha": commit, "private": self.hub.is_private(name), "tags": []}
            facts |= {"gated": name in self.hub.gated, "cardData": _card_data(folder)}
            return {**facts, "modelId": name, "siblings": [{"rfilename": path} for path in names]}
        if verb == "tree":
            if not (folder / below).is_dir():
                raise Missing("EntryNotFound")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            return _entries(folder, folder / below, recursive=recursive)
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        every = {entry["path"]: entry for entry in _entries(folder, folder, recursive=True)}
        return [every[path.strip("/")] for path in asked if path.strip("/") in every]

    def _send_file(self, match: re.Match[str]) -> None:
        kind = "datasets" if match["datasets"] else "models"
        commit, folder = self.hub.find(kind, match["name"], match["revision"])
        self.hub.check_access(match["name"])
        path = folder / match["path"]
        if not path.is_file():
            raise Missing("EntryNotFound", commit=commit)
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"', "Accept-Ranges": "bytes"}
        if path.suffix in LARGE:
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            port = self.headers["Host"].rpartition(":")[2]
            where = f"http://localhost:{port}/blobs/{digest}"  # another host: clients take the facts from this answer
            self._send(HTTPStatus.FOUND, b"", {**headers, "Location": where})
            return
        self._send(HTTPStatus.OK, content, headers)

    def _send_json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entries(root: Path, folder: Path, *, recursive: bool) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            found.append({"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0})
            continue
        content = path.read_bytes()
        entry: dict[str, Any] = {"type": "file", "path": name, "oid": git_sha1(content), "size": len(content)}
        if path.suffix in LARGE:
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 132}
        found.append(entry)
    return found


def _card_data(folder: Path) -> Any:
    card = folder / "README.md"
    text = card.read_text() if card.exists() else ""
    return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None


def git_sha1(content: bytes) -> str:
    """The name that git gives a file of this content: the hub's ETag of small files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
