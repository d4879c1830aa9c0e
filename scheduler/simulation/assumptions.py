"""What a replay assumes about a trace's jobs: how long a start takes, and what they need without recomputing."""

from __future__ import annotations

from loractl.common.job.method import Need, Roomy, RoomyForm
from loractl.common.placement.replay import ReplayedForm
from loractl.common.units import GIB

IMPORT_S = 7.4
"""Seconds that a new trainer needs to import its libraries, on a two-core machine; a fork has them already."""

PREPARE_S = 0.6
"""Seconds from the claim to the first step besides imports and base: messages, data and adapter. Measured with
SmolLM2-135M and 90 short rows on a two-core machine."""

LOAD_BYTES_S = 0.28 * GIB
"""Bytes of a base that are read, checked and placed per second. Chosen, not measured on a card: with it a base of 8B
parameters in 16 bit takes a minute, and SmolLM2-135M 9.2 s with its imports, as measured there."""

SAVE_S = 300.0
"""Seconds of training from one checkpoint to the next. Chosen: after the first one, a job knows what it needs of a card
that goes."""


def start_s(size: int, *, forks: bool) -> float:
    """Seconds from the claim to the first step of a job whose loaded base has `size` bytes; 0 for one whose base's size
    is not known. `forks`: trainers have their imports from the fork server."""
    return PREPARE_S + size / LOAD_BYTES_S + (0.0 if forks else IMPORT_S) if size else 0.0


FORMS = ((4, 2.63, 0.74), (2, 1.76, 0.74), (1, 1.32, 0.75))
"""Rows at once, bytes as a multiple of the need, and the share of the time: for 8B in 16 bit, 4 rows of 1,024 tokens,
rank 16. The bytes are the memory plan's, the times computed for a 4090 (`python -m benchmarks.budget roomy`): none was
measured on a card."""

HALF = 0.88
"""Share of the time with one row at once and every second block recomputed."""


def forms_of(need: int) -> tuple[ReplayedForm, ...]:
    """The forms of a job with this need in bytes, as if it were such a job."""
    sizes = [(rows, int(times * need)) for rows, times, _ in FORMS]
    whole = tuple(RoomyForm(micro_batch=rows, bytes=size, planned=size) for rows, size in sizes)
    known = Need(lora=need, qlora=None)
    forms = Roomy(lora=whole).with_half(known, known, FORMS[0][0]).lora
    times = (*(share for _, _, share in FORMS), HALF)
    return tuple(ReplayedForm(form=form, time=share) for form, share in zip(forms, times, strict=True))
