"""The memory plan on each of several cards, by hand for a published model."""

from __future__ import annotations

import pytest

from loractl.common.job.method import Method, Parallel
from loractl.common.job.sections import TrainingSpec
from loractl.common.memory.context import CONTEXT_BYTES
from loractl.common.memory.plan import LINK_BYTES, plan
from loractl.common.memory.step import Stack
from loractl.common.memory.weights import nf4_bytes

from .test_plan import LINEAR, METHODS, job, shape

WHOLE = 134_515_008
ENDS = 49152 * 576 + 576
BLOCK = (WHOLE - ENDS) // 30


def sharded(cards: int) -> Stack:
    return Stack(cards=cards, parallel=Parallel.SHARDED)


def test_a_sharded_base_is_divided_and_gathered_a_few_blocks_at_a_time() -> None:
    parts = plan(shape(), job(), Method.LORA, stack=sharded(4)).parts
    assert parts["weights"] == 2 * ENDS + 30 * BLOCK * 2 // 4
    assert parts["gathered"] == 2 * 3 * BLOCK
    assert parts["buckets"] == parts["gradients"] == parts["adapter"]
    assert parts["context"] == CONTEXT_BYTES + LINK_BYTES


def test_the_scales_of_nf4_stay_whole_on_every_card() -> None:
    parts = [plan(shape(), job(), Method.QLORA, stack=stack).parts for stack in (Stack(), sharded(2))]
    scales = parts[0]["weights"] - LINEAR // 2 - 2 * (WHOLE - LINEAR)
    assert parts[1]["weights"] == scales + 2 * ENDS + (LINEAR // 2 + 2 * (30 * 2 * 576)) // 2
    assert nf4_bytes(576 * 576) - 576 * 576 // 2 > 0
    block = LINEAR // 30 // 2 + 2 * 2 * 576
    assert parts[1]["gathered"] == 3 * block


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel_cards_hold_the_whole_base_and_sum_gradients_in_a_copy(method: Method) -> None:
    spec = job(training={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4})
    one = plan(shape(), spec, method)
    each = plan(shape(), spec, method, stack=Stack(cards=2, parallel=Parallel.DATA))
    assert each.tensor_bytes - one.tensor_bytes == each.parts["buckets"] == one.parts["gradients"]


def test_a_card_takes_fewer_rows_at_once_where_its_part_of_a_step_is_smaller() -> None:
    spec = job(training={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})
    parts = plan(shape(), spec, Method.LORA, stack=Stack(cards=4, parallel=Parallel.DATA))
    two = job(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1})
    assert parts.parts["activations"] == plan(shape(), two, Method.LORA).parts["activations"]


@pytest.mark.parametrize(
    ("micro", "accumulation", "cards", "each"),
    [(4, 4, 1, (4, 4)), (4, 4, 2, (4, 2)), (4, 4, 8, (2, 1)), (1, 16, 4, (1, 4)), (6, 2, 4, (3, 1)), (4, 3, 2, (3, 2))],
)
def test_the_cards_learn_from_the_same_rows_a_step_as_one(
    micro: int, accumulation: int, cards: int, each: tuple[int, int]
) -> None:
    training = TrainingSpec(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    assert training.rows_a_card(cards) == each
    assert each[0] * each[1] * cards == micro * accumulation
    assert cards in training.even_cards


def test_what_cards_can_t_share_evenly_is_told_with_what_they_can() -> None:
    training = TrainingSpec(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert training.even_cards == [1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="5 cards can't share 12 rows evenly"):
        training.rows_a_card(5)
