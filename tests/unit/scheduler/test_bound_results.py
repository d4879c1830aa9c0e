"""Whoever can write to the artifact store can't pass files off as a job's result: every reader checks its row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from loractl.common.artifacts import WEIGHTS, ArtifactStore, attempt_prefix, manifest_sha256
from loractl.common.errors import ArtifactError, ExitCode
from loractl.common.job.status import Reason
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import Settings, load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.scheduler.cli.main import cli
from loractl.scheduler.database.answer import back_up, restore
from loractl.worker.serving.library import Library

from ... import services
from ...acceptance.test_report_page import report as page_report
from ...models import weights_of
from ..factories import RESULT, submission, take
from .compare.test_answer import job

READERS = (
    "adapters pull 1 {new}", "adapters show 1", "report 1", "report 1 --json", "report 1 --html {new}", "logs 1",
    "compare 1 2", "compare --sweep 1", "reproduce 1 --dry-run", "reproduce 2 --check 1",
    "adapters push 1 a/b --to {new}",
)  # fmt: skip
"""Command lines that read the first job's result; {new} is a path where nothing is."""

TRAINED = weights_of("trained")

NUMBERS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Two finished jobs of a sweep, with their results in a store of either kind."""

    settings: Settings
    store: Store
    folder: Path

    @property
    def readers(self) -> tuple[str, ...]:
        """All of them on a folder, and a few on S3, where each read takes longer."""
        return READERS if self.settings.artifacts_url.startswith("file:") else READERS[:4]

    def ask(self, line: str) -> Result:
        return CliRunner().invoke(cli, line.format(new=self.folder / f"new-{next(NUMBERS)}").split())

    def finish(self, job_id: int, weights: bytes = TRAINED, told: str | None = None) -> None:
        """End a job that waits, with a result; `told`: the report's text."""
        claim = take(self.store)
        assert isinstance(claim, Claim)
        folder = self.folder / f"result-{job_id}"
        closed, digest = stores(self.settings, folder, job_id, weights, "Better than the base", told=told)
        result = replace(RESULT, manifest_sha256=closed, adapter_sha256=digest)
        self.store.attempts.finish(claim, Reason.OK, "done", Progress(log="step 1\n"), result)
        self.store.results.forget_log(job_id, 1)

    def replace_result(self, weights: bytes) -> None:
        """Put a whole result in the place of the first one: adapter, report, page, log and a manifest that fits."""
        ArtifactStore(self.settings.artifacts_url).remove(attempt_prefix(1, 1))  # loractl itself writes over none
        stores(self.settings, self.folder / "forged", 1, weights, sentence="Better than everything")

    def forget_binding(self) -> None:
        """The rows as an earlier version has left them."""
        with self.store.engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET manifest_sha256 = NULL"))


PAGE = "<!doctype html><title>report</title>"


def stores(
    settings: Settings,
    folder: Path,
    job_id: int,
    weights: bytes,
    sentence: str,
    page: str = PAGE,
    told: str | None = None,
) -> tuple[str, str]:
    """Store a result; returns the hash of its manifest and of its weights."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    (folder / "log.txt").write_text("step 1\n")
    (folder / "report.json").write_text(json.dumps(report(job_id, sentence)) if told is None else told)
    (folder / "report.html").write_text(page)
    manifest = ArtifactStore(settings.artifacts_url).put_result(folder, attempt_prefix(job_id, 1))
    return manifest_sha256(manifest), manifest[WEIGHTS].sha256


def report(job_id: int, sentence: str) -> dict[str, Any]:
    value, measured = page_report(), job(job_id, [1.2 + n / 40 for n in range(40)]).report["evaluation"]
    value["data"] |= {"held_out_sha256": "d" * 64, "train_rows_sha256": "e" * 64}
    value["training"] |= {"per_device_eval_batch_size": 4}
    value["evaluation"] |= {"row_losses": measured["row_losses"]}
    value["verdict"] |= {"sentence": sentence}
    return {**value, "versions": {"torch": "2.13"}}


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.long)])
def lab(
    request: pytest.FixtureRequest, upgraded_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    environment = {"LORACTL_HOME": str(upgraded_home), "LORACTL_USER": "ada"}
    if request.param == "s3":
        server: services.S3 = request.getfixturevalue("s3_server")
        environment |= {**server.environment, "LORACTL_ARTIFACTS_URL": f"{server.url}/{tmp_path.name}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    store = Store(connect(settings))
    store.sweeps.submit(NewSweep(name="a", varied={"lora.r": "4,8"}), [submission(), submission()])
    lab = Lab(settings=settings, store=store, folder=tmp_path)
    for job_id in (1, 2):
        lab.finish(job_id)
    yield lab
    store.engine.dispose()


def refused(done: Result, what: str) -> bool:
    error = done.exception
    assert isinstance(error, ArtifactError), (done.output, error)
    assert error.exit_code == ExitCode.FAILED and error.hint
    assert "jobs/1/attempt-1 was changed after it was stored" in error.sentence
    return what in error.sentence


@pytest.mark.parametrize("lab", ["folder", "s3"], indirect=True)
def test_a_result_that_somebody_has_replaced_is_refused_by_every_command(lab: Lab) -> None:
    lab.replace_result(weights_of("another"))
    for line in lab.readers:
        assert refused(lab.ask(line), "its manifest is not the one that its row names"), line
        assert not [p for new in lab.folder.glob("new-*") for p in (new, *new.rglob("*")) if p.is_file()], line


def test_a_box_loads_no_adapter_that_somebody_has_replaced(lab: Lab) -> None:
    """generate, chat, serve, matrix and merge all read by the library."""
    lab.replace_result(weights_of("another"))
    library = Library(lab.settings)
    adapter = library.find("1")
    for read in (library.fetch, library.report, library.format, library.changed_base):
        with pytest.raises(ArtifactError, match="its manifest is not the one that its row names"):
            read(adapter)
    assert not list((lab.settings.cache_dir / "adapters").glob("*"))
    assert library.fetch(library.find("2")).is_dir()


def test_a_result_of_an_earlier_version_is_read_with_a_warning_and_its_weights_are_bound_all_the_same(lab: Lab) -> None:
    lab.forget_binding()
    for line in lab.readers:
        done = lab.ask(line)
        assert done.exception is None or isinstance(done.exception, SystemExit), (line, done.exception)
        assert done.exit_code == ExitCode.OK, (line, done.output)
        assert "Warning: jobs/1/attempt-1 is not bound to its row" in done.stderr, line
    assert "not bound to its row: loractl adapters bind" in lab.ask("adapters show 1").stdout
    lab.replace_result(weights_of("another"))
    assert refused(lab.ask("report 1"), "its weights are not those that its row names")


def test_results_of_an_earlier_version_are_bound_by_a_command(lab: Lab) -> None:
    lab.forget_binding()
    done = lab.ask("adapters bind")
    assert done.exit_code == 0 and done.stdout.count("is bound to its row.") == 2
    assert lab.store.jobs.events(1)[-1].text == "its stored result was bound to its row by ada"
    assert lab.ask("report 1").stderr == "" and lab.ask("adapters bind").stdout == ""
    lab.replace_result(TRAINED)
    assert refused(lab.ask("report 1"), "its manifest is not the one"), "the weights are right, the report is not"


def test_a_result_with_other_weights_is_not_bound_and_the_others_are(lab: Lab) -> None:
    lab.forget_binding()
    lab.replace_result(weights_of("another"))
    done = lab.ask("adapters bind 1 2")
    assert done.exit_code == ExitCode.FAILED
    assert "Error: job 1 is not bound: " in done.stderr and "its weights are not those" in done.stderr
    assert done.stdout == "The result of job 2 is bound to its row.\n"
    assert [job.job_id for job in lab.store.results.not_bound()] == [1]


def test_a_page_with_a_script_is_not_written_even_where_nothing_binds_it(lab: Lab) -> None:
    lab.forget_binding()
    page = "<!doctype html><title>report</title><script>document.title = 'owned'</script>"
    stores(lab.settings, lab.folder / "forged", 1, TRAINED, "Better", page)
    done = lab.ask("report 1 --html {new}")
    assert isinstance(done.exception, ArtifactError) and done.exception.exit_code is ExitCode.FAILED
    assert done.exception.sentence == "the page of job 1 is not loractl's: it holds <script>"
    assert not list(lab.folder.glob("new-*"))


@pytest.mark.parametrize(
    "told", ["{}", "[]", "7", "no JSON", '{"data": 3, "job": [], "training": null, "verdict": {}}']
)
@pytest.mark.parametrize("lab", ["folder"], indirect=True)
def test_a_report_of_another_form_is_told_in_a_sentence(lab: Lab, told: str) -> None:
    lab.store.jobs.submit(submission())
    lab.finish(3, told=told)
    for line in ("adapters show 3", "report 3", "compare 1 3", "reproduce 3 --dry-run", "reproduce 1 --check 3"):
        error = lab.ask(line).exception
        assert isinstance(error, ArtifactError) and error.exit_code is ExitCode.FAILED, (line, error)
        assert "jobs/3/attempt-1/report.json is not a loractl report" in error.sentence and error.hint
    library = Library(lab.settings)
    with pytest.raises(ArtifactError, match="is not a loractl report"):
        library.format(library.find("3"))


@pytest.mark.parametrize("weights", [b"", b"weights", TRAINED[:-1], TRAINED + b"x", b"\xff" * 64])
@pytest.mark.parametrize("lab", ["folder"], indirect=True)
def test_weights_that_nothing_can_load_are_not_handed_out(lab: Lab, weights: bytes) -> None:
    lab.store.jobs.submit(submission())
    lab.finish(3, weights)
    error = lab.ask("adapters pull 3 {new}").exception
    assert isinstance(error, ArtifactError) and error.exit_code is ExitCode.FAILED and error.hint
    assert error.sentence.startswith("the stored adapter of job 3 is refused: adapter_model.safetensors ")
    assert not [path for path in lab.folder.glob("new-*") if path.name == "adapter_model.safetensors"]
    library = Library(lab.settings)
    with pytest.raises(ArtifactError, match="the stored adapter of job 3 is refused"):
        library.fetch(library.find("3"))


@pytest.mark.parametrize("lab", ["folder"], indirect=True)
def test_a_backup_keeps_what_binds_results(lab: Lab) -> None:
    back_up(lab.settings, lab.folder / "backup.db")
    lab.forget_binding()
    restore(lab.settings, lab.folder / "backup.db", force=True)
    lab.replace_result(TRAINED)
    assert refused(lab.ask("report 1"), "its manifest is not the one")
