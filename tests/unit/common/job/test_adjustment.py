"""Steps down after out-of-memory: the effective batch stays, and the steps end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.adjustment import (
    Adjustment,
    adjusted,
    in_its_room,
    in_words,
    is_roomy,
    next_adjustment,
    without_room,
)  # fmt: skip
from loractl.common.job.method import Checkpointing, RoomyForm
from loractl.common.job.spec import JobSpec


def form(rows: int, *, half: bool = False) -> RoomyForm:
    return RoomyForm(micro_batch=rows, bytes=1, planned=1, half=half)


def job(batch: int = 8, accumulation: int = 4, checkpointing: Checkpointing | None = None) -> JobSpec:
    training = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": checkpointing,
    }
    dataset = {"path": "x.jsonl"}
    return JobSpec.model_validate({"name": "j", "base_model": "m", "dataset": dataset, "training": training})


def ladder(spec: JobSpec, *, on_gpu: bool, cards: int = 1) -> list[Adjustment]:
    """Every step down, from the spec's own settings."""
    steps, current = [], Adjustment()
    while (lower := next_adjustment(spec, current, on_gpu=on_gpu, cards=cards)) is not None:
        assert len(steps) < 20, "the ladder does not end"
        steps.append(lower)
        current = lower
    return steps


def test_the_batch_is_halved_down_to_one_row_and_then_checkpointed() -> None:
    steps = ladder(job(8, 4), on_gpu=False)
    assert [(s.micro_batch, s.accumulation) for s in steps] == [(4, 8), (2, 16), (1, 32), (1, 32)]
    assert [s.gradient_checkpointing for s in steps] == [None, None, None, True]


def test_on_several_cards_each_step_takes_rows_from_every_card() -> None:
    spec = job(16, 1)
    steps = ladder(spec, on_gpu=True, cards=2)
    a_card = [adjusted(spec, step).training.rows_a_card(2) for step in (Adjustment(), *steps)]
    assert a_card == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert in_words(spec, Adjustment(), steps[0], cards=2) == (
        "out of memory with 8 rows at once on each of 2 cards: continues with 4, accumulating 2 (same effective batch)"
    )


def test_on_a_gpu_checkpointing_is_a_step_only_where_the_job_refused_it() -> None:
    assert ladder(job(1, 4), on_gpu=True) == []
    assert ladder(job(1, 4, checkpointing=False), on_gpu=True) == [Adjustment(gradient_checkpointing=True)]
    assert ladder(job(1, 4, checkpointing=True), on_gpu=False) == []


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([None, True, False]), st.booleans())
def test_no_step_changes_the_effective_batch_and_each_is_smaller(
    batch: int, accumulation: int, checkpointing: bool | None, on_gpu: bool
) -> None:
    spec, before = job(batch, accumulation, checkpointing), batch
    for step in ladder(spec, on_gpu=on_gpu):
        training = adjusted(spec, step).training
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps == batch * accumulation
        assert 2 * training.per_device_train_batch_size <= before or step.gradient_checkpointing
        before = training.per_device_train_batch_size
    assert before == 1


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 500))
def test_every_step_has_as_many_optimizer_steps_an_epoch(batch: int, accumulation: int, rows: int) -> None:
    """transformers counts ceil(micro-batches / accumulation): a checkpoint's step must mean the same rows on each."""
    spec = job(batch, accumulation)
    for step in ladder(spec, on_gpu=False):
        training = adjusted(spec, step).training
        batches = -(-rows // training.per_device_train_batch_size)
        assert -(-batches // training.gradient_accumulation_steps) == -(-rows // (batch * accumulation))


def test_an_empty_adjustment_changes_nothing_and_a_step_nothing_else() -> None:
    spec = job()
    assert adjusted(spec, Adjustment()) == spec
    changed = adjusted(spec, Adjustment(micro_batch=2, accumulation=16, eval_batch=1))
    assert changed.evaluation.per_device_eval_batch_size == 1
    assert changed.training.learning_rate == spec.training.learning_rate
    assert changed.dataset == spec.dataset and changed.lora == spec.lora


def test_a_step_is_kept_as_what_it_changes_and_read_back() -> None:
    step = Adjustment(micro_batch=2, accumulation=16)
    assert step.as_json() == {"micro_batch": 2, "accumulation": 16}
    assert Adjustment(**step.as_json()) == step
    assert Adjustment().as_json() == {}


def test_the_history_says_what_did_not_fit_and_how_the_run_goes_on() -> None:
    spec, none = job(8, 4), Adjustment()
    half, one = Adjustment(micro_batch=4, accumulation=8), Adjustment(micro_batch=1, accumulation=32)
    assert in_words(spec, none, half) == (
        "out of memory with 8 rows at once: continues with 4, accumulating 8 (same effective batch)"
    )
    assert in_words(spec, none, half, where="at step 13", then="restarts") == (
        "out of memory at step 13 with 8 rows at once: restarts with 4, accumulating 8 (same effective batch)"
    )
    checkpointed = Adjustment(micro_batch=1, accumulation=32, gradient_checkpointing=True)
    assert (
        in_words(spec, one, checkpointed) == "out of memory with 1 row at once: continues with gradient checkpointing"
    )
    assert in_words(spec, none, Adjustment(eval_batch=4)) == "out of memory evaluating 8 rows at once: evaluates 4"


def test_a_run_in_its_room_recomputes_first_in_its_own_micro_batches_and_is_halved_then() -> None:
    spec = job(4, 2)
    roomy = in_its_room(spec, Adjustment(eval_batch=2), form(1))
    assert roomy == Adjustment(micro_batch=1, accumulation=8, gradient_checkpointing=False, eval_batch=2)
    lower = next_adjustment(spec, roomy, on_gpu=True)
    assert lower == Adjustment(gradient_checkpointing=True, eval_batch=2)
    assert adjusted(spec, lower).training.rows_a_card(1) == (4, 2)
    halved = next_adjustment(spec, lower, on_gpu=True)
    assert halved == Adjustment(micro_batch=2, accumulation=4, gradient_checkpointing=True, eval_batch=2)
    assert in_words(spec, roomy, lower) == (
        "out of memory with 1 row at once: continues with gradient checkpointing and 4, accumulating 2 "
        "(same effective batch)"
    )
    whole = in_its_room(spec, Adjustment(), form(4))
    assert whole == Adjustment(gradient_checkpointing=False)
    back = next_adjustment(spec, whole, on_gpu=True)
    assert back is not None
    assert in_words(spec, whole, back) == "out of memory with 4 rows at once: continues with gradient checkpointing"


def test_a_run_that_recomputes_every_second_block_recomputes_all_when_it_does_not_fit() -> None:
    spec, asked = job(4, 2), job(1, 2, checkpointing="half")
    given = in_its_room(spec, Adjustment(), form(1, half=True))
    assert given == Adjustment(micro_batch=1, accumulation=8, gradient_checkpointing="half") and is_roomy(spec, given)
    assert without_room(spec, given) == Adjustment()
    lower = next_adjustment(spec, given, on_gpu=True)
    assert lower == Adjustment(gradient_checkpointing=True)
    assert in_words(spec, given, lower) == (
        "out of memory with 1 row at once: continues with gradient checkpointing of every block and 4, accumulating 2 "
        "(same effective batch)"
    )
    assert not is_roomy(asked, Adjustment()) and next_adjustment(asked, Adjustment(), on_gpu=False) == lower
    assert next_adjustment(asked, lower, on_gpu=False) is None


def test_the_room_is_one_attempt_s_and_what_a_person_refused_is_no_room() -> None:
    spec, refused = job(4, 2), job(4, 2, checkpointing=False)
    assert without_room(
        spec, Adjustment(micro_batch=1, accumulation=8, gradient_checkpointing=False, eval_batch=2)
    ) == (Adjustment(eval_batch=2))
    halved = Adjustment(micro_batch=2, accumulation=4, gradient_checkpointing=True)
    assert without_room(spec, halved) == halved, "out of memory changed it: that holds for later attempts"
    kept = Adjustment(micro_batch=2, accumulation=4, gradient_checkpointing=False)
    assert without_room(refused, kept) == kept and not is_roomy(refused, kept)
