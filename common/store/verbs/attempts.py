"""Attempts: claimed, kept alive and ended by a node; listed for a person."""

from __future__ import annotations

from ..queries import claims, endings, heartbeats, jobs
from ..queries.cards import shares
from .verb import Subject, lists, reads, writes


class AttemptVerbs(Subject):
    """Verbs about attempts."""

    claim = writes(claims.claim)
    beat = writes(heartbeats.beat)
    keep_checkpoint = writes(heartbeats.keep_checkpoint)
    finish = writes(endings.finish)
    give_back = writes(endings.give_back)

    of_job = lists(jobs.attempts)
    shares = lists(shares.of_job)
    runs = reads(jobs.read_runs)
    measured = reads(jobs.read_measured)

    def reap(self) -> list[tuple[int, int]]:
        """End attempts with an expired lease as worker_lost; returns (job_id, vram_class) of jobs that wait again.

        Does nothing while another node does so. A transaction ends a few of them.
        """
        return endings.reap_all(self._write)
