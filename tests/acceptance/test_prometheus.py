"""A real Prometheus reads /metrics and loads the rules; an alert fires when a box is killed. In `make test-long`."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
import yaml

from loractl.common.artifacts import ArtifactStore
from loractl.common.store.database import make_engine
from loractl.common.store.store import Store
from loractl.scheduler.web import metrics
from loractl.scheduler.web.guard import Access
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import make_site

from .. import services, webs
from ..conftest import Cli

PROMETHEUS = shutil.which("prometheus")
RULES = Path(__file__).parents[2] / "rules" / "loractl.yaml"
TOKEN = "t" * 43

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus on this machine: apt-get install prometheus"),
]


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs."""

    port: int

    def asked(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.asked("alerts")["alerts"] if alert["state"] == "firing"}

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, (self.asked("targets"), self.asked("alerts"))
            time.sleep(0.2)


@contextlib.contextmanager
def prometheus(folder: Path, web_port: int, after_s: int | None = None) -> Iterator[Prometheus]:
    """A Prometheus that looks at a page twice a second; no alert waits for its `for`.

    `after_s`: how long a box may be silent, in place of the rule's own time.
    """
    rules, port = yaml.safe_load(RULES.read_text("utf-8")), services.free_port()
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
        if after_s is not None and rule["alert"] == "LoractlBoxSilent":
            rule["expr"] = rule["expr"].replace("> 90", f"> {after_s}")
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    (folder / "token").write_text(TOKEN)
    scrape = {
        "job_name": "loractl",
        "static_configs": [{"targets": [f"127.0.0.1:{web_port}"]}],
        "authorization": {"credentials_file": str(folder / "token")},
    }
    settings = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    command = [
        str(PROMETHEUS), f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with services.running(command, port):
        deadline = time.monotonic() + 60
        while not _ready(port):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield Prometheus(port)


def _ready(port: int) -> bool:
    """It listens before it answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=10) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


@contextlib.contextmanager
def served(store: Store, lab: webs.SeededLab | None) -> Iterator[int]:
    """The page of a lab behind a token; the port where it is."""

    def artifacts() -> ArtifactStore:
        assert lab is not None
        return lab.artifacts

    access, port = Access(token=TOKEN, names=frozenset({"localhost"})), services.free_port()
    site = make_site(store, ReportShelf(store, artifacts), access)
    server = uvicorn.Server(uvicorn.Config(site, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FRESH_S", -1.0)


def test_it_loads_the_rules_scrapes_and_an_alert_fires_when_a_row_is_old(sqlite_template: Path, tmp_path: Path) -> None:
    shutil.copy(sqlite_template, tmp_path / "lab.db")
    url = f"sqlite:///{tmp_path / 'lab.db'}"
    lab = webs.seed(url, tmp_path / "artifacts")
    with served(webs.reader(url, lambda: lab.now), lab) as web, prometheus(tmp_path, web) as watched:
        watched.until(lambda: watched.asked("query?query=loractl_database_up")["result"])
        (group,) = watched.asked("rules")["groups"]
        assert len(group["rules"]) == 10 and all(rule["health"] in ("ok", "unknown") for rule in group["rules"])
        up = watched.asked("query?query=up")["result"][0]
        assert up["metric"]["job"] == "loractl" and up["value"][1] == "1"
        jobs = watched.asked("query?query=loractl_job_progress_ratio")["result"]
        assert {series["metric"]["job_id"] for series in jobs} == {"12", "13", "14"}
        assert all("exported_job" not in series["metric"] for series in jobs)
        assert "LoractlBoxSilent" not in watched.firing()
        with lab.store.engine.begin() as connection:
            aged = "UPDATE nodes SET seen_at = datetime(seen_at, '-10 minutes') WHERE host = 'osprey'"
            connection.exec_driver_sql(aged)
        watched.until(lambda: "LoractlBoxSilent" in watched.firing())
        silent = [a for a in watched.asked("alerts")["alerts"] if a["labels"]["alertname"] == "LoractlBoxSilent"]
        assert [alert["labels"]["host"] for alert in silent] == ["osprey"]


@pytest.mark.cold
def test_an_alert_fires_for_a_box_whose_worker_was_killed_and_ends_when_it_is_back(
    make_cli: Callable[..., Cli], home: Path, tmp_path: Path
) -> None:
    """A worker writes its row every 5 s, so the rule's 90 s are 12 here."""
    cli = make_cli(LORACTL_DEVICES="sim:24GiB", LORACTL_HOST="osprey")
    worker = cli.start("worker")
    try:
        _until_seen(cli)
        store = Store(make_engine(f"sqlite:///{home / 'loractl.db'}", read_only=True))
        with served(store, None) as web, prometheus(tmp_path, web, after_s=12) as watched:
            seen = "query?query=loractl_card_seen_timestamp_seconds"
            watched.until(lambda: watched.asked(seen)["result"])
            assert "LoractlBoxSilent" not in watched.firing()
            _kill(worker)
            watched.until(lambda: "LoractlBoxSilent" in watched.firing())
            alerts = watched.asked("alerts")["alerts"]
            assert {a["labels"]["host"] for a in alerts if a["labels"]["alertname"] == "LoractlBoxSilent"} == {"osprey"}
            worker = cli.start("worker")
            watched.until(lambda: "LoractlBoxSilent" not in watched.firing())
    finally:
        _kill(worker)


def _until_seen(cli: Cli) -> None:
    deadline = time.monotonic() + 60
    while not json.loads(cli("gpus", "--json").stdout):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _kill(worker: subprocess.Popen[str]) -> None:
    """The box loses its power: nothing of it ends in order."""
    for process in [*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)]:
        process.kill()
    worker.wait(timeout=20)


def test_promtool_finds_nothing_wrong() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine: apt-get install promtool")
    done = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "10 rules found" in done.stdout, done.stdout + done.stderr
