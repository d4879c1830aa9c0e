"""A lab in three commands: loractl lab init, and loractl join on a box and on a person's machine, on real services."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.roles import SUBMIT, WORK
from loractl.common.store.store import Store
from loractl.scheduler.lab.line import read_line

from .. import services
from ..conftest import Cli
from ..services import QUEUE_SECRET
from ..unit.factories import submission


@dataclass(frozen=True)
class Lab:
    """The server box's command line, and those of machines with homes of their own."""

    owner: Cli
    folder: Path
    store: Path

    def machine(self, name: str) -> Cli:
        bare = {k: v for k, v in self.owner.environment.items() if not k.startswith("LORACTL_")}
        return Cli({**bare, "LORACTL_HOME": str(self.folder / name), "LORACTL_DEVICES": "cpu"})

    def lines(self, *options: str) -> dict[str, str]:
        answer = json.loads(self.owner("lab", *options, "--json").stdout)
        return {ticket["name"] or ticket["kind"]: ticket["line"] for ticket in answer["tickets"]}


@pytest.fixture
def lab(
    alone_inviting: None, make_cli: Callable[..., Cli], postgres_url: str, redis_url: str, tmp_path: Path
) -> Iterator[Lab]:
    owner = make_cli(
        LORACTL_DATABASE_URL=postgres_url,
        LORACTL_REDIS_URL=redis_url,
        LORACTL_ARTIFACTS_URL=(tmp_path / "store").as_uri(),
    )
    yield Lab(owner, tmp_path, tmp_path / "store")
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        names = text("SELECT rolname FROM pg_roles WHERE rolname ~ '^(lab-|loractl_join_)'")
        for (name,) in connection.execute(names).all():
            connection.exec_driver_sql(f'DROP ROLE "{name}"')
    admin.dispose()


def test_a_box_and_a_person_join_with_the_lines_that_init_prints(lab: Lab, postgres_url: str) -> None:
    log = server_log(postgres_url)
    told = lab.owner("lab", "init").stdout
    assert "The tables are at revision" in told and ", new; the roles are " in told
    box_line, person_line = (line.split()[2] for line in told.splitlines() if line.startswith("    loractl join"))
    box, person = lab.machine("box"), lab.machine("person")
    seen = box("join", box_line, "--name", "lab-heron", "--no-service").stdout
    assert "lab-heron runs jobs of the lab at" in seen and "Start the worker: loractl worker" in seen
    command = [Path(sys.executable).with_name("loractl"), "join", "--name", "lab-ada"]
    joined = subprocess.run(
        command, env=person.environment, input=f"{person_line}\n", capture_output=True, text=True, timeout=60
    )
    assert joined.returncode == 0 and "lab-ada submits to the lab at" in joined.stdout, joined.stderr
    for who, cli, role in (("lab-heron", box, WORK), ("lab-ada", person, SUBMIT)):
        config = Path(cli.environment["LORACTL_HOME"]) / "config.toml"
        assert config.stat().st_mode & 0o777 == 0o600
        settings = load_settings(cli.environment)
        assert f"//{who}:" in settings.database_url and QUEUE_SECRET in str(settings.redis_url)
        assert role_of(postgres_url, who) == [role]
    assert load_settings(box.environment).host == "lab-heron"
    engine = connect(load_settings(person.environment))
    assert Store(engine).jobs.submit(submission()) == 1
    engine.dispose()
    for line in (box_line, person_line):
        again = lab.machine("late")("join", line, "--no-service", code=1)
        assert "it was used, has expired" in again.stderr and "loractl lab invite" in again.stderr
    assert not (lab.folder / "late").exists()
    written = log.read_text()
    for secret in (
        QUEUE_SECRET,
        *(read_line(line).password for line in (box_line, person_line)),
        *passwords(box, person),
    ):
        assert secret not in written and secret not in told + seen + joined.stdout
    assert "loractl_lab.enter" in written, "the server's log has every statement"


def test_init_again_changes_nothing_and_invites_again(lab: Lab, postgres_url: str) -> None:
    first = lab.lines("init", "--box", "lab-heron", "--person", "lab-ada")
    box = lab.machine("box")
    box("join", first["lab-heron"], "--no-service")
    before = (load_settings(box.environment), passwords(box))
    told = lab.owner("lab", "init", "--box", "lab-owl").stdout
    assert "the roles are there" in told and "On lab-owl, as root" in told and told.count("loractl join ") == 1
    assert (load_settings(box.environment), passwords(box)) == before
    assert "is in a lab" in box("join", first["lab-ada"], "--no-service", code=1).stderr
    again = lab.lines("invite", "--box", "lab-heron")["lab-heron"]
    box("join", again, "--no-service", "--replace")
    assert passwords(box) != before[1] and role_of(postgres_url, "lab-heron") == [WORK]
    assert "nobody is named" in lab.owner("lab", "invite", code=2).stderr


def test_a_join_that_can_t_work_is_refused_before_the_line_is_used(lab: Lab, postgres_url: str) -> None:
    line = lab.lines("init", "--box", "lab-heron")["lab-heron"]
    box = lab.machine("box")
    home = Path(box.environment["LORACTL_HOME"])
    mark, aside = lab.store, lab.folder / "aside"
    mark.rename(aside)
    assert "this machine has no such folder" in box("join", line, "--no-service", code=4).stderr
    aside.rename(mark)
    set_there = box.with_environment(LORACTL_REDIS_URL="redis://127.0.0.1:1/0")
    assert "LORACTL_REDIS_URL is set here" in set_there("join", line, "--no-service", code=1).stderr
    assert "this line is for lab-heron" in box("join", line, "--name", "lab-owl", "--no-service", code=2).stderr
    assert "damaged" in box("join", line[:-4], "--no-service", code=2).stderr
    assert not home.exists() and role_of(postgres_url, "lab-heron") == []
    box("join", line, "--no-service")
    assert role_of(postgres_url, "lab-heron") == [WORK]


def test_a_queue_that_is_away_stops_a_join_and_the_line_serves_on(
    alone_inviting: None, make_cli: Callable[..., Cli], postgres_url: str, tmp_path: Path
) -> None:
    with services.valkey(tmp_path, QUEUE_SECRET) as redis_url:
        store = (tmp_path / "store").as_uri()
        owner = make_cli(LORACTL_DATABASE_URL=postgres_url, LORACTL_REDIS_URL=redis_url, LORACTL_ARTIFACTS_URL=store)
        lab = Lab(owner, tmp_path, tmp_path / "store")
        line = lab.lines("init", "--box", "lab-heron")["lab-heron"]
    refused = lab.machine("box")("join", line, "--no-service", code=1)
    assert "queue: the queue is unreachable" in refused.stderr and "the line still works" in refused.stderr
    assert QUEUE_SECRET not in refused.stdout + refused.stderr
    assert not (tmp_path / "box").exists() and role_of(postgres_url, "lab-heron") == []
    again = owner("lab", "invite", "--box", "lab-heron").stdout
    assert "loractl join join-" in again, "the owner needs no queue to invite"
    assert "queue: the queue is unreachable" in owner("lab", "init", code=1).stderr


def test_a_lab_needs_services_that_others_reach(cli: Cli, make_cli: Callable[..., Cli], postgres_url: str) -> None:
    assert "a lab needs PostgreSQL" in cli("lab", "init", code=2).stderr
    assert "no queue that others reach" in make_cli(LORACTL_DATABASE_URL=postgres_url)("lab", "init", code=2).stderr


def passwords(*machines: Cli) -> list[str]:
    return [str(make_url(load_settings(cli.environment).database_url).password) for cli in machines]


def role_of(owner_url: str, login: str) -> list[str]:
    engine = create_engine(owner_url)
    with engine.connect() as connection:
        groups = text(
            "SELECT g.rolname FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid"
            " JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = :n"
        )
        found = list(connection.execute(groups, {"n": login}).scalars())
    engine.dispose()
    return found


def server_log(owner_url: str) -> Path:
    """The server's log, which from now on has every statement in this database with its values."""
    engine = create_engine(owner_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {engine.url.database} SET log_statement = 'all'")
        folder = Path(str(connection.execute(text("SHOW data_directory")).scalar_one()))
    engine.dispose()
    return folder / "log"
