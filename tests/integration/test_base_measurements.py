"""A box measures a base once for the jobs that ask the same of it, and believes nothing that was changed since."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.status import Reason, Stage
from loractl.worker.base import source
from loractl.worker.base.box_cache import BoxCache
from loractl.worker.evaluation import evaluation as measuring
from loractl.worker.protocol.messages import FileKept, KnownFile, Note, StageChanged, Start
from loractl.worker.recipe import fit
from loractl.worker.recipe.recipe import train
from loractl.worker.recipe.reference import FrozenReference
from loractl.worker.recipe.run import Run, Stopped

from ..models import write_helpdesk

NOON = dt.datetime(2026, 1, 14, 12, tzinfo=dt.UTC)


class Box:
    """Runs jobs one after another, and lists for each what those before it have left, as the database does."""

    def __init__(self, start: Callable[..., Start], folder: Path) -> None:
        self.start, self.folder, self.known = start, folder, dict[str, KnownFile]()
        self.jobs = 0
        self.notes = list[str]()  # of the last job

    def run(self, **keys: Any) -> dict[str, Any]:
        """The report of the next job."""
        self.jobs += 1
        told = list[Any]()
        order = self.start(f"job-{self.jobs}", job_id=self.jobs, **{"max_steps": 1, **keys})
        run = Run(order=order.model_copy(update={"kept": [*self.known.values()]}), tell=told.append)
        assert train(run).reason is Reason.OK
        for one in told:
            if isinstance(one, FileKept):
                self.known[one.key] = KnownFile(key=one.key, sha256=one.sha256, job_id=self.jobs, at=NOON)
        self.notes = [one.text for one in told if isinstance(one, Note) and one.kind in ("cache", "evaluation")]
        report: dict[str, Any] = json.loads((Path(order.output_dir) / "report.json").read_text())
        return report["evaluation"]

    @property
    def files(self) -> list[Path]:
        return sorted((self.folder / "measured").iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty one for each test, which are about what it keeps."""
    return tmp_path / "cache"


@pytest.fixture
def box(start: Callable[..., Start], cache: Path) -> Box:
    return Box(start, cache)


@pytest.fixture
def bases_measured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for each model that is measured in full: whether it is the base."""
    seen, measure = list[bool](), measuring._measure

    def watched(*args: Any, base: bool) -> Any:
        seen.append(base)
        return measure(*args, base=base)

    monkeypatch.setattr(measuring, "_measure", watched)
    return seen


def numbers(report: dict[str, Any]) -> Any:
    """All that a report measured, without who measured it and how long it took."""
    return {
        key: value for key, value in report.items()
        if key not in ("seconds", "base_measured_by_job", "base_measured_at", "base_rows_measured_again")
    }  # fmt: skip


def test_a_sweep_measures_its_base_once_and_reports_the_same_numbers(
    box: Box, cache: Path, bases_measured: list[bool]
) -> None:
    """Whatever its members vary of the adapter, the seed and the batch: the base's results are the same bits."""
    varied: dict[str, Any] = {
        "lora": {"r": 8, "target_modules": ["q_proj"], "use_dora": True}, "learning_rate": 1e-2, "seed": 5,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    first, second = box.run(), box.run(**varied)
    assert bases_measured == [True, False, False]
    assert (first["base_measured_by_job"], second["base_measured_by_job"]) == (None, 1)
    assert second["base_measured_at"] == NOON.isoformat() and second["base_rows_measured_again"] > 0
    assert any("job 1" in note and "2026-01-14" in note for note in box.notes)
    box.known.clear()
    alone = box.run(**varied)
    assert bases_measured[3:] == [True, False]
    assert numbers(alone) == numbers(second)
    assert [stat.S_IMODE(path.stat().st_mode) for path in box.files] == [0o600]


OTHERWISE: dict[str, dict[str, Any]] = {
    "number format": {"dtype": "float32"},
    "exact mode": {"exact": True},
    "attention": {"attn_implementation": "eager"},
    "longer answers": {"evaluation": {"max_new_tokens": 7}},
    "fewer answers": {"evaluation": {"samples": 1}},
    "other batches": {"evaluation": {"per_device_eval_batch_size": 3}},
    "NF4": {"method": "qlora"},
    "a job that repeats another": {"job": {"labels": {"reproduces": "1"}}},
}


@pytest.mark.long
def test_what_changes_the_base_s_results_has_it_measured(box: Box, tmp_path: Path, bases_measured: list[bool]) -> None:
    box.run()
    data = write_helpdesk(tmp_path / "others.jsonl")
    data.write_text(data.read_text().replace("broken", "slow"))
    for what, keys in (*OTHERWISE.items(), ("rows", {"dataset": {"path": str(data)}})):
        del bases_measured[:]
        assert box.run(**keys)["base_measured_by_job"] is None, what
        assert bases_measured == [True, False], what


@pytest.mark.long
def test_another_base_under_the_same_name_is_measured(box: Box, tiny_model: Path) -> None:
    box.run()
    weights = tiny_model / "model.safetensors"
    content, dates = weights.read_bytes(), weights.stat()
    weights.write_bytes(content[:-4] + bytes([content[-4] ^ 64]) + content[-3:])
    os.utime(weights, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert box.run()["base_measured_by_job"] is None


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_file_that_was_changed_is_thrown_away_and_the_history_says_so(box: Box, bases_measured: list[bool]) -> None:
    first = box.run()
    (file,) = box.files
    one_bit(file)
    second = box.run()
    assert bases_measured == [True, False] * 2 and second["base_measured_by_job"] is None
    assert any(f"{file} is thrown away: it is not as it was written" in note for note in box.notes)
    assert numbers(first)["row_losses"] == numbers(second)["row_losses"]
    assert box.run()["base_measured_by_job"] == 2


@pytest.mark.long
def test_a_file_that_the_database_does_not_know_is_not_read(box: Box, bases_measured: list[bool]) -> None:
    box.run()
    (file,) = box.files
    forged = json.loads(file.read_bytes())
    forged["rows"]["loss"][0] += 1
    box.known.clear()
    file.write_text(json.dumps(forged))
    assert box.run()["base_measured_by_job"] is None
    assert bases_measured == [True, False] * 2


@pytest.mark.long
def test_figures_that_no_longer_come_out_are_thrown_away(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is right, but what decides the result has changed in a way that the key does not name."""
    box.run()
    score = measuring.score_rows

    def drifted(*args: Any, **options: Any) -> Any:
        scores = score(*args, **options)
        scores.loss[:] *= 1 + 2**-50
        return scores

    monkeypatch.setattr(measuring, "score_rows", drifted)
    assert box.run()["base_measured_by_job"] is None
    assert any("are other ones now" in note for note in box.notes)
    assert box.run()["base_measured_by_job"] == 2


def test_a_base_measured_in_smaller_batches_is_left_to_nobody(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller batches round differently."""
    measure = measuring.score_rows

    def short_of_memory(*args: Any, **options: Any) -> Any:
        args[6]() if len(args) > 6 else None
        return measure(*args, **options)

    monkeypatch.setattr(measuring, "score_rows", short_of_memory)
    box.run()
    assert box.known == {}


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """What a job on pairs asks, for two epochs of few batches."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"item {n}?"}],
            "chosen": [{"role": "assistant", "content": f"number {n * 3}"}],
            "rejected": [{"role": "assistant", "content": f"bad {n % 5}"}],
        }
        for n in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"path": str(tmp_path / "pairs.jsonl"), "test_size": 0.25}
    return {"job": {"task_type": "preference"}, "dataset": dataset, "max_steps": 6, "evaluation": {"samples": 0}}


@pytest.fixture
def pairs_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each call of a reference scored."""
    seen, score = list[int](), FrozenReference._scored

    def watched(self: FrozenReference, texts: Any) -> Any:
        seen.append(len(texts) // 2)
        return score(self, texts)

    monkeypatch.setattr(FrozenReference, "_scored", watched)
    return seen


def weights(box: Box, tmp_path: Path) -> bytes:
    return (tmp_path / f"job-{box.jobs}" / "result" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_pairs_are_scored_with_the_base_once_and_the_adapter_is_the_same(
    box: Box, pairs: dict[str, Any], pairs_scored: list[int], tmp_path: Path
) -> None:
    box.run(**pairs)
    first, own = sum(pairs_scored), weights(box, tmp_path)
    assert first == 12
    del pairs_scored[:]
    box.run(**pairs)
    assert sum(pairs_scored) == 4, "one micro-batch, to compare it"
    assert any("job 1 has scored 12 pairs with the base on this box; 4 of them" in note for note in box.notes)
    assert weights(box, tmp_path) == own
    del pairs_scored[:]
    box.run(**pairs, lora={"r": 8}, learning_rate=1e-3)
    shared = weights(box, tmp_path)
    assert sum(pairs_scored) == 4
    box.known.clear()
    box.run(**pairs, lora={"r": 8}, learning_rate=1e-3)
    assert weights(box, tmp_path) == shared


@pytest.mark.long
def test_pairs_that_passed_in_other_micro_batches_are_scored_again(
    box: Box, pairs: dict[str, Any], pairs_scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SmolLM2 two rows in a batch of four have other last bits than in a batch of two."""
    fit_once, failed = fit._fit_once, list[int]()

    def short_of_memory(run: Any, learner: Any, forward: Any, data: Any, *of: Any) -> str | None:
        if failed:
            return fit_once(run, learner, forward, data, *of)
        failed.append(1)
        forward.loss.meet([data.trained_rows[n] for n in range(4)])  # before the first step
        return "no room"

    monkeypatch.setattr(fit, "_fit_once", short_of_memory)
    box.run(**pairs)
    assert pairs_scored == [4] + [2] * 6
    for asked, scored in (
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, [2]),
        ({"train_sampling_strategy": "sequential"}, [4, 4, 4]),
        ({}, [4, 4, 4]),
    ):
        del pairs_scored[:]
        box.run(**pairs, **asked)
        assert pairs_scored == scored


@pytest.mark.long
def test_a_training_that_was_interrupted_leaves_no_scores(box: Box, pairs: dict[str, Any], tmp_path: Path) -> None:
    """It has scored its rows in the micro-batches of a later epoch."""
    box.run(**pairs, save_steps=5)
    kept = {file.sha256 for file in box.known.values()}
    box.known.clear()
    checkpoints = tmp_path / "job-1" / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-6")
    box.jobs = 0  # the same folders: it continues there
    box.run(**pairs, save_steps=5)
    assert [file.sha256 in kept for file in box.known.values()] == [True], "those of the held-out rows alone"


def test_a_stop_is_obeyed_while_a_large_base_is_hashed(
    start: Callable[..., Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = threading.Event()
    monkeypatch.setattr(source, "fingerprint", lambda *_: hashed.wait(60) and {})

    def tell(told: Any) -> None:
        if isinstance(told, StageChanged) and told.stage is Stage.EVALUATING:
            run.stop.came.set()

    run = Run(order=start("job", max_steps=1), tell=tell)
    began = time.monotonic()
    with pytest.raises(Stopped):
        train(run)
    assert time.monotonic() - began < 60
    hashed.set()


@pytest.mark.long
def test_scores_of_pairs_that_no_longer_come_out_are_thrown_away(
    box: Box, pairs: dict[str, Any], pairs_scored: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.run(**pairs)
    own, read = weights(box, tmp_path), BoxCache.read

    def drifted(self: BoxCache, key: str) -> Any:
        """As if the base had scored otherwise then."""
        found = read(self, key)
        if found is None or found.content.startswith(b"{"):
            return found
        content = bytearray(found.content)
        content[16::32] = bytes(byte ^ 1 for byte in content[16::32])  # the last bit of each first score
        return replace(found, content=bytes(content))

    monkeypatch.setattr(BoxCache, "read", drifted)
    del pairs_scored[:]
    box.run(**pairs)
    assert sum(pairs_scored) == 12 and weights(box, tmp_path) == own
    assert any("scores of 4 of its pairs are other ones now" in note for note in box.notes)


@pytest.mark.long
def test_changed_scores_of_pairs_are_not_learned_from(
    box: Box, pairs: dict[str, Any], pairs_scored: list[int], tmp_path: Path
) -> None:
    box.run(**pairs)
    own = weights(box, tmp_path)
    (file,) = [path for path in box.files if not path.read_bytes().startswith(b"{")]
    one_bit(file)
    del pairs_scored[:]
    box.run(**pairs)
    assert sum(pairs_scored) == 12 and weights(box, tmp_path) == own
    assert any("not as it was written" in note for note in box.notes)
