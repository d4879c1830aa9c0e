"""Small files in a box's cache: believed by their hash in the database, on full disks, under two writers, bounded."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loractl.worker.base import box_cache
from loractl.worker.base.box_cache import BoxCache
from loractl.worker.protocol.messages import KnownFile

NOON = dt.datetime(2026, 1, 14, 12, tzinfo=dt.UTC)


class Jobs:
    """Jobs of one box, and the rows of what they have left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.notes = folder, dict[str, str](), list[str]()

    def cache(self, *about: object) -> BoxCache:
        known = [KnownFile(key=key, sha256=sha256, job_id=7, at=NOON) for key, sha256 in self.rows.items()]
        return BoxCache(
            folder=self.folder, known=known, about=about, tell=self.rows.__setitem__, note=self.notes.append
        )

    def write(self, question: str, content: bytes) -> None:
        cache = self.cache()
        cache.write(cache.key(question), content)

    def read(self, question: str, *about: object) -> bytes | None:
        cache = self.cache(*about)
        found = cache.read(cache.key(question))
        return None if found is None else found.content

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "measured")


def test_a_later_job_reads_what_an_earlier_one_left_for_its_own_question_alone(jobs: Jobs) -> None:
    jobs.write("a", b"losses")
    assert jobs.read("a") == b"losses" and jobs.read("b") is None and jobs.read("a", "another base") is None
    assert jobs.notes == []
    assert [stat.S_IMODE(path.stat().st_mode) for path in jobs.files] == [0o600]


def test_nothing_is_read_without_its_row(jobs: Jobs) -> None:
    jobs.write("a", b"losses")
    jobs.rows.clear()
    assert jobs.read("a") is None


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "", "x" * 64, "0" * 65])
def test_a_row_leads_to_no_other_file(jobs: Jobs, name: str, tmp_path: Path) -> None:
    """Whoever writes rows by hand names no file by them."""
    (tmp_path / "secret").write_text("secret")
    jobs.rows[jobs.cache().key("a")] = name
    assert jobs.read("a") is None and (tmp_path / "secret").exists()


def test_a_file_that_made_room_is_only_missing(jobs: Jobs) -> None:
    jobs.write("a", b"losses")
    jobs.files[0].unlink()
    assert jobs.read("a") is None and jobs.notes == []


def test_another_content_under_the_name_is_thrown_away(jobs: Jobs) -> None:
    jobs.write("a", b"losses")
    (file,) = jobs.files
    file.write_bytes(b"lossez")
    assert jobs.read("a") is None
    assert jobs.notes == [f"{file} is thrown away: it is not as it was written"] and jobs.files == []


def test_a_swollen_file_is_not_read_to_its_end(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.write("a", b"losses")
    monkeypatch.setattr(box_cache, "MOST_OF_ONE", 1000)
    os.truncate(jobs.files[0], 2**40)
    assert jobs.read("a") is None and "thrown away" in jobs.notes[0]


def test_the_files_that_were_not_used_for_the_longest_time_make_room(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_cache, "MOST_FILES", 3)
    for age, question in enumerate("abc"):
        jobs.write(question, question.encode() * 10)
        os.utime(jobs.folder / jobs.rows[jobs.cache().key(question)], (age, age))
    assert jobs.read("a") is not None  # used now
    jobs.write("d", b"d" * 10)
    assert [jobs.read(question) is not None for question in "abcd"] == [True, False, True, True]
    monkeypatch.setattr(box_cache, "MOST_BYTES", 25)
    jobs.write("e", b"e" * 10)
    assert len(jobs.files) == 2


def test_a_content_that_is_too_large_is_not_left(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(box_cache, "MOST_OF_ONE", 5)
    jobs.write("a", b"losses")
    assert jobs.rows == {} and not jobs.folder.exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing_and_ends_no_job(full_disk: Path) -> None:
    jobs = Jobs(full_disk / "measured")
    jobs.write("a", b"x" * 100_000)
    assert jobs.rows == {} and jobs.notes == []
    assert list(full_disk.rglob("part-*")) == []
    jobs.write("b", b"small enough")
    assert jobs.read("b") == b"small enough"


def test_a_folder_that_is_closed_is_named_in_the_history(tmp_path: Path) -> None:
    (tmp_path / "measured").write_text("a file in the folder's place")
    jobs = Jobs(tmp_path / "measured")
    jobs.write("a", b"losses")
    assert jobs.rows == {} and "nothing is left for later jobs" in jobs.notes[0]


def _write_often(folder: Path, content: bytes, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    for _ in range(200):
        Jobs(folder).write("a", content)


def test_two_trainers_that_write_one_key_at_once_leave_whole_files(jobs: Jobs) -> None:
    contents = [bytes([65 + n]) * 50_000 for n in range(2)]
    started = multiprocessing.get_context("fork")
    barrier = started.Barrier(2)
    writers = [started.Process(target=_write_often, args=(jobs.folder, one, barrier)) for one in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(path.read_bytes() for path in jobs.files) == contents
    for content in contents:  # whichever the database names
        jobs.write("a", content)
        assert jobs.read("a") == content
    assert jobs.notes == []
