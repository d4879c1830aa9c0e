"""A real Prometheus reads /metrics and loads the rules; an alert fires when a box falls silent. In `make test-long`."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml

from loractl.scheduler.answers.lab.shelf import ReportShelf
from loractl.scheduler.web import metrics
from loractl.scheduler.web.access import Access
from loractl.scheduler.web.site import make_site

from .. import services, webs

PROMETHEUS = shutil.which("prometheus")
RULES = Path(__file__).parents[2] / "rules" / "loractl.yaml"
TOKEN = "t" * 43

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus on this machine: apt-get install prometheus"),
]


@dataclass(frozen=True)
class Watched:
    """A lab that a Prometheus watches."""

    lab: webs.SeededLab
    port: int  # of Prometheus

    def asked(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.asked("alerts")["alerts"] if alert["state"] == "firing"}

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while name not in self.firing():
            assert time.monotonic() < deadline, f"{name} does not fire: {self.asked('alerts')}"
            time.sleep(0.2)


@pytest.fixture
def watched(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """A lab, its page behind a token, and a Prometheus that looks twice a second; no alert waits for its `for`."""
    monkeypatch.setattr(metrics, "FRESH_S", -1.0)
    shutil.copy(sqlite_template, tmp_path / "lab.db")
    url = f"sqlite:///{tmp_path / 'lab.db'}"
    lab = webs.seed(url, tmp_path / "artifacts")
    store = webs.reader(url, lambda: lab.now)
    site = make_site(
        store, ReportShelf(store, lambda: lab.artifacts), Access(token=TOKEN, names=frozenset({"localhost"}))
    )
    web_port, port = services.free_port(), services.free_port()
    server = uvicorn.Server(uvicorn.Config(site, host="127.0.0.1", port=web_port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    rules = yaml.safe_load(RULES.read_text("utf-8"))
    for rule in rules["groups"][0]["rules"]:
        rule.pop("for", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "token").write_text(TOKEN)
    scrape = {
        "job_name": "loractl",
        "static_configs": [{"targets": [f"127.0.0.1:{web_port}"]}],
        "authorization": {"credentials_file": str(tmp_path / "token")},
    }
    settings = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(tmp_path / "rules.yaml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    command = [
        str(PROMETHEUS), f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    try:
        with services.running(command, port):
            yield Watched(lab=lab, port=port)
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def test_a_real_prometheus_loads_the_rules_and_fires_when_a_box_is_silent(watched: Watched) -> None:
    deadline = time.monotonic() + 60
    while not watched.asked("query?query=loractl_database_up")["result"]:
        assert time.monotonic() < deadline, watched.asked("targets")
        time.sleep(0.2)
    (group,) = watched.asked("rules")["groups"]
    assert len(group["rules"]) == 8 and all(rule["health"] in ("ok", "unknown") for rule in group["rules"])
    up = watched.asked("query?query=up")["result"][0]
    assert up["metric"]["job"] == "loractl" and up["value"][1] == "1"
    jobs = watched.asked("query?query=loractl_job_progress_ratio")["result"]
    assert {series["metric"]["job_id"] for series in jobs} == {"12", "13", "14"}
    assert all("exported_job" not in series["metric"] for series in jobs)
    assert "LoractlBoxSilent" not in watched.firing()
    # osprey is off: its row is not written any more, while the other boxes go on
    engine = watched.lab.store._engine
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE nodes SET seen_at = datetime(seen_at, '-10 minutes') WHERE host = 'osprey'")
    watched.wait_for("LoractlBoxSilent")
    silent = [a for a in watched.asked("alerts")["alerts"] if a["labels"]["alertname"] == "LoractlBoxSilent"]
    assert [alert["labels"]["host"] for alert in silent] == ["osprey"]


def test_promtool_finds_nothing_wrong() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine")
    done = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "8 rules found" in done.stdout, done.stdout + done.stderr
