"""What plan says of several cards: where one is too small, and where a job asks for more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.answers.need import JobToPlan, MemoryNeed, memory_need

from ...common.memory.test_ways import LLAMA_8B
from ...factories import node_state


def asked(store: Store, tmp_path: Path, card: int | None, **resources: Any) -> MemoryNeed:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    tree = {"name": "t", "base_model": str(tmp_path), "dataset": {"path": "org/data"}, "method": "lora"}
    spec = JobSpec.model_validate({**tree, "resources": resources})
    return memory_need(store, JobToPlan(title="t", spec=spec, data={}), card, solve=False)


def rows(need: MemoryNeed) -> list[tuple[str, str, str]]:
    return [(room.word, room.card, room.how) for room in need.cards]


def test_a_card_that_is_too_small_is_named_with_how_many_such_cards_hold_the_job(store: Store, tmp_path: Path) -> None:
    need = asked(store, tmp_path, 16 * GIB)
    assert need.choice is Method.LORA
    assert rows(need)[1:] == [("fits", "2 cards of a box", "with lora, sharded: 14.3 GiB of each")]
    assert rows(need)[0][0] == "never"
    assert [word for word, *_ in rows(asked(store, tmp_path, 24 * GIB))] == ["fits"], "one card is enough"


def test_a_number_of_cards_is_planned_as_it_is_asked_for(store: Store, tmp_path: Path) -> None:
    assert rows(asked(store, tmp_path, 24 * GIB, cards=2)) == [
        ("fits", "2 cards of a box", "with lora, data: 19.9 GiB of each")
    ]
    need = asked(store, tmp_path, 8 * GIB, cards=2)
    assert (rows(need), need.choice) == ([("never", "2 cards", "of no box")], None)


def test_only_boxes_whose_workers_run_such_jobs_are_named(store: Store, tmp_path: Path) -> None:
    for number in range(2):
        store.see_node(node_state(f"heron:{number}", total=16 * GIB, gangs=False))
    assert [word for word, *_ in rows(asked(store, tmp_path, None))] == ["never", "never"]
    for number in range(2):
        store.see_node(node_state(f"heron:{number}", total=16 * GIB, gangs=True))
    assert rows(asked(store, tmp_path, None))[2:] == [
        ("fits", "2 cards of heron", "with lora, sharded: 14.3 GiB of each")
    ]
