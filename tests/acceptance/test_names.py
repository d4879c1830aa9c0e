"""Jobs by name, tag and range, where a number could stand; and what the shell completes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.job.names import parse_reference
from loractl.common.job.status import Reason
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store

from ..conftest import Cli
from ..unit.factories import RESULT, submission, take


@pytest.fixture
def lab(cli: Cli, home: Path) -> Cli:
    """Job 1 (tickets) has succeeded and is tagged prod; 2 to 5 wait, 3 and 4 under one name, 5 is bob's."""
    engine = connect(load_settings(cli.environment))
    store = Store(engine)
    store.lab.set("changes", "open")
    user = load_settings(cli.environment).user
    for name in ("tickets", "alone", "twice", "twice"):
        store.jobs.submit(replace(submission(name=name), user=user))
    store.jobs.submit(replace(submission(name="other"), user="bob"))
    claim = take(store)
    assert isinstance(claim, Claim) and claim.job_id == 1
    store.attempts.finish(claim, Reason.OK, "better", Progress(), RESULT)
    store.adapters.tag(parse_reference("1"), "prod", user)
    engine.dispose()
    return cli


def _statuses(cli: Cli) -> dict[int, str]:
    return {job["job_id"]: job["status"] for job in json.loads(cli("status", "-a", "--json").stdout)}


def test_a_job_is_named_by_its_name_or_tag_and_what_is_ambiguous_is_listed(lab: Cli) -> None:
    assert json.loads(lab("status", "alone", "--json").stdout)["job_id"] == 2
    assert json.loads(lab("status", "tickets:prod", "--json").stdout)["job_id"] == 1
    assert json.loads(lab("why", "alone", "--json").stdout)["job_id"] == 2
    several = lab("status", "twice", code=2).stderr
    assert "several jobs are named twice: 4 (queued), 3 (queued)" in several
    assert "there is no job nobody" in lab("logs", "nobody", code=3).stderr


def test_ranges_and_a_persons_waiting_jobs_are_cancelled(lab: Cli) -> None:
    assert "Job 2 is held" in lab("hold", "2-2").stdout
    lab("cancel", "--user", "me", "--queued")
    assert _statuses(lab) == {1: "succeeded", 2: "cancelled", 3: "cancelled", 4: "cancelled", 5: "queued"}
    lab("retry", "2-4")
    lab("cancel", "4-9")
    assert _statuses(lab) == {1: "succeeded", 2: "queued", 3: "queued", 4: "cancelled", 5: "cancelled"}
    assert "the range 9-4 ends before it begins" in lab("cancel", "9-4", code=2).stderr
    assert "there is no job 50-60" in lab("cancel", "50-60", code=3).stderr
    lab("cancel", "3", "--user", "me", code=2)


def test_a_tag_is_given_without_its_name_and_a_person_nobody_knows_is_doubted(lab: Cli) -> None:
    told = lab("adapters", "tag", "1", "tickets:prod", code=2).stderr.splitlines()
    assert told[0].startswith("Error: 'tickets:prod' is a name and a tag") and told[1:] == [
        "Hint: loractl adapters tag 1 prod"
    ]
    doubted = "Warning: nobody called bbo has submitted a job here; did you mean bob?"
    for command in (
        ("quota", "set", "bbo", "1h/day"),
        ("cancel", "--user", "bob2", "--queued"),
        ("status", "--user", "bob2"),
    ):
        assert lab(*command).stderr.splitlines()[:1] == [doubted.replace("bbo", command[2])]
    assert "did you mean bbo?" in lab("quota", "remove", "bob", code=2).stderr
    lab("quota", "set", "bob", "1h/day")
    assert not lab("quota", "remove", "bob").stderr


@pytest.mark.parametrize(
    ("shell", "line", "offered"),
    [
        ("bash", "loractl status ", {"1", "5", "alone", "tickets:prod"}),
        pytest.param("zsh", "loractl cancel al", {"alone"}, marks=pytest.mark.long),
        ("fish", "loractl submit --set training.max_s", {"training.max_steps="}),
        pytest.param("bash", "loractl drain ", {"box", "box:0"}, marks=pytest.mark.long),
        pytest.param("bash", "loractl adapters pull tick", {"tickets", "tickets:prod"}, marks=pytest.mark.long),
    ],
)
def test_the_shell_completes_jobs_names_tags_boxes_and_keys(lab: Cli, shell: str, line: str, offered: set[str]) -> None:
    words = line.split(" ")
    place = words[-1] if shell == "fish" else str(len(words) - 1)  # fish says the word itself
    asked = {"_LORACTL_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": place}
    told, _ = lab.with_environment(**asked).start().communicate(timeout=60)
    assert all(word in told for word in offered) and "Traceback" not in told, told


def test_a_closed_lab_s_people_change_their_own_jobs_and_operators_all(lab: Cli, make_cli: Callable[..., Cli]) -> None:
    user, bob = load_settings(lab.environment).user, make_cli(LORACTL_USER="bob")
    assert "People change their own jobs" in lab("lab", "close").stdout
    told = bob("cancel", "2", code=1).stderr
    assert f"Error: job 2 is {user}'s: only {user}, an operator or the lab's owner may cancel it" in told
    assert "loractl lab operators --add NAME, loractl lab open" in told
    for command in (("hold", "2"), ("edit", "2", "--set", "training.seed=3"), ("adapters", "tag", "1", "mine"),
                    ("adapters", "untag", "tickets:prod"), ("cancel", "--user", user, "--queued")):  # fmt: skip
        assert (
            f"an operator or the lab's owner may {command[0].replace('adapters', 'tag')} it"
            in bob(*command, code=1).stderr
        )
    assert _statuses(lab) == {1: "succeeded", 2: "queued", 3: "queued", 4: "queued", 5: "queued"}
    told = bob("cancel", "2-5", code=1)
    assert told.stderr.count("may cancel it") == 3 and told.stdout == "Job 5 is cancelled.\n"
    assert lab("lab", "operators", "--add", "bob").stdout == "People change their own jobs. Operators: bob.\n"
    bob("hold", "2")
    assert lab("lab", "operators", "--remove", "bob").stdout == "People change their own jobs. Operators: none.\n"
    assert "may release it" in bob("release", "2", code=1).stderr
    lab("lab", "open")
    bob("release", "2")
