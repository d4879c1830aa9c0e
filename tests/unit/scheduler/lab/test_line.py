"""Join lines: one word that survives a shell and a mail, and tells what was copied wrongly without repeating it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

from loractl.common.errors import UsageError
from loractl.common.settings import load_settings
from loractl.scheduler.lab.line import JoinLine, addresses_of, new_secret, read_line


def line(**changed: object) -> JoinLine:
    number, secret = new_secret()
    fields = {"host": "10.0.0.5", "port": 5432, "database": "loractl", "number": number, "secret": secret, "tls": {}}
    return JoinLine(**{**fields, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["10.0.0.5", "db.lab", "fd00::5", "/tmp/a socket"])
def test_a_line_says_again_what_it_was_made_of(host: str) -> None:
    made = line(host=host, database="ein Labor", tls={"sslmode": "require", "channel_binding": "require"})
    text = made.text()
    assert read_line(text) == made and shlex.split(text) == [text] and re.fullmatch(r"[\w-]+", text)
    assert read_line(f"  {text[:40]}\n  {text[40:]}\n") == made, "a mail has wrapped it"
    assert read_line(f"    loractl join {text}\n") == made, "copied with its command"
    url = make_url(made.url("ada", "pass", made.tls))
    assert (url.host or url.query["host"], int(str(url.port or url.query["port"]))) == (host, 5432)
    assert (url.username, url.database, url.query["sslmode"]) == ("ada", "ein Labor", "require")


def test_what_was_copied_wrongly_is_told_and_not_repeated() -> None:
    text = line().text()
    for wrong in ("", "postgresql://ada@db", text[:-3], text[:20] + text[21:], text + "AAAA", text.replace("-", "-!")):
        with pytest.raises(UsageError) as error:
            read_line(wrong)
        assert "join line" in error.value.sentence and text[8:30] not in error.value.sentence + str(error.value.hint)


def test_the_secret_is_shown_by_no_repr_and_its_uses_differ() -> None:
    made = line()
    assert made.secret not in repr(made) and made.password not in repr(made)
    assert made.password not in made.seal("text")
    assert made.secret not in made.url(made.login, made.password, {})


def test_a_lab_without_cryptography_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    for use in (line().seal, line().unseal):
        with pytest.raises(UsageError, match="cryptography is not installed") as no:
            use("text")
        assert no.value.hint == "pip install 'loractl[postgres]'"


def test_what_is_sealed_opens_with_its_key_alone_and_unchanged() -> None:
    mine, other = line(), line()
    sealed = mine.seal("redis://:secret@10.0.0.5/0 ä")
    assert mine.unseal(sealed) == "redis://:secret@10.0.0.5/0 ä" and "secret" not in sealed
    for wrong, text in ((other, sealed), (mine, sealed[:-8] + "AAAAAAA="), (mine, "")):
        with pytest.raises(ValueError, match="another line"):
            wrong.unseal(text)


@pytest.mark.parametrize(("address", "there"), [("10.0.0.5", "10.0.0.5"), ("fd00::5", "[fd00::5]")])
def test_an_address_takes_the_place_of_one_that_only_this_machine_reaches(
    tmp_path: Path, address: str, there: str
) -> None:
    said = {
        "LORACTL_HOME": str(tmp_path), "LORACTL_DATABASE_URL": "postgresql://lab:p@127.0.0.1/lab",
        "LORACTL_REDIS_URL": "redis://:p@127.0.0.1:6379/0",
    }  # fmt: skip
    assert addresses_of(load_settings(said), False, address).redis_url == f"redis://:p@{there}:6379/0"
