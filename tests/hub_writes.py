"""A hub of one's own that takes pushes: repositories are made, large files uploaded, and commits added.

It answers what huggingface_hub 2.4 asks with Xet switched off: whoami, repos/create, validate-yaml, preupload, the LFS
batch with its PUT and verify, and the commit as JSON lines. What it gets must have the size and the sha256 that it was
told, and a commit names only what was uploaded; all else is a 4xx, so a push that passes is one that a hub can keep.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from .hub import LARGE, Hub, Missing, git_sha1

TOKEN = "hf_" + "AbCdEfGhIj" * 3
"""The only token that it knows."""

_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/main")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/main")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_LFS = re.compile(r"/lfs/([0-9a-f]{64})")


@dataclass
class WritableHub(Hub):
    """Of one person, who may write to what belongs to `owners`."""

    folder: Path
    owners: set[str] = field(default_factory=lambda: {"lab"})
    private: set[str] = field(default_factory=set)
    refuses: dict[str, HTTPStatus] = field(default_factory=dict)  # by a part of a path: all that is asked there
    ignored: set[str] = field(default_factory=set)  # files that a repository's .gitignore leaves out
    uploaded: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of its commits

    def __post_init__(self) -> None:
        super().__init__(self.folder)

    def files(self, name: str) -> dict[str, bytes]:
        """What main of a repository holds now."""
        _, folder = self.find("models", name, "main")
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def is_private(self, name: str) -> bool:
        return name in self.private

    def write(self, method: str, path: str, body: bytes, token: str, host: str) -> Any:
        if status := next((status for part, status in self.refuses.items() if part in path), None):
            raise Missing(f"Refused {token}", status)  # a hub that repeats the token, which nobody must print
        if match := _LFS.fullmatch(path):  # by a signed address, as S3 has it
            return self._store(match[1], body)
        if path == "/api/whoami-v2" or method == "POST":
            self._know(token)
        if path == "/api/whoami-v2":
            return {"type": "user", "name": "somebody"}
        if method != "POST":
            return None
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), host)
        if path == "/lfs/verify":
            return self._verify(json.loads(body))
        for pattern, answer in ((_PREUPLOAD, self._modes), (_BATCH, self._batch), (_COMMIT, self._commit)):
            if match := pattern.fullmatch(path):
                self._may_write(match[1])
                return answer(match[1], body, host)
        return None

    def _know(self, token: str) -> None:
        if token != TOKEN:
            raise Missing("InvalidToken", HTTPStatus.UNAUTHORIZED)

    def _may_write(self, name: str) -> None:
        if name.partition("/")[0] not in self.owners:
            raise Missing("NotYours", HTTPStatus.FORBIDDEN)

    def _create(self, asked: dict[str, Any], host: str) -> dict[str, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        self._may_write(name)
        if (self.folder / "models" / name).exists():
            raise Missing("Exists", HTTPStatus.CONFLICT)
        assert asked["visibility"] in ("private", "public")
        if asked["visibility"] == "private":
            self.private.add(name)
        self.commit("models", name, {".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return {"url": f"http://{host}/{name}", "name": name}

    def _modes(self, name: str, body: bytes, host: str) -> dict[str, Any]:
        there = self.files(name)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": file["path"] in self.ignored,
                    "oid": _oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, name: str, body: bytes, host: str) -> dict[str, Any]:
        objects = []
        for asked in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"http://{host}/lfs/{asked['oid']}"},
                "verify": {"href": f"http://{host}/lfs/verify"},
            }
            objects.append({**asked, **({} if asked["oid"] in self.uploaded else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Missing("OtherContent", HTTPStatus.BAD_REQUEST)
        self.uploaded[oid] = body
        return {}

    def _verify(self, told: dict[str, Any]) -> dict[str, Any]:
        if len(self.uploaded.get(told["oid"], b"")) != told["size"]:
            raise Missing("OtherSize", HTTPStatus.BAD_REQUEST)
        return {}

    def _commit(self, name: str, body: bytes, host: str) -> dict[str, Any]:
        header, *operations = map(json.loads, body.splitlines())
        files = self.files(name)
        for operation in operations:
            told = operation["value"]
            if operation["key"] == "file":
                files[told["path"]] = base64.b64decode(told["content"], validate=True)
                continue
            content = self.uploaded.get(told["oid"]) if operation["key"] == "lfsFile" else None
            if content is None or len(content) != told["size"]:
                raise Missing("NotUploaded", HTTPStatus.UNPROCESSABLE_ENTITY)
            files[told["path"]] = content
        staged = self.folder / "staged"
        for path, content in files.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(content)
        commit = self.commit("models", name, staged)
        staged.rename(self.folder / f"staged-{commit}")
        self.messages.append(header["value"]["summary"])
        return {"success": True, "commitOid": commit, "commitUrl": f"http://{host}/{name}/commit/{commit}"}


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_sha1(content)
