"""Names and paths in the artifact store: nothing leads out of it, and nothing is stored that was not made there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from loractl.common.artifacts import LONGEST_NAME, ArtifactStore, Binding
from loractl.common.errors import ArtifactError, NotStorable

HERE = Binding(prefix="jobs/1/attempt-1", manifest_sha256=None)
DATA = b'{"text": "a"}\n'
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "result"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"w")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "datasets/../../secret.json",
        "jobs/1/attempt-1/report.json",
        f"datasets/{DIGEST}/../../../secret.json",
        f"datasets/{DIGEST}.json/../{DIGEST}.json",
        f"datasets/{DIGEST}",
        f"datasets/{DIGEST}.",
        f"datasets/{DIGEST}.json\n",
        "",
    ],
)
def test_a_row_can_name_nothing_but_a_data_set(store: ArtifactStore, tmp_path: Path, name: str) -> None:
    """Even with the right hash: otherwise a row would say whether a file of a guessed content exists."""
    for secret in (tmp_path / "secret.json", tmp_path / "artifacts" / "jobs" / "1" / "attempt-1" / "report.json"):
        secret.parent.mkdir(parents=True, exist_ok=True)
        secret.write_bytes(DATA)
    for uri in (f"{store.url}/{name}", name, (tmp_path / "secret.json").as_uri(), str(tmp_path / "secret.json")):
        with pytest.raises(ArtifactError, match="is not a data set of this store"):
            store.fetch_dataset(uri, DIGEST, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("digest", ["..", "x" * 64, DIGEST.upper(), DIGEST[:40], ""])
def test_a_hash_that_is_none_names_no_data_set(store: ArtifactStore, tmp_path: Path, digest: str) -> None:
    with pytest.raises(ArtifactError, match="is not a data set of this store"):
        store.fetch_dataset(f"{store.url}/datasets/{digest}.json", digest, tmp_path / "cache")


def test_a_link_in_a_result_is_refused_and_what_it_leads_to_is_not_stored(
    store: ArtifactStore, result: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", tmp_path, tmp_path / "nothing"):
        (result / "adapter" / "link").symlink_to(target)
        with pytest.raises(ArtifactError, match="'adapter/link' is not a plain file"):
            store.put_result(result, "jobs/1/attempt-1")
        (result / "adapter" / "link").unlink()
    os.mkfifo(result / "pipe")
    with pytest.raises(ArtifactError, match="'pipe' is not a plain file"):
        store.put_result(result, "jobs/1/attempt-1")
    assert not (tmp_path / "artifacts" / "jobs").exists()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\\b", "\u202egnp.exe", "a\udcff"])
def test_a_name_that_a_terminal_or_another_system_reads_in_its_own_way_is_refused(
    store: ArtifactStore, result: Path, name: str
) -> None:
    (result / os.fsencode(name).decode("utf-8", "surrogateescape")).write_text("x")
    with pytest.raises(ArtifactError, match="is not a valid file name in a result"):
        store.put_result(result, "jobs/1/attempt-1")


def test_a_name_as_long_as_a_folder_s_store_takes_is_stored_and_a_longer_one_refused(
    store: ArtifactStore, result: Path
) -> None:
    (result / ("a" * LONGEST_NAME)).write_text("x")
    store.put_result(result, "jobs/1/attempt-1")
    (result / ("a" * (LONGEST_NAME + 1))).write_text("x")
    with pytest.raises(NotStorable, match="is not a valid file name in a result"):
        store.put_result(result, "jobs/2/attempt-1")


@pytest.mark.parametrize("sha256", ["/../../victim", "", "0" * 63, 7])
def test_a_manifest_s_hash_is_a_hash(store: ArtifactStore, result: Path, tmp_path: Path, sha256: object) -> None:
    """Folders of this box are named by it."""
    store.put_result(result, "jobs/1/attempt-1")
    manifest = tmp_path / "artifacts" / "jobs" / "1" / "attempt-1" / "manifest.json"
    manifest.write_text(json.dumps({"a.txt": {"size": 1, "sha256": sha256}}))
    with pytest.raises(ArtifactError, match=r"manifest of .* is damaged"):
        store.manifest(HERE)


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "adapter/../../evil",
        "/etc/evil",
        "adapter//evil",
        "adapter/./evil",
        "adapter/..",
        "adapter/\x1b[2J",
        "",
    ],
)
def test_a_forged_manifest_leads_nowhere(store: ArtifactStore, result: Path, tmp_path: Path, name: str) -> None:
    store.put_result(result, "jobs/1/attempt-1")
    manifest = tmp_path / "artifacts" / "jobs" / "1" / "attempt-1" / "manifest.json"
    forged = {"size": 1, "sha256": hashlib.sha256(b"w").hexdigest()}
    manifest.write_text(json.dumps({name: forged, **json.loads(manifest.read_text())}))
    with pytest.raises(ArtifactError, match=r"manifest of .* is damaged"):
        store.pull(HERE, "adapter/", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists() and not (tmp_path / "evil").exists()


def test_pull_writes_through_no_link(store: ArtifactStore, result: Path, tmp_path: Path) -> None:
    """A link in the target folder is replaced, not followed."""
    store.put_result(result, "jobs/1/attempt-1")
    outside, target = tmp_path / "outside", tmp_path / "pulled"
    outside.write_text("mine")
    target.mkdir()
    (target / "weights").symlink_to(outside)
    store.pull(HERE, "adapter/", target)
    assert outside.read_text() == "mine"
    assert (target / "weights").read_bytes() == b"w" and not (target / "weights").is_symlink()


def test_a_data_set_with_any_file_name_is_stored_under_its_hash(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "..\n\x1b[2J; rm -rf.JSONL"
    path.write_bytes(DATA)
    uri, digest = store.put_dataset(path)
    assert uri == f"{store.url}/datasets/{DIGEST}.jsonl"
    assert store.fetch_dataset(uri, digest, tmp_path / "cache").read_bytes() == DATA
