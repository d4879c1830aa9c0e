"""lora.init_from: a training that begins where a stored adapter ended, and says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.sections import DatasetSpec
from loractl.worker.base.model import load_tokenizer
from loractl.worker.protocol.messages import Ancestor, Start, Taught
from loractl.worker.recipe.recipe import train
from loractl.worker.recipe.rows import prepare_rows
from loractl.worker.recipe.run import Run

from ..conftest import Cli
from ..models import write_helpdesk, write_job
from .conftest import Recipe

SMALL_STEPS = ("--set=training.max_steps=2", "--set=training.learning_rate=1e-7", "--set=lora.lora_dropout=0")


def test_a_job_begins_from_a_stored_adapter_and_says_so(cli: Cli, home: Path, tiny_model: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, tiny_model)
    text = job.read_text().replace("data.jsonl", "data.jsonl, test_size: 0.25")
    job.write_text(text.replace("max_steps: 6", "max_steps: 20, dtype: float32"))
    cli("submit", job)
    cli("worker", "--drain-when-idle")
    begun = (job, "--set=name=further", "--set=lora.init_from=tiny:latest")
    cli("submit", *begun, *SMALL_STEPS, "--set=dataset.final_size=0.2")
    assert json.loads(cli("status", 2, "--json").stdout)["spec"]["lora"]["init_from"] == "1", "a tag would move"
    _refuses_what_does_not_fit(cli, begun)
    assert "job 2 is to begin from the adapter of job 1" in cli("adapters", "delete", "tiny", "--yes", code=1).stderr
    cli("worker", "--drain-when-idle")

    first, second = (json.loads(cli("report", n, "--json").stdout) for n in (1, 2))
    assert _loss(second)["tuned"] == pytest.approx(_loss(first)["tuned"], abs=1e-3), "where the first one ended"
    assert _loss(first)["base"] - _loss(first)["tuned"] > 0.5
    warnings = [warning for warning in second["data"]["warnings"] if "job 1" in warning]
    assert warnings == ["5 rows of the final ones are like rows that job 1 was trained on, before this one"], (
        "not held-out"
    )
    lineage = {"job_id": 1, "name": "tiny", "sha256": first["adapter"]["sha256"]}
    assert second["adapter"]["init_from"] == lineage and first["adapter"]["init_from"] is None
    stored = home / "artifacts" / "jobs" / "2" / "attempt-1"
    assert json.loads((stored / "job.json").read_text())["init_from"] == lineage
    assert json.loads((stored / "adapter" / "lineage.json").read_text()) == {"init_from": lineage}
    assert (
        f"begun from the adapter of tiny (job 1), sha256 {lineage['sha256']}"
        in (stored / "adapter" / "README.md").read_text()
    )
    assert "begins from the adapter of tiny (job 1)" in cli("status", 2, "--full").stdout
    assert [row["init_from"] for row in json.loads(cli("adapters", "--json").stdout)] == [None, 1]
    assert "FROM" in cli("adapters").stdout
    assert "begun     from the adapter of tiny (job 1)" in cli("adapters", "show", "further").stdout
    cli("adapters", "delete", "tiny", "--yes")
    assert "loractl adapters lists them" in cli("submit", *begun, code=2).stderr


def _loss(report: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = next(m for m in report["evaluation"]["metrics"] if m["name"] == "loss")
    return found


def _refuses_what_does_not_fit(cli: Cli, begun: tuple[Any, ...]) -> None:
    for override, difference in (
        ("lora.r=8", "lora.r is 8, and that adapter's 4"),
        ("lora.target_modules=[q_proj]", 'lora.target_modules is ["q_proj"], and that adapter\'s all-linear'),
        ("lora.use_dora=true", "lora.use_dora is true, and that adapter's false"),
    ):
        refused = cli("submit", *begun, f"--set={override}", code=2).stderr
        assert f"further can't begin from tiny (job 1): {difference}" in refused
    both = cli("submit", *begun, "--set=lora.init_lora_weights=gaussian", code=2).stderr
    assert "lora.init_from already says how A and B start" in both
    unknown = cli("submit", begun[0], "--set=lora.init_from=nobody", code=2).stderr
    assert "lora.init_from: no adapter nobody:latest is stored" in unknown
    assert json.loads(cli("status", "--json").stdout)[0]["job_id"] == 2, "nothing else was queued"


def test_rows_that_an_earlier_adapter_has_learned_carry_no_verdict(
    recipe: Recipe, start: Callable[..., Start], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    asked = [f"ticket {n}: something is broken" for n in range(60)]
    rows = [{"prompt": ask, "completion": f" please wait {n * 7919 % 997} lines"} for n, ask in enumerate(asked)]
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe("first", max_steps=20, dataset={"test_size": 0.02}, evaluation={"metrics": ["loss"], "samples": 0})
    order = start(
        "second", dataset={"test_size": 0.5}, evaluation={"metrics": ["loss"], "samples": 0}, max_steps=1,
        learning_rate=1e-7,
    )  # fmt: skip
    taught = [Taught(job_id=1, **of(data, 0.02))]
    folder = tmp_path / "first" / "result" / "adapter"
    ancestor = Ancestor(path=str(folder), job_id=1, name="tiny", sha256="0" * 64, taught=taught)
    train(Run(order=order.model_copy(update={"init_from": ancestor}), tell=lambda told: None))
    report = json.loads((tmp_path / "second" / "result" / "report.json").read_text())
    known = "29 of 30 held-out rows resemble rows that the adapter before it was trained on"
    assert report["verdict"]["why"] == f"{known}, and the other 1 are too few"
    assert report["verdict"]["short"].startswith(f"can't be judged: {known}")
    assert "29 rows held out are like rows that job 1 was trained on, before this one." in report["verdict"]["aside"]
    assert report["evaluation"]["metrics"][0]["reading"] == "better", "what it would have said"


def test_what_every_adapter_before_has_learned_counts_and_what_is_not_known_is_said(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path
) -> None:
    """Rows of another file count if they are alike, whatever their format is."""
    data, tokenizer = write_helpdesk(tmp_path / "data.jsonl", 60), load_tokenizer(str(tiny_model), None)
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"text": f"ticket {n}: something with gpu is broken"}) + "\n" for n in range(60))
    )
    lessons = (
        [Taught(job_id=1, **of(data, 0.5))],
        [Taught(job_id=2, **of(data, 0.5)), Taught(job_id=1, **of(data, 0.02))],
        [Taught(job_id=1, **of(other, 0.02))],
        [Taught(job_id=1)],
        [Taught(job_id=1, **of(tmp_path / "gone.jsonl", 0.02))],
    )
    order, found = start(dataset={"test_size": 0.5, "final_size": 0.1}), []
    for taught in lessons:
        ancestor = Ancestor(path="", job_id=taught[0].job_id, name="tiny", sha256="", taught=taught)
        found.append(prepare_rows(order.model_copy(update={"init_from": ancestor}), order.spec, tokenizer))
    assert [len(prepared.held_out.given_away) for prepared in found] == [0, 29, 9, 0, 0]
    assert [len(prepared.final.given_away) for prepared in found if prepared.final] == [6, 6, 3, 0, 0]
    assert all("before this one, is not known" in prepared.held_out.doubts()[-1] for prepared in found[3:])
    assert not found[0].held_out.doubts() and found[0].final and found[0].final.doubts()


def test_pairs_whose_chosen_answers_an_earlier_adapter_has_learned_are_known(
    start: Callable[..., Start], tmp_path: Path, tiny_model: Path
) -> None:
    """What sets them apart from their rejected ones may then be that they are known."""
    answers, pairs = tmp_path / "answers.jsonl", tmp_path / "pairs.jsonl"
    asked = [f"ticket {n}: something with gpu is broken" for n in range(60)]
    rows = [{"instruction": ask, "output": f"please wait {n * 7919 % 997} lines"} for n, ask in enumerate(asked)]
    answers.write_text("\n".join(json.dumps(row) for row in rows[:50]))
    both = [{"instruction": r["instruction"], "chosen": r["output"], "rejected": "go away"} for r in rows]
    pairs.write_text("\n".join(map(json.dumps, both)))
    order = start(dataset={"path": str(pairs), "test_size": 0.5}, job={"task_type": "preference"})
    order = order.model_copy(update={"data_path": str(pairs)})
    ancestor = Ancestor(path="", job_id=1, name="tiny", sha256="", taught=[Taught(job_id=1, **of(answers, 0.02))])
    tokenizer = load_tokenizer(str(tiny_model), None)
    data = prepare_rows(order.model_copy(update={"init_from": ancestor}), order.spec, tokenizer)
    known = [one.number for one in data.held_out.examples if one.number <= 50]
    assert (
        len(data.held_out.given_away) >= len(known) - 1 and {*data.held_out.given_away} <= {*known} and len(known) > 20
    )
    assert data.held_out.resemble == "resemble rows that the adapter before it was trained on"


def of(data: Path, share: float) -> dict[str, Any]:
    """The rows of a file but for this share, as a job is taught them."""
    return {"dataset": DatasetSpec(path=data.name, test_size=share), "paths": {"path": str(data)}}
