"""A store that is slow but moves: between two signs of life it has little to do, so that no one takes it for dead."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from loractl.common.artifacts import ArtifactStore, attempt_prefix

from ... import services

MIB = 1 << 20
AT_ONCE = 32 * MIB
"""In the five minutes after which a silent call is given up, that is 112 kB/s."""


def result(tmp_path: Path, size: int) -> Path:
    """One with a large file."""
    (tmp_path / "result").mkdir()
    with (tmp_path / "result" / "optimizer").open("wb") as stream:
        stream.truncate(size)
    return tmp_path / "result"


def test_a_large_file_goes_to_a_folder_s_disk_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes all of it at once; it is the sync that waits for a slow disk, or a server behind it."""
    synced, sync = [0], os.fsync

    def fsync(descriptor: int) -> None:
        if ".part-" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            synced.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    ArtifactStore((tmp_path / "artifacts").as_uri()).put_result(result(tmp_path, 70 * MIB), attempt_prefix(7, 2))
    large = synced[: synced.index(70 * MIB) + 1]
    assert max(after - before for before, after in itertools.pairwise(large)) <= AT_ONCE


@pytest.mark.parametrize("size", [24 * MIB, 70 * MIB])
def test_a_large_file_goes_to_s3_and_is_read_back_in_parts(
    size: int, s3_server: services.S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers send the checksum of the whole file with each part of it."""
    from aiobotocore.client import AioBaseClient

    sent, asked, call = [], [], AioBaseClient._make_api_call

    async def recorded(client: AioBaseClient, operation: str, given: dict[str, Any]) -> Any:
        sent.append(len(given.get("Body") or b""))
        if "Range" in given:
            first, last = given["Range"].removeprefix("bytes=").split("-")
            asked.append(int(last) - int(first) + 1)
        return await call(client, operation, given)

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(AioBaseClient, "_make_api_call", recorded)
    ArtifactStore(f"{s3_server.url}/{tmp_path.name}").put_result(result(tmp_path, size), attempt_prefix(7, 2))
    assert sum(sent) > size and sum(asked) >= size
    assert sum(sorted(sent)[-2:]) <= AT_ONCE and max(asked) <= AT_ONCE, "two parts are on their way at once"
