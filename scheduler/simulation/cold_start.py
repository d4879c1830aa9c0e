"""How long a job takes from its start to its first step: in a new trainer, from a spare one, and in a host."""

from __future__ import annotations

from loractl.common.placement.clock import ReplayedBase
from loractl.common.placement.pack_rule import PassLaw
from loractl.common.units import GIB

IMPORT_S = 7.4
"""Seconds in which a new trainer imports its libraries, on a two-core machine; a spare trainer has done it before."""

WARM_S = 0.6
"""Seconds from the claim to the first step in a host that has the base: the median of benchmarks/hosts.py, see
docs/architecture.md#hosts."""

LOAD_BYTES_S = 0.28 * GIB
"""Bytes of a base that are read, checked and placed in a second. Chosen, not measured on a card: with it a base of 8B
parameters in 16 bit takes a minute, and SmolLM2-135M 9.2 s with its imports, as was measured there."""


def start_of(size: int, *, spare: bool, law: PassLaw | None = None) -> ReplayedBase:
    """The start of a job whose loaded base has `size` bytes. `spare`: a spare trainer is ready each time.

    `law`: of passes over the base, where jobs may share a trainer.
    """
    cold_s = WARM_S + size / LOAD_BYTES_S + (0.0 if spare else IMPORT_S)
    return ReplayedBase(bytes=size, cold_s=cold_s, warm_s=WARM_S, law=law)
