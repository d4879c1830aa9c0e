"""TLS to the queue and the database by URL: who can't show a certificate of the right authority is not talked to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from sqlalchemy import make_url

from loractl.common.errors import ServiceUnreachable
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store

from ..conftest import Cli
from ..models import write_helpdesk
from ..services import QUEUE_SECRET, wake
from ..tls import make_authority, terminator

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_authority(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_authority(tmp_path_factory.mktemp("tls") / "wrong")


@pytest.fixture
def valkey(right: Path, redis_url: str) -> Iterator[str]:
    """The address of a Valkey with a password behind TLS, without query."""
    url = urlsplit(redis_url)
    with terminator(right, int(url.port or 0)) as port:
        yield f"rediss://:{url.password}@localhost:{port}{url.path}"


@pytest.fixture
def database(right: Path, postgres_url: str) -> Iterator[str]:
    """A real PostgreSQL's URL through TLS, without query."""
    url = make_url(postgres_url)
    host, port = str(url.query.get("host", url.host)), url.port or 5432
    upstream = Path(host) / f".s.PGSQL.{port}" if host.startswith("/") else port
    with terminator(right, upstream, postgres=True) as front:
        yield f"postgresql://{url.username}:hunter2@localhost:{front}/{url.database}"


def test_the_queue_answers_by_tls_to_who_trusts_its_authority(valkey: str, right: Path, tmp_path: Path) -> None:
    wake(load_settings(_home(tmp_path, LORACTL_REDIS_URL=f"{valkey}?ssl_ca_certs={right}")), 8)


@pytest.mark.parametrize("query", ["", "?ssl_ca_certs={wrong}"])
def test_a_queue_of_another_authority_is_refused_in_a_sentence(
    valkey: str, wrong: Path, tmp_path: Path, query: str
) -> None:
    """Without a query the system's authorities count."""
    with pytest.raises(ServiceUnreachable, match="certificate verify failed") as caught:
        wake(load_settings(_home(tmp_path, LORACTL_REDIS_URL=valkey + query.format(wrong=wrong))), 8)
    assert QUEUE_SECRET not in caught.value.sentence


def test_a_certificate_for_another_name_is_refused(valkey: str, right: Path, tmp_path: Path) -> None:
    url = valkey.replace("localhost", "127.0.0.1")
    with pytest.raises(ServiceUnreachable, match="certificate verify failed"):
        wake(load_settings(_home(tmp_path, LORACTL_REDIS_URL=f"{url}?ssl_ca_certs={right}")), 8)


def test_the_database_answers_by_tls_to_who_trusts_its_authority(
    make_cli: Callable[..., Cli], database: str, valkey: str, right: Path, tmp_path: Path
) -> None:
    """Both at once, as docs/deploy.md writes them: a job is queued by the command."""
    cli = make_cli(
        LORACTL_DATABASE_URL=f"{database}?sslmode=verify-full&sslrootcert={quote(str(right))}",
        LORACTL_REDIS_URL=f"{valkey}?ssl_ca_certs={right}",
        LORACTL_ARTIFACTS_URL=tmp_path.as_uri(),
    )
    cli("db", "upgrade")
    write_helpdesk(tmp_path / "data.jsonl")
    (tmp_path / "job.yaml").write_text("name: job\nbase_model: gpt2\ndataset: {path: data.jsonl}\n")
    done = cli("submit", tmp_path / "job.yaml")
    assert "Warning" not in done.stderr
    engine = connect(load_settings(cli.environment))
    assert [job.job_id for job in Store(engine).jobs.matching()] == [1]
    engine.dispose()


def test_a_database_of_another_authority_is_refused_in_a_sentence(
    make_cli: Callable[..., Cli], database: str, wrong: Path
) -> None:
    url = f"{database}?sslmode=verify-full&sslrootcert={wrong}"
    told = make_cli(LORACTL_DATABASE_URL=url)("status", code=4).stderr
    assert told.startswith("Error: the database is unreachable at postgresql+psycopg://") and "hunter2" not in told
    assert "certificate verify failed" in told


def _home(folder: Path, **more: str) -> dict[str, str]:
    return {"LORACTL_HOME": str(folder / "home"), **more}
