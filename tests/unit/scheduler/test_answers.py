"""Every reading command prints the JSON of the answer that it asks for, and shapes none itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from loractl.common.artifacts import ArtifactStore, attempt_prefix, manifest_sha256, open_store
from loractl.common.job.names import parse_reference
from loractl.common.job.status import Reason, Stage
from loractl.common.job.sweep import NewSweep
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Choice, Claim, Page, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.adapters.answer import adapter_list, lineage
from loractl.scheduler.cli.main import cli
from loractl.scheduler.cli.output import HasJson
from loractl.scheduler.compare.answer import comparison
from loractl.scheduler.fleet.answer import fleet
from loractl.scheduler.plan.answer import job_to_plan, memory_need, plan_accuracy
from loractl.scheduler.report.answer import report
from loractl.scheduler.status.job import job_in_full
from loractl.scheduler.status.overview import job_list, overview
from loractl.scheduler.status.standing import sweep_standing
from loractl.scheduler.why.answer import why

from ..factories import RESULT, Clock, node_state, submission, take
from .compare.test_answer import job

ASKED: dict[str, Callable[[Store], HasJson]] = {
    "status": lambda store: overview(store, Choice(), Page()),
    "status --user bob": lambda store: overview(store, Choice(user="bob"), Page()),
    "status --limit 1 --after 5": lambda store: overview(store, Choice(), Page(limit=1, after=5)),
    "status --all --limit 3": lambda store: job_list(store, Choice(), Page(limit=3)),
    "status --all --after 4": lambda store: job_list(store, Choice(), Page(after=4)),
    "status --all --label project=support": lambda store: job_list(store, Choice(label=("project", "support")), Page()),
    "status 3": lambda store: job_in_full(store, 3),
    "status 5": lambda store: job_in_full(store, 5),
    "status --sweep 1": lambda store: sweep_standing(store, 1),
    "status 2": lambda store: job_in_full(store, 2),
    "why 1": lambda store: why(store, 1),
    "why 5": lambda store: why(store, 5),
    "gpus": fleet,
    "plan 5": lambda store: memory_need(store, job_to_plan(store, "5", ()), None, solve=False),
    "plan 5 --solve --gpu 24GiB": lambda store: memory_need(store, job_to_plan(store, "5", ()), 24 * GIB, solve=True),
    "plan --accuracy": plan_accuracy,
}
"""A command line without --json, and its answer."""

OF_RESULTS: dict[str, Callable[[Store, ArtifactStore], HasJson]] = {
    "report 1": lambda store, artifacts: report(store, artifacts, 1, "ada"),
    "compare 1 4": lambda store, artifacts: comparison(store, artifacts, (1, 4)),
    "adapters": lambda store, _: adapter_list(store, Page()),
    "adapters list --limit 1": lambda store, _: adapter_list(store, Page(limit=1)),
    "adapters show ends:prod": lambda store, artifacts: lineage(store, artifacts, "ends:prod"),
}
"""The same for what is read from the artifact store, too."""

ELSEWHERE = ("doctor", "usage", "quota", "adapters push")
"""They read more than a store, or what runs counts until now: acceptance/test_doctor.py,
test_usage.py, test_json.py."""

CHANGING = ("submit", "sweep", "reproduce", "gc", "import", "db backup", "db roles", "join", "lab init", "lab invite")
"""Commands that do something; their JSON says what they did."""

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home to copy: a database with jobs of each kind, a sweep, and cards, one of them drained."""
    home = tmp_path_factory.mktemp("filled")
    shutil.copy(sqlite_template, home / "loractl.db")
    engine = connect(load_settings({"LORACTL_HOME": str(home)}))
    _fill(Store(engine, Clock()), home)
    engine.dispose()
    return home


@pytest.fixture
def lab(home: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A lab of the test's own; its clock stands still."""
    shutil.copytree(filled, home, dirs_exist_ok=True)
    for name, value in (("HOME", str(home)), ("USER", "ada")):
        monkeypatch.setenv(f"LORACTL_{name}", value)
    engine = connect(load_settings())
    store = Store(engine, Clock())
    monkeypatch.setattr("loractl.common.store.store.Store", lambda engine: store)
    yield store
    engine.dispose()


def _fill(store: Store, home: Path) -> None:
    base = home / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    for number, name in enumerate(("ends", "fails", "runs", "ends-too"), start=1):
        store.jobs.submit(submission(name=name, max_retries=0, labels={"project": "support"}))
        other = {"pid": 1, "user": "tomas", "name": "vllm", "bytes": GIB}
        # by a card of its own next to what runs: how long that takes is not known
        claim = take(store, 8 * GIB, "box:1" if name == "ends-too" else "box:0", outside=[other])
        assert isinstance(claim, Claim)
        metrics = ((1, "loss", 3.0), (3, "loss", 1.5), (3, "eval_loss", 1.6))
        told = Progress(stage=Stage.TRAINING, step=3, total_steps=30, eta_seconds=900.0, eta_spread_seconds=60.0)
        assert store.attempts.beat(claim, told).accepted
        assert store.attempts.beat(
            claim, Progress(metrics=metrics, events=(("note", "began"),), log="a line\n")
        ).accepted
        if name.startswith("ends"):
            result = replace(RESULT, manifest_sha256=_store_result(home, number))
            store.attempts.finish(claim, Reason.OK, "done", Progress(vram_process=3 * GIB), result)
        elif name == "fails":
            store.attempts.finish(claim, Reason.TRAINER_ERROR, "it crashed", Progress())
    store.jobs.submit(submission(name="waits", lora=6, qlora=5, base_model=str(base)))
    store.jobs.submit(submission(name="larger", lora=60, qlora=50, user="bob"))
    members = [submission(name=f"triage-{number}") for number in (1, 2)]
    store.sweeps.submit(NewSweep(name="triage", varied={"lora.r": "8,16"}), members)
    store.adapters.tag(parse_reference("1"), "prod", "ada")
    store.cards.see(node_state("merlin:0", total=24 * GIB))
    store.cards.drain("merlin", "lena", "replacing a fan")


def _store_result(home: Path, job_id: int) -> str:
    """An adapter's file and a report, where the job's attempt has them. Returns their manifest's hash."""
    report = job(job_id, [1.2 * job_id + n / 40 for n in range(40)]).report
    report["data"] |= {"format": "messages", "sha256": "d" * 64, "train_rows": 36, "held_out_rows": 40}
    report |= {"verdict": {"reading": "better", "sentence": "Better than the base"}, "versions": {"torch": "2.13"}}
    folder = home / f"result-{job_id}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "report.json").write_text(json.dumps(report))
    store = open_store(load_settings({"LORACTL_HOME": str(home)}))
    return manifest_sha256(store.put_result(folder, attempt_prefix(job_id, 1)))


@pytest.mark.parametrize("line", ASKED)
def test_a_reading_command_prints_the_json_of_its_answer(line: str, lab: Store) -> None:
    done = CliRunner().invoke(cli, [*line.split(), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert printed, "an empty answer proves nothing"
    assert printed == json.loads(json.dumps(ASKED[line](lab).as_json()))


def test_no_command_with_json_is_forgotten() -> None:
    asked = {_command_of(line) for line in ASKED}
    listed = [*asked, *{_command_of(line) for line in OF_RESULTS}, *ELSEWHERE, *CHANGING]
    assert len(set(listed)) == len(listed), "a command stands in two lists"
    assert set(listed) == set(with_json(cli))


@pytest.mark.parametrize("line", OF_RESULTS)
def test_a_command_that_reads_results_prints_the_json_of_its_answer(line: str, lab: Store, home: Path) -> None:
    artifacts = open_store(load_settings({"LORACTL_HOME": str(home)}))
    done = CliRunner().invoke(cli, [*line.split(), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    printed = json.loads(done.stdout)
    assert printed, "an empty answer proves nothing"
    assert printed == json.loads(json.dumps(OF_RESULTS[line](lab, artifacts).as_json()))


def with_json(group: click.Group, path: str = "") -> Iterator[str]:
    """The scheduler's commands that have --json, as they are typed."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.callback is not None and command.callback.__module__.startswith("loractl.worker"):
            continue
        if any("--json" in parameter.opts for parameter in command.params):
            yield f"{path}{name}"
        if isinstance(command, click.Group):
            yield from with_json(command, f"{path}{name} ")


def _command_of(line: str) -> str:
    """The longest beginning of the line that names a command."""
    words = line.split()
    names = set(with_json(cli))
    return next(name for length in (2, 1) if (name := " ".join(words[:length])) in names)
