"""Results: what a job left in the artifact store, how long it is kept, and who looked at its final rows."""

from __future__ import annotations

from ..queries import looks, retention
from ..tables import FinalLook
from .verb import Subject, lists, reads, writes


class ResultVerbs(Subject):
    """Verbs about results, logs, checkpoints and rows that gc may remove."""

    looks = lists(looks.looks)
    not_bound = lists(retention.not_bound)
    bind = writes(retention.bind_result)
    beyond_newest = lists(retention.beyond_newest)
    remove = writes(retention.remove_result)

    over = reads(retention.read_over)
    needed_data = reads(retention.read_needed_data)
    forget_checkpoint = writes(retention.forget_checkpoint)
    forget_finished = writes(retention.forget_finished)
    spent_logs = reads(retention.read_spent_logs)
    forget_log = writes(retention.forget_log)
    past_jobs = reads(retention.read_past)
    forget_jobs = writes(retention.forget_jobs)
    courses = reads(retention.read_courses)
    forget_courses = writes(retention.forget_courses)

    def look(self, job_id: int, rows_sha256: str, user: str) -> list[FinalLook]:
        """Write down that `user` is shown what a job measured on final rows; returns all looks at these rows, this one
        last. Raises JobNotFound."""
        with self._write() as tx:
            mine = looks.look(tx, job_id, rows_sha256, user)
        # read once it is committed: of two looks at once, the later one to commit counts both
        return sorted(self.looks(rows_sha256), key=lambda one: (one.look_id == mine, one.look_id))
