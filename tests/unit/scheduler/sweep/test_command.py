"""The command that starts a sweep: what its members are, what is refused, and that all are queued or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loractl.common.errors import LoractlError, SpecError, UsageError, WrongState
from loractl.common.job.file import load_spec
from loractl.common.job.spec import JobSpec
from loractl.scheduler.change.command import cancel
from loractl.scheduler.compare.command import compare
from loractl.scheduler.status.command import status
from loractl.scheduler.submit import admission, intake
from loractl.scheduler.sweep.answer import numbered
from loractl.scheduler.sweep.command import sweep

from ....models import write_helpdesk

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 99,
}  # fmt: skip
RATES = "training.learning_rate=1e-4,3e-4"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "job.yaml").write_text("name: triage\nbase_model: ./base\ndataset: {path: data.jsonl}\n")
    return tmp_path / "job.yaml"


def call(job: Path, *settings: str, home: Path | None = None, options: tuple[str, ...] = ()) -> Result:
    args = [str(job), *(part for setting in settings for part in ("--set", setting)), *options]
    return CliRunner(env={"LORACTL_HOME": str(home), "LORACTL_USER": "ada"} if home else {}).invoke(sweep, args)


def members(job: Path, *settings: str, options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    done = call(job, *settings, options=("--dry-run", "--json", *options))
    assert done.exception is None, done.exception
    return json.loads(done.stdout)["members"]


def refused(job: Path, *settings: str, options: tuple[str, ...] = ()) -> LoractlError:
    error = call(job, *settings, options=("--dry-run", *options)).exception
    assert isinstance(error, LoractlError)
    return error


def test_each_member_is_the_job_with_one_point_s_settings(job: Path) -> None:
    found = members(job, "lora.r=4,8", RATES, "training.max_steps=20")
    assert [member["name"] for member in found] == ["triage-1", "triage-2", "triage-3", "triage-4"]
    assert [tuple(member["settings"].values()) for member in found] == [(4, 1e-4), (4, 3e-4), (8, 1e-4), (8, 3e-4)]
    for member in found:
        spec = member["spec"]
        assert (spec["lora"]["r"], spec["training"]["learning_rate"]) == tuple(member["settings"].values())
        assert (spec["training"]["max_steps"], spec["training"]["eval_steps"]) == (20, None)


def test_a_long_name_makes_room_for_the_number(job: Path) -> None:
    first, _ = members(job, RATES, f"name={'n' * 63}")
    assert first["name"] == "n" * 61 + "-1"


def test_a_long_name_of_a_tracker_s_run_makes_room_too(job: Path) -> None:
    named = ("training.report_to=[wandb]", f"training.tracker.run_name={'r' * 100}")
    specs = [load_spec(job, named)] * 2
    members = [JobSpec.model_validate(spec.model_dump()) for spec in numbered(specs)]
    assert [spec.training.tracker.run_name for spec in members] == [f"{'r' * 98}-{n}" for n in (1, 2)]


def test_members_that_may_be_stopped_are_evaluated_at_the_rungs(job: Path) -> None:
    stop = ("--early-stop",)
    assert {m["spec"]["training"]["eval_steps"] for m in members(job, RATES, options=stop)} == {0.25}
    own = members(job, RATES, "training.eval_steps=0.05", options=stop)
    assert {m["spec"]["training"]["eval_steps"] for m in own} == {0.05}
    own = members(job, RATES, "training.eval_steps=4", "training.max_steps=32", options=stop)
    assert {m["spec"]["training"]["eval_steps"] for m in own} == {4}
    smoothed = members(job, "training.label_smoothing_factor=0,0.1", options=stop)
    assert len(smoothed) == 2, "held-out rows are measured without"
    for wrong in ("training.eval_steps=0.3", "training.eval_steps=10"):
        assert "does not evaluate there" in refused(job, RATES, wrong, options=stop).sentence


@pytest.mark.parametrize(
    "varied",
    [
        "base_model=./base,org/other", "revision=main,old", "dataset.max_length=128,256", "evaluation.max_rows=4,8",
        "preference.beta=0.1,0.5",
    ],
)  # fmt: skip
def test_losses_that_say_nothing_of_each_other_are_not_compared_on_the_way(job: Path, varied: str) -> None:
    error = refused(job, varied, options=("--early-stop",))
    assert isinstance(error, UsageError) and varied.partition("=")[0] in error.sentence and error.hint
    if not varied.startswith(("revision", "preference")):  # a folder has none, and this job learns from no pairs
        assert len(members(job, varied)) == 2, "without stopping, each may be looked at by itself"


def test_what_can_t_be_a_member_is_refused(job: Path) -> None:
    assert "name" in refused(job, "name=a,b").sentence
    assert "are the same job" in refused(job, "training.learning_rate=1e-4,0.0001").sentence
    assert "--seed is for draws" in refused(job, RATES, options=("--seed", "3")).sentence
    unknown = refused(job, "lora.rank=4,8")
    assert isinstance(unknown, SpecError) and [p.hint for p in unknown.problems] == ["did you mean lora.r?"]


def test_the_problems_of_all_members_are_told_at_once(job: Path) -> None:
    error = refused(job, "lora.r=0,8,none", "training.learning_rate=1e-4,2")
    assert isinstance(error, SpecError)
    assert sorted(str(p) for p in error.problems) == [
        "--set: lora.r: \"none\" is not a whole number",
        "--set: lora.r: 0 must be at least 1",
        "--set: training.learning_rate: 2 must be below 1.0",
    ]  # fmt: skip


def test_draws_are_those_of_the_seed_and_are_printed(job: Path) -> None:
    ranges = ("training.learning_rate=log:1e-5..1e-3", "lora.r=int:4..64")
    found = [m["settings"] for m in members(job, *ranges, options=("--trials", "5", "--seed", "3"))]
    assert found == [m["settings"] for m in members(job, *ranges, options=("--trials", "5", "--seed", "3"))]
    text = call(job, *ranges, options=("--trials", "5", "--seed", "3", "--dry-run")).output
    assert all(f"{point['training.learning_rate']:.4g}" in text for point in found)
    assert "5 jobs, drawn with seed 3; none is queued." in text


def test_all_members_are_queued_with_one_upload_or_none_is(job: Path, upgraded_home: Path) -> None:
    done = call(job, RATES, "lora.r=4,8", home=upgraded_home, options=("--early-stop",))
    assert done.exception is None, done.exception
    told = "Sweep 1: 4 jobs (1 to 4) are queued; losers stop after 25 % and 50 % of their steps.\n"
    assert done.stdout == told
    assert "loractl status --sweep 1" in done.stderr
    assert len(list((upgraded_home / "artifacts").rglob("*.jsonl"))) == 1
    # the second of these needs more than the limit that the first keeps
    limit = "resources.max_vram=1GiB"
    error = call(job, "training.per_device_train_batch_size=1,4096", limit, home=upgraded_home).exception
    assert isinstance(error, UsageError) and error.sentence.startswith("triage-2 needs")
    listed = CliRunner(env={"LORACTL_HOME": str(upgraded_home)}).invoke(status, ["-a", "--json"])
    assert [row["sweep_id"] for row in json.loads(listed.stdout)] == [1, 1, 1, 1], "nothing of the refused one"


def test_a_queued_sweep_as_json_is_what_status_prints(job: Path, upgraded_home: Path) -> None:
    done = call(job, "lora.r=int:4..64", home=upgraded_home, options=("--trials", "3", "--json"))
    found = json.loads(done.stdout)
    assert (found["sweep_id"], found["trials"], found["seed"], found["waiting"]) == (1, 3, 0, 3)
    again = CliRunner(env={"LORACTL_HOME": str(upgraded_home)}).invoke(status, ["--sweep", "1", "--json"])
    assert json.loads(again.stdout) == found


def test_a_sweep_is_cancelled_as_one_and_compared_once_a_member_has_a_result(job: Path, upgraded_home: Path) -> None:
    runner = CliRunner(env={"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"})
    call(job, RATES, home=upgraded_home)
    early = runner.invoke(compare, ["--sweep", "1"]).exception
    assert isinstance(early, WrongState) and early.sentence == "no member of sweep 1 has a result"
    shown = runner.invoke(status, []).stdout
    assert shown.startswith("0 running, 2 waiting, no worker is online.\n"), "no line of a job says what they wait for"
    told = runner.invoke(cancel, ["--sweep", "1"]).stdout
    assert told == "Job 1 is cancelled.\nJob 2 is cancelled.\n"
    assert isinstance(runner.invoke(cancel, ["--sweep", "1"]).exception, WrongState)
    assert "2 cancelled" in runner.invoke(status, ["--sweep", "1"]).stdout
    for command, args in (
        (cancel, ["1", "--sweep", "1"]),
        (compare, ["1", "--sweep", "1"]),
        (status, ["-a", "--sweep", "1"]),
    ):
        error = runner.invoke(command, args).exception
        assert isinstance(error, UsageError) and error.hint and "--sweep" in error.hint


def test_the_rows_of_all_members_are_looked_at_hashed_and_stored_once(
    job: Path, upgraded_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for module, name in ((admission, "check_used_data"), (intake, "stored_hashes"), (intake, "store_data")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: asked.append(name) or real(*a))
    assert call(job, RATES, "lora.r=4,8", home=upgraded_home).exit_code == 0
    assert asked == ["check_used_data", "stored_hashes", "store_data"]


def test_no_member_starts_after_another_one(job: Path, upgraded_home: Path) -> None:
    error = call(job, RATES, "after=triage-2", home=upgraded_home).exception
    assert isinstance(error, UsageError) and "not a job of this submit" in error.sentence
    told = refused(job, RATES, "after=triage-2").sentence
    assert told == error.sentence, "a dry run says so where there is no database, too"


def test_a_base_that_no_worker_can_load_is_refused(job: Path) -> None:
    job.write_text(job.read_text().replace("./base", "./base/config.json"))
    assert "is a file" in refused(job, RATES).sentence
