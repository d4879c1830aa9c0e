"""The heartbeat of an attempt: it keeps the lease, writes what is new, and brings back what people wish."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from loractl.common.store.database import DatabaseError, outage

from .state import AttemptState
from .stops import require_wanted
from .workplace import Workplace

log = logging.getLogger("loractl.worker")
Answer = TypeVar("Answer")


def beat(place: Workplace, state: AttemptState) -> None:
    """One heartbeat. With the database away the training goes on: the lease decides."""
    state.turn()
    try:
        answer = place.store.beat(state.claim, state.progress())
    except DatabaseError as error:
        if (why := outage(error)) is None:
            raise
        log.warning("job %s: the database is away, training goes on: %s", state.claim.job_id, why)
        return
    finally:
        state.turn()
    state.beaten(answer)


def while_beating(place: Workplace, state: AttemptState, work: Callable[[], Answer]) -> Answer:
    """Do our own slow work (fetching, uploading) in a thread, while the heartbeat goes on.

    Raises what the work raises, and Interrupted when its result is no longer wanted.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def do() -> None:
        try:
            outcome.put(work())
        except Exception as error:  # noqa: BLE001  handed to the thread that waits for it, which raises it
            outcome.put(error)

    threading.Thread(target=do, name=f"work of job {state.claim.job_id}", daemon=True).start()
    while True:
        beat(place, state)
        require_wanted(place, state)
        try:
            done = outcome.get(timeout=place.beat_s)
        except queue.Empty:
            continue
        if isinstance(done, Exception):
            raise done
        return done
