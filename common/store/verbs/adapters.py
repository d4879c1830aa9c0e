"""Stored adapters, their tags, and which began from which."""

from __future__ import annotations

from ..queries import adapters
from .verb import Subject, lists, reads, writes


class AdapterVerbs(Subject):
    """Verbs about adapters."""

    all = lists(adapters.every)
    newest = lists(adapters.newest_adapters)
    get = reads(adapters.read_adapter)
    tags = reads(adapters.read_tags)
    tag = writes(adapters.tag)
    untag = writes(adapters.untag)
    ancestors = reads(adapters.read_ancestors)
    descendants = reads(adapters.read_descendants)
