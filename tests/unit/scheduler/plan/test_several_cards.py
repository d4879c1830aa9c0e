"""What plan says of several cards: where one is too small, and where a job asks for more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Method, Need
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason, Status
from loractl.common.memory.step import Lengths
from loractl.common.store.records import Claim, Progress
from loractl.common.store.store import Store
from loractl.common.units import GIB, gib
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.plan import answer as answer
from loractl.scheduler.plan.answer import JobToPlan, MemoryNeed, job_to_plan, memory_need
from loractl.scheduler.plan.command import following
from loractl.scheduler.plan.text import need_text
from loractl.scheduler.submit.lengths import RowLengths
from loractl.scheduler.submit.need import plan_job

from ....databases import SQLITE_ALONE
from ...common.memory.test_ways import LLAMA_8B
from ...factories import node_state, take

pytestmark = SQLITE_ALONE


def asked_for(tmp_path: Path, **resources: Any) -> JobSpec:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    tree = {"name": "t", "base_model": str(tmp_path), "dataset": {"path": "org/data"}, "method": "lora"}
    return JobSpec.model_validate({**tree, "resources": resources})


def asked(store: Store, tmp_path: Path, card: int | None, solve: bool = False, **resources: Any) -> MemoryNeed:
    spec = asked_for(tmp_path, **resources)
    return memory_need(store, JobToPlan(title="t", spec=spec, data={}), card, solve=solve)


def rows(need: MemoryNeed) -> list[tuple[str, str, str]]:
    return [(room.word, room.card, room.how) for room in need.cards]


def test_a_card_that_is_too_small_is_named_with_how_many_such_cards_hold_the_job(store: Store, tmp_path: Path) -> None:
    need = asked(store, tmp_path, 16 * GIB)
    assert need.choice is Method.LORA
    assert rows(need)[1:] == [("fits", "2 cards of a box", "with lora, sharded: 14.3 GiB of each")]
    assert rows(need)[0][0] == "never"
    assert [word for word, *_ in rows(asked(store, tmp_path, 24 * GIB))] == ["fits"], "one card is enough"


def test_a_job_with_patience_takes_no_card_with_qlora_before_it_is_over(store: Store, tmp_path: Path) -> None:
    patient = asked_for(tmp_path).model_copy(update={"method": Method.AUTO, "lora_patience": 7200.0})
    file = tmp_path / "job.yaml"
    written = {"base_model": str(tmp_path), "dataset": {"path": "org/data"}, "resources": {"cards": 1}}
    file.write_text(json.dumps({"name": "t", "lora_patience": "2h", **written}))
    small = memory_need(store, job_to_plan(store, str(file), ()), 16 * GIB, solve=False)
    assert rows(small) == [("tight", "a card", "with qlora, once it has waited 2 h 00 min for lora")]
    said = " ".join(need_text(small, "x", Screen(width=80, unicode=True, color=False)).split())
    assert "For 2 h 00 min it waits for a card that holds LoRA; then QLoRA is allowed." in said
    assert rows(memory_need(store, job_to_plan(store, str(file), ()), 48 * GIB, solve=False))[0][0] == "fits"
    store.cards.see(node_state("heron:0", total=16 * GIB))
    job_id = store.jobs.submit(plan_job(patient, "ada", {}, store))
    assert rows(memory_need(store, job_to_plan(store, str(job_id), ()), None, solve=False))[0][0] == "tight"
    hasty = memory_need(store, job_to_plan(store, str(job_id), ("lora_patience=null",)), None, solve=False)
    assert hasty.choice is Method.QLORA and rows(hasty)[0][0] == "fits"


def test_a_number_of_cards_is_planned_as_it_is_asked_for(store: Store, tmp_path: Path) -> None:
    assert rows(asked(store, tmp_path, 24 * GIB, cards=2)) == [
        ("fits", "2 cards of a box", "with lora, data: 19.9 GiB of each")
    ]
    need = asked(store, tmp_path, 8 * GIB, cards=2)
    assert (rows(need), need.choice) == ([("never", "2 cards", "of no box")], None)


def test_only_boxes_whose_workers_run_such_jobs_are_named(store: Store, tmp_path: Path) -> None:
    for number in range(2):
        store.cards.see(node_state(f"heron:{number}", total=16 * GIB, gangs=False))
    assert [word for word, *_ in rows(asked(store, tmp_path, None))] == ["never", "never"]
    for number in range(2):
        store.cards.see(node_state(f"heron:{number}", total=16 * GIB, gangs=True))
    assert rows(asked(store, tmp_path, None))[2:] == [
        ("fits", "2 cards of heron", "with lora, sharded: 14.3 GiB of each")
    ]


def waits(need: MemoryNeed) -> str:
    """What the job waits for, in the sentence that says so."""
    text = " ".join(need_text(need, "x", Screen(width=120, unicode=True, color=False)).split())
    found = re.search(r"(It|until [^:]*, it) waits for .*?(lora|has)\.(?= )", text)
    return "" if found is None else found[0]


def test_what_submit_reserves_for_longer_rows_may_be_of_several_cards(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that no card has what two of a box would begin with at once."""
    counted = RowLengths(lengths=Lengths(train=64, evaluate=64), rows=None, sentence="Counted.")
    monkeypatch.setattr(answer, "row_lengths", lambda *_: counted)
    said = "until its trainer has counted them, it waits for"
    two = "14.3 GiB of each of 2 cards with lora."
    need = asked(store, tmp_path, 19 * GIB)
    assert need.choice is Method.LORA and need.submitted is not None
    size = gib(need.submitted.need.lora)
    assert waits(need) == f"{said} {size} GiB with lora, or for {two}"
    assert waits(asked(store, tmp_path, 19 * GIB, cards=1)) == f"{said} {size} GiB with lora, which no card has."
    assert waits(asked(store, tmp_path, 19 * GIB, cards=2)) == f"{said} {two}"
    wide = asked(store, tmp_path, 19 * GIB, cards=2, parallel="data")
    assert waits(wide) == f"{said} 19.9 GiB of each of 2 cards with lora, which no box has."


def test_a_job_that_its_trainer_has_planned_waits_for_what_its_row_says(store: Store, tmp_path: Path) -> None:
    job = asked_for(tmp_path)
    store.jobs.submit(plan_job(job, "ada", {}, store))
    first = memory_need(store, job_to_plan(store, "1", ()), None, solve=False)
    assert waits(first) == "" and first.as_json()["methods"]["lora"]["submitted_bytes"] == first.reserved.lora
    mine = take(store, 24 * GIB)
    assert isinstance(mine, Claim)
    store.attempts.beat(mine, Progress(need=Need(lora=17 * GIB, qlora=None)))
    assert store.attempts.finish(mine, Reason.WORKER_LOST, "silent", Progress()) is Status.QUEUED
    later = memory_need(store, job_to_plan(store, "1", ()), None, solve=False)
    assert later.as_json()["methods"]["lora"]["submitted_bytes"] == store.jobs.get(1).vram_lora == 17 * GIB
    assert waits(later) == "It waits for 17.0 GiB with lora."
    other = memory_need(store, job_to_plan(store, "1", ("lora.r=32",)), None, solve=False)
    assert waits(other) == "", "that would be another job"


def ways(need: MemoryNeed) -> list[tuple[tuple[str, ...], str, int]]:
    return [(one.settings, one.method.value, one.cards) for one in need.solutions]


def test_several_cards_are_a_solution_beside_qlora_and_smaller_forms(store: Store, tmp_path: Path) -> None:
    need = asked(store, tmp_path, 16 * GIB, solve=True)
    assert ways(need) == [((), "lora", 2), (("method=qlora",), "qlora", 1)]
    assert need.as_json()["solutions"][0] == {
        "settings": [], "words": "2 cards of a box (16 GiB), sharded", "method": "lora", "cards": 2,
        "parallel": "sharded", "bytes": need.solutions[0].bytes,
    }  # fmt: skip
    text = need_text(need, "x", Screen(width=80, unicode=True, color=False))
    assert "  2 cards of a box (16 GiB), sharded, as it is: 14.3 GiB of each with lora\n  one card: " in text
    assert "\n    --set method=qlora\n" in text
    small = asked(store, tmp_path, 19 * GIB, solve=True)
    rows = "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=8"
    assert (rows, "lora", 1) in ways(small), "fewer rows at once on one card"
    assert any(setting.startswith("dataset.max_length=") for one in small.solutions for setting in one.settings)
    assert ways(asked(store, tmp_path, 24 * GIB, solve=True)) == [], "one card holds it as it is"


def test_no_one_is_told_that_no_card_holds_what_two_of_a_box_do(store: Store, tmp_path: Path) -> None:
    need = asked(store, tmp_path, 16 * GIB, cards=1)
    assert need.choice is None and ways(need) == [(("resources.cards=2",), "lora", 2)]
    told = "It fits on 2 cards of a box (16 GiB), sharded: loractl plan job.yaml --set resources.cards=2"
    assert following("job.yaml", need, solve=False) == told
    need = asked(store, tmp_path, 15 * GIB, cards=2, parallel="data")
    assert ways(need)[0][0] == ("resources.cards=2", "resources.parallel=auto")
    for number in range(2):
        store.cards.see(node_state(f"heron:{number}", total=16 * GIB, gangs=False))
    need = asked(store, tmp_path, None, cards=1)
    assert ways(need) == [] and following("job.yaml", need, solve=False).startswith("No card holds it as it is.")


def test_where_one_card_is_enough_no_one_is_told_that_none_is(store: Store, tmp_path: Path) -> None:
    for box in ("heron", "owl"):
        store.cards.see(node_state(f"{box}:0", total=24 * GIB, gangs=True))
    need = asked(store, tmp_path, None, solve=True, cards=2)
    assert ways(need)[0] == (("resources.cards=auto",), "lora", 1)
    text = need_text(need, "x", Screen(width=80, unicode=True, color=False))
    assert "No box holds it on the cards that it asks for. What would:\n  one card: " in text
    without = following("job.yaml", asked(store, tmp_path, None, cards=2), solve=False)
    assert without.startswith("No box holds it on the cards that it asks for. What would fit: ")
    assert "No card" not in text + without


def test_one_row_at_once_takes_fewer_cards(store: Store, tmp_path: Path) -> None:
    need = asked(store, tmp_path, 14 * GIB, solve=True)
    found = {one.words: one.cards for one in need.solutions if one.method is Method.LORA}
    assert len(found) == 2 and min(found.values()) < max(found.values())
    assert any("1 row at once" in words and cards == min(found.values()) for words, cards in found.items())


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (Status.QUEUED, "Its wait: loractl why 7"),
        (Status.RUNNING, "How far it is: loractl status 7"),
        (Status.SUCCEEDED, "It has ended. One like it: loractl submit --like 7"),
    ],
)
def test_the_next_command_is_that_of_a_job_in_its_state(
    store: Store, tmp_path: Path, status: Status, told: str
) -> None:
    need = replace(asked(store, tmp_path, 16 * GIB, cards=1), status=status)
    assert following("7", need, solve=False) == told
