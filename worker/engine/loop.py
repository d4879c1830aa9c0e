"""The loop: a pack that takes steps until each of its members has come to its end."""

from __future__ import annotations

from collections.abc import Sequence

from .member import PackMember
from .pack import Pack


def run(members: Sequence[PackMember]) -> None:
    """Train members to their ends. What one raises comes through: with one member it is the job's own failure."""
    pack = Pack()
    for member in members:
        pack.join(member)
    while pack.members:
        for ending in pack.step():
            if ending.error is not None:
                raise ending.error
