"""The lab from Python: the same jobs, reports, adapters and errors as the commands have."""

from __future__ import annotations

import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

import loractl
from loractl.common.artifacts import ArtifactStore
from loractl.common.errors import JobNotFound, SpecError, UsageError, WrongState
from loractl.common.job.status import Reason
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from .... import webs
from ....models import write_helpdesk
from ...factories import take


@pytest.fixture
def folder(upgraded_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows to train on."""
    monkeypatch.setenv("LORACTL_HOME", str(upgraded_home))
    monkeypatch.setenv("LORACTL_USER", "ada")
    monkeypatch.chdir(tmp_path)
    write_helpdesk(tmp_path / "rows.jsonl")
    return tmp_path


JOB = {"name": "tiny", "base_model": "org/model", "dataset": {"path": "rows.jsonl"}, "lora": {"r": 8, "lora_alpha": 4}}


def finish(job_id: int) -> None:
    """Store a result, as a worker does."""
    settings = load_settings()
    store = Store(connect(settings))
    seeded = webs.SeededLab(store=store, artifacts=ArtifactStore(settings.artifacts_url), now=store.now())
    claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == job_id
    webs.store_result(seeded, claim, 3.0, 1.0)


def test_a_job_goes_from_a_mapping_to_its_report_and_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = loractl.connect().submit(JOB, lora={"r": 32}, training={"learning_rate": 1e-05}, priority=3)
    assert (job.status, job.state.user, job.state.priority) == ("queued", "ada", 3)
    with pytest.raises(WrongState, match="has no result"):
        job.report  # noqa: B018
    with pytest.raises(TimeoutError, match="queued"):
        job.wait(timeout=0)
    threading.Timer(0.2, finish, (job.job_id,)).start()
    job.wait(timeout=60)
    assert job.status == "succeeded"
    said = capsys.readouterr().err.splitlines()
    assert "job 1 queued" in said and said[-1] == "job 1 succeeded"
    report = job.report
    assert report.verdict == "better" and "3.00 -> 1.00" in report.sentence
    report._found.content["verdict"]["aside"] = "8 of 12 were cut off."
    assert "8 of 12 were cut off." in report._repr_html_(), "as the other faces show it"
    assert (job.adapter.pull("new") / "adapter_config.json").exists()
    with pytest.raises(UsageError, match="not empty"):
        job.adapter.pull("new")
    spec = Store(connect(load_settings())).jobs.get(job.job_id).spec
    assert spec["lora"]["r"] == 32 and spec["lora"]["lora_alpha"] == 4 and spec["training"]["learning_rate"] == 1e-05
    assert spec["dataset"]["path"] == str(folder / "rows.jsonl")


def test_a_small_number_stays_a_number(folder: Path) -> None:
    """JSON writes 1e-06, which YAML reads as a text."""
    job = loractl.connect().submit(JOB, training={"lr_scheduler_kwargs": {"min_lr": 1e-06}})
    stored = Store(connect(load_settings())).jobs.get(job.job_id).spec
    assert stored["training"]["lr_scheduler_kwargs"] == {"min_lr": 1e-06}


def test_a_change_may_hold_any_text(folder: Path) -> None:
    labels = {"team": "a 😀 “no”: ü"}
    assert loractl.connect().submit(JOB, labels=labels).state.labels == labels


def test_a_path_is_a_value_an_empty_mapping_too_and_another_object_is_refused(folder: Path) -> None:
    lab, job = loractl.connect(), {**JOB, "dataset": {"path": folder / "rows.jsonl"}, "labels": {"team": "a"}}
    assert lab.submit(job, labels={}).state.labels == {}
    assert lab.submit(job, dataset={"path": folder / "rows.jsonl"}).state.labels == {"team": "a"}
    with pytest.raises(UsageError, match="no value of a job file"):
        lab.submit(JOB, lora={"r": object()})


def test_a_job_file_is_submitted_as_the_command_does(folder: Path) -> None:
    Path("job.yaml").write_text("name: filed\nbase_model: org/model\ndataset: {path: rows.jsonl}\n")
    lab = loractl.connect()
    job = lab.submit("job.yaml")
    assert lab.job("filed").job_id == lab.job(1).job_id == job.job_id
    assert [one.job_id for one in lab.jobs()] == [1] and lab.jobs(user="mara") == []
    assert job.cancel().status == "cancelled"


def test_errors_are_those_of_the_commands_with_the_next_step_in_the_traceback(folder: Path) -> None:
    lab = loractl.connect()
    with pytest.raises(SpecError, match=r"lora\.rank"):
        lab.submit(JOB, lora={"rank": 32})
    with pytest.raises(JobNotFound) as missing:
        lab.job(7)
    assert "Hint: loractl status -a lists all jobs" in "".join(traceback.format_exception(missing.value))


def test_a_notebook_shows_a_job_as_a_table_in_which_nothing_is_code(folder: Path) -> None:
    job = loractl.connect().submit(JOB)
    table = job._repr_html_()
    assert "<td style='text-align:left'>1 tiny</td>" in table and "queued" in table and repr(job) == "<job 1 queued>"
    store = Store(connect(load_settings()))
    claim = take(store)
    assert isinstance(claim, Claim)
    store.attempts.finish(claim, Reason.BAD_DATA, "row 1: <script>", Progress())
    assert "row 1: &lt;script&gt;" in job._repr_html_() and "<script>" not in job._repr_html_()


def test_it_loads_no_training_stack(folder: Path) -> None:
    script = "import loractl, sys; loractl.connect(); print({'torch', 'transformers', 'celery'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
