"""A fleet at one moment, put together by hand: nodes, what runs there, drains and waiting jobs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

from loractl.common.job.method import Method, Need, Ways, least_need
from loractl.common.job.status import Status
from loractl.common.placement.lines import Lines, Waiting, queue_key
from loractl.common.placement.rule import place
from loractl.common.placement.shares import charge
from loractl.common.store.fleet import FleetView, card_of, is_ready, waiting_of
from loractl.common.store.tables import DrainOrder, Job, Node
from loractl.common.units import GIB

from .factories import NOON, job, node


def card(name: str = "box:0", total: float = 24, **changed: Any) -> Node:
    """A card of `total` GiB without a margin; sizes in GiB."""
    sizes = {key: int(changed.pop(key, 0) * GIB) for key in ("margin", "outside_bytes")}
    return node(name, **{"total": int(total * GIB), "max_jobs": 1, "seen_at": NOON, **sizes, **changed})


def running(job_id: int, on: str, size: float, ends_in: float | None = None, **changed: Any) -> Job:
    """A job that reserves `size` GiB and is expected to end in so many seconds."""
    values = {
        "job_id": job_id, "status": Status.RUNNING, "node": on, "vram_reserved": int(size * GIB),
        "eta_seconds": ends_in, "step": 5, "started_at": NOON, "preemptible": False, "method": "lora",
    }  # fmt: skip
    return job(**{**values, **changed})


def waits(
    job_id: int = 7,
    lora: float | None = 8,
    qlora: float | None = 4,
    methods: tuple[Method, ...] = (Method.LORA, Method.QLORA),
    labels: dict[str, str] | None = None,
    **changed: Any,
) -> Job:
    """A QUEUED job; needs in GiB, None: not known. `labels`: those that its node must have."""
    need = Need(lora=None if lora is None else int(lora * GIB), qlora=None if qlora is None else int(qlora * GIB))
    until = changed.get("lora_until")
    now = (Method.LORA,) if until is not None and until > NOON else methods
    least, user, priority = least_need(now, need), changed.get("user", "ada"), changed.get("priority", 0)
    values = {
        "job_id": job_id, "vram_lora": need.lora, "vram_qlora": need.qlora, "vram_needed": least,
        "methods": [method.value for method in methods], "lora_until": until, "preemptible": False,
        "queue_key": queue_key(priority, now, need, Ways(), labels or {}, user),
        "spec": {"resources": {"max_vram": None, "node_labels": labels or {}}, "training": {"save_steps": 50}},
    }  # fmt: skip
    return job(**{**values, **changed})


def ready(jobs: Iterable[Job], now: dt.datetime = NOON) -> list[Waiting]:
    """Those that could be claimed, as the rule sees them."""
    return [waiting_of(vars(j), now) for j in jobs if is_ready(j, now)]


def fleet(
    nodes: Iterable[Node],
    ran: Iterable[Job] = (),
    waiting: Iterable[Job] = (),
    drains: Iterable[DrainOrder] = (),
    charges: dict[str, float] | None = None,
) -> FleetView:
    """The view that the store would give at NOON."""
    ran, jobs = list(ran), ready(waiting)
    orders = {order.target: order for order in drains if order.until is None or order.until > NOON}
    cards = {n.node: card_of(n, [j for j in ran if j.node == n.node], NOON, orders) for n in nodes}
    used = dict(charges or {})
    for one in ran:
        used[one.user] = charge(used.get(one.user, 0.0), [(one.vram_reserved or 0, 0.0)])
    decisions = tuple(place(Lines(jobs), list(cards.values()), used, NOON))
    starting = {one.placed.job.job_id for one in decisions if one.placed is not None}
    return FleetView(
        now=NOON,
        nodes={n.node: n for n in nodes},
        cards=dict(sorted(cards.items())),
        drains=orders,
        running={j.job_id: j for j in ran},
        charges=used,
        firsts=tuple(job for job in jobs if job.job_id not in starting),
        decisions=decisions,
    )


def drained(target: str = "box", **changed: Any) -> DrainOrder:
    values = {"target": target, "user": "lena", "reason": "replacing a fan", "until": None, "now": False}
    return DrainOrder(**{**values, **changed})


def in_seconds(seconds: float) -> dt.datetime:
    return NOON + dt.timedelta(seconds=seconds)
