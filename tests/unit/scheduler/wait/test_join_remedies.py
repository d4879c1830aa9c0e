"""What would start a job now where that is a place beside others on their base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.spec import JobSpec
from loractl.common.placement.hosts import base_key
from loractl.common.placement.pack_rule import MeasuredPass
from loractl.common.store.fleet import waiting_of
from loractl.common.store.records import NewHost
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.scheduler.wait.remedies import remedies

from ....databases import SQLITE_ALONE
from ...factories import node_state, submission
from ..test_packs import NODE, claim, queue

pytestmark = SQLITE_ALONE


@pytest.fixture
def packed(store: Store) -> Store:
    """A small card whose one trainer has a base of 5 GiB and takes more jobs."""
    store.cards.see(node_state(NODE, total=24 * GIB, max_jobs=1))
    queue(store)
    mine = claim(store)
    key = base_key(mine.spec, mine.method)
    assert key is not None and store.hosts.open(mine, NewHost(host="h", node=NODE, key=key, bytes=5 * GIB))
    return store


@pytest.fixture
def packed_nf4(store: Store) -> Store:
    """The same with a base in NF4."""
    store.cards.see(node_state(NODE, total=16 * GIB, max_jobs=1))
    store.jobs.submit(submission(qlora=8, method="qlora", dataset={"path": "org/data", "max_length": 8}))
    mine = claim(store)
    key = base_key(mine.spec, mine.method)
    assert key is not None and store.hosts.open(mine, NewHost(host="h", node=NODE, key=key, bytes=5 * GIB))
    return store


def test_what_would_start_a_job_now_may_be_a_join(packed_nf4: Store) -> None:
    mine = packed_nf4.jobs.submit(
        submission(lora=20, qlora=8, method="lora", dataset={"path": "org/data", "max_length": 8}, user="bob")
    )
    view = packed_nf4.cards.fleet()
    (told, *_) = remedies(packed_nf4.jobs.get(mine), view, packed_nf4.cards.would_start)
    assert told.startswith(f"It would start now on {NODE} with method: qlora")


def test_a_smaller_form_is_asked_with_its_own_tokens_whether_it_joins(packed: Store) -> None:
    mine = queue(packed, length=1024, user="bob")
    row = packed.jobs.get(mine)
    me, spec = waiting_of(vars(row), packed.cards.fleet().now), JobSpec.model_validate(row.spec)
    assert packed.cards.would_start(me, spec) is None, "long rows gain nothing"
    shorter = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"max_length": 8})})
    assert packed.cards.would_start(me, shorter) == NODE
    assert packed.cards.would_start(replace(me, need=replace(me.need, lora=40 * GIB)), shorter) is None, (
        "its part has no room"
    )


@pytest.fixture
def long_rows(store: Store, tmp_path: Path) -> dict[str, Any]:
    """What asks for long rows of a base that one trainer has loaded, on a card of 16 GiB."""
    numbers = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "head_dim": 128, "tie_word_embeddings": False, "max_position_embeddings": 65536,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    long = {"base_model": str(tmp_path), "dataset": {"path": "org/data", "max_length": 32768}, "method": "qlora"}
    store.cards.see(node_state(NODE, total=16 * GIB, max_jobs=1))
    store.jobs.submit(submission(qlora=8, **long))
    mine = claim(store)
    key = base_key(mine.spec, mine.method)
    assert key is not None and store.hosts.open(mine, NewHost(host="h", node=NODE, key=key, bytes=5 * GIB))
    return {**long, "training": {"per_device_train_batch_size": 1}, "qlora": 40, "user": "bob"}


def test_a_form_that_has_room_beside_others_is_among_those_that_are_tried(
    store: Store, long_rows: dict[str, Any]
) -> None:
    flat = [MeasuredPass(tokens=tokens, members=1, seconds=1.0) for tokens in (8, 65536) * 10]
    store.hosts.note_passes("h", flat)  # tokens cost next to nothing: any pack pays
    waiting = store.jobs.get(store.jobs.submit(submission(**long_rows)))
    (told, command) = remedies(waiting, store.cards.fleet(), store.cards.would_start)
    assert told.startswith(f"It would start now on {NODE} with max_length ")
    assert command.startswith(f"Try: loractl plan {waiting.job_id} --set dataset.max_length=")


def test_where_others_have_more_room_and_refuse_the_job_a_card_of_its_own_is_tried(
    store: Store, long_rows: dict[str, Any]
) -> None:
    store.cards.see(node_state("owl:0", total=10 * GIB))
    waiting = store.jobs.get(store.jobs.submit(submission(**long_rows)))
    (told, command) = remedies(waiting, store.cards.fleet(), store.cards.would_start)
    assert told.startswith("It would start now on owl:0 with max_length ")
    assert command.startswith(f"Try: loractl plan {waiting.job_id} --set dataset.max_length=")
