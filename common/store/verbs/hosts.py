"""Hosts: trainers that keep their base, or have several jobs on it."""

from __future__ import annotations

from ..queries.cards import hosts
from .verb import Subject, reads, writes


class HostVerbs(Subject):
    """Verbs about hosts."""

    keep = writes(hosts.keep)
    open = writes(hosts.open_to_others)
    note_passes = writes(hosts.note_passes)
    spoil = writes(hosts.spoil)
    leave = writes(hosts.leave)
    send_off = writes(hosts.send_off)
    forget = writes(hosts.forget)
    of_card = reads(hosts.of_node)
