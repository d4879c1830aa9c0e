"""How an adapter is trained, how several cards divide the work, and what a job needs of a card by each method."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


class Method(enum.StrEnum):
    """The `method` of a job file."""

    AUTO = "auto"  # LoRA where the device holds it, else QLoRA
    LORA = "lora"  # base weights in 16 or 32 bit
    QLORA = "qlora"  # base weights in NF4 with double quantisation


Checkpointing = bool | Literal["half"]
"""The `training.gradient_checkpointing` of a job file: whether blocks are recomputed; "half": every second block."""

MOST_CARDS = 8
"""The most cards that a job may have: as many as one box has."""


class Parallel(enum.StrEnum):
    """How the cards of a job divide it."""

    NONE = "none"  # one card has all of it
    DATA = "data"  # each card has the whole base, and its part of each step's rows
    SHARDED = "sharded"  # the base is divided too, and gathered a block at a time


@dataclass(frozen=True, kw_only=True)
class Need:
    """Predicted peak in bytes by method; None where it can't be predicted before the model is available."""

    lora: int | None
    qlora: int | None

    def of(self, method: Method) -> int | None:
        return self.qlora if method is Method.QLORA else self.lora


@dataclass(frozen=True, kw_only=True)
class RoomyForm:
    """How a job would train with room to recompute less: rows of a micro-batch, and bytes of its card."""

    micro_batch: int
    bytes: int  # corrected by measured peaks
    planned: int  # the plan alone
    half: bool = False  # every second block is recomputed; no row has such a form, see `with_half`


_FORM = ("micro_batch", "bytes", "planned")
"""What a row has of it."""


@dataclass(frozen=True, kw_only=True)
class Roomy:
    """What a job may have beyond its need if nobody else wants it, by method, the fastest form first."""

    lora: tuple[RoomyForm, ...] = ()
    qlora: tuple[RoomyForm, ...] = ()

    def of(self, method: Method) -> tuple[RoomyForm, ...]:
        return self.qlora if method is Method.QLORA else self.lora

    def as_json(self) -> dict[str, Any] | None:
        """None for a job that has no such form."""
        if not self.lora and not self.qlora:
            return None
        return {
            name: [{key: getattr(form, key) for key in _FORM} for form in forms] for name, forms in vars(self).items()
        }

    def with_half(self, need: Need, planned: Need, rows: int) -> Roomy:
        """These forms and, last, the one that recomputes every second block, in the smallest micro-batch.

        It takes no more than the middle between the job's need and what it takes without recomputing: the plan is the
        largest of sums that grow by the same with each block that keeps its activations. Only the smallest micro-batch
        has it: half as many rows without recomputing take less memory, and less time, than all of them in this form. In
        NF4 only the job's own (`rows`) has it: smaller ones dequantise the base again, which costs what is gained.
        """

        def of(method: Method) -> tuple[RoomyForm, ...]:
            forms, size, plan = self.of(method), need.of(method), planned.of(method)
            least = forms[-1] if forms else None
            if least is None or size is None or plan is None or least.half:
                return forms
            if method is Method.QLORA and least.micro_batch != rows:
                return forms
            middle = replace(least, half=True, bytes=(size + least.bytes) // 2, planned=(plan + least.planned) // 2)
            return (*forms, middle)

        return Roomy(lora=of(Method.LORA), qlora=of(Method.QLORA))

    def that(self, fits: Callable[[RoomyForm], bool]) -> Roomy:
        """Only the forms for which `fits` holds."""
        return Roomy(**{name: tuple(form for form in forms if fits(form)) for name, forms in vars(self).items()})

    @classmethod
    def read(cls, column: Mapping[str, Any] | None) -> Roomy:
        """What `as_json` has written."""

        def forms(name: str) -> tuple[RoomyForm, ...]:
            kept = column.get(name) if column else None
            return tuple(RoomyForm(**{key: form[key] for key in _FORM}) for form in kept or ())

        return cls(lora=forms("lora"), qlora=forms("qlora"))


@dataclass(frozen=True, kw_only=True)
class SharedNeed:
    """What a job needs of each of several cards that divide it."""

    cards: int
    parallel: Parallel
    need: Need

    def as_json(self) -> dict[str, Any]:
        return {"cards": self.cards, "parallel": self.parallel.value, **vars(self.need)}

    @classmethod
    def read(cls, column: Mapping[str, Any]) -> SharedNeed:
        """What `as_json` has written."""
        need = Need(lora=column["lora"], qlora=column["qlora"])
        return cls(cards=column["cards"], parallel=Parallel(column["parallel"]), need=need)


@dataclass(frozen=True, kw_only=True)
class Ways:
    """On how many cards a job may run."""

    alone: bool = True  # on one
    gangs: tuple[SharedNeed, ...] = ()  # how several may divide it, the preferred way first

    def bound(self, methods: Sequence[Method], need: Need) -> int | None:
        """Bytes that a card must have free before it is worth trying: the job's least, or a card's part of it."""
        sizes = [least_need(methods, gang.need) for gang in self.gangs]
        sizes += [least_need(methods, need)] if self.alone or not sizes else []
        return None if None in sizes else min(size for size in sizes if size is not None)

    def as_json(self) -> dict[str, Any] | None:
        """None for a job that runs on one card."""
        only_alone = self.alone and not self.gangs
        return None if only_alone else {"alone": self.alone, "ways": [gang.as_json() for gang in self.gangs]}

    @classmethod
    def read(cls, column: Mapping[str, Any] | None) -> Ways:
        """What `as_json` has written."""
        if column is None:
            return cls()
        return cls(alone=column["alone"], gangs=tuple(SharedNeed.read(way) for way in column["ways"]))


def permitted_methods(wanted: Method | Sequence[Method]) -> tuple[Method, ...]:
    """The methods that a job may run with, the preferred one first."""
    if isinstance(wanted, Method):
        return (Method.LORA, Method.QLORA) if wanted is Method.AUTO else (wanted,)
    return tuple(wanted)


def choose_method(methods: Sequence[Method], need: Need, limit: int) -> Method | None:
    """The preferred method that runs in `limit` bytes; an unknown need counts as fitting. None: no method fits."""
    for method in methods:
        size = need.of(method)
        if size is None or size <= limit:
            return method
    return None


def within(methods: Sequence[Method], need: Need, max_vram: int | None) -> tuple[Method, ...]:
    """The methods that the job's own limit admits. It admits a need that is not known yet."""
    if max_vram is None:
        return tuple(methods)
    sizes = [(method, need.of(method)) for method in methods]
    return tuple(method for method, size in sizes if size is None or size <= max_vram)


def least_need(methods: Sequence[Method], need: Need) -> int | None:
    """The least bytes that a permitted method needs; None when one need is not known."""
    sizes = [need.of(method) for method in methods]
    return None if None in sizes else min((size for size in sizes if size is not None), default=None)
