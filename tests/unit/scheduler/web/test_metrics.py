"""The lab in numbers: what a scrape reads, that it adds up, and that the alerts name what is told."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loractl import __version__
from loractl.common.channels import Channel
from loractl.common.job.status import Reason, Status
from loractl.common.settings import load_settings
from loractl.common.store.records import Delivery, Progress
from loractl.common.units import GIB
from loractl.scheduler.lab.health.condition import Level
from loractl.scheduler.lab.health.services import see_boxes
from loractl.scheduler.web.metrics import RATIO_BUCKETS, SETTLED_S, WAIT_BUCKETS, Exporter

from .... import webs
from ...factories import node_state
from .conftest import Web, serve

RULES = Path(__file__).parents[4] / "rules" / "loractl.yaml"


def scrape(web: Web) -> dict[str, list[Sample]]:
    """All samples by their names, as Prometheus reads them."""
    answer = web.client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def value(samples: dict[str, list[Sample]], name: str, **labels: str) -> float:
    """The one sample with these labels among others."""
    found = [s.value for s in samples.get(name, []) if labels.items() <= s.labels.items()]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return float(found[0])


def test_a_lab_is_told_in_numbers_from_either_database(any_web: Web) -> None:
    web = any_web
    samples, now = scrape(web), web.lab.now.timestamp()
    assert value(samples, "loractl_database_up") == 1
    assert value(samples, "loractl_build_info", version=__version__) == 1
    assert value(samples, "loractl_jobs", state="succeeded", reason="ok") == 9
    assert value(samples, "loractl_jobs", state="failed", reason="bad_data") == 1
    assert value(samples, "loractl_jobs", state="running", reason="training") == 3
    assert value(samples, "loractl_jobs", state="queued", reason="held") == 1
    assert value(samples, "loractl_jobs", state="queued", reason="ready") == 4
    total = {status: len(web.lab.store.jobs.matching(statuses=[status])) for status in Status}
    for status, count in total.items():
        assert sum(s.value for s in samples["loractl_jobs"] if s.labels["state"] == status) == count
    assert 0 < value(samples, "loractl_oldest_ready_job_timestamp_seconds") <= now
    assert value(samples, "loractl_card_seen_timestamp_seconds", card="heron:1") == pytest.approx(now, abs=1)
    assert value(samples, "loractl_card_drained", card="heron:2", host="heron") == 1
    assert value(samples, "loractl_card_open", card="heron:2") == 0
    assert value(samples, "loractl_card_open", card="kestrel:1") == 1
    assert value(samples, "loractl_job_progress_ratio", job_id="12", card="osprey:0") == 0.8
    assert value(samples, "loractl_job_lease_end_timestamp_seconds", job_id="12") > 0


def test_the_bytes_of_a_card_add_up_to_the_card(own_web: Web) -> None:
    own_web.lab.store.cards.see(node_state("kestrel:1", total=24 * GIB, outside_bytes=30 * GIB, margin=GIB))
    samples = scrape(own_web)
    for card, (_, size) in webs.CARDS.items():
        uses = {s.labels["use"]: s.value for s in samples["loractl_card_bytes"] if s.labels["card"] == card}
        assert sum(uses.values()) == size * GIB and uses.keys() == {"jobs", "outside", "margin", "free"}
        assert min(uses.values()) >= 0
    assert value(samples, "loractl_card_bytes", card="osprey:0", use="jobs") == 61 * GIB
    assert value(samples, "loractl_card_bytes", card="heron:1", use="outside") == 41 * GIB


def test_no_label_is_one_of_prometheus_own(web: Web) -> None:
    labels = {label for samples in scrape(web).values() for sample in samples for label in sample.labels}
    assert labels & {"job", "instance"} == set() and "job_id" in labels
    text = web.client.get("/metrics").text
    assert all(re.fullmatch(r"loractl_[a-z_]+", line.split()[2]) for line in text.splitlines() if line[:6] == "# TYPE")


def test_messages_are_told_by_channel_and_by_what_became_of_them(own_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loractl.scheduler.web.metrics.FRESH_S", -1.0)
    lab, ops = own_web.lab, Channel(name="ops", kind="slack", url="https://hooks.slack.com/services/SECRET")
    waiting = value(scrape(own_web), "loractl_notifications", channel="ops", state="waiting")
    for delivery in (Delivery(sent=True), Delivery(why="HTTP 410")):
        message = lab.store.outbox.lease((ops,), 90.0)
        assert message is not None and lab.store.outbox.settle(message, delivery)
    after = scrape(own_web)
    assert value(after, "loractl_notifications", channel="ops", state="waiting") == waiting - 2 > 0
    assert value(after, "loractl_notifications", channel="ops", state="sent") == 1
    assert value(after, "loractl_notifications", channel="ops", state="given_up") == 1
    oldest = value(after, "loractl_oldest_notification_timestamp_seconds", channel="ops")
    assert lab.now.timestamp() - 4 * 3600 < oldest < lab.now.timestamp()
    text = own_web.client.get("/metrics").text
    assert "SECRET" not in text and "HTTP 410" not in text and "triage-r32" not in text


def test_what_ends_while_it_runs_is_counted_once_and_its_series_go(
    own_web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loractl.scheduler.web.metrics.FRESH_S", -1.0)
    lab = own_web.lab
    before = scrape(own_web)
    assert value(before, "loractl_attempts_total", reason="ok") == 0, "counted since the server began"
    assert value(before, "loractl_queue_wait_seconds_count") == 0
    lab.store.cards.end_drain("heron:2")
    for job_id in (16, 17, 19):
        lab.store.jobs.cancel(job_id, "ada")
    lab.pass_(10)
    claim = webs.run(lab, "short", "ada", "heron:2", 17, steps=50)
    webs.store_result(lab, claim, 2.0, 1.0)
    failed = webs.run(lab, "bad-card", "ada", "heron:2", 17, steps=50)
    lab.store.attempts.finish(failed, Reason.GPU_ERROR, "CUDA error", Progress())
    lab.pass_(SETTLED_S + 1)
    for _ in range(2):
        after = scrape(own_web)
        assert value(after, "loractl_attempts_total", reason="ok") == 1
        assert value(after, "loractl_attempts_total", reason="gpu_error") == 1
        assert value(after, "loractl_card_failures_total", card="heron:2", reason="gpu_error", host="heron") == 1
        assert value(after, "loractl_card_recent_failures", card="heron:2", reason="gpu_error") == 1
        assert value(after, "loractl_queue_wait_seconds_count") == 2
        assert value(after, "loractl_queue_wait_seconds_bucket", le="1") == 2
        assert value(after, "loractl_plan_measured_ratio_count") == 1
    lab.store.jobs.cancel(12, "ada")
    lab.store.cards.arrive(node_state("osprey:0"))
    gone = scrape(own_web)
    assert {s.labels["job_id"] for s in gone["loractl_job_lease_end_timestamp_seconds"]} == {"13", "14", "15"}


def test_the_buckets_hold_what_the_histograms_say() -> None:
    for buckets in (WAIT_BUCKETS, RATIO_BUCKETS):
        assert list(buckets) == sorted(set(buckets))
    assert 1.0 in RATIO_BUCKETS, "how many plans were too small can be read off"


def test_without_a_database_a_scrape_says_just_that(own_web: Web) -> None:
    own_web.alter("ALTER TABLE nodes RENAME TO elsewhere")
    samples = scrape(own_web)
    assert value(samples, "loractl_database_up") == 0
    assert "loractl_jobs" not in samples and "loractl_attempts_total" in samples


def test_two_scrapes_at_the_same_moment_read_once(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    store = web.lab.store
    fleet = store.cards.fleet
    monkeypatch.setattr(store.cards, "fleet", lambda: (looks.append(1), fleet())[1])
    exporter = Exporter(store)
    assert exporter.text() == exporter.text() and len(looks) == 1


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return list(group["rules"])


def test_there_are_eleven_alerts_each_with_words_for_people() -> None:
    assert len({alert["alert"] for alert in alerts()}) == 11
    for alert in alerts():
        assert alert["alert"].startswith("Loractl") and alert["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= alert["annotations"].keys()


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_names_only_what_the_exporter_tells(own_web: Web, alert: dict[str, Any]) -> None:
    # a failure of a card, without which its series are not there
    own_web.lab.store.cards.arrive(node_state("kestrel:0"))
    samples = scrape(own_web)
    named = re.findall(r"(loractl_\w+)(\{[^}]*\})?", alert["expr"])
    assert named
    for name, selector in named:
        assert name in samples, f"{alert['alert']} asks for {name}"
        labels = re.findall(r"(\w+)=\"([^\"]+)\"", selector or "")
        for label, wanted in labels:
            assert any(s.labels.get(label) == wanted for s in samples[name]), f"{name} has no {label}={wanted}"
    for grouped in re.findall(r"by \((\w+)\)", alert["expr"]):
        assert all(grouped in s.labels for s in samples[named[0][0]])
    shown = re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"])
    assert all(label in samples[named[0][0]][0].labels for label in shown)


def test_a_round_that_nobody_takes_is_told(own_web: Web, home: Path) -> None:
    """Somebody's transaction may hold its lock: then no lost worker is noticed."""
    web, words = own_web, "round for 5 min"

    def last_at(moment: dt.datetime, ago: dt.timedelta) -> None:
        web.alter("DELETE FROM fleet_rounds")
        at = f"{moment - ago:%Y-%m-%d %H:%M:%S}"
        web.alter(f"INSERT INTO fleet_rounds VALUES ('leases', '{at}', '{at}')")
        web.alter(f"UPDATE nodes SET seen_at = '{moment:%Y-%m-%d %H:%M:%S}'")

    last_at(web.lab.now, dt.timedelta(seconds=5))
    assert value(scrape(web), "loractl_fleet_round_timestamp_seconds") == web.lab.now.timestamp() - 5
    assert words not in serve(web.lab, web.url).client.get("/").text
    last_at(web.lab.now, dt.timedelta(minutes=5))
    assert words in serve(web.lab, web.url).client.get("/").text
    last_at(dt.datetime.now(dt.UTC), dt.timedelta(minutes=5))
    settings = replace(load_settings(), database_url=web.url)
    (told,) = [one for one in see_boxes(settings) if words in one.sentence]
    assert told.level is Level.ERROR and told.hint is not None
