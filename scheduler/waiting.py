"""Why a job waits, as a word and a sentence. Pure: from the job's row and the nodes' rows."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loractl.common.fleet import NODE_STALE_S
from loractl.common.units import duration, gib

if TYPE_CHECKING:
    from loractl.common.tables import Job, Node


def wait_reason(job: Job, nodes: Sequence[Node], running: Sequence[Job], now: dt.datetime) -> tuple[str, str]:
    """(word, sentence) for a QUEUED job."""
    if job.held:
        return "held", job.message or "until loractl retry"
    if job.not_before is not None and job.not_before > now:
        return "retry", f"attempt {job.attempt + 1} in {duration((job.not_before - now).total_seconds())}"
    online = [n for n in nodes if (now - n.seen_at).total_seconds() <= NODE_STALE_S and not n.draining]
    if not online:
        return "worker", "no worker is online: start loractl worker on a box"
    need = job.vram_needed
    largest = max(online, key=lambda n: n.total)
    if need is not None and need > largest.total:
        return "memory", f"needs {gib(need)}, the largest card online has {gib(largest.total)}"
    busy = {r.node: r.job_id for r in running}
    fitting = [n for n in online if need is None or need <= n.total]
    idle = [n for n in fitting if n.node not in busy]
    if any(need is None or need <= n.free for n in idle):
        return "order", "a worker is about to look at it"
    if idle:
        best = max(idle, key=lambda n: n.free)
        return "memory", f"needs {gib(need)}, {best.node} has {gib(best.free)} free now"
    node = fitting[0].node
    more = f" and {len(fitting) - 1} more" if len(fitting) > 1 else ""
    return "busy", f"{node} runs {busy[node]}{more}"
