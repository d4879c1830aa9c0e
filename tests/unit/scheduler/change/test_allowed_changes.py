"""Which keys of a submitted job may change, by how far it has come."""

from __future__ import annotations

from pathlib import Path

import pytest

from loractl.common.errors import SpecError, UsageError
from loractl.common.job.file import amended_spec
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec, spec_keys
from loractl.scheduler.change.amendment import WHILE_IT_RUNS, Amended, Standing, changes

from ...common.job.test_identity import OTHERWISE
from ...factories import spec

FREE = {
    "name", "labels", "priority", "preemptible", "max_retries", "lora_patience", "training.report_to", "method",
    "training.tracker.project", "training.tracker.run_name",
    "resources.max_vram", "resources.time_limit", "resources.node_labels",
    "training.gradient_checkpointing", "training.torch_compile",
}  # fmt: skip
"""What a job that has begun may still get: it runs elsewhere, later or in other pieces, and learns the same."""


VALUES = {
    **OTHERWISE,
    "name": "other", "labels": {"a": "b"}, "priority": 3, "preemptible": True, "max_retries": 5, "lora_patience": 60,
    "training.tracker.project": "tickets", "training.tracker.run_name": "first", "training.report_to": ["wandb"],
    "resources.max_vram": 2**34, "resources.time_limit": 60,
    "resources.node_labels": {"nvlink": "yes"},
}  # fmt: skip


def change(overrides: list[str], standing: Standing, *, in_sweep: bool = False, **keys: object) -> JobSpec:
    before = spec(**keys)
    after = amended_spec(before.model_dump(mode="json"), overrides, "job 3", Path("/"))
    Amended(
        job_id=3, standing=standing, taken=Method.LORA, in_sweep=in_sweep, before=before, after=after
    ).require_allowed()
    return after


def allowed(key: str, standing: Standing, *, in_sweep: bool = False) -> bool:
    before = spec()
    after = JobSpec.model_validate(_with(before.model_dump(mode="json"), key, VALUES[key]))
    amended = Amended(job_id=3, standing=standing, taken=Method.LORA, in_sweep=in_sweep, before=before, after=after)
    try:
        amended.require_allowed()
    except UsageError:
        return False
    return True


def _with(tree: dict, key: str, value: object) -> dict:
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        place = place[section]
    place[last] = value
    return tree


def test_each_key_is_open_or_refused_as_the_page_says() -> None:
    keys = [key for key in spec_keys() if key in VALUES]
    running = {key for key in keys if allowed(key, Standing.RUNNING)}
    assert running == set(WHILE_IT_RUNS)
    begun = {key for key in keys if allowed(key, Standing.BEGUN)}
    evaluated = {key for key in keys if key.startswith("evaluation.")} - {"evaluation.regression"}
    assert begun == FREE - {"method"} | evaluated, "its method was LoRA, which is no more permitted"
    assert {key for key in keys if allowed(key, Standing.BEGUN, in_sweep=True)} == begun - evaluated
    new = {key for key in keys if allowed(key, Standing.NEW)}
    data = {"dataset.max_length", "dataset.on_overflow"}
    assert {key for key in keys if key.startswith("dataset.")} & new == data
    assert {"base_model", "revision", "evaluation.regression"} & new == set()
    assert {"training.learning_rate", "lora.r", "training.seed", *FREE} <= new


def test_the_batch_may_be_cut_in_other_pieces_and_not_changed() -> None:
    same = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=8"]
    assert change(same, Standing.BEGUN).training.effective_batch == 16
    with pytest.raises(UsageError, match=r"training.per_device_train_batch_size can't change once job 3 has begun"):
        change(same[:1], Standing.BEGUN)


def test_a_job_that_has_begun_keeps_the_method_of_its_checkpoint() -> None:
    assert change(["method=lora"], Standing.BEGUN).method is Method.LORA
    with pytest.raises(UsageError, match="method can't change once job 3 has begun: it would be a different") as no:
        change(["method=qlora"], Standing.BEGUN)
    assert no.value.hint == "queue it as a new job: loractl submit --like 3 --set method=..."


def test_what_is_refused_names_every_key_and_what_is_left() -> None:
    with pytest.raises(UsageError) as no:
        change(["training.seed=4", "priority=2", "lora.r=8"], Standing.RUNNING)
    assert no.value.sentence == (
        "lora.r, training.seed can't change while job 3 runs; labels, preemptible, priority, resources.time_limit can"
    )
    assert no.value.hint == "queue it as a new job: loractl submit --like 3 --set lora.r=..."
    with pytest.raises(UsageError) as no:
        change(["max_retries=9"], Standing.RUNNING)
    assert no.value.hint == "stop it first: loractl cancel 3, then loractl retry 3 --set max_retries=..."
    with pytest.raises(UsageError, match="job 3 has these settings already"):
        change(["priority=0"], Standing.NEW)
    with pytest.raises(SpecError, match="priority"):
        change(["priority=high"], Standing.NEW)
    with pytest.raises(SpecError, match="lora_patience"):
        change(["lora_patience=2h"], Standing.NEW, method="lora")


def test_a_change_is_told_in_words() -> None:
    before, after = spec(), change(["resources.time_limit=2h", "resources.max_vram=20GiB", "labels.a=b"], Standing.NEW)
    told = sorted(map(str, changes(before, after)))
    assert told == [
        'labels {} -> {"a": "b"}', "resources.max_vram null -> 20.0 GiB", "resources.time_limit null -> 2 h 00 min",
    ]  # fmt: skip


def test_stored_paths_stay_as_they_are_and_new_ones_are_found_from_here(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    stored = spec(dataset={"path": str(tmp_path / "link" / "old.jsonl")})
    after = amended_spec(stored.model_dump(mode="json"), ["dataset.eval_path=rows.jsonl"], "job 3", tmp_path)
    assert after.dataset.path == stored.dataset.path
    assert (after.dataset.eval_path, after.dataset.test_size) == (str(tmp_path / "rows.jsonl"), None)
