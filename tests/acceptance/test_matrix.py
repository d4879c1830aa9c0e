"""loractl matrix: every adapter on every task, on one base that is loaded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .. import json_page
from ..conftest import Cli
from .conftest import ANSWERS


def _rows(path: Path, name: str, count: int = 10) -> Path:
    rows = [{"instruction": f"what is in {n}?", "input": "", "output": ANSWERS[name]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_adapter_is_best_on_its_own_task_and_costs_are_measured(trained: Cli, tmp_path: Path) -> None:
    page = tmp_path / "matrix.html"
    data = ",".join(f"{name}={_rows(tmp_path / f'{name}.jsonl', name)}" for name in ANSWERS)
    asked = ["--adapters", "red,green:latest,blue", "--data", data, "--max-new-tokens", 48]
    found = json.loads(trained("matrix", *asked, "--html", page, "--json").stdout)
    json_page.hold({"matrix": [found]})
    assert [(t["name"], t["rows"], t["measure"]) for t in found["tasks"]] == [(n, 10, "rougeL") for n in ANSWERS]
    for line, own in zip(found["adapters"], ANSWERS, strict=True):
        for task, cells in line["tasks"].items():
            loss, rouge = cells["loss"], cells["rougeL"]
            assert (rouge["value"] > 60) == (task == own), (line["name"], task, rouge)
            assert (loss["reading"] == "better") == (loss["high"] < 0) and loss["cases"] == 10
            assert loss["change"] == pytest.approx(loss["value"] - loss["base"])
        assert line["tasks"][own]["loss"]["reading"] == line["tasks"][own]["rougeL"]["reading"] == "better"
        assert line["rows_trained_on"][own] >= 8, "the same conversations as those of its training"
    memory = found["memory_bytes"]
    assert memory["copies"] == 3 * memory["base"]
    assert memory["base"] < memory["one_base"] == memory["base"] + sum(a["memory_bytes"] for a in found["adapters"])
    assert found["switch_seconds"]["count"] == 59 and found["switch_seconds"]["median"] > 0
    assert found["disk_bytes"]["base"] > 100_000
    text = page.read_text()
    assert text.count('class="cell') == 2 * 9 and "trained on rows of this task" in text and "<script" not in text


def test_without_files_the_tasks_are_what_each_job_held_out(trained: Cli) -> None:
    done = trained("matrix", "--adapters", "red,green", "--samples", 2, "--max-new-tokens", 4)
    head, *rest = done.stdout.splitlines()
    assert head.startswith("2 adapters on tiny (float32") or head.startswith("2 adapters on tiny (bfloat16")
    assert sum(line.startswith(("red ", "green ")) for line in rest) == 4, "answers, then losses"
    assert "few" in done.stdout and "*" not in done.stdout.replace("**", ""), "held-out rows are trained on by nobody"
    assert "Memory: one base with 2 adapters" in done.stdout and "a switch" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--adapters", "red,red"], 2, "--adapters names none, or one twice"),
        (["--adapters", "pink"], 3, "no adapter pink:latest is stored"),
        (["--adapters", "red", "--data", "faq"], 2, "'faq' is not of the form NAME=FILE"),
        (["--adapters", "red", "--data", "faq=nowhere.jsonl"], 2, "there is no file nowhere.jsonl"),
        (["--adapters", "red", "--html", "/nowhere/m.html"], 2, "there is no such folder"),
    ],
)
def test_wrong_lists_are_told_in_a_sentence(trained: Cli, arguments: list[str], code: int, says: str) -> None:
    assert says in trained("matrix", *arguments, code=code).stderr
