"""A data set that is no file must be one that the hub can have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import DataError
from loractl.common.store.store import Store
from loractl.scheduler.submit.data import check_data, counted_data, store_data
from loractl.scheduler.submit.draft import like_job, rows_at_hand
from loractl.scheduler.submit.lengths import check_used_data

from ....databases import SQLITE_ALONE
from ...factories import spec, submission


@pytest.mark.parametrize(
    "name", ["json", "csv", "squad", "a/b/c", "hf://datasets/a/b", "no such file", "data@main", "a/b@", "a/b@../c"]
)
def test_a_name_that_is_neither_is_refused_at_submit(name: str) -> None:
    with pytest.raises(DataError, match="nor a data set on the hub") as caught:
        check_data(spec(dataset={"path": name}))
    assert "owner/name" in str(caught.value.hint)
    with pytest.raises(DataError, match="nor a data set on the hub"):
        check_data(spec(dataset={"path": "org/data", "eval_path": name}))


def test_rows_that_make_one_step_with_a_warm_up_as_long_are_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n} says something"}) + "\n" for n in range(8)))
    training = {"num_train_epochs": 1, "gradient_accumulation_steps": 8, "per_device_train_batch_size": 2}
    job = spec(dataset={"path": str(rows)}, training={**training, "warmup_steps": 1})
    with pytest.raises(DataError, match="the run has 1 step: its learning rate is 0, so nothing would be learned"):
        check_used_data(job)
    check_used_data(spec(dataset={"path": str(rows)}, training=training))


def test_a_hub_id_is_left_to_the_worker() -> None:
    check_data(spec(dataset={"path": "org/data", "eval_path": "org-2/data_set.v2"}))
    check_data(spec(dataset={"path": "org/data@refs/pr/1", "eval_path": "org/data@v1.0"}))


def test_what_is_stored_of_a_file_of_lines_says_how_many_rows_and_bytes_it_has(tmp_path: Path) -> None:
    lines, other = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    lines.write_text('{"text": "a"}\n\n{"text": "bcd"}')
    other.write_text("text\na\n")
    store = ArtifactStore(f"file://{tmp_path / 'store'}")
    wanted = spec(dataset={"path": str(lines), "eval_path": str(other)})
    stored = store_data(wanted, store)
    assert (stored["path"]["rows"], stored["path"]["bytes"]) == (2, 14 + 15)
    assert stored["path"]["tokens"] == 1, "four bytes of the texts for one"
    assert (stored["eval_path"]["rows"], stored["eval_path"]["tokens"]) == (1, 0)


def rows_in(file: Path, what: str, count: int) -> str:
    file.write_text("".join(json.dumps({"text": f"{what} number {n}"}) + "\n" for n in range(count)), "utf-8")
    return str(file)


def test_lines_that_end_in_cr_alone_are_stored_as_before_they_were_counted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\r".join(b'{"text": "row %d"}' % n for n in range(30)))
    stored = store_data(spec(dataset={"path": str(rows)}), ArtifactStore(f"file://{tmp_path / 'store'}"))
    assert stored["path"]["tokens"] == round(rows.stat().st_size / 4), "no line is JSON by itself"


def test_a_file_that_can_t_be_read_is_left_out_of_a_plan(tmp_path: Path) -> None:
    torn, good = tmp_path / "torn.csv", tmp_path / "good.csv"
    torn.write_text('prompt,completion\n"a,b\n')
    good.write_text("prompt,completion\nwhy,because\n")
    counted = counted_data(spec(dataset={"path": str(torn), "eval_path": str(good)}))
    assert counted == {"eval_path": {"rows": 1, "bytes": good.stat().st_size, "tokens": 2}}


def test_submit_says_how_many_rows_come_from_where_and_stores_each_file(tmp_path: Path) -> None:
    main, other = rows_in(tmp_path / "a.jsonl", "mine", 80), rows_in(tmp_path / "b.jsonl", "other", 900)
    wanted = spec(dataset={"path": main, "more": [{"path": other, "share": 0.2, "split": "train[:50%]"}]})
    (told,) = [finding for finding in check_data(wanted) if finding.kind == "several data sets"]
    assert told.text.startswith("80 rows of a.jsonl (") and ", 20 of the 450 rows of b.jsonl (" in told.text
    stored = store_data(wanted, ArtifactStore(f"file://{tmp_path / 'store'}"))
    assert stored.keys() == {"path", "more.0"} and stored["more.0"]["rows"] == 900
    Path(other).write_text('{"text": "good"}\n{"text": ""}\n' * 2, "utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl: row 2: text is empty"):
        check_data(wanted)


def test_rows_are_held_out_of_the_file_that_is_trained_on_by_slices(tmp_path: Path) -> None:
    file = rows_in(tmp_path / "a.jsonl", "mine", 100)
    sliced = {"path": file, "split": "train[:90%]", "eval_path": file, "eval_split": "train[90%:]", "test_size": None}
    assert not {finding.kind for finding in check_data(spec(dataset=sliced))} & {"overlap", "few held-out rows"}
    sliced["split"] = "train[:95%]"
    (overlap,) = [finding for finding in check_data(spec(dataset=sliced)) if finding.kind == "overlap"]
    assert overlap.count == 5
    with pytest.raises(DataError, match="whose only split is train"):
        check_data(spec(dataset={**sliced, "eval_split": "test"}))


@SQLITE_ALONE
def test_a_job_like_another_takes_its_stored_rows_but_for_those_that_it_names_itself(
    store: Store, tmp_path: Path
) -> None:
    main, other = rows_in(tmp_path / "a.jsonl", "mine", 40), rows_in(tmp_path / "b.jsonl", "other", 40)
    wanted = spec(dataset={"path": main, "more": [{"path": other, "share": 0.2}]})
    artifacts = ArtifactStore(f"file://{tmp_path / 'store'}")
    stored = store_data(wanted, artifacts)
    job_id = store.jobs.submit(replace(submission(dataset=wanted.dataset.model_dump()), data=stored))
    Path(main).unlink()
    Path(other).unlink()
    draft = like_job(store, job_id, ["dataset.split=train[:30]"])
    assert draft.stored == stored
    with rows_at_hand(draft, artifacts) as here:
        (told,) = [finding for finding in check_data(here) if finding.kind == "several data sets"]
        assert told.count == 38, "30, and a fifth of all"
    changed = like_job(store, job_id, ["dataset.more=[{path: org/data}]"])
    assert changed.stored.keys() == {"path"} and changed.spec.data_sets()["more.0"] == "org/data"


@SQLITE_ALONE
@pytest.mark.parametrize(
    ("override", "named", "kept"),
    [
        ("dataset={path: new.jsonl}", "path", {"regression"}),
        ("dataset={path: old.jsonl, more: [{path: new.jsonl}]}", "more.0", {"regression"}),
        ("evaluation={regression: new.jsonl}", "regression", {"path", "more.0"}),
        ("evaluation.regression=new.jsonl", "regression", {"path", "more.0"}),
    ],
)
def test_a_job_like_another_takes_no_stored_rows_for_a_section_that_is_written_anew(
    override: str, named: str, kept: set[str], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = rows_in(tmp_path / "old.jsonl", "old", 40), rows_in(tmp_path / "new.jsonl", "new", 30)
    wanted = spec(dataset={"path": old, "more": [{"path": old}]}, evaluation={"regression": old})
    artifacts = ArtifactStore(f"file://{tmp_path / 'store'}")
    stored = store_data(wanted, artifacts)
    job_id = store.jobs.submit(replace(submission(), spec=wanted, data=stored))
    draft = like_job(store, job_id, [override])
    assert draft.stored.keys() == kept
    assert draft.spec.data_sets()[named] == new
    assert store_data(draft.spec, artifacts, draft.stored)[named]["rows"] == 30
