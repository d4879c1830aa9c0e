"""A job's need as its attempts change it: a better plan lowers it, running out of memory raises it."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import select, update

from loractl.common.job.method import Method
from loractl.common.job.need import Need, within
from loractl.common.memory.correction import GROWTH
from loractl.common.units import gib

from ..records import Claim
from ..tables import Attempt, Job, Node
from ..transaction import Transaction
from .backlog import line_up, node_labels
from .jobs import read_job

OUTSIDER_SHARE = 0.85
"""An attempt that ran out of memory below this share of its reservation lacked what another program had taken."""


def plan_again(tx: Transaction, claim: Claim, planned: Need) -> None:
    """Take a better plan for later attempts. What this one reserves beyond it goes back to the card."""
    job = read_job(tx, claim.job_id)
    old, new = job.planned, vars(planned)
    known = {"lora": job.vram_lora, "qlora": job.vram_qlora}
    for name, size in new.items():
        before = old.get(name)
        if size is not None:  # what was learned from measured peaks holds for the better plan too
            learned = known[name] / before if known[name] and before else 1.0
            known[name] = int(size * learned)
    job.planned, job.vram_lora, job.vram_qlora = new, known["lora"], known["qlora"]
    size = known[claim.method.value]
    if claim.vram_planned is not None or job.planned.get(claim.method.value) is not None:
        own = (Attempt.job_id == claim.job_id) & (Attempt.attempt == claim.attempt) & (Attempt.device_kind != "cpu")
        tx.session.execute(update(Attempt).where(own).values(vram_planned=new.get(claim.method.value)))
    if size is not None and job.vram_reserved is not None and size < job.vram_reserved:
        text = f"planned {gib(size)} GiB from the data's own lengths, {gib(job.vram_reserved)} were reserved"
        tx.tell(job.job_id, claim.attempt, "planned", text)
        job.vram_reserved = size


def need_more(tx: Transaction, job: Job, gave: int, message: str, now: dt.datetime) -> tuple[bool, str]:
    """After out-of-memory: raise what the job needs beyond the `gave` bytes that it had. False when no card has more.

    Returns the given message with the consequence added.
    """
    attempt = tx.session.get(Attempt, (job.job_id, job.attempt), populate_existing=True)
    method = Method(job.method or Method.LORA.value)
    assert attempt is not None
    peak = attempt.vram_process or attempt.vram_peak or 0
    if attempt.device_kind == "nvml" and 0 < peak < OUTSIDER_SHARE * gave:
        return True, f"{message}; another program took memory of {job.node}"
    largest = _largest(tx)
    node = tx.session.get(Node, job.node)
    # A plan says nothing about a processor's RAM, so the method is not tried again.
    more = largest + 1 if node is not None and node.kind == "cpu" else int(gave * GROWTH)
    needs = {Method.LORA: job.vram_lora, Method.QLORA: job.vram_qlora}
    needs[method] = max(needs[method] or 0, more, int(peak * 1.05))
    job.vram_lora, job.vram_qlora = needs[Method.LORA], needs[Method.QLORA]
    limit = min(largest, job.spec.get("resources", {}).get("max_vram") or largest)
    need = Need(lora=job.vram_lora, qlora=job.vram_qlora)
    if not within([Method(name) for name in job.methods], need, limit):
        why = "no card of the fleet has more" if limit == largest else "its resources.max_vram allows no more"
        return False, f"{message}; {method.value} had {gib(gave)} GiB, and {why}"
    job.lora_until = None
    job.adjustment = None  # more memory, or another method: the job's own batch may fit
    line_up(job, node_labels(job), now)
    return True, f"{message}; it waits for {gib(job.vram_needed)} GiB now"


def _largest(tx: Transaction) -> int:
    """Bytes of the fleet's largest card; of its largest processor where it has no card."""
    nodes = tx.session.scalars(select(Node)).all()
    gpus = [node for node in nodes if node.kind != "cpu"]
    return max((node.usable for node in gpus or nodes), default=0)
