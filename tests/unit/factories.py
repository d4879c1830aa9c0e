"""Small values for the tests of the store and the screen."""

from __future__ import annotations

import datetime as dt
from typing import Any

from loractl.common.policy import Need, least_need, vram_class
from loractl.common.records import NodeState, StoredResult, Submission
from loractl.common.spec import JobSpec
from loractl.common.status import Status
from loractl.common.tables import Job, Node
from loractl.common.units import GIB

NOON = dt.datetime(2026, 1, 14, 12, 0, tzinfo=dt.UTC)

RESULT = StoredResult(
    adapter_uri="file:///lab/jobs/1/adapter",
    report_uri="file:///lab/jobs/1/report",
    adapter_size=4096,
    adapter_sha256="a" * 64,
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


def submission(*, lora: float | None = None, qlora: float | None = None, user: str = "ada", **keys: Any) -> Submission:
    """A job that needs so many GiB with each method (None: not known)."""
    need = Need(lora=_bytes(lora), qlora=_bytes(qlora))
    wanted = spec(**keys)
    least = least_need(wanted.method, need)
    return Submission(spec=wanted, user=user, data={}, need=need, vram_needed=least, vram_class=vram_class(least))


def node_state(node: str = "box:0", **changed: Any) -> NodeState:
    host = node.partition(":")[0]
    return NodeState(
        **{
            "node": node, "host": host, "gpu": f"GPU-{node}", "device_name": "NVIDIA A40", "kind": "nvml",
            "total": 48 * GIB, "free": 47 * GIB, **changed,
        }
    )  # fmt: skip


def job(**changed: Any) -> Job:
    """A row as the store would return it, waiting unless told otherwise."""
    row: dict[str, Any] = {
        "job_id": 7, "name": "helpdesk", "user": "ada", "labels": {}, "spec": {}, "spec_hash": "0" * 64,
        "base_model": "org/model-135M", "data": {}, "priority": 0, "vram_lora": None, "vram_qlora": None,
        "vram_needed": 8 * GIB, "vram_class": 8, "max_retries": 2, "status": Status.QUEUED, "cancel_requested": False,
        "held": False, "attempt": 0, "retries_used": 0, "submitted_at": NOON, "reason": None, "message": None,
        "stage": None, "not_before": None, "token": None, "lease_expires_at": None, "node": None, "gpu": None,
        "method": None, "step": None, "total_steps": None, "loss": None, "tokens_per_second": None, "eta_seconds": None,
        "started_at": None, "ended_at": None, "adapter_uri": None, "report_uri": None,
    }  # fmt: skip
    return Job(**{**row, **changed})


def node(name: str = "box:0", **changed: Any) -> Node:
    """A device's row, seen at NOON."""
    return Node(**{**vars(node_state(name)), "seen_at": NOON, **changed})


def _bytes(size: float | None) -> int | None:
    return None if size is None else int(size * GIB)
