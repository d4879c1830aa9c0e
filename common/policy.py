"""Which method a job would run with on a device, and which nodes a wake message should reach. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from .method import Method
from .units import GIB

VRAM_CLASSES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 144, 192, 288)
"""GiB. A job waits in the smallest class that holds its need; sizes are those of cards that labs own."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Predicted peak in bytes by method; None where it can't be predicted before the model is there."""

    lora: int | None
    qlora: int | None

    def of(self, method: Method) -> int | None:
        return self.qlora if method is Method.QLORA else self.lora


def permitted_methods(wanted: Method) -> tuple[Method, ...]:
    """The methods that a job may run with, the better one first."""
    return (Method.LORA, Method.QLORA) if wanted is Method.AUTO else (wanted,)


def choose_method(wanted: Method, need: Need, limit: int) -> Method | None:
    """The method to run with in `limit` bytes; None when nothing fits.

    auto means LoRA where it fits, else QLoRA, and QLoRA only where it really needs less. A need that is not
    known yet counts as fitting: the trainer finds out.
    """
    for method in permitted_methods(wanted):
        size = need.of(method)
        if size is None or size <= limit:
            return method
    return None


def least_need(wanted: Method, need: Need) -> int | None:
    """Bytes with which some permitted method runs; None when one of them is not known."""
    sizes = [need.of(method) for method in permitted_methods(wanted)]
    return None if None in sizes else min(size for size in sizes if size is not None)


def vram_class(size: int | None) -> int:
    """The class (GiB) of a need in bytes; the smallest for an unknown one, the largest for one beyond all."""
    if size is None:
        return VRAM_CLASSES[0]
    return next((c for c in VRAM_CLASSES if size <= c * GIB), VRAM_CLASSES[-1])


def served_classes(free: int) -> tuple[int, ...]:
    """Classes that can hold a job which fits into `free` bytes: those whose lower bound is below it."""
    lower = (0, *VRAM_CLASSES[:-1])
    return tuple(c for c, bound in zip(VRAM_CLASSES, lower, strict=True) if bound * GIB < free)


def queue_name(size_class: int) -> str:
    """The queue of a class, like vram.24."""
    return f"vram.{size_class}"
