"""What loractl itself writes into a job's log: one line per event, for people."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from loractl.common.text import clean_line, without_passwords
from loractl.common.units import duration


def log_line(stage: str, text: str) -> str:
    """A line with its end: the time on the box, the stage, the text."""
    return f"{time.strftime('%H:%M:%S')} {stage:<10} {clean_line(without_passwords(text))}\n"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """A training's progress and speed; None while unknown."""

    step: int
    total_steps: int
    step_seconds: float | None  # per step, including evaluations and checkpoints in between
    tokens_per_second: float | None
    left_seconds: float | None  # until the job is done


def step_texts(losses: Mapping[str, float], pace: Pace) -> list[str]:
    """A step's losses (`loss`, `eval_loss`), one line each, within 80 columns."""
    step = _place(pace)
    texts = []
    if "eval_loss" in losses:
        texts.append(f"{step}  held-out loss {losses['eval_loss']:.4f}")
    if "loss" in losses:
        parts = [step, f"loss {losses['loss']:.4f}"]
        if pace.tokens_per_second:
            parts.append(f"{pace.tokens_per_second:.0f} tok/s")
        elif pace.step_seconds is not None:
            parts.append(f"{pace.step_seconds:.2f} s a step")
        parts += [f"{duration(pace.left_seconds)} left"] if pace.left_seconds else []
        texts.append("  ".join(parts))
    return texts


def evaluation_text(pace: Pace) -> str:
    """The log line before an evaluation in mid-training."""
    return f"{_place(pace)}  evaluates the held-out rows"


def begin_text(step: int, total_steps: int) -> str:
    """The log line before the first step, which compiles and fills the card, and may take minutes."""
    return f"trains: {total_steps} steps, " + (
        f"continues after step {step}" if step else "the first one takes longest"
    )


def _place(pace: Pace) -> str:
    return f"step {pace.step:>{len(str(pace.total_steps))}} of {pace.total_steps}"
