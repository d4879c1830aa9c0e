"""The matrix as programs and people read it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loractl.common.artifacts import ArtifactStore, Binding
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.settings import load_settings
from loractl.worker.evaluation.comparison import Compared
from loractl.worker.serving.library import Library, Listed
from loractl.worker.serving.matrix.matrix import (
    ACCURACY,
    LOSS,
    MEASURES,
    Matrix,
    MatrixRow,
    Task,
    learned_before,
    reading,
)
from loractl.worker.serving.matrix.view import matrix_page, matrix_text

from ..models import write_helpdesk
from ..unit.factories import spec, submission


def cell(change: float, spread: float = 0.1, cases: int = 20, measure: str = LOSS) -> Compared:
    return MEASURES[measure].compared(cases, 1.0, 1.0 + change, change - spread, change + spread)


def row(name: str, change: float, trained_on: int = 0) -> MatrixRow:
    cells = {"mail": {LOSS: cell(-change), ACCURACY: cell(10 * change, measure=ACCURACY)}}
    return MatrixRow(
        name=name, job_id=4, method="lora", cells=cells, trained_on={"mail": trained_on}, load_seconds=0.5,
        memory=2**20, disk=3_000_000, as_trained=True,
    )  # fmt: skip


def matrix(*rows: MatrixRow, switches: tuple[float, ...] = (0.001, 0.003)) -> Matrix:
    work = cast(Any, SimpleNamespace(numbers=list(range(20)), labelled=True))
    return Matrix(
        base_model="/models/tiny", precision="NF4", rows=list(rows),
        tasks=[Task(name="mail", work=work, likenesses=())],
        base_memory=10 * 2**20, base_disk=20_000_000, base_load_seconds=1.0, switch_seconds=list(switches),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (cell(-1), "better"),
        (cell(-1, measure=ACCURACY), "worse"),
        (cell(0.05), "no clear change"),
        (cell(-1, spread=math.nan), "not known"),
        (cell(-1, cases=7), "too few rows"),
        (cell(-0.005, spread=0.001), "no practical change"),
    ],
)
def test_a_cell_is_read_by_its_interval(of: Compared, says: str) -> None:
    assert reading(of) == says


def test_the_json_names_what_was_measured_and_what_is_no_number_is_null() -> None:
    value = matrix(row("red", math.nan, trained_on=3), row("green", 1.0), switches=())
    shown = json.loads(json.dumps(value.as_json(), allow_nan=False))
    assert shown["tasks"] == [{"name": "mail", "rows": 20, "measure": "accuracy"}]
    assert [adapter["name"] for adapter in shown["adapters"]] == ["red", "green"]
    assert shown["adapters"][0]["rows_trained_on"] == {"mail": 3}
    assert shown["adapters"][0]["tasks"]["mail"]["loss"]["value"] is None
    assert shown["adapters"][1]["tasks"]["mail"]["accuracy"] == {
        "base": 1.0, "value": 11.0, "low": 9.9, "high": 10.1, "cases": 20, "change": 10.0, "reading": "better",
    }  # fmt: skip
    assert shown["memory_bytes"] == {"base": 10 * 2**20, "one_base": 12 * 2**20, "copies": 20 * 2**20}
    assert shown["disk_bytes"] == {"base": 20_000_000, "adapters": 6_000_000}
    assert shown["switch_seconds"] == {"median": None, "count": 0}


def test_the_tables_mark_what_is_better_and_what_was_trained_on() -> None:
    lines = matrix_text(matrix(row("red", 1.0), row("green", -1.0, trained_on=2))).splitlines()
    assert lines[0] == "2 adapters on tiny (NF4), 1 tasks."
    assert lines[5].split() == ["red", "11.0", "+10.0", "better"]
    assert lines[6].split() == ["green", "-9.0", "−10.0", "worse", "*"]
    assert "* trained on rows of this task: no measure of what it has learned." in lines
    assert lines[-1] == "Loading: the base 1.00 s, an adapter 0.50 s, a switch 2.0 ms (median of 2)."


def test_the_page_escapes_names_and_fetches_nothing() -> None:
    page = matrix_page(matrix(row("<b>red</b>", 1.0)))
    assert "&lt;b&gt;red&lt;/b&gt;" in page and "<b>red</b></b>" not in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_what_the_adapters_before_one_were_trained_on_counts_too(home: Path, tmp_path: Path) -> None:
    library = Library(load_settings({"LORACTL_HOME": str(home)}))
    store, artifacts = library.store, ArtifactStore(library.settings.artifacts_url)
    rows = write_helpdesk(tmp_path / "rows.jsonl", 24)
    stored = dict(zip(("uri", "sha256"), artifacts.put_dataset(rows), strict=True))
    for begun in (None, "1", "2"):
        asked = spec(lora={"init_from": begun}, dataset={"path": str(rows), "test_size": 0.25}, method="lora")
        store.jobs.submit(replace(submission(), spec=asked, data={"path": stored}))
    warned: list[str] = []
    listed = Listed(
        job_id=3, attempt=1, name="third", method=Method.LORA, size=1, created=1, data={},
        spec=JobSpec.model_validate(store.jobs.get(3).spec), stored=Binding(prefix="p", manifest_sha256=None),
    )  # fmt: skip
    assert [one.job_id for one in library.before(listed)] == [2, 1]
    assert len(learned_before("third", listed, library, warned.append)) == 18 and not warned
    for file in home.rglob(f"{stored['sha256']}*"):
        file.unlink()
    assert learned_before("third", listed, library, warned.append) == set()
    assert warned[0].startswith("third was begun from another adapter, and what that one was trained on is not known: ")
