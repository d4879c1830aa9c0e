"""On how many cards a job may run, and what each of them needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Method, Need, Parallel, Ways
from loractl.common.job.spec import JobSpec
from loractl.common.memory.config import read_shape
from loractl.common.memory.fit import plan_ways
from loractl.common.memory.plan import plan, predict
from loractl.common.memory.step import Stack
from loractl.common.units import GIB

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
METHODS = (Method.LORA, Method.QLORA)


def job(tmp_path: Path, more: dict[str, Any] | None = None, **resources: Any) -> JobSpec:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    tree = {"name": "t", "base_model": str(tmp_path), "dataset": {"path": "org/data"}, "resources": resources}
    return JobSpec.model_validate(tree | (more or {}))


def ways(spec: JobSpec, need: Need | None = None) -> Ways:
    planned = predict(spec)
    return plan_ways(spec, METHODS, planned, need or planned)


def test_auto_names_the_numbers_of_cards_that_share_a_step_evenly_the_fewest_first(tmp_path: Path) -> None:
    spec = job(tmp_path)
    found = ways(spec)
    assert found.alone
    assert [(way.cards, way.parallel) for way in found.gangs] == [(n, Parallel.SHARDED) for n in (2, 4, 8)]
    shape = read_shape(spec.base_model, None)
    assert shape is not None
    each = plan(shape, spec, Method.LORA, stack=Stack(cards=4, parallel=Parallel.SHARDED)).need_bytes
    assert found.gangs[1].need.lora == each
    assert found.bound(METHODS, predict(spec)) == found.gangs[2].need.qlora, "a card with room for the least share"


def test_a_number_of_cards_is_meant_and_divides_the_base_only_where_it_must(tmp_path: Path) -> None:
    found = ways(job(tmp_path, cards=2))
    assert not found.alone
    assert [(way.cards, way.parallel) for way in found.gangs] == [(2, Parallel.DATA), (2, Parallel.SHARDED)]
    only = ways(job(tmp_path, cards=2, parallel="sharded"))
    assert [way.parallel for way in only.gangs] == [Parallel.SHARDED]


def test_a_small_job_or_one_that_asks_for_one_card_is_not_divided(tmp_path: Path) -> None:
    assert ways(job(tmp_path, cards=1)) == ways(job(tmp_path), Need(lora=8 * GIB, qlora=5 * GIB)) == Ways()


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", ["sigmoid", "sft"]])
def test_cards_share_pairs(tmp_path: Path, loss: Any) -> None:
    assert ways(job(tmp_path, {"task_type": "preference", "preference": {"loss_type": loss}})).gangs


def test_what_was_measured_on_one_card_corrects_the_shares_in_proportion(tmp_path: Path) -> None:
    spec, planned = job(tmp_path), predict(job(tmp_path))
    assert planned.lora is not None and planned.qlora is not None
    learned = ways(spec, Need(lora=int(planned.lora * 1.2), qlora=planned.qlora))
    before = ways(spec).gangs[0].need.lora
    assert learned.gangs[0].need.lora == pytest.approx(1.2 * (before or 0), rel=1e-6)


def test_the_job_s_own_limit_is_of_each_card(tmp_path: Path) -> None:
    assert [way.cards for way in ways(job(tmp_path, max_vram=9 * GIB)).gangs] == [2, 4, 8]
    assert [way.cards for way in ways(job(tmp_path, max_vram=int(8 * GIB))).gangs] == [4, 8]


def test_ways_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = ways(job(tmp_path))
    assert Ways.read(json.loads(json.dumps(found.as_json()))) == found
    assert Ways().as_json() is None
    for column in ({}, {"alone": True, "ways": [{"cards": "2"}]}, [], {"alone": True, "ways": 3}):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
            Ways.read(column)  # type: ignore[arg-type]
