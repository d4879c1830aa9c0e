"""What a box that lost its power may have left half written is not built upon."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loractl.common.artifacts import ArtifactStore, checkpoint_prefix, manifest_sha256, sha256_of
from loractl.common.data.examples import Example
from loractl.common.errors import StoreFailed
from loractl.common.job.identity import data_digest, training_digests
from loractl.common.job.method import Method
from loractl.common.job.sections import DataFormat, DatasetSpec
from loractl.common.job.status import Reason
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, StoredCheckpoint
from loractl.common.store.store import Store
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.order import stored_checkpoint
from loractl.worker.attempt.result import mark_ready, ready_result, take_ready
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.data.token_set import RowTokenizer
from loractl.worker.data.tokens import TokenRow
from loractl.worker.device.devices import CpuDevice
from loractl.worker.protocol.marker import MARKER, close_checkpoint, is_complete, newest_checkpoint
from loractl.worker.protocol.messages import Peaks

from ...held_lab import HeldLab
from .. import factories


def claim(attempt: int = 1, checkpoint: StoredCheckpoint | None = None) -> Claim:
    return Claim(
        job_id=1, attempt=attempt, token=f"token-{attempt}", user="ada", spec=factories.spec(), data={},
        submitted_at=factories.NOON, method=Method.LORA, vram_planned=None, checkpoint=checkpoint,
    )  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """An attempt's folder whose result is complete."""
    adapter = tmp_path / "attempt-1" / "result" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    mark_ready(tmp_path / "attempt-1", claim(), "6 steps")
    return tmp_path / "attempt-1"


def test_a_finished_result_is_taken_over_by_the_next_attempt(finished: Path) -> None:
    assert ready_result(finished, claim(attempt=2)) == "6 steps"


def test_a_log_that_grew_with_each_attempt_to_store_the_result_does_not_spoil_it(finished: Path) -> None:
    log = finished / "result" / "log.txt"
    log.write_text("stores 2 files\n")
    note = json.loads((finished / "ready.json").read_text())
    note["files"]["log.txt"] = sha256_of(log)  # as an earlier version noted it
    (finished / "ready.json").write_text(json.dumps(note))
    log.write_text("stores 2 files\nstores 2 files\n")
    assert ready_result(finished, claim(attempt=3)) == "6 steps"
    mark_ready(finished, claim(attempt=3), "6 steps")
    log.unlink()
    assert ready_result(finished, claim(attempt=4)) == "6 steps", "the log is no part of what is compared"


@pytest.mark.parametrize(
    "other",
    [{"spec": factories.spec(lora={"r": 4})}, {"method": Method.QLORA}, {"data": {"path": {"sha256": "f" * 64}}}],
    ids=lambda other: next(iter(other)),
)
def test_a_result_of_another_spec_method_or_data_is_not_taken_over(finished: Path, other: dict[str, Any]) -> None:
    assert ready_result(finished, replace(claim(attempt=2), **other)) is None


@pytest.mark.parametrize("torn", ["truncated", "gone", "note"])
def test_a_torn_result_is_not_taken_over(finished: Path, torn: str) -> None:
    weights = finished / "result" / "adapter" / "adapter_model.safetensors"
    if torn == "truncated":
        weights.write_bytes(b"weig")
    elif torn == "gone":
        weights.unlink()
    else:
        note = finished / "ready.json"
        note.write_bytes(note.read_bytes()[:-5])
    assert ready_result(finished, claim(attempt=2)) is None


def test_a_result_that_was_taken_over_outlives_an_attempt_that_is_killed_before_it_stores_it(tmp_path: Path) -> None:
    made = tmp_path / "1" / "attempt-1"
    (made / "result" / "adapter").mkdir(parents=True)
    (made / "result" / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (made / "log.txt").write_text("trains\n")
    mark_ready(made, claim(), "6 steps")
    for attempt in (2, 3):
        state = begin(claim(attempt), tmp_path)
        (state.folder / "result").mkdir(parents=True)
        assert take_ready(state) == "6 steps"
        assert state.heard.ended is None, (
            "the supervisor's thread alone says so: the attempt may be stopped at this moment"
        )
    assert (state.folder / "result" / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


def checkpoint(folder: Path, step: int = 5) -> Path:
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(100))
    close_checkpoint(folder, step=step, finished=False, belongs_to={})
    return folder


def workplace(home: Path) -> Workplace:
    settings = load_settings({"LORACTL_HOME": str(home)})
    return Workplace(
        settings=settings, store=Store(make_engine(settings.database_url)), device=CpuDevice(total=1), node="box:0",
        artifacts=StoreClient(settings.artifacts_url), drain=Drain(),
    )  # fmt: skip


def second(place: Workplace, kept: StoredCheckpoint) -> SupervisedAttempt:
    return begin(claim(attempt=2, checkpoint=kept), place.settings.work_dir)


@pytest.mark.parametrize("whole", [True, False])
def test_a_stored_checkpoint_is_fetched_when_the_local_one_is_torn(tmp_path: Path, whole: bool) -> None:
    place = workplace(tmp_path)
    settings, artifacts = place.settings, place.artifacts
    local = checkpoint(settings.work_dir / "1" / "attempt-1" / "checkpoints" / "checkpoint-5")
    kept = StoredCheckpoint(step=5, prefix=checkpoint_prefix(1, 1, 5))
    artifacts.put_result(local, kept.prefix)
    if not whole:
        (local / "optimizer.pt").write_bytes(bytes(50))
    assert (local / MARKER).exists() and is_complete(local) is whole
    fetched = stored_checkpoint(place, second(place, kept))
    assert bool(fetched) is not whole
    assert all(is_complete(folder / "checkpoint-5") for folder in fetched)


def test_a_store_that_fails_at_this_moment_loses_no_checkpoint(tmp_path: Path) -> None:
    """An attempt that began anew would soon store one of its own, and remove this one."""
    place = workplace(tmp_path)
    kept = StoredCheckpoint(step=5, prefix=checkpoint_prefix(1, 1, 5))
    place.artifacts.put_result(checkpoint(tmp_path / "saved"), kept.prefix)
    (stored,) = (tmp_path / "artifacts").rglob("optimizer.pt")
    aside = stored.rename(stored.with_name("aside"))
    stored.mkdir()  # reading it is an error of the disk, also for root
    with pytest.raises(StoreFailed):
        stored_checkpoint(place, second(place, kept))
    stored.rmdir()
    aside.rename(stored)
    assert stored_checkpoint(place, second(place, kept))


def test_a_stored_checkpoint_that_somebody_has_replaced_is_not_resumed_and_the_history_says_so(tmp_path: Path) -> None:
    place, told = workplace(tmp_path), list[str]()
    saved = place.artifacts.put_result(checkpoint(tmp_path / "saved"), checkpoint_prefix(1, 1, 5))
    kept = StoredCheckpoint(step=5, prefix=checkpoint_prefix(1, 1, 5), manifest_sha256=manifest_sha256(saved))
    folder = place.settings.work_dir / "1" / "stored"

    def fetch(named: StoredCheckpoint) -> list[Path]:
        attempt = second(place, named)
        found = stored_checkpoint(place, attempt)
        told[:] = [f"{kind}: {text}" for kind, text in attempt.unwritten.progress(Peaks()).events]
        return found

    assert fetch(kept) and told == []
    (tmp_path / "saved" / "optimizer.pt").write_bytes(bytes(99))
    close_checkpoint(tmp_path / "saved", step=5, finished=False, belongs_to={})
    place.artifacts.put_result(tmp_path / "saved", kept.prefix)
    assert fetch(kept) == [] and not (folder / "checkpoints" / "checkpoint-5").exists()
    assert told[0].startswith("refused: the stored checkpoint of step 5 is not resumed: ")
    assert "was changed after it was stored" in told[0]
    assert fetch(replace(kept, manifest_sha256=None)), "a row of an earlier version does not know"
    assert told == ["data: the stored checkpoint of step 5 is not bound to its row: an earlier version stored it"]


def test_what_82e4d97_finished_or_saved_is_taken_up(finished: Path, tmp_path: Path) -> None:
    """Literally what that version wrote: an upgrade in the middle of a job loses nothing."""
    note = finished / "ready.json"
    asked = ["bdd90f4c1885ad4e5c7c43b00d66cad0a50e5c2a95ac2569176107b866ddc1d4", "lora"]
    note.write_text(json.dumps({**json.loads(note.read_text()), "belongs_to": asked}))
    assert ready_result(finished, claim(attempt=2)) == "6 steps"
    saved = {
        "base_model": "a61be99b886dec9acfcbc5a23ce0755abc4586ff0827e1a9bf564696f2ac20d3",
        "lora": "ade5d30e1cc9ed78f106552968754205ff8096764873d1f4400605e9da64b743",
        "training": "72aa59a87daef9815ee2cd0add0dccba25d9b5e514f56a4280061a037b2d78a0",
        "method": "513a7768777572ee4836e3c13975a149196ea13e7c727be25e9f0254cf4b635e",
        "data": "ba047fca367ceac379559fade687fe16271db7b3f8a9d68542ee55fd7a6dadb0",
    }
    (folder := tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    close_checkpoint(folder, step=5, finished=False, belongs_to=saved)
    now = training_digests(factories.spec(), Method.LORA, data_digest([[[1, 2, 3], []], [[4, 5], [0]]]))
    assert newest_checkpoint([folder.parent], now) is not None
    changed = training_digests(
        factories.spec(lora={"r": 8}), Method.LORA, data_digest([[[1, 2, 3], []], [[4, 5], [0]]])
    )
    assert newest_checkpoint([folder.parent], changed) is None


@dataclass(eq=False)
class Tokens:
    """Makes the tokens of some rows, and counts how often."""

    cache: Path
    made: int = 0
    summed: int = 0

    def __call__(self, text: str, **_: object) -> Any:
        self.made += 1
        ids = [ord(letter) for letter in text]
        return SimpleNamespace(input_ids=ids, offset_mapping=[(n, n + 1) for n in range(len(ids))])

    chat_template, eos_token, eos_token_id, is_fast = None, "", 3, True

    def get_vocab(self) -> dict[str, int]:
        self.summed += 1
        return {}

    def tokeniser(self) -> RowTokenizer:
        dataset = DatasetSpec(path="/rows.jsonl", max_length=64)
        return RowTokenizer(dataset=dataset, tokenizer=self, format=DataFormat.TEXT, cache=self.cache)

    def kept(self) -> list[TokenRow]:
        examples = [Example(number=1, text="here is a row")]
        return list(self.tokeniser().tokenise(examples, "to train on", "rows.jsonl").rows)

    def files(self) -> Path:
        (folder,) = (self.cache / "tokenised").iterdir()
        return folder


@pytest.mark.parametrize("torn", ["empty", "zeroed", "gone", "counts"])
def test_torn_tokens_are_made_again(tmp_path: Path, torn: str) -> None:
    tokens = Tokens(tmp_path)
    rows = tokens.kept()
    assert tokens.kept() == rows and tokens.made == 1
    file = tokens.files() / ("counts.json" if torn == "counts" else "input_ids.npy")
    content = file.read_bytes()
    file.unlink()
    if torn != "gone":
        file.write_bytes({"empty": b"", "zeroed": content[:-8] + bytes(8), "counts": content[:-5]}[torn])
    assert tokens.kept() == rows and tokens.made == 2
    assert tokens.kept() == rows and tokens.made == 2


def test_tokens_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, rename = set[str](), Path.rename
    monkeypatch.setattr(os, "fsync", lambda place: synced.add(Path(f"/proc/self/fd/{place}").readlink().name))

    def named(aside: Path, target: Path) -> Path:
        assert synced == {aside.name} | {path.name for path in aside.iterdir()} and len(synced) > 3
        synced.clear()
        return rename(aside, target)

    monkeypatch.setattr(Path, "rename", named)
    assert Tokens(tmp_path).kept() and not synced


def test_a_tokenizer_is_summed_once_for_all_sides_of_a_job_s_rows(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    tokeniser = tokens.tokeniser()
    for side, text in (("to train on", "here is a row"), ("held out", "here is another")):
        assert tokeniser.tokenise([Example(number=1, text=text)], side, "rows.jsonl")
    assert (tokens.made, tokens.summed) == (2, 1)


@pytest.mark.parametrize("older", ["whole", "broken"])
def test_a_broken_checkpoint_is_withdrawn_everywhere_then_an_older_one_is_tried_then_a_fresh_start(
    held: HeldLab, older: str
) -> None:
    """On the box's disk and in the store, in one attempt that spends no retry; the history has a line for each."""
    held.start()
    job_id = held.submit("--set=training.save_steps=5", "--set=max_retries=0", steps=40)
    held.until(job_id, lambda job: (job.checkpoint or {}).get("step") == 10)
    held.stop(how="now")
    saved = held.settings().work_dir / str(job_id) / "attempt-1" / "checkpoints"
    for folder in sorted(saved.glob("checkpoint-*")):
        if older == "broken" or folder.name != "checkpoint-5":
            (folder / "trainer_state.json").write_text("[]")  # as many bytes as its marker says
    kept, artifacts = held.store.jobs.get(job_id).checkpoint, ArtifactStore(held.settings().artifacts_url)
    assert kept is not None
    again = artifacts.put_result(saved / "checkpoint-10", kept["prefix"])
    held.change(job_id, checkpoint={**kept, "manifest_sha256": manifest_sha256(again)})
    held.start()
    held.until(job_id, lambda job: job.checkpoint is None, seconds=6)
    held.until(job_id, lambda job: (job.checkpoint or {}).get("step", 0) > 10)
    assert not list(held.home.glob(f"artifacts/jobs/{job_id}/checkpoints/1-10/*"))
    held.until(job_id, lambda job: job.status == "succeeded")
    assert held.reasons(job_id) == [Reason.DRAINED, Reason.OK]
    assert held.store.jobs.get(job_id).retries_used == 0
    told = [event.text for event in held.store.jobs.events(job_id) if event.kind in ("withdrawn", "resumed")]
    broken = "the checkpoint of step 10 can't be read; it is withdrawn"
    last = "resumed" if older == "whole" else "the checkpoint of step 5 can't be read; it is withdrawn on this box"
    assert told == [f"{broken} on this box", f"{broken} from the artifact store", last]
