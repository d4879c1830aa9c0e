"""loractl doctor on real services: what is in order, what is not, what hangs, and what no line shows."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from loractl import __version__
from loractl.common.artifacts import MARK
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.schema import HEAD
from loractl.common.store.store import Store
from loractl.common.units import GIB

from .. import services
from ..conftest import Cli
from ..integration.test_store_keys import SECRET, gate  # noqa: F401  a fixture
from ..nvml import FakeCard, build, compiler
from ..services import QUEUE_SECRET, S3
from ..unit.factories import node_state

LAB = (
    "settings", "database", "revision", "logins", "clock", "queue", "store", "disk", "models", "boxes", "messages",
    "cards",
)  # fmt: skip
PASSWORD = "bird-8215-%2F-song"


def checks(cli: Cli, *options: str, code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """What doctor says as JSON, by check."""
    answer = json.loads(cli("doctor", "--json", *options, code=code).stdout)
    assert answer["ok"] == (code == 0)
    found: dict[str, list[dict[str, Any]]] = {}
    for line in answer["checks"]:
        assert set(line) == {"check", "level", "sentence", "hint"}
        assert line["level"] in ("ok", "warning", "error", "skipped") and (line["level"] == "ok" or line["sentence"])
        found.setdefault(line["check"], []).append(line)
    return found


def levels(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    return {check: lines[0]["level"] for check, lines in found.items()}


def box_state(node: str, version: str = __version__, torch: str = "2.10.0", **changed: Any) -> Any:
    return node_state(node, versions={"loractl": version, "torch": torch}, **changed)


@pytest.mark.fresh
def test_a_home_before_its_first_job_and_after_and_nothing_stays(cli: Cli, home: Path) -> None:
    cli = cli.with_environment(HF_HUB_OFFLINE="0")
    fresh = checks(cli)
    assert tuple(fresh) == LAB
    assert levels(fresh) | {"disk": "?"} == dict.fromkeys(LAB, "ok") | {"disk": "?"} | dict.fromkeys(
        ("database", "revision", "logins", "clock", "store", "boxes", "messages"), "skipped"
    )
    assert not (home / "loractl.db").exists() and not (home / "run" / "valkey.sock").exists()
    assert "it needs no self-test" in fresh["cards"][0]["sentence"]
    cli("db", "upgrade")
    told = cli("doctor").stdout
    assert f"{HEAD}, as loractl {__version__} needs it" in told and "no worker is online" in told
    assert "> start one on a GPU box: loractl worker" in told and "1 warning." in told
    assert [path.name for path in (home / "artifacts").rglob("*") if path.is_file()] == [MARK], "the upgrade's"


def test_a_lab_s_services_answer_and_no_line_shows_a_password(
    make_cli: Callable[..., Cli], postgres_url: str, redis_url: str, s3_server: S3
) -> None:
    owner = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    name = f"doctor_{time.time_ns()}"
    with owner.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'bird-8215-/-song'")
    url = make_url(postgres_url).set(username=name, password=PASSWORD.replace("%2F", "/"))
    cli = make_cli(
        LORACTL_DATABASE_URL=url.render_as_string(hide_password=False),
        LORACTL_REDIS_URL=redis_url,
        LORACTL_ARTIFACTS_URL=s3_server.url,
        **s3_server.environment,
    )
    empty = checks(cli, code=1)
    assert levels(empty)["revision"] == "error" and levels(empty)["boxes"] == "skipped"
    assert "loractl db upgrade" in empty["revision"][0]["hint"]
    cli("db", "upgrade")
    done = cli("doctor")
    told = " ".join(done.stdout.split())
    assert "PostgreSQL" in told and f"{name}:***@" in told.replace(" ", "") and "writes and reads back in" in told
    for secret in (PASSWORD, "bird-8215-/-song", QUEUE_SECRET, s3_server.environment["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in done.stdout + done.stderr
    below = [path.name for path in s3_server.folder.rglob("*") if path.is_file() and "doctor" in path.name]
    assert below == [], "what it stored is gone"
    with owner.connect() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}; DROP ROLE {name}")
    owner.dispose()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_services_that_hang_or_are_away_are_lines_and_the_others_are_looked_at(
    make_cli: Callable[..., Cli], silent: str
) -> None:
    cli = make_cli(
        LORACTL_DATABASE_URL=f"postgresql://ada:{PASSWORD}@{silent}/loractl",
        LORACTL_REDIS_URL=f"redis://:{PASSWORD}@127.0.0.1:{services.free_port()}/0",
        LORACTL_ARTIFACTS_URL="s3://loractl/lab",
        AWS_ENDPOINT_URL=f"http://{silent}",
        AWS_ACCESS_KEY_ID="ada",
        AWS_SECRET_ACCESS_KEY=SECRET,
    )
    began = time.monotonic()
    done = cli("doctor", "--json", "--patience", "2s", code=1)
    assert time.monotonic() - began < 15
    found: dict[str, dict[str, Any]] = {line["check"]: line for line in json.loads(done.stdout)["checks"]}
    for check in ("database", "store"):
        assert (found[check]["level"], found[check]["sentence"]) == ("error", "no answer within 2 s")
    assert "the queue is unreachable at redis://:***@" in found["queue"]["sentence"]
    assert "LORACTL_REDIS_URL" in found["queue"]["hint"]
    assert all(found[check]["level"] == "skipped" for check in ("revision", "clock", "boxes"))
    assert all(found[check]["level"] == "ok" for check in ("settings", "cards"))
    assert PASSWORD not in done.stdout + done.stderr and SECRET not in done.stdout + done.stderr


def test_boxes_of_other_versions_silent_ones_and_closed_cards_are_named(cli: Cli) -> None:
    engine = connect(load_settings(cli.environment))
    store = Store(engine)
    for state in (
        box_state("heron:0"), box_state("heron:1", fault="it must be reset"), box_state("owl:0", version="0.0.1"),
        box_state("wren:0"), box_state("finch:0", torch="2.11.0"),
    ):  # fmt: skip
        store.cards.see(state)
    with engine.begin() as connection:
        connection.execute(text("UPDATE nodes SET seen_at = datetime('now', '-2 hours') WHERE node = 'wren:0'"))
        columns = "message_id, event, channel, user, kind, subject, text, at, due_at"
        values = "'msg_1', 'e', 'ops', 'ada', 'job.failed', 's', 't', :at, :at"
        message = text(f"INSERT INTO outbox ({columns}) VALUES ({values})")
        connection.execute(message, {"at": "2026-01-14 12:00:00.000000"})
    engine.dispose()
    found = checks(cli)
    (stuck,) = found["messages"]
    assert stuck["level"] == "warning"
    assert stuck["sentence"] == "1 message to channel ops, due since 2026-01-14 12:00 UTC: no worker has that channel"
    told = {line["sentence"]: line for line in found["boxes"]}
    assert told.pop(f"finch: loractl {__version__}, 1 card")["level"] == "ok"
    assert {line["level"] for line in told.values()} == {"warning"}
    heron, owl, torch, wren = sorted(told)
    assert heron.endswith("2 cards; heron:1 is closed: it must be reset")
    assert owl == f"owl: loractl 0.0.1, 1 card; this is loractl {__version__}"
    assert "upgrading" in told[owl]["hint"]
    assert torch.startswith("torch is ") and "2.10.0 on" in torch and "2.11.0 on finch" in torch
    assert wren.startswith("wren: ") and "not seen for 2 h" in wren


def test_a_clock_that_is_off_a_database_that_only_reads_and_one_of_the_future(
    make_cli: Callable[..., Cli], upgraded_postgres: str, tmp_path: Path
) -> None:
    cli = make_cli(LORACTL_DATABASE_URL=upgraded_postgres, LORACTL_ARTIFACTS_URL=tmp_path.as_uri())
    name = make_url(upgraded_postgres).database
    works, unknown = checks(cli, "--check", "store")["store"]
    assert (works["level"], unknown["level"]) == ("ok", "warning") and "does not know the lab's store" in unknown[
        "sentence"
    ]
    cli("lab", "adopt-store")
    assert len(checks(cli, "--check", "store")["store"]) == 1
    owner = create_engine(upgraded_postgres, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        for statement in (
            "CREATE SCHEMA late",
            "CREATE FUNCTION late.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS"
            " $$ SELECT pg_catalog.clock_timestamp() - interval '3 minutes' $$",
            f"ALTER DATABASE {name} SET search_path = late, pg_catalog, public",
        ):
            connection.exec_driver_sql(statement)
        clock = checks(cli)["clock"][0]
        assert clock["level"] == "warning" and "is 3 min ahead of the database's" in clock["sentence"]
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        assert "upgrade loractl on this machine" in checks(cli, code=1)["revision"][0]["hint"]
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        found = checks(cli, code=1)
        assert "only reads" in found["database"][0]["sentence"] and levels(found)["clock"] == "skipped"
    owner.dispose()


def test_keys_of_the_store_are_told_apart(make_cli: Callable[..., Cli], gate: str) -> None:  # noqa: F811
    told = {}
    for name, code in (("ada", 0), ("heron", 0), ("cleaner", 1)):
        cli = make_cli(
            LORACTL_ARTIFACTS_URL="s3://loractl/lab", AWS_ENDPOINT_URL=gate, AWS_DEFAULT_REGION="us-east-1",
            AWS_ACCESS_KEY_ID=name, AWS_SECRET_ACCESS_KEY=SECRET,
        )  # fmt: skip
        told[name] = checks(cli, code=code)["store"][0]
    assert "takes no results from here, so this key is a client's" in told["ada"]["sentence"]
    assert "takes no data sets from here, so this key is a GPU box's" in told["heron"]["sentence"]
    assert told["cleaner"]["level"] == "error" and "ccess" in told["cleaner"]["sentence"]


def test_settings_that_can_t_be_read_and_models_that_are_not_there(cli: Cli, home: Path) -> None:
    (home / "config.toml").write_text('databse_url = "x"\n')
    wrong = checks(cli, code=1)
    assert "unknown key databse_url" in wrong["settings"][0]["sentence"]
    assert {line["level"] for check, lines in wrong.items() if check != "settings" for line in lines} == {"skipped"}
    (home / "config.toml").unlink()
    (home / "models" / "one").mkdir(parents=True)
    (home / "models" / "one" / "config.json").write_text("{}")
    roots = cli.with_environment(
        LORACTL_MODEL_ROOTS=f"{home / 'models'}:/nowhere/models", LORACTL_ARTIFACT_URL="s3://x"
    )
    found = checks(roots, code=1)
    assert [line["hint"] for line in found["settings"]] == [None, "did you mean LORACTL_ARTIFACTS_URL?"]
    here, nowhere = found["models"][:2]
    assert (here["level"], here["sentence"]) == ("ok", f"{home / 'models'}: 1 model")
    assert nowhere["level"] == "error" and "names /nowhere/models" in nowhere["sentence"]


@pytest.mark.long
def test_a_card_with_a_fault_fails_and_a_served_one_is_left_alone(make_cli: Callable[..., Cli], tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C compiler for the NVML stand-in")
    library = build(tmp_path)
    library.show(
        FakeCard(uuid="GPU-aaaa", total=24 * GIB // 2**20, lost=True),
        FakeCard(uuid=f"GPU-{secrets.token_hex(4)}", total=80 * 1024),
    )
    cli = make_cli(LORACTL_HOST="heron", LORACTL_DEVICES="nvml:cpu", **library.environment())
    lost, good = checks(cli, code=1)["cards"]
    assert lost["level"] == "error" and lost["sentence"].startswith("heron:0") and "cards-that-fail" in lost["hint"]
    assert good["level"] == "ok" and good["sentence"].startswith("heron:1")
    worker = cli.start("worker", "--reserve", "0")
    store = Store(connect(load_settings(cli.environment)))
    deadline = time.monotonic() + 60
    while not store.cards.nodes():
        assert time.monotonic() < deadline and worker.poll() is None
        time.sleep(0.1)
    assert "a worker serves them" in checks(cli)["cards"][0]["sentence"]
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (_, theirs) = checks(cli.with_environment(LORACTL_HOME=str(elsewhere)), "--check", "cards", code=1)["cards"]
    assert theirs["level"] == "ok" and "a worker of another home serves it" in theirs["sentence"]
    for _ in range(2):
        worker.terminate()
    print(worker.communicate(timeout=60)[0])
