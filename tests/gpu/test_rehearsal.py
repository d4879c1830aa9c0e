"""`make gpu` on a processor, with models of a hand's breadth: nothing of it may break in its first minute on a card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loractl.common.job.method import Method
from loractl.common.memory.config import read_shape
from loractl.common.memory.plan import plan
from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings

from . import faulty_trainer
from .__main__ import run, well
from .attention import compare
from .experiments import EXPERIMENTS
from .families import FAMILIES, HALF, Workshop
from .lab import Lab
from .ladder import ROWS, SHARE, spec_of
from .packs import Bench, verdicts
from .page import NEVER, page
from .rig import Figure, Rig, make_rig
from .solo import SIDES, Course, measure
from .speeds import NARROW, pack_figures, rows_figure, solo_figures

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"


@pytest.fixture
def rig(home: Path, warm_start: dict[str, str]) -> Iterator[Rig]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
    made = make_rig(home, {**kept, **warm_start}, device="cpu", small=True, budget_s=1200)
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


def workshop_rig(folder: Path) -> Rig:
    """A rig for what needs no lab."""
    return Rig(cli=None, store=None, workshop=Workshop(folder=folder, device="cpu", small=True), folder=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_are_as_long_as_they_are_said_to_be(mixed: bool, tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    course = Course.of(
        str(rig.workshop.model(HALF)), str(rig.rows(length=1024, mixed=mixed)), "lora", "cpu", 1, 1, 1024
    )
    lengths = sorted(len(row.input_ids) for row in (*course.train, *course.held_out))
    assert 0.95 * 1024 < lengths[-1] <= 1024 and (lengths[0] < 256) == mixed
    assert all(sum(label >= 0 for label in row.labels) > 0.5 * len(row.labels) for row in course.train)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_engine_and_the_trainer_learn_the_same_rows_alike(method: str, tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    course = Course.of(str(rig.workshop.model(NARROW)), str(rig.rows(16, 128)), method, "cpu", 4, 2, 128)
    sides = {side: measure(side, course) for side in SIDES}
    assert [sides[side]["pass"] for side in SIDES] == ["SharedPass", "PaddedPass", "padded"]
    assert all(side["seconds"] > 0 for side in sides.values())
    assert sides["exact"]["loss"] == pytest.approx(sides["trainer"]["loss"], rel=1e-3)
    figures = list(solo_figures(sides, method))
    assert [f.what for f in figures if not f.ok] == [] and len(figures) == 4


def test_rows_at_once_are_compared_with_row_by_row_and_a_card_without_the_kernel_is_told() -> None:
    found = {"shape": "2x16", **compare(torch.device("cpu"), 2, 16)}
    assert found["by row"] > 0 and "does not take these" in found["why"]
    assert rows_figure(found, on_card=False).ok and not rows_figure(found, on_card=True).ok
    both = {"shape": "2x16", "by row": 3.0, "at once": 1.5, "apart": 0.004}
    assert rows_figure(both, on_card=True).value == "1.50, 3.00 (2.00 of the speed, apart by 0.004)"
    assert not rows_figure({**both, "apart": 0.2}, on_card=True).ok


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_a_pack_is_compared_with_its_members_alone(kind: str, tmp_path: Path) -> None:
    rig = workshop_rig(tmp_path)
    model, rows = str(rig.workshop.model(NARROW)), str(rig.rows(512, 128))
    bench = Bench(
        lab=Lab(model, rows, kind, recompute=True, longest=128), model=model, kind=kind, device="cpu", card="cpu"
    )
    found = bench.compare(2, 64)
    assert found["loss"] == found["weight"] == found["moved"] == 0.0, "on a processor a pack changes nothing"
    alone = bench.planned(1, 64)
    assert alone < found["planned"] < 2 * alone, "the base counts once"
    (verdict,) = verdicts([found], quantised=kind == "nf4")
    assert verdict["first"] > 1.0 and verdict["fitted"] > 0
    assert len(list(pack_figures(kind, found, verdict))) == 3


def test_the_ladder_has_steps_to_go_down_and_one_to_stand_on(tmp_path: Path) -> None:
    """By the plan of the whole family, with its margin for what must not fit and without it for what must."""
    from transformers import AutoConfig

    kind, numbers = FAMILIES[HALF]
    AutoConfig.for_model(kind, **numbers, max_position_embeddings=8192).save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path), None)
    assert shape is not None
    plans = {rows: plan(shape, spec_of(tmp_path, tmp_path, 1024, rows), Method.LORA) for rows in (ROWS, 8, 4)}
    limit = SHARE * plans[ROWS].need_bytes
    assert plans[4].peak_bytes < limit < plans[8].peak_bytes


def test_only_what_had_no_time_may_be_missing() -> None:
    done = {name: [Figure(what="x", value="y")] for name in EXPERIMENTS}
    late = next(name for name, experiment in EXPERIMENTS.items() if not experiment.always)
    assert well(done) and well({**done, late: []}) and not well({**done, "Packs": []})
    assert f"| {late} | no time was left | | " in page({**done, late: []}, "a card")
    assert "| Packs | not reached | | no |" in page({**done, "Packs": []}, "a card")
    assert not well({**done, late: [Figure(what="x", value="y", ok=False)]})


@pytest.mark.long
def test_every_experiment_runs_on_a_processor(rig: Rig) -> None:
    figures = run(rig)
    assert {name: [f for f in part if not f.ok] for name, part in figures.items()} == {name: [] for name in EXPERIMENTS}
    assert all(figures.values())
    assert page(figures, "a processor").count("\n| ") > 15
