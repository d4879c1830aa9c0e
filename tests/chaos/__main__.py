"""make chaos: CHAOS_JOBS jobs (1000) under faults drawn from CHAOS_SEED; ends non-zero on any broken promise.

CHAOS_JOBS=1000 CHAOS_SEED=7 python -m tests.chaos docs/chaos.md

CHAOS_DATABASE=sqlite: one box on SQLite, and no page. CHAOS_STORE: s3 or folder, whatever the seed says. CHAOS_SECONDS:
the storm ends after so long, with as many jobs as came in.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from .report import page, table
from .storm import Plan, storm, with_s3


def main() -> int:
    jobs, seed = int(os.environ.get("CHAOS_JOBS") or 1000), int(os.environ.get("CHAOS_SEED") or time.time())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing of the lab may remain
    faulthandler.register(signal.SIGUSR1)  # where a run that hangs stands
    print(f"CHAOS_JOBS={jobs} CHAOS_SEED={seed}", flush=True)
    seconds, gap_s = os.environ.get("CHAOS_SECONDS"), float(os.environ.get("CHAOS_GAP") or 2.5)
    plan = Plan(jobs=jobs, seed=seed, gap_s=gap_s, probes=3, gangs=True, s3=with_s3(seed))
    plan = replace(plan, storm_s=float(seconds) if seconds else None)
    if os.environ.get("CHAOS_DATABASE") == "sqlite":
        plan = replace(plan, sqlite=True, boxes=1, probes=0)
    outcome = storm(plan, say=lambda line: print(line, flush=True))
    print(table(outcome))
    for breach in outcome.broken:
        print(f"BROKEN promise {breach.promise}: {breach.what}")
    if outcome.broken:
        print("\n".join(outcome.log))
        return 1
    if len(sys.argv) > 1 and not plan.sqlite:  # the page is about the large one
        Path(sys.argv[1]).write_text(page(outcome))
        print(f"wrote {sys.argv[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
