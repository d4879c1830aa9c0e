"""The site's page of JSON keys names every key that --json prints."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from loractl.common.artifacts import open_store
from loractl.common.memory.step import Lengths
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.roles import RoleLogin, RolesDone
from loractl.common.store.store import Store
from loractl.common.store.tables import FinalLook
from loractl.scheduler.cli.main import cli
from loractl.scheduler.compare.winner import sweep_comparison
from loractl.scheduler.fleet.answer import Fleet, fleet
from loractl.scheduler.lab.health.condition import Condition, Diagnosis, Level
from loractl.scheduler.lab.join import JoinAnswer
from loractl.scheduler.lab.lab import JoinTicket, LabAnswer
from loractl.scheduler.plan.answer import job_to_plan, memory_need
from loractl.scheduler.report.answer import FinalResult

from ... import json_page, webs
from ...models import write_helpdesk
from ..factories import NOON
from .test_answers import CONFIG

TESTS = Path(json_page.__file__).parent

LINES = {
    "submit": ["submit {job} --set labels.project=support"],
    "submit --dry-run": ["submit {job} --dry-run"],
    "sweep --dry-run": ["sweep {job} --set lora.r=4,8 --early-stop --dry-run"],
    "sweep": ["sweep {job} --set lora.r=4,8,16 --trials 2 --early-stop"],
    "status": ["status"],
    "status --all": ["status --all"],
    "status JOB": ["status 11", "status 10", "status 12", "status 21"],
    "status --sweep": ["status --sweep 1"],
    "compare": ["compare 7 8"],
    "compare --sweep": ["compare --sweep 1"],
    "reproduce": ["reproduce 7 --dry-run"],
    "reproduce --check": ["reproduce 7 --check 8"],
    "adapters": ["adapters", "adapters list"],
    "adapters show": ["adapters show 7"],
    "why": ["why 16"],
    "why of a job that does not wait": ["why 11"],
    "plan": ["plan {job} --solve", "plan {job} --gpu 5GiB"],
    "plan --accuracy": ["plan --accuracy"],
    "gpus": ["gpus"],
    "usage": ["usage", "usage --by month --since 400d"],
    "quota": ["quota"],
    "import": ["import {theirs}"],
    "gc": ["gc --dry-run"],
    "db backup": ["db backup {backup}"],
    "doctor": ["doctor --check disk"],
}
"""Command lines whose JSON together is what a section lists."""

ELSEWHERE = {
    "report": "acceptance/test_adapters.py",
    "generate": "acceptance/test_adapters.py",
    "adapters merge": "acceptance/test_adapters.py",
    "adapters push": "unit/scheduler/adapters/test_push.py",
    "matrix": "acceptance/test_matrix.py",
    "data check": "integration/test_data_check.py",
    "data show": "integration/test_data_check.py",
}
"""Commands that need a model, a tokenizer or a hub: their sections are held where they run."""

THEIRS = """
base_model: org/model
datasets: [{path: data.jsonl, type: alpaca}]
adapter: lora
micro_batch_size: 2
learning_rate: 0.0002
output_dir: out
unheard_of: true
"""


@pytest.fixture
def lab(seeded: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The seeded lab as a home; its clock stands still."""
    shutil.copytree(seeded / "artifacts", home / "artifacts")
    shutil.copy(seeded / "lab.db", home / "loractl.db")
    for name, value in (("HOME", str(home)), ("USER", "mara")):
        monkeypatch.setenv(f"LORACTL_{name}", value)
    settings = load_settings()
    store = Store(connect(settings), lambda: NOON)
    for user, hours in (("mara", 1.0), ("wei", 1000.0)):
        store.usage.set_quota(user, hours, 7 * 86400, soft=user == "wei")
    monkeypatch.setattr("loractl.common.store.store.Store", lambda engine: store)
    return store


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What commands read and write, by name."""
    named = {"job": "job.yaml", "theirs": "theirs.yaml", "backup": "backup"}
    files = {name: tmp_path / file for name, file in named.items()}
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    files["job"].write_text("name: triage\nbase_model: ./base\nmethod: lora\ndataset: {path: data.jsonl}\n")
    files["theirs"].write_text(THEIRS)
    return files


def test_the_page_lists_what_the_commands_print(lab: Store, files: dict[str, Path]) -> None:
    printed = {title: [_printed(line.format(**files)) for line in lines] for title, lines in LINES.items()}
    for title, values in _by_hand(lab, files["job"]).items():
        printed.setdefault(title, []).extend(values)
    json_page.hold(printed)


def test_every_command_with_json_has_a_section_that_is_held() -> None:
    assert set(json_page.ANSWERS) == {*LINES, *ELSEWHERE, *BY_HAND}
    words = [f"{words} " for words in (*itertools.chain(*LINES.values()), *ELSEWHERE, *BY_HAND)]
    assert [name for name in _with_json(cli) if not any(line.startswith(f"{name} ") for line in words)] == []
    for title, file in ELSEWHERE.items():
        assert f'"{title}"' in (TESTS / file).read_text("utf-8"), f"{file} does not hold {title}"


def _printed(line: str) -> Any:
    done = CliRunner().invoke(cli, [*shlex.split(line), "--json"])
    assert done.stdout.startswith(("[", "{")), f"{line}: {done.output} {done.exception!r}"
    return json.loads(done.stdout)


BY_HAND = ("db roles", "lab init", "lab invite", "join")
"""What needs PostgreSQL or a machine to set up: their answers are put together here."""


def _by_hand(lab: Store, job: Path) -> dict[str, list[Any]]:
    """Answers that no command gives in this lab, and parts that a lab of one moment lacks."""
    found = Condition(check="queue", level=Level.WARNING, sentence="it is slow", hint="look at it")
    made = LabAnswer(
        host="10.0.0.5", only_here=False, revision="0038", revision_before="0037", new_roles=("loractl_web",),
        until=NOON, tickets=(JoinTicket(kind="box", name="heron", line="join-1"),), done=("It listens.",),
    )  # fmt: skip
    joined = JoinAnswer(
        kind="box", name="heron", host="10.0.0.5", file="config.toml", embedded="loractl.db", service="started",
        diagnosis=Diagnosis(conditions=(found,)),
    )  # fmt: skip
    roles = RolesDone(
        revision="0038", new_roles=("loractl_web",), logins=(RoleLogin(name="ada", role="submit", new=True, url="p"),)
    )
    whole = sweep_comparison(lab, open_store(load_settings()), 1, "mara")
    planned = replace(
        memory_need(lab, job_to_plan(lab, str(job), ()), None, solve=False),
        lengths=Lengths(train=90, evaluate=80, rows=20, labels=2, longest=(90,), text=45),
        rows={"train": 20, "held_out": 2, "final": 2, "cut": 0, "left_out": 1},
    )
    report = webs.the_report(1, "triage-sweep", "mara", 3.0, 0.8)
    last = {"sha256": "f" * 64, "verdict": {**report["verdict"], "aside": ""}}
    last |= {key: report["evaluation"][key] for key in ("rows", "metrics")}
    look = FinalLook(rows_sha256="f" * 64, job_id=1, sweep_id=1, user="mara", at=NOON)
    final = FinalResult(job_id=1, content=last, looks=(look,))
    return {
        "lab init": [made.as_json()],
        "lab invite": [made.as_json()],
        "join": [joined.as_json()],
        "db roles": [roles.as_json()],
        "doctor": [Diagnosis(conditions=(found,)).as_json()],
        "plan": [planned.as_json()],
        "compare --sweep": [replace(whole, final=final).as_json()],
        "gpus": [_with_a_self_test(fleet(lab)).as_json()],
    }


def _with_a_self_test(found: Fleet) -> Fleet:
    """Its first card has shown something before it served."""
    found.devices[0].row.self_test = {}
    return found


def _with_json(group: click.Group, path: str = "") -> list[str]:
    """The commands that have --json, as they are typed."""
    found = []
    for name in group.list_commands(context := click.Context(group)):
        command = group.get_command(context, name)
        assert command is not None
        if any("--json" in parameter.opts for parameter in command.params):
            found.append(f"{path}{name}")
        if isinstance(command, click.Group):
            found += _with_json(command, f"{path}{name} ")
    return found
