"""The company of a job: the others of its process, of whom it may have none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from loractl.worker.protocol.messages import LogLines, Told

SWITCH_S = 0.0005
"""Seconds for which a thread that reads rows may keep the interpreter from one that computes. With Python's own 5 ms
each operation of a step beside it waits so long."""


@dataclass(kw_only=True)
class Company:
    """Who is in this process. Any thread may ask."""

    lost: str | None = None  # why what is trained here counts for nobody any more, in words
    shared: bool = False  # it is a host's: what it prints is no job's, and the peak of its memory neither
    _met: dict[int, set[int]] = field(default_factory=dict)  # job -> all that were here while it is
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, job_id: int) -> None:
        with self._lock:
            for met in self._met.values():
                met.add(job_id)
            self._met[job_id] = set(self._met)

    def leave(self, job_id: int) -> None:
        with self._lock:
            self._met.pop(job_id, None)

    def met_by(self, job_id: int) -> tuple[int, ...]:
        """The jobs that a job has shared the process with so far."""
        with self._lock:
            return tuple(sorted(self._met.get(job_id, ())))

    @property
    def any_job(self) -> int | None:
        """A job that is here."""
        with self._lock:
            return next(iter(self._met), None)

    def share(self, say: Callable[[], None]) -> None:
        """Be several jobs'. `say` prints the line behind which standard error is no job's."""
        with self._lock:
            sys.setswitchinterval(SWITCH_S)
            say()
            self.shared = True

    def write(self, job_id: int, text: str, tell: Callable[[Told], None]) -> None:
        """Add lines to a job's log: by standard error, or as a message."""
        with self._lock:
            if not self.shared:
                sys.stderr.write(text)
                sys.stderr.flush()
                return
        tell(LogLines(job_id=job_id, text=text))
