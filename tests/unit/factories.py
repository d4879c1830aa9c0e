"""Small values for the tests of the store and the screen."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from loractl.common.job.method import Need, Roomy, RoomyForm, permitted_methods, within
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Status
from loractl.common.memory.fit import MemoryPlan
from loractl.common.store.records import Claim, Left, NodeState, StoredResult, Submission
from loractl.common.store.store import Store
from loractl.common.store.tables import Job, Node
from loractl.common.units import GIB

EXAMPLES = int(os.environ.get("STORE_EXAMPLES", "12"))
"""Of each property of the store."""

NOON = dt.datetime(2026, 1, 14, 12, 0, tzinfo=dt.UTC)

PLENTY = 100 * GIB
RESULT = StoredResult(
    adapter_uri="file:///lab/jobs/1/adapter",
    report_uri="file:///lab/jobs/1/report",
    adapter_size=4096,
    adapter_sha256="a" * 64,
    manifest_sha256="b" * 64,
)


class Clock:
    """A time that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> dt.datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


def spec(**keys: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "tiny", "base_model": "org/model", "dataset": {"path": "org/data"}, **keys})


def submission(
    *,
    lora: float | None = 4,
    qlora: float | None = 2,
    user: str = "ada",
    roomy: dict[int, float] | None = None,
    need_key: str | None = None,
    family: str | None = None,
    **keys: Any,
) -> Submission:
    """A job that needs so many GiB with each method (None: not known). `roomy`: GiB of LoRA without recomputing, by the
    rows of a micro-batch."""
    forms = [RoomyForm(micro_batch=n, bytes=int(gib * GIB), planned=int(gib * GIB)) for n, gib in (roomy or {}).items()]
    need = Need(lora=_bytes(lora), qlora=_bytes(qlora))
    wanted = spec(**keys)
    methods = within(permitted_methods(wanted.method), need, wanted.resources.max_vram)
    plan = MemoryPlan(need=need, planned=need, roomy=Roomy(lora=tuple(forms)), need_key=need_key, family=family)
    return Submission(spec=wanted, user=user, data={}, plan=plan, methods=methods)


def node_state(node: str = "box:0", **changed: Any) -> NodeState:
    host = node.partition(":")[0]
    return NodeState(
        **{
            "node": node, "host": host, "gpu": f"GPU-{node}", "device_name": "NVIDIA A40", "kind": "nvml",
            "total": 48 * GIB, **changed,
        }
    )  # fmt: skip


def take(store: Store, free: int = PLENTY, node: str = "box:0", **state: Any) -> Claim | Left | None:
    """A claim by a card that has `free` bytes for new jobs beside what it runs."""
    seen = node_state(node, **{"total": free, "max_jobs": 64, **state})
    reserved = sum(job.reserved for job in store.cards.see(seen).running)
    store.cards.see(replace(seen, total=free + reserved))
    return store.attempts.claim(node)


def job(**changed: Any) -> Job:
    """A row as the store would return it, waiting unless told otherwise."""
    row: dict[str, Any] = {
        "job_id": 7, "name": "helpdesk", "user": "ada", "labels": {}, "spec": {},
        "base_model": "org/model-135M", "data": {}, "priority": 0, "vram_lora": None, "vram_qlora": None,
        "vram_needed": 8 * GIB, "vram_class": 8, "methods": ["lora", "qlora"], "lora_until": None,
        "result_host": None, "result_until": None,
        "vram_reserved": None, "eta_spread_seconds": None, "planned": {}, "adjustment": None,
        "evaluated": None, "to_evaluate": None,
        "status": Status.QUEUED, "cancel_requested": False,
        "held": False, "attempt": 0, "retries_used": 0, "submitted_at": NOON, "avoids": None, "reason": None,
        "message": None, "stage": None, "not_before": None, "token": None, "lease_expires_at": None, "node": None,
        "gpu": None, "method": None, "step": None, "total_steps": None, "loss": None, "tokens_per_second": None,
        "eta_seconds": None, "started_at": None, "ended_at": None, "adapter_uri": None, "report_uri": None,
        "manifest_sha256": None, "work_left_s": 3600.0,
    }  # fmt: skip
    return Job(**{**row, **changed})


def node(name: str = "box:0", **changed: Any) -> Node:
    """A device's row, seen at NOON."""
    return Node(**{**vars(node_state(name)), "free": 47 * GIB, "seen_at": NOON, **changed})


def _bytes(size: float | None) -> int | None:
    return None if size is None else int(size * GIB)


@contextlib.contextmanager
def another_person() -> Iterator[None]:
    """With the rights of nobody: root reads everything."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)
