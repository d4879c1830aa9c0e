"""How far off predicted times are in a made-up lab: python -m benchmarks.durations

The jobs are those of benchmarks.lab_trace; each starts as it arrives, on one of four cards of three models, and is
predicted from what has ended by then. How long each really takes is drawn, and so is how far its tokens were estimated
wrongly: by its user's language, and by its own rows. So this tests the rule, not any card. Times of real trainings are
in docs/placement.md.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loractl.common.placement.duration import Basis, Extent, TimedRun, Undone, forecast

from .lab_trace import BASES, jobs

SLOWNESS = {"RTX 3060": 3.4, "RTX 4090": 1.0, "A40": 1.9}
"""Made up, of a step; bases differ from it by OWN."""

CARDS = ("RTX 3060", "RTX 4090", "RTX 4090", "A40")
PARAMETERS = {"qwen-1.5b": 1.5e9, "mistral-7b-nf4": 7.2e9, "llama-8b-nf4": 8.0e9, "llama-8b-bf16": 8.0e9}
NF4 = 1.3
"""Made up: how much slower a step on a quantised base is."""

STEP_TOKENS, BASE_S_A_GIB = 16_000.0, 3.6
OWN, LANGUAGE, ROWS, NOISE, SHARED = 0.15, 0.3, 0.25, 0.05, 0.3
"""Sigmas of what is drawn: a base's own speed on a model of card, a user's bytes a token, a data set's, a run's noise;
and the share of jobs that run next to another at two thirds of the speed."""

COUNTED = 0.9
"""Share of jobs whose rows were counted at submit."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A job: what was predicted of it, and what it took."""

    ends: float
    predicted: float
    took: float
    basis: Basis
    run: TimedRun
    first: bool  # of its base

    @property
    def off(self) -> float:
        return max(self.predicted / self.took, self.took / self.predicted)


def replayed(seed: int) -> list[Ran]:
    rng, done = random.Random(seed), list[Ran]()
    own = {(base, card): rng.lognormvariate(0, OWN) for base in BASES for card in SLOWNESS}
    language = {user: rng.lognormvariate(0, LANGUAGE) for user in ("ada", "bob", "cyd", "dan", "eve", "fay")}
    data: dict[tuple[str, str], float] = {}
    for number, (arrival, _, seconds, user, base) in enumerate(jobs()):
        card, method = CARDS[number % len(CARDS)], "qlora" if "nf4" in base else "lora"
        pace = PARAMETERS[base] ** 0.9 * (NF4 if method == "qlora" else 1.0) * SLOWNESS[card] * own[base, card] * 2e-12
        prepared = 8.0 + BASE_S_A_GIB * BASES[base]
        trained, closing = 0.85 * seconds * SLOWNESS[card], 0.15 * seconds * SLOWNESS[card]
        trained *= rng.lognormvariate(0, NOISE) * (1.5 if rng.random() < SHARED else 1.0)
        key = (
            data.setdefault((user, base), rng.lognormvariate(0, ROWS))
            if rng.random() < 0.7
            else rng.lognormvariate(0, ROWS)
        )
        wrong = language[user] * key
        steps = max(1, round(0.85 * seconds * SLOWNESS[card] / pace / STEP_TOKENS))
        extent = Extent(
            steps=steps,
            step_tokens=STEP_TOKENS * wrong,
            closing_tokens=steps * STEP_TOKENS * wrong * 0.15 / 0.85,
            parameters=int(PARAMETERS[base]),
        )
        counted = extent if rng.random() < COUNTED else None
        took = prepared + trained + closing
        known = [one.run for one in sorted(done, key=lambda one: -one.ends) if one.ends < arrival]
        known = [run for run in known if run.base_model == base][:50] + [
            run for run in known if run.base_model != base
        ][:50]
        need_key = f"{user} {base} {key:.6f}"
        asked = Undone(user=user, base_model=base, method=method, need_key=need_key, extent=counted)
        found = forecast(asked, card, known)
        run = TimedRun(
            user=user, base_model=base, method=method, need_key=need_key, device=card, extent=counted,
            prepared_s=prepared, trained_s=trained, steps=steps, seconds=took,
        )  # fmt: skip
        first = all(one.run.base_model != base for one in done)
        done.append(
            Ran(ends=arrival + took, predicted=found.seconds, took=took, basis=found.basis, run=run, first=first)
        )
    return done


def row(name: str, some: Sequence[Ran]) -> None:
    if some:
        off = sorted(one.off for one in some)
        nine = off[min(len(off) - 1, int(0.9 * len(off)))]
        ratio = statistics.median(one.took / one.predicted for one in some)
        print(f"{name:<28}{len(some):>6}{ratio:>9.2f}{statistics.median(off):>9.2f}{nine:>9.2f}")


def main() -> None:
    done = [one for seed in range(20) for one in replayed(seed)]
    print(f"{'20 draws':<28}{'jobs':>6}{'ratio':>9}{'off by':>9}{'9 in 10':>9}")
    for basis in Basis:
        row(basis.value, [one for one in done if one.basis is basis])
    row("all", done)
    row("all, as an hour", [replace(one, predicted=3600.0) for one in done])
    row("first of a base", [one for one in done if one.first])
    row("first of a base, but known", [one for one in done if one.first and one.basis is not Basis.UNKNOWN])


if __name__ == "__main__":
    main()
