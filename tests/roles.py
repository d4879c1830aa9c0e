"""Logins with the roles of a lab, made as loractl db roles makes them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import create_engine

from loractl.common.store.database import make_engine
from loractl.common.store.roles import SUBMIT, WORK, WantedLogin, apply_roles

from .databases import KeptDatabase

PASSWORD = "pw-of-a-test-1234"


@dataclass(frozen=True, kw_only=True)
class Logins:
    """URLs of one database: of who submits, and of a GPU box."""

    person: str
    box: str


@contextlib.contextmanager
def logins(owner_url: str, password: str = PASSWORD) -> Iterator[Logins]:
    """Roles in a database that has its tables. A server has its roles in common: names differ from test to test."""
    suffix = secrets.token_hex(4)
    with (
        role(owner_url, f"ada_{suffix}", SUBMIT, password) as person,
        role(owner_url, f"heron_{suffix}", WORK, password) as box,
    ):
        yield Logins(person=person, box=box)


class KeptLab(KeptDatabase):
    """A kept database with the roles of a lab, and a login of a person and of a box."""

    rows = "SELECT"

    logins: Logins

    def furnish(self, until: contextlib.ExitStack, url: str) -> None:
        self.logins = until.enter_context(logins(url))


@contextlib.contextmanager
def role(owner_url: str, name: str, group: str, password: str = PASSWORD) -> Iterator[str]:
    """A login of one of the roles; yields its URL."""
    engine = make_engine(owner_url)
    (login,) = apply_roles(engine, [WantedLogin(name=name, role=group, password=password)]).logins
    engine.dispose()
    assert login.url is not None and login.new
    yield login.url.replace("postgresql://", "postgresql+psycopg://", 1)
    admin = create_engine(owner_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")
    admin.dispose()
