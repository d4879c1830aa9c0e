"""How plans look: within the screen, in ASCII where it must be, without escapes in a pipe."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Method, Need, Roomy, RoomyForm
from loractl.common.memory.config import read_shape
from loractl.common.memory.correction import Measured, accuracy
from loractl.common.memory.fit import Fit
from loractl.common.memory.plan import Plan
from loractl.common.memory.plan import plan as memory_plan
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.plan.answer import CardRoom, LargestFit, MemoryNeed, PlanAccuracy
from loractl.scheduler.plan.text import accuracy_text, need_text

from ...factories import spec
from ..screens import PIPE, seemly, shown


@pytest.fixture
def plans(tmp_path: Path) -> dict[Method, Plan]:
    numbers = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    shape = read_shape(str(tmp_path))
    assert shape is not None
    return {
        method: memory_plan(shape, spec(base_model=str(tmp_path)), method)
        for method in Method
        if method is not Method.AUTO
    }


CARDS = (
    CardRoom(word="fits", card="kestrel:0", total_gib="24", how="with qlora, 6.2 GiB are free now"),
    CardRoom(
        word="tight",
        card="a-very-long-name-of-a-box-in-some-data-centre.example.org:1",
        total_gib="24",
        how="with qlora, once others have left it",
    ),
    CardRoom(word="never", card="merlin:0", total_gib="12", how="3.4 GiB short"),
)


def need(plans: dict[Method, Plan], title: str = "job.yaml", lengths: str = "Rows.", **more: Any) -> MemoryNeed:
    values: dict[str, Any] = {
        "title": title, "plans": plans, "reserved": Need(lora=None, qlora=None), "choice": Method.QLORA,
        "lengths": None, "planned_for": lengths, "measured": (10 * GIB, 11 * GIB), "cards": CARDS, "largest": None,
    }  # fmt: skip
    return MemoryNeed(**values | more)


@shown
def test_a_plan_fits_any_screen(plans: dict[Method, Plan], screen: Screen) -> None:
    title, lengths = (
        "t" * 60 + ".yaml",
        "Planned for rows of max_length, 1024 tokens: there is no tokenizer to count them with.",
    )
    fits = {method: Fit(micro_batch=1024, max_length=2**24) for method in plans}
    largest = LargestFit(room=24 * GIB, which="a card of 24 less what is kept free", by_method=fits)
    text = need_text(need(plans, title, lengths, measured=(GIB, 2 * GIB), largest=largest), "Submit it: x", screen)
    seemly(text, screen)
    assert "Largest in 24.0 GiB, a card of 24 less what is kept free:" in " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 110])
def test_a_parts_note_goes_over_several_lines_and_loses_no_word(plans: dict[Method, Plan], width: int) -> None:
    words = need_text(need(plans), "x", replace(PIPE, width=width)).split()
    for one in plans.values():
        for name, note in one.notes.items():
            assert not one.parts.get(name) or set(note.split()) <= set(words)
    assert not any(word.endswith("…") for word in words)


def test_a_plan_shows_both_methods_part_by_part(plans: dict[Method, Plan]) -> None:
    text = need_text(need(plans), "Submit it: x", PIPE)
    lines = text.splitlines()
    for method, one in plans.items():
        like = " (measured on 2 like it: 10.0 to 11.0)" if method is Method.QLORA else ""
        assert f"job.yaml with {method.value} needs {one.need_bytes / GIB:.1f} GiB{like}" in lines
    (weights,) = [line for line in lines if "parameters, bf16" in line]
    assert (
        weights.split()[:2] == ["weights", f"{plans[Method.LORA].parts['weights'] / GIB:.1f}"] and "█" * 12 in weights
    )
    assert sum(line.lstrip().startswith("margin ") for line in lines) == 2
    assert lines[-1] == "Submit it: x"
    assert [line.split()[0] for line in lines if "kestrel:0" in line or "merlin:0" in line] == ["fits", "never"]


def test_a_plan_says_what_the_job_takes_without_recomputing_and_when(plans: dict[Method, Plan]) -> None:
    forms = tuple(RoomyForm(micro_batch=n, bytes=n * 10 * GIB, planned=1) for n in (4, 2, 1))
    found = need(plans, roomy=Roomy(qlora=forms))
    said = " ".join(need_text(found, "x", PIPE).split())
    assert (
        "Without recomputing it takes 40.0 GiB, 20.0 with 2 rows at once, 10.0 with 1 row at once (qlora): it has that "
        "room where it is alone on a card and no ready job wants it."
    ) in said
    assert found.as_json()["methods"]["qlora"]["roomy"][1] == {"micro_batch": 2, "bytes": 20 * GIB, "half": False}
    fewer = need(plans, roomy=Roomy(qlora=(*forms, replace(forms[-1], bytes=7 * GIB, half=True))))
    assert "10.0 with 1 row at once, 7.0 with 1 row at once and every second block recomputed (qlora)" in " ".join(
        need_text(fewer, "x", PIPE).split()
    )
    assert "recomputing" not in need_text(need(plans), "x", PIPE)


def test_what_does_not_fit_is_said_in_words(plans: dict[Method, Plan]) -> None:
    def solved(**size: int | None) -> str:
        fits = {Method.LORA: Fit(**{"micro_batch": None, "max_length": None, **size})}
        largest = LargestFit(room=GIB, which="the largest card", by_method=fits)
        lines = iter(need_text(need(plans, largest=largest), "x", PIPE).splitlines())
        first = next(line for line in lines if line.startswith("  lora "))
        return " ".join([first, *(line.strip() for line in itertools.takewhile(bool, lines))])

    assert solved(micro_batch=4, max_length=512).endswith("per_device_train_batch_size 4, or max_length 512")
    assert solved(micro_batch=8, max_length=512, all_rows=True).endswith(
        "per_device_train_batch_size 8 (every row to train on; memory is not the limit), or max_length 512"
    )
    assert solved(max_length=96).endswith("max_length 96; not one row of this job's length")
    assert solved(micro_batch=4).endswith("per_device_train_batch_size 4; at the job's batch size no length")
    assert solved().endswith("nothing fits, not even with one row at once or with rows of 8 tokens")


@shown
def test_the_table_of_accuracy_fits_any_screen(screen: Screen) -> None:
    runs = [
        Measured(
            device_name="NVIDIA H100 80GB HBM3 with a long name", method=method, family=family, need_key=None,
            planned=10 * GIB, reserved=10 * GIB, peak=int(peak * GIB), out_of_memory=False,
        )
        for method in (Method.LORA, Method.QLORA)
        for family in (None, "llama", "a_family_with_a_long_name")
        for peak in (9.1, 9.2, 9.3)
    ]  # fmt: skip
    text = accuracy_text(PlanAccuracy(rows=tuple(accuracy(runs))), screen)
    seemly(text, screen)
    assert "0.92" in text and "0.94" in text
    assert accuracy_text(PlanAccuracy(rows=()), screen).startswith("Nothing was measured")
