"""What is fixed of a job that runs again, and what is said beforehand of what can't be the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import UsageError
from loractl.common.fingerprint import fingerprint
from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Checkpointing, Method
from loractl.common.job.status import Reason
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import load_settings
from loractl.common.store.records import HELD_OUT_LOSS, Claim, NodeState, Progress
from loractl.common.store.store import Store
from loractl.scheduler.reproduce.answer import Repetition, plan_repetition, submission_of
from loractl.scheduler.submit.ancestor import settle_predecessors

from ....databases import SQLITE_ALONE
from ...factories import RESULT, node_state, spec, submission, take

pytestmark = SQLITE_ALONE

VERSIONS = {"loractl": "0.9", "torch": "2.13.0"}


def report(**changed: Any) -> dict[str, Any]:
    """What a repetition needs of a report."""
    training = {
        "precision": "bfloat16", "optim": "paged_adamw_8bit", "adjustment": {}, "changes": [],
        "resumed_from_step": None, "per_device_train_batch_size": 4,
    }  # fmt: skip
    training |= changed.pop("training", {})
    base = {"commit": "c" * 40, "sha256": "b" * 64, "files": {}}
    return {"method": "qlora", "base": base, "versions": VERSIONS, "data": {}, "training": training, **changed}


def again(
    store: Store, tmp_path: Path, found: dict[str, Any], *, others: Sequence[NodeState] = (), **keys: Any
) -> Repetition:
    """A job that has run once on an A40, planned to run again where `others` are online too."""
    job_id = store.jobs.submit(submission(**keys))
    take(store, versions=VERSIONS)
    for node in others:
        store.cards.see(node)
    return plan_repetition(store.jobs.get(job_id), found, store, load_settings({"LORACTL_HOME": str(tmp_path)}))


def told(repetition: Repetition) -> dict[str, tuple[str, str]]:
    return {caveat.what: (caveat.then, caveat.now) for caveat in repetition.caveats}


def test_what_was_left_to_the_worker_is_fixed_to_what_it_took(store: Store, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"lora_patience": "1h", "revision": "main", "labels": {"a": "b"}, "training": {"seed": 5}}
    repetition = again(store, tmp_path, report(), **keys)
    fixed, asked = repetition.spec, spec(**keys)
    assert (fixed.method, fixed.lora_patience, fixed.revision) == (Method.QLORA, None, "c" * 40)
    assert (fixed.training.dtype, fixed.training.optim) == ("bfloat16", "paged_adamw_8bit")
    assert fixed.labels == {"a": "b", "reproduces": "1"}
    assert fixed.lora == asked.lora and fixed.training.seed == 5 and fixed.dataset == asked.dataset


@pytest.mark.parametrize("recomputed", [False, "half"])
def test_whether_it_recomputed_is_fixed_with_the_pieces_of_its_room(
    recomputed: Checkpointing, store: Store, tmp_path: Path
) -> None:
    room = Adjustment(micro_batch=2, accumulation=8, gradient_checkpointing=recomputed)
    told = {"gradient_checkpointing": recomputed, "adjustment": room.as_json()}
    repetition = again(store, tmp_path, report(training=told))
    assert repetition.spec.training.gradient_checkpointing == recomputed
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    job_id = store.jobs.submit(submission_of(repetition, settings, store))
    claim = take(store, node="box:1")
    assert isinstance(claim, Claim) and (claim.job_id, claim.adjustment) == (job_id, room), "no placement changes it"
    asked = again(store, tmp_path, report(training=told), training={"gradient_checkpointing": True})
    assert asked.spec.training.gradient_checkpointing is True


def test_what_the_job_file_said_is_not_overruled(store: Store, tmp_path: Path) -> None:
    repetition = again(store, tmp_path, report(), training={"optim": "lion_8bit", "dtype": "float32"})
    assert (repetition.spec.training.dtype, repetition.spec.training.optim) == ("float32", "lion_8bit")


def test_the_new_job_begins_in_the_pieces_in_which_the_first_one_ended(store: Store, tmp_path: Path) -> None:
    smaller = Adjustment(micro_batch=1, accumulation=16, eval_batch=2)
    repetition = again(store, tmp_path, report(training={"adjustment": smaller.as_json()}))
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    job_id = store.jobs.submit(submission_of(repetition, settings, store))
    assert store.jobs.get(job_id).adjustment == smaller.as_json()
    assert store.jobs.get(job_id).spec["training"]["per_device_train_batch_size"] == 4, "what was asked for stays"
    claim = take(store, node="free:0", free=2**40)
    assert claim is not None and getattr(claim, "adjustment", None) == smaller


def test_data_of_the_hub_are_held_at_the_commit_that_was_read(store: Store, tmp_path: Path) -> None:
    more = [{"path": "org/more", "share": 0.1}]
    keys = {
        "dataset": {"path": "org/data@v1", "more": more, "eval_path": "org/held"},
        "evaluation": {"regression": "org/other"},
    }
    commits = {"path": "1" * 40, "more.0": "4" * 40, "eval_path": "2" * 40, "regression": "3" * 40}
    repetition = again(store, tmp_path, report(data={"commits": commits}), **keys)
    assert repetition.spec.data_sets() == {
        "path": f"org/data@{'1' * 40}", "more.0": f"org/more@{'4' * 40}", "eval_path": f"org/held@{'2' * 40}",
        "regression": f"org/other@{'3' * 40}",
    }  # fmt: skip
    assert repetition.spec.dataset.more[0].share == 0.1
    assert told(repetition) == {}


def test_an_equal_lab_leaves_only_the_hub_s_data_open(store: Store, tmp_path: Path) -> None:
    assert told(again(store, tmp_path, report())).keys() == {"dataset.path"}


def test_other_versions_and_devices_are_named_with_a_card_that_has_them(store: Store, tmp_path: Path) -> None:
    newer = node_state("new:0", device_name="NVIDIA H100", versions={"loractl": "0.9", "torch": "2.14.0"})
    silent = node_state("old:0", versions={"loractl": "0.9"})
    found = told(again(store, tmp_path, report(), others=[newer, silent]))
    assert found["torch"] == ("2.13.0", "2.14.0 on new:0, a worker that does not say on old:0")
    assert found["device"] == ("NVIDIA A40", "NVIDIA H100 on new:0")
    assert "loractl" not in found


def test_a_change_in_mid_training_is_told_and_one_before_it_is_not(store: Store, tmp_path: Path) -> None:
    text = "out of memory at step 5 with 8 rows at once: restarts with 4"
    changed = {"changes": [text], "adjustment": {"micro_batch": 4, "accumulation": 4}}
    assert "batch" not in told(again(store, tmp_path, report(training=changed)))
    resumed = again(store, tmp_path, report(training={**changed, "resumed_from_step": 4}))
    assert told(resumed)["batch"] == (text, "4 rows at once from the first step")


def test_another_date_in_the_prompts_is_named(store: Store, tmp_path: Path) -> None:
    dated = {day: {"data": {"prompt_date": day}} for day in ("2026-01-14", store.now().date().isoformat())}
    found = [told(again(store, tmp_path, report(**one))).get("date in the prompts") for one in dated.values()]
    assert found == [("2026-01-14", list(dated)[1]), None]


def test_jobs_in_the_same_trainer_are_named(store: Store, tmp_path: Path) -> None:
    assert "other jobs in its trainer" not in told(again(store, tmp_path, report()))
    beside = again(store, tmp_path, report(training={"companions": [3, 4]}))
    assert told(beside)["other jobs in its trainer"] == ("3, 4", "none")


def test_a_base_in_a_folder_is_compared_by_its_files(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    base = {"commit": None, "sha256": "b" * 64, "files": fingerprint(folder, tmp_path)}
    keys = {"base_model": str(folder)}
    assert "base model" not in told(again(store, tmp_path, report(base=base), **keys))
    (folder / "config.json").write_text("{ }")
    assert told(again(store, tmp_path, report(base=base), **keys))["base model"][1] == "config.json changed"
    (folder / "config.json").unlink()
    folder.rmdir()
    assert "not on this machine" in told(again(store, tmp_path, report(base=base), **keys))["base model"][1]


def test_a_report_of_an_earlier_version_is_repeated_with_what_it_does_not_say(store: Store, tmp_path: Path) -> None:
    older = report()
    del older["base"]
    repetition = again(store, tmp_path, older, revision="v1")
    assert repetition.spec.revision == "v1"
    assert told(repetition)["base model"] == ("its commit is not in the report", "revision v1 as it is today")


def test_a_job_without_room_for_a_label_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 32 labels, so that none is left"):
        again(store, tmp_path, report(), labels={str(n): "x" for n in range(32)})


def test_it_begins_from_the_member_that_was_chosen_and_waits_for_nobody(store: Store, tmp_path: Path) -> None:
    new = NewSweep(name="tuned", varied={"lora.r": "16"})
    sweep_id = store.sweeps.submit(new, [submission(max_retries=0), submission(max_retries=0)])
    begun = settle_predecessors(spec(lora={"init_from": {"sweep": sweep_id}}), store)
    last = store.jobs.submit(replace(submission(), spec=begun))
    for loss in (0.5, None):
        end(store, loss)
    assert end(store, 0.3).spec.lora.init_from == "1"
    store.jobs.retry(2, "ada")
    end(store, 0.4)
    settings = load_settings({"LORACTL_HOME": str(tmp_path)})
    repetition = plan_repetition(store.jobs.get(last), report(base={}), store, settings)
    assert (repetition.spec.lora.init_from, repetition.spec.after, repetition.spec.after_any) == ("1", [], False)
    again = store.jobs.submit(submission_of(repetition, settings, store))
    assert store.jobs.get(again).spec["lora"]["init_from"] == "1" and not store.jobs.get(again).held


def end(store: Store, loss: float | None) -> Claim:
    """Let the next job end. None: it fails."""
    claim = take(store)
    assert isinstance(claim, Claim)
    measured = Progress() if loss is None else Progress(metrics=((1, HELD_OUT_LOSS, loss),))
    result = None if loss is None else RESULT
    store.attempts.finish(claim, Reason.BAD_DATA if loss is None else Reason.OK, "", measured, result)
    return claim
