"""The roles of docs/deploy.md, made from the page's own SQL."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, make_url

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"


@dataclass(frozen=True, kw_only=True)
class Logins:
    """URLs of one database: of who submits, and of a GPU box."""

    person: str
    box: str


@contextlib.contextmanager
def logins(owner_url: str, password: str = "pw") -> Iterator[Logins]:
    """Roles in a database that has its tables. A server has its roles in common: names differ from test to test."""
    rules, made = re.findall(r"```sql\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    suffix = secrets.token_hex(4)
    names = {"ada": f"ada_{suffix}", "heron": f"heron_{suffix}"}
    assert made.count("'...'") == 2
    for name, ours in names.items():
        assert f"CREATE ROLE {name} " in made
        made = made.replace(f"CREATE ROLE {name} ", f"CREATE ROLE {ours} ")
    admin = create_engine(owner_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for _ in range(2):  # the page says: again after each upgrade
            connection.exec_driver_sql(rules)
        connection.exec_driver_sql(made.replace("'...'", f"'{password}'"))

    def url(name: str) -> str:
        changed = make_url(owner_url).set(username=names[name], password=password)
        return changed.render_as_string(hide_password=False)

    yield Logins(person=url("ada"), box=url("heron"))
    with admin.connect() as connection:
        for ours in names.values():
            connection.exec_driver_sql(f"DROP ROLE {ours}")
    admin.dispose()


@contextlib.contextmanager
def role(owner_url: str, name: str, group: str, password: str = "pw") -> Iterator[str]:
    """A login of one of the roles; yields its URL."""
    admin = create_engine(owner_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' IN ROLE {group}")
    yield make_url(owner_url).set(username=name, password=password).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")
    admin.dispose()
