"""loractl db roles: logins that may what they should, as often as it is said, and passwords that no statement holds."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text

from loractl.common.errors import Forbidden
from loractl.common.store.database import make_engine
from loractl.common.store.roles import SUBMIT, WantedLogin, apply_roles
from loractl.common.store.store import Store

from ..conftest import Cli
from ..unit.factories import submission


@pytest.fixture
def owner(postgres_url: str) -> Iterator[Engine]:
    """The tables' owner, by hand; logins of this test are gone at its end."""
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    yield engine
    with engine.connect() as connection:
        for name in connection.execute(text("SELECT rolname FROM pg_roles WHERE rolname ~ '^new_'")):
            connection.exec_driver_sql(f"DROP ROLE {name[0]}")
    engine.dispose()


@pytest.fixture
def lab(make_cli: Callable[..., Cli], upgraded_postgres: str) -> Cli:
    """The owner's command line on upgraded tables."""
    return make_cli(LORACTL_DATABASE_URL=upgraded_postgres)


def is_password_of(owner: Engine, name: str, password: str) -> bool:
    """Whether it is the login's, by what the server keeps (RFC 5802)."""
    with owner.connect() as connection:
        kept = connection.execute(
            text("SELECT rolpassword FROM pg_authid WHERE rolname = :n"), {"n": name}
        ).scalar_one()
    kind, rounds_and_salt, keys = kept.split("$")
    assert kind == "SCRAM-SHA-256"
    rounds, salt = rounds_and_salt.split(":")
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(rounds))
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    return base64.b64encode(stored).decode() == keys.split(":")[0]


def test_each_login_has_only_its_rights_and_a_second_run_changes_nothing(
    lab: Cli, owner: Engine, tmp_path: Path
) -> None:
    ada, heron, page = (f"new_{name}_{secrets.token_hex(4)}" for name in ("ada", "heron", "page"))
    asked = ("db", "roles", "--person", ada, "--box", heron, "--web", page)
    first = {login["name"]: login for login in json.loads(lab(*asked, "--json").stdout)["logins"]}
    assert all(login["new"] and login["url"].startswith("postgresql://") for login in first.values())
    engines = {name: make_engine(login["url"].replace("://", "+psycopg://", 1)) for name, login in first.items()}
    job_id = Store(engines[ada]).jobs.submit(submission())
    assert Store(engines[page]).jobs.get(job_id).user == ada
    for name in (heron, page):
        with pytest.raises(Forbidden):
            Store(engines[name]).jobs.submit(submission())
    with owner.connect() as connection:
        connection.exec_driver_sql(f"GRANT DELETE ON jobs, nodes TO {SUBMIT}")
    again = lab(*asked).stdout
    assert "The roles already existed." in again and again.count("Its password stays.") == 3 and "://" not in again
    with pytest.raises(Forbidden), engines[ada].begin() as connection:
        connection.execute(text("DELETE FROM jobs"))
    passwords = {name: str(make_url(login["url"]).password) for name, login in first.items()}
    assert all(len(password) == 48 and is_password_of(owner, name, password) for name, password in passwords.items())
    told = lab("db", "roles", "--person", ada, "--renew").stdout
    assert f"{ada} has a new password" in told and told.count("LORACTL_DATABASE_URL=postgresql://") == 1
    assert not is_password_of(owner, ada, passwords[ada]) and is_password_of(owner, heron, passwords[heron])
    (tmp_path / "chosen").write_text("a-password-of-mine\n")
    lab("db", "roles", "--person", ada, "--passwords", tmp_path / "chosen")
    assert is_password_of(owner, ada, "a-password-of-mine")
    refused = lab.with_environment(LORACTL_DATABASE_URL=first[ada]["url"])("db", "roles", code=1).stderr
    assert f"does not let {ada} do that" in refused and passwords[ada] not in refused
    for engine in engines.values():
        engine.dispose()


def test_no_statement_holds_a_password(lab: Cli, owner: Engine, postgres_url: str) -> None:
    engine, said = make_engine(postgres_url), []
    event.listen(
        engine, "before_cursor_execute", lambda c, cursor, statement, values, *_: said.append((statement, values))
    )
    wanted = [WantedLogin(name=f"new_{name}_{secrets.token_hex(4)}", role=SUBMIT) for name in ("ada", "heron")]
    done = apply_roles(
        engine, [wanted[0], WantedLogin(name=wanted[1].name, role=SUBMIT, password="a bird's 100% song")]
    )
    engine.dispose()
    assert is_password_of(owner, wanted[1].name, "a bird's 100% song")
    made = str(make_url(str(done.logins[0].url)).password)
    assert len(said) > 5 and not any(word in str(said) for word in (made, "bird", "song"))
    assert made not in repr(done)


def test_what_can_t_be_a_login_is_refused_and_nothing_is_done(lab: Cli, owner: Engine, tmp_path: Path) -> None:
    ada, other = (f"new_ada_{secrets.token_hex(4)}" for _ in range(2))
    lab("db", "roles", "--person", ada)
    (tmp_path / "short").write_text("short\n")
    superuser = str(owner.url.username)
    for options, code, words in (
        (("--box", ada), 1, f"{ada} has the role loractl_submit"),
        (("--person", superuser), 1, f"{superuser} has more rights than any role"),
        (("--person", "Ada Lovelace"), 2, "'Ada Lovelace' is not a valid login name"),
        (("--box", "loractl_worker"), 2, "is not a valid login name"),
        (("--person", other, "--box", other), 2, "is named twice"),
        (("--person", other, "--passwords", tmp_path / "short"), 2, "is no line of 12 characters"),
        (("--person", other, "--box", f"{other}b", "--passwords", tmp_path / "short"), 2, "1 passwords for 2 logins"),
        (("--person", other, "--box", ada), 1, f"{ada} has the role loractl_submit"),
    ):
        assert words in lab("db", "roles", *options, code=code).stderr
    with owner.connect() as connection:
        assert connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :n"), {"n": other}).scalar() is None
    embedded = Cli({k: v for k, v in lab.environment.items() if k != "LORACTL_DATABASE_URL"})
    assert "this home's database is SQLite" in embedded("db", "roles", code=2).stderr


def test_an_upgrade_gives_the_roles_their_rights(make_cli: Callable[..., Cli], postgres_url: str) -> None:
    cli = make_cli(LORACTL_DATABASE_URL=postgres_url)
    assert "loractl db upgrade" in cli("db", "roles", code=1).stderr, "without tables there is nothing to grant"
    with create_engine(postgres_url, isolation_level="AUTOCOMMIT").connect() as connection:
        if connection.execute(text("SELECT to_regrole('loractl_submit')")).scalar() is None:
            connection.exec_driver_sql("CREATE ROLE loractl_submit NOLOGIN")
        assert "loractl db roles" not in cli("db", "upgrade").stderr
        may = "SELECT has_table_privilege('loractl_submit', 'jobs', :what)"
        assert [connection.execute(text(may), {"what": what}).scalar() for what in ("SELECT", "INSERT")] == [
            True,
            False,
        ]
        called = "SELECT has_function_privilege('loractl_submit', 'loractl_submit(json)', 'EXECUTE')"
        assert connection.execute(text(called)).scalar()
