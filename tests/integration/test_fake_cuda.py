"""The engine's passes on a card that is none: fake CUDA tensors, in one process for all (tests/fake_cuda)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .. import fake_cuda
from ..conftest import LONG
from ..fake_cuda.budget import SHAPES, WAYS, Step, shares
from ..fake_cuda.passes import CARDS, CASES, FAULTS, MANY

ROOT = Path(__file__).parents[2]

QUICK = (
    "lora", "nf4, fp16", "fp32", "one row", "7.5", "7.5, a family that overflows fp16", "8.0", "12.0",
    "8.9, wide heads, one row", "1B lora 8 x 256",
)  # fmt: skip
"""What `make test` tries of passes and cards: a card before Ampere, the first one since and the newest; and the step
that it counts."""

CHANGE = 0.02
"""Share by which a figure may differ from its line in docs/budget.md."""

Outcomes = dict[str, dict[str, Any]]


def _outcomes(*names: str) -> Outcomes:
    if (why := fake_cuda.why_not()) is not None:
        pytest.skip(why)
    command = [sys.executable, "-m", "tests.fake_cuda", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return {found.pop("name"): found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return _outcomes(*FAULTS, *((*CASES, *CARDS, *SHAPES) if LONG else QUICK))


def cases(*rows: tuple[Any, ...]) -> list[Any]:
    """Each with the name of a case first, and long if that is."""
    return [pytest.param(*row, marks=() if row[0] in QUICK else pytest.mark.long) for row in rows]


@pytest.mark.parametrize("case", cases(*((name,) for name in (*CASES, *CARDS))))
def test_a_pass_stays_on_the_card_in_one_type_and_leaves_every_gradient(case: str, outcomes: Outcomes) -> None:
    found = outcomes[case]
    assert found["faults"] == {}, found.get("where")
    assert found["operators"] > 300, "something ran"
    if (CASES | CARDS)[case].way != "padded":
        assert found["moved"] <= 1, "the processor waits for the card at each further tensor that it brings there"


@pytest.mark.parametrize(
    ("card", "base", "autocast", "at_once"),
    cases(
        ("7.5", "torch.float16", "fp16", False),
        ("7.5, a family that overflows fp16", "torch.float32", None, False),
        ("8.0", "torch.bfloat16", "bf16", True),
        ("8.6", "torch.bfloat16", "bf16", True),
        ("8.9", "torch.bfloat16", "bf16", True),
        ("9.0", "torch.bfloat16", "bf16", True),
        ("12.0", "torch.bfloat16", "bf16", True),
    ),
)
def test_a_card_s_generation_picks_types_and_attention(
    card: str, base: str, autocast: str | None, at_once: bool, outcomes: Outcomes
) -> None:
    found = outcomes[card]
    assert found["types"] == [base, autocast]
    assert (found["at_once"] > 0, found["by_row"] is None) == (at_once, at_once)


def test_a_card_before_ampere_says_why_rows_go_one_by_one(outcomes: Outcomes) -> None:
    assert outcomes["7.5"]["by_row"] == "cards before Ampere have no kernel for rows of any lengths"
    assert "FlashAttention takes no torch.float32" in outcomes["fp32"]["by_row"]


@pytest.mark.parametrize(
    ("case", "kernel"),
    cases(
        ("7.0", "efficient"),
        ("7.5", "efficient"),
        ("7.5, nf4", "efficient"),
        ("7.5, fp32", "efficient"),
        ("7.5, evaluation", "efficient"),
        ("7.5, windows", "efficient"),
        ("7.5, padded", "efficient"),
        ("8.0, fp32", "efficient"),
        ("fp32", "efficient"),
        ("8.0, one row", "flash"),
        ("one row", "flash"),
        ("8.0, wide heads, one row", "flash"),
        ("8.9, wide heads, one row", "efficient"),
    ),
)
def test_no_card_holds_scores_of_heads_that_share_keys_and_values(case: str, kernel: str, outcomes: Outcomes) -> None:
    """Whether the kernel for rows of any lengths is there or not: plain products hold the square of a row."""
    assert set(outcomes[case]["attention"]) == {f"_scaled_dot_product_{kernel}_attention"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a tensor on the processor", "_varlen_attn on a processor's tensor of shape [(5,), (5,)]"),
        ("mixed types", "_varlen_attn of mixed types: torch.bfloat16, torch.float32"),
        (
            "a gradient that is lost",
            "no gradient for base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight",
        ),
    ],
)
def test_a_fault_that_is_put_into_the_engine_is_found(fault: str, said: str, outcomes: Outcomes) -> None:
    assert said in outcomes[fault]["faults"]


@pytest.mark.parametrize("step", cases(*((name,) for name in SHAPES)))
def test_a_step_costs_what_its_budget_says(step: str, outcomes: Outcomes) -> None:
    _within_budget(step, outcomes[step])


def test_a_micro_batch_takes_what_it_runs_or_what_starting_it_takes() -> None:
    def step(kernels: int, ms: float) -> Step:
        return Step(kernels=kernels, gigabytes=0, elementwise=0, teraflop=0, milliseconds={"4090": ms})

    whole, none = step(1000, 100), step(800, 70)
    assert shares(whole, [none], 1) == {"4090": pytest.approx(0.7)}
    assert shares(whole, [none, whole], 2) == {"4090": pytest.approx(1.7)}, "every second block"
    assert shares(whole, [step(10_000, 70)], 1) == {"4090": pytest.approx(2)}, "20 us a kernel"


@pytest.mark.long
def test_whatever_is_combined_stays_on_the_card() -> None:
    found = _outcomes(*MANY)
    assert {name: one["faults"] for name, one in found.items() if one["faults"]} == {}
    assert len(found) == len(MANY)


def _within_budget(step: str, found: dict[str, Any]) -> None:
    """Where a figure has changed for a reason, python -m benchmarks.budget writes the page anew."""
    for way, side in WAYS.items():
        _, _, *told = next(line for line in _table() if line[:2] == [step, side])
        for name, cell in zip(("kernels", "gigabytes", "elementwise", "teraflop"), told, strict=False):
            before, now = float(cell.replace(",", "")), found[way][name]
            assert abs(now / before - 1) <= CHANGE, (
                f"{side}, {step}: {name} were {cell} in docs/budget.md, are {now:.1f}"
            )


def _table() -> list[list[str]]:
    lines = (ROOT / "docs" / "budget.md").read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
