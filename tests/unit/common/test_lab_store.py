"""The lab's own artifact store, on both databases: known by its mark, and no other is read or written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.artifacts import MARK, ArtifactStore, attempt_prefix
from loractl.common.errors import ServiceUnreachable, WrongState, WrongStore
from loractl.common.job.status import Reason
from loractl.common.lab_store import SETTING, adopt, adopt_if_sure, known_mark, open_lab_store
from loractl.common.settings import Settings, load_settings
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from ...databases import SQLITE_ALONE
from ...services import S3, free_port
from ..factories import RESULT, submission, take


@pytest.fixture
def settings_of(store: Store, tmp_path: Path) -> Callable[..., Settings]:
    """The settings of a home with the store in this folder; by default in the home."""

    def make(folder: Path | None = None) -> Settings:
        variables = {
            "LORACTL_HOME": str(tmp_path / "home"),
            "LORACTL_DATABASE_URL": store.engine.url.render_as_string(hide_password=False),
        }
        return load_settings({**variables, **({"LORACTL_ARTIFACTS_URL": folder.as_uri()} if folder else {})})

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "d.jsonl").write_text("rows")
    return tmp_path / "d.jsonl"


def test_another_store_than_the_lab_s_is_neither_read_nor_written(
    store: Store, settings_of: Callable[..., Settings], data: Path, tmp_path: Path
) -> None:
    ours, other = tmp_path / "lab", tmp_path / "other"
    ours.mkdir()
    adopt(settings_of(ours), store)
    uri, digest = open_lab_store(settings_of(ours), store).put_dataset(data)
    wrong = open_lab_store(settings_of(other), store)
    for begins in ("this machine has no such folder", "it has no mark", "it has another lab's mark"):
        with pytest.raises(WrongStore, match=begins) as refused:
            wrong.put_dataset(data)
        assert refused.value.exit_code == 4 and "adopt-store" in (refused.value.hint or "")
        with pytest.raises(WrongStore):
            wrong.fetch_dataset(uri, digest, tmp_path / "cache")
        if other.exists():
            ArtifactStore(other.as_uri()).write_mark("another lab's")
        else:
            assert begins.endswith("folder"), "what is not mounted is not made"
            other.mkdir()
    assert [path.name for path in other.iterdir()] == [MARK]
    with pytest.raises(WrongStore, match=r"no such folder|on PostgreSQL"):  # a home's own
        open_lab_store(settings_of(), store).put_dataset(data)


def test_a_share_that_is_unmounted_later_is_noticed_at_the_next_call(
    store: Store, settings_of: Callable[..., Settings], data: Path, tmp_path: Path
) -> None:
    share, mount = tmp_path / "share", tmp_path / "mount"
    mount.mkdir()
    adopt(settings_of(mount), store)
    artifacts = open_lab_store(settings_of(mount), store)
    artifacts.put_dataset(data)
    mount.rename(share)
    mount.mkdir()
    with pytest.raises(WrongStore, match="it has no mark"):
        artifacts.put_dataset(data)
    assert list(mount.iterdir()) == []
    mount.rmdir()
    share.rename(mount)
    artifacts.put_dataset(data)


def test_one_machine_s_store_is_known_from_its_first_use_and_a_lab_s_by_its_owner_alone(
    store: Store, settings_of: Callable[..., Settings], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    if settings_of().embedded_database:
        with ThreadPoolExecutor(4) as pool:
            marks = {*pool.map(lambda _: known_mark(settings_of(), store), range(4))}
        assert marks == {store.lab.setting(SETTING)} == {ArtifactStore(settings_of().artifacts_url).read_mark()}
        return
    with pytest.raises(WrongStore, match="this home's own, and the lab is on PostgreSQL"):
        known_mark(settings_of(), store)
    assert known_mark(settings_of(folder), store) == "" == known_mark(settings_of(tmp_path / "away"), store)
    open_lab_store(settings_of(folder), store).put_dataset(data)  # as before
    with pytest.raises(WrongStore, match="no such folder"):
        open_lab_store(settings_of(tmp_path / "away"), store).put_dataset(data)
    assert store.lab.setting(SETTING) is None
    assert adopt_if_sure(settings_of(), store) is not None and store.lab.setting(SETTING) is None
    assert adopt_if_sure(settings_of(folder), store) is None
    assert store.lab.setting(SETTING) == known_mark(settings_of(folder), store) != ""
    adopt(settings_of(), store, empty=True)  # its owner may want that
    assert known_mark(settings_of(), store) == store.lab.setting(SETTING)


def test_an_upgrade_adopts_no_store_that_the_rows_do_not_name(
    store: Store, settings_of: Callable[..., Settings], data: Path, tmp_path: Path
) -> None:
    ours, other = tmp_path / "lab", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
    result = tmp_path / "result"
    result.mkdir()
    (result / "file").write_text("x")
    settings, earlier = settings_of(ours), ArtifactStore(ours.as_uri())
    uri, digest = earlier.put_dataset(data)
    job_id = store.jobs.submit(replace(submission(), data={"path": {"uri": uri, "sha256": digest}}))
    lab = not settings.embedded_database
    if lab:
        why = adopt_if_sure(settings_of(other), store)
        assert why is not None and f"its jobs name {ours.as_uri()}" in why.sentence
    claim = take(store)
    assert isinstance(claim, Claim)
    earlier.put_result(result, attempt_prefix(job_id, 1))
    stored = replace(RESULT, adapter_uri=f"{earlier.url}/{attempt_prefix(job_id, 1)}/adapter")
    store.attempts.finish(claim, Reason.OK, "", Progress(), stored)
    with pytest.raises(WrongState, match=f"lacks the result of job {job_id}"):
        adopt(settings_of(other), store)  # a share that is not mounted looks like this
    assert adopt_if_sure(settings_of(other), store) is not None and store.lab.setting(SETTING) is None
    assert adopt_if_sure(settings, store) is None and store.lab.setting(SETTING)


def test_a_moved_store_is_found_by_its_mark_with_the_data_of_waiting_jobs(
    store: Store, settings_of: Callable[..., Settings], data: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    mark = adopt(settings_of(before), store)
    uri, digest = open_lab_store(settings_of(before), store).put_dataset(data)
    before.rename(after)
    moved = open_lab_store(settings_of(after), store)
    assert moved.fetch_dataset(uri, digest, tmp_path / "cache").read_text() == "rows"
    (after / MARK).unlink()  # a copy may leave hidden files out
    with pytest.raises(WrongStore, match="it has no mark"):
        moved.put_dataset(data)
    assert adopt(settings_of(after), store) == mark, "running workers still know it"
    moved.put_dataset(data)
    shutil.rmtree(after)
    with pytest.raises(WrongState, match="has no folder"):
        adopt(settings_of(after), store)
    assert adopt(settings_of(after), store, empty=True) == mark and after.is_dir()


@SQLITE_ALONE
def test_a_bucket_is_looked_at_once_and_one_that_is_away_is_an_outage(
    store: Store, s3_server: S3, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    database = store.engine.url.render_as_string(hide_password=False)

    def settings(url: str) -> Settings:
        home = {"LORACTL_HOME": str(tmp_path), "LORACTL_DATABASE_URL": database, "LORACTL_ARTIFACTS_URL": url}
        return load_settings(home)

    ours = settings(f"{s3_server.url}/{tmp_path.name}/lab")
    mark = adopt(ours, store)
    artifacts = open_lab_store(ours, store)
    artifacts.put_dataset(data)
    artifacts._files._fs.rm(f"{artifacts.url}/{MARK}")
    artifacts.put_dataset(data)
    for other in (f"{s3_server.url}/{tmp_path.name}/other", "s3://no-such-bucket/lab"):
        with pytest.raises(WrongStore, match="it has no mark"):
            open_lab_store(settings(other), store).put_dataset(data)
    assert adopt(ours, store) == mark
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServiceUnreachable) as away:
        open_lab_store(ours, store).put_dataset(data)
    assert not isinstance(away.value, WrongStore)
