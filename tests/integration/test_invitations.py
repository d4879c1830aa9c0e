"""Join lines on a real PostgreSQL: what their logins may do, for whom they serve, how often and how long."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from loractl.common.errors import Forbidden, UsageError, WrongState
from loractl.common.store.database import make_engine
from loractl.common.store.roles import (
    LOGIN,
    SUBMIT,
    WORK,
    Invitation,
    WantedLogin,
    apply_roles,
    entered,
    invite,
    look,
    verifier,
)
from loractl.common.store.schema import upgrade
from loractl.common.store.store import Store

from .. import services
from ..unit.factories import submission

ENTER = "SELECT loractl_lab.enter('x', NULL)"


@pytest.fixture
def owner(alone_inviting: None, upgraded_postgres: str) -> Iterator[Engine]:
    """The owner of tables that are there, with roles; logins of this test go at its end."""
    engine = make_engine(upgraded_postgres)
    apply_roles(engine)
    yield engine
    with engine.begin() as connection:
        for (name,) in connection.execute(text(f"SELECT rolname FROM pg_roles WHERE rolname ~ '^(guest_|{LOGIN})'")):
            connection.exec_driver_sql(f"DROP ROLE {name}")
    engine.dispose()


@pytest.fixture
def invited(owner: Engine) -> Iterator[Callable[..., tuple[Engine, Invitation]]]:
    """A factory of invitations, each with the engine of its line's login."""
    engines: list[Engine] = []

    def make(role: str = SUBMIT, name: str | None = None, valid_s: float = 3600) -> tuple[Engine, Invitation]:
        number, password = secrets.token_hex(6), secrets.token_hex(16)
        guest = Invitation(login=LOGIN + number, password=password, role=role, name=name, sealed="sealed words")
        invite(owner, [guest], valid_s)
        url = owner.url.set(username=guest.login, password=password).render_as_string(hide_password=False)
        engines.append(make_engine(url))
        return engines[-1], guest

    yield make
    for engine in engines:
        engine.dispose()


def new_name() -> str:
    return f"guest_{secrets.token_hex(4)}"


def test_a_line_makes_one_login_of_its_role_once(
    owner: Engine, invited: Callable[..., tuple[Engine, Invitation]]
) -> None:
    engine, _guest = invited(SUBMIT)
    found = look(engine)
    assert (found.role, found.name, found.sealed) == (SUBMIT, None, "sealed words")
    ada = new_name()
    with pytest.raises(ZeroDivisionError), entered(engine, ada, "a" * 20):
        raise ZeroDivisionError
    assert look(engine).role == SUBMIT, "nothing was made, and it serves"
    with entered(engine, ada, "a" * 20) as name:
        assert name == ada
    person = make_engine(owner.url.set(username=ada, password="a" * 20).render_as_string(hide_password=False))
    assert Store(person).jobs.submit(submission()) == 1
    with pytest.raises(Forbidden), person.begin() as connection:
        connection.execute(text("SELECT * FROM loractl_lab.invitations"))
    with pytest.raises(Forbidden), person.begin() as connection:
        connection.execute(text(ENTER))
    person.dispose()
    with pytest.raises(WrongState, match="is no longer valid"):
        look(engine)
    engine.dispose()
    with pytest.raises(DBAPIError, match="not permitted to log in"):
        look(engine)
    with owner.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM loractl_lab.invitations")).scalar() == 0


def test_a_line_s_login_may_do_nothing_else(owner: Engine, invited: Callable[..., tuple[Engine, Invitation]]) -> None:
    engine, _guest = invited(WORK)
    for statement in (
        "SELECT * FROM jobs", "SELECT * FROM alembic_version", "SELECT * FROM loractl_lab.invitations",
        "CREATE TABLE mine (a int)", "CREATE TEMPORARY TABLE mine (a int)", "CREATE SCHEMA mine", "CREATE ROLE mine",
        "GRANT loractl_worker TO CURRENT_USER", "SET ROLE loractl_worker", "SET ROLE loractl_registrar",
        "SET SESSION AUTHORIZATION loractl_registrar", "SELECT rolpassword FROM pg_authid",
        "CREATE FUNCTION loractl_lab.enter(a int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "UPDATE loractl_lab.invitations SET role = 'loractl_worker'",
    ):  # fmt: skip
        with pytest.raises((Forbidden, DBAPIError)), engine.begin() as connection:
            connection.exec_driver_sql(statement)
            pytest.fail(f"{statement} was let through")
    with engine.begin() as connection:  # what it has of its own does not lead the function astray
        connection.exec_driver_sql("SET search_path = pg_temp, public")
        assert "sealed words" in str(connection.execute(text(ENTER)).scalar_one())
    wrong = "SELECT loractl_lab.enter(:name, :kept)::text"
    good = "SCRAM-SHA-256$4096:" + "A" * 24 + "$" + "A" * 44 + ":" + "A" * 44
    for name, kept, why in (
        ("ada", "a password", "verifier"), ("ada", "md5" + "0" * 32, "verifier"), ("ada", good + "'", "verifier"),
        ('a"; DROP ROLE x', good, "name"), ("loractl_worker", good, "name"), ("pg_read_all_data", good, "name"),
        ("public", good, "name"), (None, good, "name"), ("postgres", good, "taken"),
    ):  # fmt: skip
        with engine.begin() as connection:
            answer = str(connection.execute(text(wrong), {"name": name, "kept": kept}).scalar_one())
            assert f'"refused" : "{why}"' in answer, (name, kept, answer)
    assert look(engine).role == WORK


def test_of_two_that_use_a_line_at_once_one_comes_in(
    owner: Engine, invited: Callable[..., tuple[Engine, Invitation]]
) -> None:
    engine, _ = invited(WORK)
    names = [new_name(), new_name()]

    def come(name: str) -> str | None:
        try:
            with entered(engine, name, "b" * 20) as made:
                time.sleep(0.1)  # the other one waits for the row
                return made
        except WrongState:
            return None

    with ThreadPoolExecutor(2) as pool:
        came = sorted(str(name) for name in pool.map(come, names))
    assert came[0] == "None" and came[1] in names
    with owner.begin() as connection:
        there = connection.execute(text("SELECT rolname FROM pg_roles WHERE rolname = ANY(:n)"), {"n": names}).scalars()
        assert list(there) == [came[1]]


def test_a_line_ends_with_its_time_and_its_login_goes_with_the_next(
    owner: Engine, invited: Callable[..., tuple[Engine, Invitation]]
) -> None:
    engine, guest = invited(valid_s=0.3)
    with engine.connect() as living:
        time.sleep(0.4)
        assert "'spent'" in str(living.execute(text(ENTER)).scalar_one()), "though it has stayed connected"
    engine.dispose()
    with pytest.raises(DBAPIError, match="password authentication failed"):
        look(engine)
    invited()
    with owner.connect() as connection:
        there = text("SELECT count(*) FROM pg_roles WHERE rolname = :n")
        assert connection.execute(there, {"n": guest.login}).scalar() == 0
        assert connection.execute(text("SELECT count(*) FROM loractl_lab.invitations")).scalar() == 1


def test_lines_whose_transactions_stay_open_keep_the_owner_from_inviting_nobody(
    owner: Engine, invited: Callable[..., tuple[Engine, Invitation]]
) -> None:
    (looking, looks), (entering, _) = invited(), invited()
    with looking.connect() as one, entering.connect() as other:
        one.execute(text(ENTER))
        with owner.begin() as connection:
            over = text("UPDATE loractl_lab.invitations SET expires_at = now() WHERE login = :login")
            connection.execute(over, {"login": looks.login})
            kept = verifier(connection, "x", "a" * 20)
        other.execute(text("SELECT loractl_lab.enter(:name, :kept)"), {"name": new_name(), "kept": kept})
        began = time.monotonic()
        engine, _ = invited()
        assert look(engine).role == SUBMIT and time.monotonic() - began < 3


def test_a_name_that_is_there_changes_its_password_for_the_owner_s_line_alone(
    owner: Engine, invited: Callable[..., tuple[Engine, Invitation]]
) -> None:
    ada = new_name()
    apply_roles(owner, [WantedLogin(name=ada, role=SUBMIT)])
    kept = text("SELECT rolpassword FROM pg_authid WHERE rolname = :n")

    def password() -> str:
        with owner.connect() as connection:
            return str(connection.execute(kept, {"n": ada}).scalar_one())

    before = password()
    engine, _ = invited(SUBMIT)
    with pytest.raises(WrongState, match="another login has this name"), entered(engine, ada, "c" * 20):
        pytest.fail("it came in")
    assert password() == before
    again, _ = invited(SUBMIT, ada)
    with entered(again, "whoever", "c" * 20) as name:
        assert name == ada
    assert password() != before
    for wrong, role in ((WrongState, WORK), (UsageError, SUBMIT), (WrongState, SUBMIT)):
        with pytest.raises(wrong):
            invited(role, {(WrongState, WORK): ada, (UsageError, SUBMIT): "Ada B"}.get((wrong, role), "postgres"))


@pytest.mark.long
def test_an_owner_who_is_no_superuser_invites_too(real_services: None) -> None:
    """As on a server from a distribution's packages: the tables' owner may make roles, and no more."""
    folder = Path(tempfile.mkdtemp(prefix="loractl-pg-"))
    with services.postgres(folder) as server:
        admin = create_engine(server.replace("://", "+psycopg://", 1), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql("CREATE ROLE lab_owner LOGIN CREATEROLE")
            connection.exec_driver_sql("CREATE DATABASE lab OWNER lab_owner")
        admin.dispose()
        engine = make_engine(
            str(make_url(server).set(drivername="postgresql+psycopg", username="lab_owner", database="lab"))
        )
        upgrade(engine)
        apply_roles(engine)
        for name in (None, "ada", "ada"):  # a new one, and that one twice again
            guest = Invitation(login=LOGIN + secrets.token_hex(6), password="p", role=SUBMIT, name=name, sealed="s")
            invite(engine, [guest], 60)
            line = make_engine(engine.url.set(username=guest.login, password="p").render_as_string(False))
            with entered(line, "ada", "d" * 20) as made:
                assert made == "ada"
            line.dispose()
        apply_roles(engine, [WantedLogin(name="bob", role=WORK)])
        guest = Invitation(login=LOGIN + secrets.token_hex(6), password="p", role=WORK, name="bob", sealed="s")
        invite(engine, [guest], 60)
        line = make_engine(engine.url.set(username=guest.login, password="p").render_as_string(False))
        with entered(line, "bob", "e" * 20) as made:
            assert made == "bob", "a login that loractl db roles has made"
        line.dispose()
        apply_roles(engine, [WantedLogin(name="ada", role=SUBMIT)], renew=True)
        engine.dispose()
    shutil.rmtree(folder, ignore_errors=True)
