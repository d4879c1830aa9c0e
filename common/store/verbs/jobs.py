"""Jobs: what people ask of them and read of them, and what concerns those that wait."""

from __future__ import annotations

from ..queries import aside, backlog, followers, jobs, need, submissions, wishes
from ..queries.cards import decisions
from .verb import Subject, lists, reads, writes


class JobVerbs(Subject):
    """Verbs about jobs."""

    submit = writes(submissions.submit)
    submit_all = writes(submissions.submit_all)
    cancel = writes(wishes.cancel)
    hold = writes(wishes.hold)
    retry = writes(wishes.retry)
    edit = writes(wishes.edit)
    followers = reads(followers.read_followers)

    get = reads(jobs.read_one)
    numbered = reads(jobs.read_numbered)
    matching = reads(jobs.read_matching)
    newest = lists(jobs.newest)
    ended = lists(jobs.ended)
    glance = reads(jobs.read_glance)
    counts = reads(jobs.read_counts)
    users = reads(jobs.read_users)

    events = lists(jobs.events)
    metrics = lists(jobs.metrics)
    thinned = reads(jobs.read_course)
    log = lists(jobs.log)
    log_part = lists(jobs.log_part)
    log_end = reads(jobs.read_log_end)

    ready = reads(decisions.read_ready)
    oldest_ready = reads(jobs.read_oldest_ready)
    waiting_classes = reads(backlog.waiting_classes)
    has_unfinished = reads(backlog.has_unfinished)
    end_patience = writes(backlog.end_patience)
    set_aside_unreadable = writes(aside.set_aside_unreadable)

    def plan_anew(self) -> list[int]:
        """Plan waiting jobs whose plans are of an older engine, if their bases are on this machine; returns them."""
        return need.plan_anew(self._read, self._write)
