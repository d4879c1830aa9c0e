"""`make gpu` on a processor, with models of a hand's breadth: nothing of it may break in its first minute on a card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings

from . import faulty_trainer
from .experiments import EXPERIMENTS
from .families import FAMILIES, HALF, Workshop
from .page import NEVER, page
from .plain_trainer import speed
from .rig import Figure, Rig, make_rig

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"


@pytest.fixture
def rig(home: Path, warm_start: dict[str, str]) -> Iterator[Rig]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
    made = make_rig(home, {**kept, **warm_start}, device="cpu", small=True, budget_s=240)
    yield made
    stop_embedded(load_settings(made.cli.environment))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_made_with_its_own_numbers_where_it_is_not_small(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = Workshop(folder=tmp_path, device="cpu", small=True).model(family)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size) == (FAMILIES[family][0], 64)
    assert len(AutoTokenizer.from_pretrained(folder)) <= config.vocab_size
    whole = AutoConfig.for_model(FAMILIES[family][0], **FAMILIES[family][1])
    assert whole.vocab_size > 32000, "logits of a real vocabulary"


@pytest.mark.parametrize("how", ["assert", "address"])
def test_a_fault_of_the_card_reads_as_cuda_says_it(how: str) -> None:
    with pytest.raises(RuntimeError, match="CUDA error: "):
        faulty_trainer.fail(how, "cpu")


def test_the_page_says_that_it_was_never_run_until_it_was() -> None:
    never = page({name: [] for name in EXPERIMENTS}, None)
    written = DOCUMENT.read_text()
    assert written == never if written.startswith(NEVER) else written.startswith("# Real cards: run on ")
    figures = {"A": [Figure(what="x|y", value="two\nlines", ok=False)], "B": []}
    text = page(figures, "NVIDIA H100", "today", 12.3)
    assert text.splitlines()[0] == "# Real cards: run on NVIDIA H100"
    assert "today, 12 s, 1 lines not as they should be." in text
    assert "| A | x\\|y | two lines | no |" in text and "| B | not reached | | no |" in text


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_plain_training_counts_tokens(method: str, tmp_path: Path) -> None:
    workshop = Workshop(folder=tmp_path, device="cpu", small=True)
    rows = Rig(cli=None, store=None, workshop=workshop, folder=tmp_path).rows(4, 30)
    assert speed(str(workshop.model(HALF)), rows, method, 3, 2, 64, "cpu") > 0


@pytest.mark.long
def test_every_experiment_runs_on_a_processor(rig: Rig) -> None:
    from .__main__ import run

    figures = run(rig)
    assert {name: [f for f in part if not f.ok] for name, part in figures.items()} == {name: [] for name in EXPERIMENTS}
    assert all(figures.values())
    assert page(figures, "a processor").count("\n| ") > 15
