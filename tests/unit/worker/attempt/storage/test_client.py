"""The artifact store as a node reaches it: what answers, what fails, and what hangs.

A named pipe stands where a data set was: who opens it waits, as on a network disk whose server is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loractl.common import files
from loractl.common.artifacts import ArtifactStore, Binding, manifest_sha256
from loractl.common.errors import ArtifactError, ServiceUnreachable
from loractl.worker.attempt.storage.client import CallWatch, StoreClient

from .....waiting import is_alive


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


def stored(artifacts: ArtifactStore, folder: Path, text: str) -> tuple[str, str]:
    data = folder / f"{text}.jsonl"
    data.write_text(text)
    return artifacts.put_dataset(data)


def hang(uri: str) -> Path:
    path = Path(uri.removeprefix("file://"))
    path.unlink()
    os.mkfifo(path)
    return path


def processes() -> list[psutil.Process]:
    """Those below this one that make calls of a store."""
    return [p for p in psutil.Process().children(recursive=True) if "loractl.worker.attempt.storage" in _command(p)]


def _command(process: psutil.Process) -> list[str]:
    try:
        while not (command := process.cmdline()) and is_alive(process):
            time.sleep(0.001)  # while it becomes another program, it shows none
        return command
    except psutil.Error:  # it ends at this moment
        return []


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_failing_to_start_the_process_in_advance_is_no_error(
    artifacts: ArtifactStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node makes it at its start, when its slots have begun: an error there would leave it hanging."""
    monkeypatch.setattr(sys, "executable", "/gone")
    StoreClient(artifacts.url).make_ready()
    assert "could be made ahead" in caplog.text


def test_without_a_process_the_store_counts_as_away(
    artifacts: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes, and a finished result waits for it."""
    monkeypatch.setattr(sys, "executable", "/gone")
    with pytest.raises(ServiceUnreachable, match="no process could be started"):
        StoreClient(artifacts.url).put_result(tmp_path, "jobs/1/attempt-1")


def test_a_call_has_the_store_s_answer_or_its_error(artifacts: ArtifactStore, tmp_path: Path) -> None:
    others = set(processes())  # of tests before, until somebody collects their clients
    client = StoreClient(artifacts.url)
    client.make_ready()
    (ready,) = set(processes()) - others
    uri, digest = stored(artifacts, tmp_path, "rows")
    assert client.fetch_dataset(uri, digest, tmp_path / "cache").read_text() == "rows"
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "weights").write_bytes(b"w" * 5000)
    prefix = "jobs/1/checkpoints/1-5"
    manifest = client.put_result(tmp_path / "result", prefix)
    bound = Binding(prefix=prefix, manifest_sha256=manifest_sha256(manifest))
    assert manifest == artifacts.manifest(bound)
    client.pull(bound, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "weights").read_bytes() == b"w" * 5000
    client.remove_checkpoints(1, 1)
    with pytest.raises(ArtifactError, match="has no manifest: it was not stored, or was removed since"):
        client.pull(bound, tmp_path / "again")
    with pytest.raises(ArtifactError) as wrong:
        client.fetch_dataset("file:///etc/passwd", digest, tmp_path / "cache")
    assert wrong.value.hint == "submit the job again"
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NotADirectoryError):
        client.fetch_dataset(uri, digest, blocked / "cache")
    assert set(processes()) - others == {ready}, "one process for all calls, made ahead"


def test_a_call_that_hangs_is_reported_and_has_a_deadline(artifacts: ArtifactStore, tmp_path: Path) -> None:
    uri, digest = stored(artifacts, tmp_path, "rows")
    other = stored(artifacts, tmp_path, "others")
    pipe, told = hang(uri), []
    client, cache = StoreClient(artifacts.url), tmp_path / "cache"
    client.fetch_dataset(*other, cache)  # its process has started: on a busy machine that takes seconds
    watched = client.watched(CallWatch(deadline_s=1.0, slow_s=0.2, silent=told.append))
    name, began = pipe.relative_to(tmp_path / "artifacts"), time.monotonic()
    with pytest.raises(
        ServiceUnreachable, match=rf"the artifact store is unreachable at .*: reading {name} had no answer"
    ):
        watched.fetch_dataset(uri, digest, cache)
    assert time.monotonic() - began < 30, "one second, on a machine that may be busy"
    assert len(told) == 1 and told[0].startswith(f"reading {name} has had no answer for ")
    assert client.fetch_dataset(*other, cache).read_text() == "others", "another process goes on"


def test_what_killed_calls_had_fetched_is_removed_by_later_ones(artifacts: ArtifactStore, tmp_path: Path) -> None:
    """A store that hangs for an hour is tried again twelve times, each time from the beginning."""
    uri, digest = stored(artifacts, tmp_path, "rows")
    other = stored(artifacts, tmp_path, "others")
    pipe, cache = hang(uri), tmp_path / "cache"
    client = StoreClient(artifacts.url)
    for _ in range(2):
        client.fetch_dataset(*other, cache)  # its process has started
        with pytest.raises(ServiceUnreachable):
            client.watched(CallWatch(deadline_s=1.0)).fetch_dataset(uri, digest, cache)
    old, young = cache.glob(".part-*")
    os.utime(old, (time.time() - files.DEAD_S - 1,) * 2)
    client.fetch_dataset(*other, cache)
    assert old.exists(), "it is another file's"
    pipe.unlink()
    pipe.write_text("rows")
    client.fetch_dataset(uri, digest, cache)
    assert not old.exists() and young.exists(), "another job may be fetching it now"


def test_a_call_is_left_when_it_is_no_longer_wanted_and_holds_up_no_other(
    artifacts: ArtifactStore, tmp_path: Path
) -> None:
    uri, digest = stored(artifacts, tmp_path, "rows")
    other = stored(artifacts, tmp_path, "others")
    hang(uri)
    unwanted, ended = threading.Event(), threading.Event()
    client = StoreClient(artifacts.url)
    waits = client.watched(CallWatch(over=unwanted.is_set))

    def fetch() -> None:
        with pytest.raises(ServiceUnreachable):
            waits.fetch_dataset(uri, digest, tmp_path / "cache")
        ended.set()

    threading.Thread(target=fetch, daemon=True).start()
    assert client.fetch_dataset(*other, tmp_path / "cache").read_text() == "others"
    assert not ended.is_set()
    unwanted.set()
    assert ended.wait(5)


def test_a_process_that_hangs_ends_with_its_node(artifacts: ArtifactStore, tmp_path: Path) -> None:
    uri, digest = stored(artifacts, tmp_path, "rows")
    hang(uri)
    node = (
        "import sys; from pathlib import Path; from loractl.worker.attempt.storage.client import StoreClient\n"
        f"StoreClient({artifacts.url!r}).fetch_dataset({uri!r}, {digest!r}, Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", node, str(tmp_path / "cache")])
    until(lambda: any((tmp_path / "cache").glob(".part-*")))  # it is about to read
    (child,) = [p for p in psutil.Process(process.pid).children() if "loractl.worker.attempt.storage" in _command(p)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not is_alive(child))


def test_a_signal_to_all_of_an_allocation_ends_no_call(artifacts: ArtifactStore, tmp_path: Path) -> None:
    """Slurm's stop reaches every process, and the last checkpoint is on its way then."""
    others, client = set(processes()), StoreClient(artifacts.url)
    client.fetch_dataset(*stored(artifacts, tmp_path, "first"), tmp_path / "a")
    (before,) = set(processes()) - others
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before.send_signal(number)
    client.fetch_dataset(*stored(artifacts, tmp_path, "second"), tmp_path / "b")
    assert set(processes()) - others == {before}
