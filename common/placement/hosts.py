"""Hosts: trainers that keep a loaded base between jobs. Which job may have which base, and which bases must go for it.

Pure functions of values, like all of the placement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loractl.common.job.method import Method

from .cards import Card, WarmBase

if TYPE_CHECKING:
    from loractl.common.job.spec import JobSpec

REPRODUCES = "reproduces"
"""The label of a job that runs another one again."""

KEEP_WARM_S = 600.0
"""How long a base stays after its last job, unless the box's owner says otherwise."""


OTHER_KEY = "their base has another revision, training.dtype, attn_implementation or exact"
"""Why jobs on one base and method have different keys, for people: what `base_key` reads besides those two."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """How a job comes on to a card: into the host that has its base, and past the bases that go for it."""

    host: WarmBase | None
    leaving: tuple[WarmBase, ...]


def base_key(spec: JobSpec, method: Method) -> str | None:
    """What decides, on one card, how the job's base is loaded; None: it gets a trainer of its own, which ends with it.

    The weights' own identity is compared where they are stored, when a job joins.
    """
    if why_alone(spec) is not None:
        return None
    training = spec.training
    how = [spec.base_model, spec.revision, method.value, training.dtype, training.attn_implementation, training.exact]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]


def why_alone(spec: JobSpec) -> str | None:
    """Why a job shares its trainer with no other job, not even one after the other; None if it may."""
    if REPRODUCES in spec.labels:
        return "it is compared with another run bit by bit"
    if spec.resources.exclusive:
        return "resources.exclusive"
    if spec.kind.alone is not None:
        return spec.kind.alone
    if spec.lora.modules_to_save:
        return "lora.modules_to_save changes the base itself"
    if spec.lora.init_lora_weights == "loftq":
        return "lora.init_lora_weights: loftq reads the base's files again"
    if spec.training.torch_compile:
        return "training.torch_compile starts its own processes"
    if spec.training.report_to:
        return f"{spec.training.report_to[0]} starts its own threads or processes"
    if spec.evaluation.lm_eval:
        return "lm_eval runs its own code"
    return None


def seat(card: Card, key: str | None, reserved: int) -> Seat:
    """The host that a job with this base joins, and the bases that go, if `reserved` bytes are reserved for it.

    The newest host of its base takes it. Of the others the oldest go, until all that stays has room next to the job,
    and the card has no more trainers than it may have.
    """
    waiting = sorted(card.waiting_bases, key=lambda base: (base.since, base.host))
    host = next((base for base in reversed(waiting) if base.key == key), None)
    others = [base for base in waiting if base is not host]
    own = reserved if host is None else max(reserved, host.bytes)
    going = _going(card, others, card.taken + own, card.trainers + 1)
    return Seat(host=host, leaving=going)


def joined(card: Card, base: WarmBase, own: int) -> Seat:
    """The seat of a job that trains alongside others on their base, with `own` bytes reserved for it."""
    waiting = sorted(card.waiting_bases, key=lambda other: (other.since, other.host))
    return Seat(host=base, leaving=_going(card, waiting, card.taken + own, card.trainers))


def beyond(card: Card) -> tuple[WarmBase, ...]:
    """The idle bases that must go, the oldest first, since what others hold of the card has grown."""
    waiting = sorted(card.waiting_bases, key=lambda base: (base.since, base.host))
    return _going(card, waiting, card.taken, card.trainers)


def may_wait(card: Card) -> bool:
    """Whether the bases that wait for a job have room on the card, and its jobs too; else the newest does not stay."""
    return card.taken <= card.capacity and not beyond(card)


def _going(card: Card, waiting: Sequence[WarmBase], taken: int, trainers: int) -> tuple[WarmBase, ...]:
    staying = list(waiting)
    while staying and (
        taken + sum(base.bytes for base in staying) > card.capacity or trainers + len(staying) > max(1, card.max_jobs)
    ):
        staying.pop(0)
    return tuple(waiting[: len(waiting) - len(staying)])
