"""The artifact store, in a folder and on a real S3: what was stored is what is read, or there is an error."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from loractl.common.artifacts import MANIFEST, ArtifactStore, Binding, attempt_prefix, open_store, sha256_of
from loractl.common.errors import (
    ArtifactError,
    DataError,
    LoractlError,
    ReportUnknown,
    ResultTaken,
    ServiceUnreachable,
    UsageError,
)
from loractl.common.files import open_files
from loractl.common.settings import load_settings

from ... import services

PREFIX = attempt_prefix(7, 2)
HERE = Binding(prefix=PREFIX, manifest_sha256=None)


@dataclass(frozen=True)
class Place:
    """A store, the folder in which its files really lie, and a hand that changes them behind its back."""

    store: ArtifactStore
    folder: Path

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        open_files(self.store.url).write(name, content)

    def remove(self, name: str) -> None:
        open_files(self.store.url).remove(name, lambda name: False)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "file":
        return Place(ArtifactStore((tmp_path / "artifacts").as_uri()), tmp_path / "artifacts")
    server: services.S3 = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    part = tmp_path.name  # one folder for the session, another in it for each test
    return Place(ArtifactStore(f"{server.url}/{part}"), server.folder / part)


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """What an attempt leaves to be stored."""
    folder = tmp_path / "result"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "report.json").write_text('{"rows": 3}')
    return folder


def test_what_was_measured_on_final_rows_is_read_by_name_alone(place: Place, result: Path) -> None:
    final = {"rows": 40, "sha256": "f" * 64}
    (result / "report.json").write_text(json.dumps({"rows": 3, "final": final}))
    place.store.put_result(result, PREFIX)
    assert place.store.read_report(HERE) == {"rows": 3} and place.store.read_final(HERE) == final


@pytest.mark.parametrize("sha256", [None, "f" * 65, 7])
def test_final_rows_without_a_hash_are_no_look_that_the_database_could_keep(
    place: Place, result: Path, sha256: object
) -> None:
    (result / "report.json").write_text(json.dumps({"final": {"rows": 40, "sha256": sha256}}))
    place.store.put_result(result, PREFIX)
    with pytest.raises(ReportUnknown, match="final rows have no sha256"):
        place.store.read_final(HERE)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_result_is_stored_verified_and_read_back(place: Place, result: Path, tmp_path: Path) -> None:
    manifest = place.store.put_result(result, PREFIX)
    assert set(manifest) == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "report.json"}
    assert manifest["report.json"].size == 11
    assert place.store.manifest(HERE) == place.store.verify(HERE) == manifest
    assert place.store.read_report(HERE) == {"rows": 3}

    pulled = place.store.pull(HERE, "adapter/", tmp_path / "pulled")
    assert set(pulled) == {"adapter_config.json", "adapter_model.safetensors"}
    for name in pulled:
        assert (tmp_path / "pulled" / name).read_bytes() == (result / "adapter" / name).read_bytes()
    assert {p.name for p in (tmp_path / "pulled").iterdir()} == set(pulled), "no part of a download is left"


def test_a_result_that_the_store_keeps_otherwise_than_it_was_given_is_not_stored(
    place: Place, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that acknowledges a write and keeps another byte."""
    put = place.store._files.put

    def flip(path: Path, name: str) -> None:
        put(path, name)
        if name.endswith("report.json"):
            place.write(name, b"X" + path.read_bytes()[1:])

    monkeypatch.setattr(place.store._files, "put", flip)
    with pytest.raises(ArtifactError, match=r"report\.json does not match its manifest"):
        place.store.put_result(result, PREFIX)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_what_was_pulled_is_said_by_the_umask(
    place: Place, result: Path, tmp_path: Path, umask: int, mode: int
) -> None:
    place.store.put_result(result, PREFIX)
    before = os.umask(umask)
    try:
        pulled = place.store.pull(HERE, "adapter/", tmp_path / "pulled")
    finally:
        os.umask(before)
    assert {(tmp_path / "pulled" / name).stat().st_mode & 0o777 for name in pulled} == {mode}


def test_a_second_store_of_another_process_sees_a_result_at_once(place: Place, result: Path) -> None:
    other = ArtifactStore(place.store.url)
    with pytest.raises(ArtifactError, match="has no manifest: it was not stored, or was removed since"):
        other.manifest(HERE)
    place.store.put_result(result, PREFIX)
    assert "report.json" in other.manifest(HERE)


def test_a_result_without_its_manifest_does_not_exist(place: Place, result: Path, tmp_path: Path) -> None:
    place.store.put_result(result, PREFIX)
    place.remove(f"{PREFIX}/{MANIFEST}")
    for read in (
        lambda: place.store.verify(HERE),
        lambda: place.store.pull(HERE, "adapter/", tmp_path / "pulled"),
        lambda: place.store.read_report(HERE),
    ):
        with pytest.raises(ArtifactError, match=f"{PREFIX} has no manifest"):
            read()


def test_a_changed_file_is_detected_by_everyone_who_reads_it(place: Place, result: Path, tmp_path: Path) -> None:
    place.store.put_result(result, PREFIX)
    place.write(f"{PREFIX}/report.json", b'{"rows": 4}')
    with pytest.raises(ArtifactError, match=r"report\.json does not match its manifest"):
        place.store.verify(HERE)
    with pytest.raises(ArtifactError, match=r"report\.json does not match its manifest"):
        place.store.read_report(HERE)
    weights = (result / "adapter" / "adapter_model.safetensors").read_bytes()
    place.write(f"{PREFIX}/adapter/adapter_model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors does not match its manifest"):
        place.store.pull(HERE, "adapter/", tmp_path / "pulled")


def test_a_removed_file_is_detected(place: Place, result: Path, tmp_path: Path) -> None:
    place.store.put_result(result, PREFIX)
    place.remove(f"{PREFIX}/report.json")
    with pytest.raises(ArtifactError, match=f"verifying {PREFIX}: not found in"):
        place.store.verify(HERE)
    with pytest.raises(ArtifactError, match=r"reading report\.json: not found in"):
        place.store.read_report(HERE)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"a": 5}',
        b'{"a": {"size": 1}}',
        b"\xff",
        json.dumps({"adapter/../../evil": {"size": 1, "sha256": "0" * 64}}).encode(),
        json.dumps({"/etc/evil": {"size": 1, "sha256": "0" * 64}}).encode(),
    ],
)
def test_a_damaged_or_forged_manifest_is_refused(place: Place, result: Path, tmp_path: Path, content: bytes) -> None:
    place.store.put_result(result, PREFIX)
    place.write(f"{PREFIX}/{MANIFEST}", content)
    with pytest.raises(ArtifactError, match=r"the manifest of .* is damaged"):
        place.store.pull(HERE, "adapter/", tmp_path / "deep" / "pulled")
    assert not (tmp_path / "evil").exists()


def test_what_a_result_does_not_hold_is_named(place: Place, result: Path, tmp_path: Path) -> None:
    place.store.put_result(result, PREFIX)
    with pytest.raises(ArtifactError, match=r"has no report\.html"):
        place.store.read_bytes(HERE, "report.html")
    with pytest.raises(ArtifactError, match="has no merged/"):
        place.store.pull(HERE, "merged/", tmp_path / "pulled")


def test_storing_the_same_attempt_again_replaces_it(place: Place, result: Path) -> None:
    place.store.put_result(result, PREFIX)
    (result / "report.json").write_text('{"rows": 5}')
    place.store.put_result(result, PREFIX)
    assert place.store.read_report(HERE) == {"rows": 5}


def test_no_result_is_written_over_another_one(place: Place, result: Path) -> None:
    """A database that was restored may give a number again."""
    place.store.put_result(result, PREFIX)
    weights = result / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    for another in (b"another training", before[::-1]):
        weights.write_bytes(another)
        with pytest.raises(ResultTaken, match="holds another result, which is kept"):
            place.store.put_result(result, PREFIX)
    pulled = place.store.read_bytes(HERE, "adapter/adapter_model.safetensors")
    assert pulled == before
    place.write(f"{PREFIX}/{MANIFEST}", b"{")
    place.store.put_result(result, PREFIX)  # what a crash has torn closes no result


def test_a_data_set_is_stored_once_under_its_content(place: Place, tmp_path: Path) -> None:
    data, copy = tmp_path / "My Data.JSONL", tmp_path / "copy.jsonl"
    data.write_text('{"text": "a"}\n')
    copy.write_text('{"text": "a"}\n')
    uri, digest = place.store.put_dataset(data)
    assert (uri, digest) == (f"{place.store.url}/datasets/{digest}.jsonl", sha256_of(data))
    stored = place.folder / "datasets" / f"{digest}.jsonl"
    before = stored.stat().st_ino
    assert place.store.put_dataset(copy) == (uri, digest)
    assert stored.stat().st_ino == before, "equal content is not uploaded again"
    assert [p.name for p in stored.parent.iterdir()] == [stored.name]


def test_a_data_set_that_somebody_writes_while_it_is_stored_is_refused(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, put = tmp_path / "data.jsonl", place.store._files.put
    data.write_text('{"text": "a"}\n')
    digest = sha256_of(data)

    def put_late(path: Path, name: str) -> None:
        path.write_text('{"text": "b"}\n')
        put(path, name)

    with monkeypatch.context() as late, pytest.raises(DataError, match="was changed while it was stored"):
        late.setattr(place.store._files, "put", put_late)
        place.store.put_dataset(data)
    data.write_text('{"text": "a"}\n')
    uri, _ = place.store.put_dataset(data)
    assert sha256_of(place.store.fetch_dataset(uri, digest, tmp_path / "cache")) == digest


def test_holdings_are_what_was_stored_with_sizes_and_dates(place: Place, result: Path, tmp_path: Path) -> None:
    assert place.store.holdings("jobs") == place.store.holdings("datasets") == []
    for attempt in (1, 10):
        place.store.put_result(result, attempt_prefix(7, attempt))
    place.write("jobs/7/checkpoints/checkpoint-3/optimizer.pt", b"12345")
    place.write("jobs/notes.txt", b"somebody's own")
    place.write("jobs/007/attempt-1/a", b"somebody's own")
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    _, digest = place.store.put_dataset(data)

    held = {h.name: h for h in place.store.holdings("jobs")}
    assert set(held) == {"jobs/7/attempt-1", "jobs/7/attempt-10", "jobs/7/checkpoints"}, "nothing else is ours"
    assert held["jobs/7/checkpoints"].size == 5
    assert held["jobs/7/attempt-1"].size == held["jobs/7/attempt-10"].size > 3_000_000
    (stored,) = place.store.holdings("datasets")
    assert (stored.name, stored.size) == (f"datasets/{digest}.jsonl", 14)
    assert abs(dt.datetime.now(dt.UTC) - stored.changed_at) < dt.timedelta(minutes=5)


def test_a_file_of_a_result_is_never_taken_for_one_that_nobody_ended(place: Place, result: Path) -> None:
    (result / "weights.part-7").write_text("whole")
    place.store.put_result(result, PREFIX)
    assert place.store.unfinished(dt.datetime.now(dt.UTC) + dt.timedelta(days=2)) == []


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_files_is_no_result(place: Place, tmp_path: Path, made: bool) -> None:
    """It is being removed: stored, it would count as whole."""
    if made:
        (tmp_path / "empty" / "adapter").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="empty"):
        place.store.put_result(tmp_path / "empty", PREFIX)
    assert place.store.holdings("jobs") == []


def test_what_is_removed_is_gone_and_its_neighbours_are_not(place: Place, result: Path) -> None:
    for attempt in (1, 10):
        place.store.put_result(result, attempt_prefix(7, attempt))
    place.store.remove("jobs/7/attempt-1")
    with pytest.raises(ArtifactError, match="has no manifest"):
        place.store.verify(Binding(prefix="jobs/7/attempt-1", manifest_sha256=None))
    place.store.verify(Binding(prefix="jobs/7/attempt-10", manifest_sha256=None))
    assert [h.name for h in place.store.holdings("jobs")] == ["jobs/7/attempt-10"]
    place.store.remove("jobs/7/attempt-1")  # twice is once: two people may clean up at the same time
    place.store.remove("jobs/7/attempt-10")
    assert place.store.holdings("jobs") == []
    assert not list(place.folder.glob("jobs/*/*"))


@pytest.mark.parametrize(
    "name",
    ["", "jobs", "jobs/7", "jobs/7/attempt-1/", "jobs/7/attempt-1/../..", "jobs/../x/attempt-1", "/etc", "datasets",
     "datasets/../jobs", "jobs/7/attempt-x", "jobs/０/attempt-1", "jobs/7/attempt-1\n"],
)  # fmt: skip
def test_a_name_that_was_not_made_by_the_store_is_never_removed(place: Place, result: Path, name: str) -> None:
    place.store.put_result(result, attempt_prefix(7, 1))
    with pytest.raises(ValueError, match="is not a name of this store"):
        place.store.remove(name)
    place.store.verify(Binding(prefix=attempt_prefix(7, 1), manifest_sha256=None))


def test_a_link_in_the_store_is_removed_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    store, outside = ArtifactStore((tmp_path / "artifacts").as_uri()), tmp_path / "outside"
    outside.mkdir()
    (outside / MANIFEST).write_text("{}")
    (tmp_path / "artifacts" / "jobs" / "7" / "attempt-1").mkdir(parents=True)
    (tmp_path / "artifacts" / "jobs" / "7" / "attempt-1" / "adapter").symlink_to(outside)
    (tmp_path / "artifacts" / "jobs" / "7" / "attempt-2").symlink_to(outside)
    for attempt in (1, 2):
        store.remove(attempt_prefix(7, attempt))
    assert not (tmp_path / "artifacts" / "jobs" / "7").exists()
    assert (outside / MANIFEST).exists()


def test_a_data_set_that_is_submitted_again_gets_a_new_date(place: Place, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    _, digest = place.store.put_dataset(data)
    month_ago = time.time() - 30 * 86400
    os.utime(place.folder / "datasets" / f"{digest}.jsonl", (month_ago, month_ago))
    place.store.put_dataset(data)
    assert dt.datetime.now(dt.UTC) - place.store.holdings("datasets")[0].changed_at < dt.timedelta(hours=1)


def test_a_data_set_of_which_only_a_part_arrived_is_stored_again(place: Place, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    _, digest = place.store.put_dataset(data)
    stored = place.folder / "datasets" / f"{digest}.jsonl"
    place.write(f"datasets/{stored.name}", b"half")
    place.store.put_dataset(data)
    assert sha256_of(stored) == digest


def test_two_attempts_that_fetch_a_damaged_data_set_at_once_both_say_so(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One finds it damaged, and removes what the other is about to look at."""
    data, get = tmp_path / "d.jsonl", place.store._files.get
    data.write_text('{"text": "a"}\n')
    uri, digest = place.store.put_dataset(data)
    place.write(f"datasets/{digest}.jsonl", b'{"text": "b"}\n')

    def get_late(name: str, path: Path) -> None:
        get(name, path)
        path.unlink()

    monkeypatch.setattr(place.store._files, "get", get_late)
    with pytest.raises(ArtifactError, match="does not have the content that was submitted"):
        place.store.fetch_dataset(uri, digest, tmp_path / "cache")


def test_a_fetched_data_set_is_kept_and_must_have_the_content_that_was_submitted(place: Place, tmp_path: Path) -> None:
    data, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    data.write_text('{"text": "a"}\n')
    uri, digest = place.store.put_dataset(data)
    fetched = place.store.fetch_dataset(uri, digest, cache)
    assert fetched.read_text() == data.read_text()

    stored = f"datasets/{digest}.jsonl"
    place.write(stored, b'{"text": "b"}\n')
    assert place.store.fetch_dataset(uri, digest, cache) == fetched, "what is here and right is not fetched again"
    fetched.write_text("damaged")
    with pytest.raises(ArtifactError, match="does not have the content that was submitted"):
        place.store.fetch_dataset(uri, digest, cache)
    assert list(cache.iterdir()) == [], "what is wrong is not left for the next attempt"
    place.remove(stored)
    with pytest.raises(ArtifactError, match="not found in"):
        place.store.fetch_dataset(uri, digest, cache)


def test_a_home_with_spaces_and_umlauts_holds_its_artifacts_itself(tmp_path: Path) -> None:
    home = tmp_path / "mein Büro 100%"
    store = open_store(load_settings({"LORACTL_HOME": str(home)}))
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    uri, digest = store.put_dataset(data)
    assert (home / "artifacts" / "datasets" / f"{digest}.jsonl").exists()
    assert store.fetch_dataset(uri, digest, tmp_path / "cache").read_text() == "{}\n"


def test_a_file_of_a_folder_is_on_the_disk_before_it_has_its_name(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel is asked for, in order: a power loss can't be had in a test."""
    at = str((tmp_path / "artifacts").resolve())
    asked: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        asked.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink()).removeprefix(f"{at}/")))
        sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        asked.append(("rename", str(target).removeprefix(f"{at}/")))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    ArtifactStore(f"file://{at}").put_result(result, PREFIX)
    renamed = [name for what, name in asked if what == "rename"]
    assert len(renamed) == 4 and renamed[-1] == f"{PREFIX}/{MANIFEST}"
    for name in renamed:
        turn = asked.index(("rename", name))
        assert asked[turn - 1][0] == "sync" and asked[turn - 1][1].startswith(f"{name}.part-")
        assert asked[turn + 1] == ("sync", name.rpartition("/")[0])
    synced = {name for what, name in asked if what == "sync"}
    assert {at, "jobs", "jobs/7", PREFIX} <= synced, "new folders have their names, too"


def test_a_full_store_is_an_error_that_names_the_space_and_leaves_no_manifest(result: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", "64k"):
        store = ArtifactStore((tmp_path / "full" / "artifacts").as_uri())
        with pytest.raises(ArtifactError, match="No space left on device") as caught:
            store.put_result(result, PREFIX)
        assert caught.value.hint == "free space on the disk that is written to"
        with pytest.raises(ArtifactError, match="has no manifest"):
            store.manifest(HERE)
        assert not list((tmp_path / "full").rglob("*.part-*")), "what was half written is gone"


def test_a_full_disk_here_is_an_error_when_an_adapter_is_pulled(result: Path, tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "artifacts").as_uri())
    store.put_result(result, PREFIX)
    with small_disk(tmp_path / "full", "64k"), pytest.raises(ArtifactError, match="No space left on device"):
        store.pull(HERE, "adapter/", tmp_path / "full" / "pulled")


@pytest.mark.timeout(90)
def test_an_s3_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{services.free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-hunter2")
    store = ArtifactStore("s3://loractl/lab")
    with pytest.raises(ServiceUnreachable) as caught:
        store.manifest(HERE)
    assert caught.value.sentence.startswith("the artifact store is unreachable at s3://loractl/lab: ")
    assert caught.value.hint == "check that it runs, or set LORACTL_ARTIFACTS_URL"
    assert "hunter2" not in caught.value.sentence


def test_a_browser_saves_what_it_gets_from_s3(
    s3_server: services.S3, monkeypatch: pytest.MonkeyPatch, result: Path
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    (result / "report.html").write_text("<script>alert(1)</script>")
    bucket, store = urlsplit(s3_server.url), ArtifactStore(f"{s3_server.url}/served")
    store.put_result(result, PREFIX)
    for name in ("report.html", "report.json", MANIFEST):
        key = f"{bucket.path[1:]}/served/{PREFIX}/{name}"
        head = store._files._fs.call_s3("head_object", Bucket=bucket.netloc, Key=key)
        assert head["ContentType"] == "application/octet-stream", name


def test_wrong_keys_are_a_sentence(s3_server: services.S3, monkeypatch: pytest.MonkeyPatch, result: Path) -> None:
    for name, value in {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoractlError) as caught:
        ArtifactStore(s3_server.url).put_result(result, PREFIX)
    assert s3_server.url in caught.value.sentence
    assert not (s3_server.folder / PREFIX).exists()


@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "ftp://lab"])
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_no_server_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, endpoint: str) -> None:
    monkeypatch.setenv(name, endpoint)
    with pytest.raises(UsageError, match=f"{name} is not the URL of an HTTP server"):
        ArtifactStore("s3://loractl/lab")


def test_an_attempt_has_a_place_of_its_own() -> None:
    assert attempt_prefix(7, 2) == "jobs/7/attempt-2"
    assert len({attempt_prefix(j, a) for j in (1, 11) for a in (1, 11)}) == 4
