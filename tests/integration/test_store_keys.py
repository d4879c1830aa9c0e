"""docs/deploy.md's keys of the store, as they stand on the page, before a real S3 server that knows no policies."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from loractl.common.artifacts import MARK, ArtifactStore, Binding, attempt_prefix, checkpoint_prefix, manifest_sha256
from loractl.common.errors import ArtifactError

from ..services import free_port, running

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
NAMES = ("ada", "heron", "cleaner")
SECRET = "test-secret-0123456789"


def policy() -> list[dict[str, Any]]:
    """The statements of the page."""
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return list(json.loads(text)["Statement"])


def may(statements: list[dict[str, Any]], name: str, action: str, resource: str) -> bool:
    """What a bucket's policy says; all statements of the page allow something."""
    assert {statement["Effect"] for statement in statements} == {"Allow"}
    return any(
        name in statement["Principal"]
        and action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
        and fnmatchcase(f"arn:aws:s3:::{resource}", statement["Resource"])
        for statement in statements
    )


def wants(method: str, path: str, query: dict[str, list[str]], body: bytes) -> list[tuple[str, str]]:
    """(action, resource) of each thing that a request would do."""
    bucket, _, key = path.strip("/").partition("/")
    if not key and method == "POST" and "delete" in query:
        return [("s3:DeleteObject", f"{bucket}/{name}") for name in re.findall(r"<Key>(.*?)</Key>", body.decode())]
    if not key and "uploads" in query:
        return [("s3:ListBucketMultipartUploads", bucket)]
    if "uploadId" in query and method == "GET":
        return [("s3:ListMultipartUploadParts", f"{bucket}/{key}")]
    if "uploadId" in query and method == "DELETE":
        return [("s3:AbortMultipartUpload", f"{bucket}/{key}")]
    if not key:
        return [("s3:ListBucket" if method in ("GET", "HEAD") else "s3:CreateBucket", bucket)]
    # a POST begins or ends an upload of several parts
    kinds = {
        "GET": "s3:GetObject",
        "HEAD": "s3:GetObject",
        "PUT": "s3:PutObject",
        "POST": "s3:PutObject",
        "DELETE": "s3:DeleteObject",
    }
    return [(kinds[method], f"{bucket}/{key}")]


class Gate(BaseHTTPRequestHandler):
    """Passes on what the policy of the page allows the key of a request, and answers 403 to the rest."""

    protocol_version = "HTTP/1.1"
    behind = 0  # the server's port
    asked: set[tuple[str, str]]  # action and name of who was allowed it

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        name = re.findall(r"Credential=(\w+)/", self.headers["Authorization"])[0]
        query = parse_qs(parts.query, keep_blank_values=True)
        wanted = wants(self.command, unquote(parts.path), query, body)
        refused = [resource for action, resource in wanted if not may(policy(), name, action, resource)]
        if refused and "delete" in query:  # as S3 does: 200, and an error for each that may not go
            keys = (resource.partition("/")[2] for resource in refused)
            told = "".join(
                f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                for key in keys
            )
            self._answer(200, {}, f"<DeleteResult>{told}</DeleteResult>".encode())
            return
        if refused:
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            return
        self.asked.update((action, name) for action, _ in wanted)
        server = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=20)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        self._answer(answer.status, dict(answer.headers), answer.read())
        server.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for name, text in {**headers, "Content-Length": length}.items():
            if name.lower() not in ("date", "server", "transfer-encoding", "connection"):
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def gate(real_services: None, tmp_path: Path) -> Iterator[str]:
    """The address of an S3 server with the page's policy and three accounts."""
    (tmp_path / "s3" / "loractl" / "lab").mkdir(parents=True)
    (tmp_path / "s3" / "loractl" / "lab" / MARK).write_text("the owner's\n")
    port = free_port()
    rclone = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    keys = [part for name in NAMES for part in ("--auth-key", f"{name},{SECRET}")]
    command = [rclone, "serve", "s3", str(tmp_path / "s3"), "--addr", f"127.0.0.1:{port}", *keys]
    with running([*command, "--config", os.devnull, "--vfs-cache-mode", "off"], port):
        Gate.behind, Gate.asked = port, set()
        server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def stores(gate: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, ArtifactStore]:
    """The store with each account's key."""
    opened = {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in NAMES:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
        opened[name] = ArtifactStore("s3://loractl/lab")
        assert opened[name].holdings("jobs") == []
    return opened


@contextlib.contextmanager
def denied() -> Iterator[None]:
    with pytest.raises(ArtifactError, match=r"(?i)access denied|forbidden|permission"):
        yield
        pytest.fail("it was let through")


@pytest.mark.long
def test_each_key_can_do_its_own_part_and_no_more(stores: dict[str, ArtifactStore], tmp_path: Path) -> None:
    client, box, gc = (stores[name] for name in NAMES)
    data, other = tmp_path / "d.jsonl", tmp_path / "other.jsonl"
    data.write_text('{"text": "a"}\n')
    other.write_text('{"text": "b"}\n')
    (tmp_path / "result" / "adapter").mkdir(parents=True)
    (tmp_path / "result" / "adapter" / "weights").write_bytes(b"w")
    result, checkpoint = attempt_prefix(1, 1), checkpoint_prefix(1, 1, 5)

    for guest in (client, box, gc):
        with denied():
            guest.write_mark("theirs")
        assert guest.read_mark() == "the owner's"

    uri, digest = client.put_dataset(data)
    stored = tmp_path / "s3" / "loractl" / "lab" / "datasets" / f"{digest}.jsonl"
    os.utime(stored, (time.time() - 30 * 86400,) * 2)
    client.put_dataset(data)  # gets a new date
    with denied():
        box.put_dataset(other)
    assert box.fetch_dataset(uri, digest, tmp_path / "cache").read_text() == data.read_text()

    binding = Binding(prefix=result, manifest_sha256=manifest_sha256(box.put_result(tmp_path / "result", result)))
    for step in (5, 10):
        box.put_result(tmp_path / "result", checkpoint_prefix(1, 1, step))
    box.remove_checkpoint(checkpoint)
    box.remove("jobs/1/checkpoints")
    for nosy in (client, gc):
        assert nosy.read_bytes(binding, "adapter/weights") == b"w"
        with denied():
            nosy.put_result(tmp_path / "result", attempt_prefix(1, 2))
        with denied():
            nosy.put_result(tmp_path / "result", checkpoint)
    for guest in (client, box):
        with denied():
            guest.remove(result)
        with denied():
            guest.remove(f"datasets/{digest}.jsonl")
    box.verify(binding)

    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=2)
    box._files._fs.call_s3("create_multipart_upload", Bucket="loractl", Key=f"lab/{result}/killed")
    with denied():
        box.unfinished(later)
    (killed,) = gc.unfinished(later)
    gc.drop(killed)
    assert gc.unfinished(later) == []
    gc.remove(result)
    gc.remove(f"datasets/{digest}.jsonl")
    assert gc.holdings("jobs") == gc.holdings("datasets") == []
    assert {("s3:PutObject", "ada"), ("s3:PutObject", "heron"), ("s3:DeleteObject", "cleaner")} <= Gate.asked
