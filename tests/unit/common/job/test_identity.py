"""The digests by which stored work is known again: a new key changes none, a value that matters changes them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.job.identity import FROM_THE_START, UNDECIDING, data_digest, spec_digest, training_digests
from loractl.common.job.method import Method
from loractl.common.job.sections import LoraSpec, TrainingSpec
from loractl.common.job.spec import JobSpec, spec_keys

MINIMAL: dict[str, Any] = {"name": "tiny", "base_model": "org/model", "dataset": {"path": "org/data"}}

ROWS = [[[1, 2, 3], []], [[4, 5], [0]]]
LABELLED = [[[1, 2, 3], []], [[4, 5], []], ["no", "yes"], [0, 1]]

RICH: dict[str, Any] = {
    **MINIMAL,
    "revision": "v2",
    "method": ["qlora", "lora"],
    "dataset": {
        "path": "/d/rows.jsonl", "format": "alpaca", "columns": {"instruction": "ask"}, "eval_path": "/d/held.jsonl",
        "test_size": None, "max_length": 512, "on_overflow": "drop", "on_bad_row": "drop",
    },
    "lora": {
        "r": 8, "lora_alpha": 16, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens"], "use_rslora": True,
    },
    "training": {
        "max_steps": 20, "num_train_epochs": None, "learning_rate": 1e-4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8, "eval_steps": 0.25, "load_best_model_at_end": True,
        "report_to": ["tensorboard"], "gradient_checkpointing": True, "torch_compile": True,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    },
    "evaluation": {"metrics": ["loss", "rouge"], "samples": 4, "regression": "/d/other.jsonl"},
    "resources": {"max_vram": "20GiB"},
    "priority": 3,
}  # fmt: skip

PLAIN_BASE = "a61be99b886dec9acfcbc5a23ce0755abc4586ff0827e1a9bf564696f2ac20d3"
PLAIN_LORA = "ade5d30e1cc9ed78f106552968754205ff8096764873d1f4400605e9da64b743"
PLAIN_TRAINING = "72aa59a87daef9815ee2cd0add0dccba25d9b5e514f56a4280061a037b2d78a0"
BY_LORA = "513a7768777572ee4836e3c13975a149196ea13e7c727be25e9f0254cf4b635e"
OF_ROWS = "ba047fca367ceac379559fade687fe16271db7b3f8a9d68542ee55fd7a6dadb0"
OF_LABELLED = "e95a0ce8461227a0a82c44b132ea5b186a51442d0df744e63794137033ee34ac"

STORED: dict[str, tuple[dict[str, Any], str, list[Any], list[str]]] = {
    "minimal": (
        MINIMAL,
        "bdd90f4c1885ad4e5c7c43b00d66cad0a50e5c2a95ac2569176107b866ddc1d4",
        ROWS,
        [PLAIN_BASE, PLAIN_LORA, PLAIN_TRAINING, BY_LORA, OF_ROWS],
    ),
    "rich": (
        RICH,
        "1dc36b0f6aab4f605fc525047ba07e1de325d4ff830f9543720d659ee532d11f",
        ROWS,
        [
            "150a288815fdbb58f3e0d6251ce78239c54784d15dfe491b1f17e1e0ac911f3f",
            "81ef7ca6d8f9e13bae7a1a14514f690386f42c10e4a59eae0f50e06a1fdf7935",
            "f3f660d1a5cd7ba278e9704f9c6ef25fdb6695871ba2e8bf0837039022291e5a",
            BY_LORA,
            OF_ROWS,
        ],
    ),
    "classifier": (
        {**MINIMAL, "task_type": "SEQ_CLS"},
        "f607c6c357190bc04f01fa0bce46ed100808c821e66b405742423bac833e54af",
        LABELLED,
        [PLAIN_BASE, PLAIN_LORA, PLAIN_TRAINING, BY_LORA, OF_LABELLED],
    ),
    "harness": (
        {**MINIMAL, "evaluation": {"lm_eval": ["arc_easy"]}},
        "83999c8213704ce3bb008617361c35f3ca98e632e9d371ae43319eb15eaf8103",
        ROWS,
        [PLAIN_BASE, PLAIN_LORA, PLAIN_TRAINING, BY_LORA, OF_ROWS],
    ),
    "harness without a limit": (
        {**MINIMAL, "evaluation": {"lm_eval": ["arc_easy"], "lm_eval_limit": None}},
        "0e9e8400aca7ec4d8619d930911c60b137421b67dbe20601ae75f2878db9932e",
        ROWS,
        [PLAIN_BASE, PLAIN_LORA, PLAIN_TRAINING, BY_LORA, OF_ROWS],
    ),
}
"""What 82e4d97 wrote into ready.json and into the markers of checkpoints, by the code of that version."""

OTHERWISE: dict[str, Any] = {
    "base_model": "org/other", "revision": "v2", "method": "qlora",
    "dataset.path": "org/rows", "dataset.format": "messages", "dataset.columns": {"text": "body"},
    "dataset.eval_path": "org/held-out", "dataset.test_size": 0.2, "dataset.max_length": 512,
    "dataset.on_overflow": "drop", "dataset.on_bad_row": "drop",
    "dataset.split": "train[:5%]", "dataset.more": [{"path": "org/more"}], "dataset.eval_split": "train",
    "dataset.template": "alpaca", "dataset.fields": "all", "dataset.ignore": ["images"],
    "dataset.final_path": "org/final", "dataset.final_size": 0.1,
    "lora.r": 8, "lora.lora_alpha": 16, "lora.lora_dropout": 0, "lora.target_modules": ["q_proj"],
    "lora.modules_to_save": ["embed_tokens"], "lora.use_dora": True, "lora.use_rslora": True,
    "lora.init_lora_weights": "gaussian", "lora.init_from": "12",
    "training.num_train_epochs": 1, "training.max_steps": 20, "training.learning_rate": 1e-4,
    "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 16,
    "training.gradient_checkpointing": True, "training.warmup_steps": 10, "training.lr_scheduler_type": "linear",
    "training.lr_scheduler_kwargs": {"num_cycles": 2}, "training.weight_decay": 0.1, "training.max_grad_norm": 0.5,
    "training.adam_beta1": 0.8, "training.adam_beta2": 0.99, "training.adam_epsilon": 1e-6,
    "training.label_smoothing_factor": 0.1, "training.neftune_noise_alpha": 5, "training.packing": True,
    "training.exact": True,
    "training.engine": "peft",
    "training.train_sampling_strategy": "sequential", "training.optim": "sgd", "training.logging_steps": 1,
    "training.dtype": "float32", "training.attn_implementation": "eager", "training.torch_compile": True,
    "training.save_steps": 10, "training.eval_steps": 5, "training.early_stopping_patience": 2,
    "training.load_best_model_at_end": True, "training.seed": 1,
    "preference.loss_type": "ipo", "preference.loss_weights": [2.0], "preference.beta": 0.5,
    "preference.label_smoothing": 0.1, "preference.simpo_gamma": 1.0,
    "evaluation.metrics": ["loss"], "evaluation.samples": 4, "evaluation.max_new_tokens": 64, "evaluation.max_rows": 10,
    "evaluation.per_device_eval_batch_size": 2, "evaluation.regression": "org/other", "evaluation.lm_eval": ["mmlu"],
}  # fmt: skip
"""Another value for each key that decides the result."""

ELSEWHERE = {"task_type", "evaluation.lm_eval_limit", "evaluation.decide_by"}
"""Keys with tests of their own: none of them stands alone."""

RECOMPUTED = {"training.gradient_checkpointing", "training.torch_compile"}


def job(values: dict[str, Any]) -> JobSpec:
    """The minimal job with some keys set."""
    tree: dict[str, Any] = {**MINIMAL, "dataset": dict(MINIMAL["dataset"])}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return JobSpec.model_validate(tree)


def decides(key: str) -> bool:
    return not {key, key.partition(".")[0]} & UNDECIDING


@pytest.mark.parametrize("written", STORED)
def test_what_82e4d97_stored_is_taken_up(written: str) -> None:
    tree, digest, rows, parts = STORED[written]
    spec = JobSpec.model_validate(tree)
    assert spec_digest(spec) == digest
    names = ("base_model", "lora", "training", "method", "data")
    assert training_digests(spec, Method.LORA, data_digest(rows)) == dict(zip(names, parts, strict=True))


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("written", STORED)
def test_a_key_that_has_no_effect_any_more_is_read_changes_no_digest_and_is_not_stored_again(
    written: str, exclusive: bool
) -> None:
    tree, digest, rows, parts = STORED[written]
    spec = JobSpec.model_validate({**tree, "resources": {**tree.get("resources", {}), "exclusive": exclusive}})
    assert spec.resources.exclusive is exclusive
    assert spec_digest(spec) == digest
    assert list(training_digests(spec, Method.LORA, data_digest(rows)).values()) == parts
    again = JobSpec.model_validate(spec.model_dump(mode="json"))
    assert "exclusive" not in spec.model_dump(mode="json")["resources"] and spec_digest(again) == digest


def test_a_measure_of_the_job_s_own_and_the_one_that_decides_change_the_digest() -> None:
    number, text = ({"name": "sum", "compare": how} for how in ("number", "exact"))
    written = [[number], [text], [number, "loss"], ["loss", number], ["loss"]]
    specs = [job({"evaluation.metrics": metrics}) for metrics in written]
    specs.append(job({"evaluation.metrics": [number], "evaluation.decide_by": "sum"}))
    assert len({spec_digest(spec) for spec in specs}) == len(specs)
    for spec in specs:
        again = JobSpec.model_validate(spec.model_dump(mode="json"))
        assert again == spec and spec_digest(again) == spec_digest(spec)


def test_every_key_of_the_job_file_is_known_to_decide_or_not() -> None:
    assert {key for key in spec_keys() if decides(key)} == OTHERWISE.keys() | ELSEWHERE
    first = {f"{section}.{key}".lstrip(".") for section, keys in FROM_THE_START.items() for key in keys}
    assert first <= set(spec_keys())


@pytest.mark.parametrize("key", OTHERWISE)
def test_another_value_changes_the_digest_and_a_default_written_out_does_not(key: str) -> None:
    plain = job({})
    assert spec_digest(job({key: OTHERWISE[key]})) != spec_digest(plain)
    default = plain
    for part in key.split("."):
        default = getattr(default, part)
    assert spec_digest(job({key: default})) == spec_digest(plain)


@given(st.sets(st.sampled_from(sorted(OTHERWISE))), st.sets(st.sampled_from(sorted(OTHERWISE))))
def test_two_jobs_have_one_digest_when_they_say_the_same(one: set[str], other: set[str]) -> None:
    mine, theirs = (job({key: OTHERWISE[key] for key in keys}) for keys in (one, other))
    assert (spec_digest(mine) == spec_digest(theirs)) is (one == other)
    assert spec_digest(JobSpec.model_validate(mine.model_dump(mode="json"))) == spec_digest(mine), "as it is stored"


@pytest.mark.parametrize("key", OTHERWISE)
def test_a_checkpoint_is_told_apart_by_what_changes_the_training(key: str) -> None:
    plain, other = (
        training_digests(job(values), Method.LORA, data_digest(ROWS)) for values in ({}, {key: OTHERWISE[key]})
    )
    differing = {name for name in plain.keys() | other.keys() if plain.get(name) != other.get(name)}
    section = key.partition(".")[0]
    if section in ("lora", "training") and key not in RECOMPUTED:
        assert differing == {section}
    elif key in ("base_model", "revision"):
        assert differing == {"base_model"}
    elif section == "preference":
        assert differing == {"job"}
    else:
        assert not differing, "the method is the one that was taken, the data are their rows"


def test_the_same_batch_in_other_pieces_goes_on_from_the_same_checkpoint() -> None:
    pieces = job({"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 8})
    plain = training_digests(job({}), Method.LORA, data_digest(ROWS))
    assert training_digests(pieces, Method.LORA, data_digest(ROWS)) == plain
    assert training_digests(job({}), Method.QLORA, data_digest(ROWS)).items() - plain.items() != set()
    assert training_digests(job({}), Method.LORA, data_digest(ROWS[:1])) != plain


def test_of_a_further_data_set_counts_what_is_not_its_default() -> None:
    plain = job({"dataset.more": [{"path": "org/more"}]})
    assert spec_digest(job({"dataset.more": [{"path": "org/more", "split": "train", "share": None}]})) == spec_digest(
        plain
    )
    for other in ({"path": "org/other"}, {"path": "org/more", "share": 0.1}, {"path": "org/more", "split": "test"}):
        assert spec_digest(job({"dataset.more": [other]})) != spec_digest(plain)


def test_a_limit_counts_where_there_is_something_to_limit() -> None:
    assert spec_digest(job({"evaluation.lm_eval_limit": 7})) == spec_digest(job({}))
    asked = {"evaluation.lm_eval": ["mmlu"]}
    assert spec_digest(job({**asked, "evaluation.lm_eval_limit": 7})) != spec_digest(job(asked))


class _WiderLora(LoraSpec):
    use_new: bool = False


class _WiderTraining(TrainingSpec):
    new_factor: float = 1


class _Added(TrainingSpec):
    """A section that the job file has not: here it borrows a key to hold."""

    new_margin: float = 0


class _Wider(JobSpec):
    """The job file of a later version: new keys in two sections, one at the top, and a new section."""

    lora: _WiderLora = _WiderLora()
    training: _WiderTraining = _WiderTraining()
    objective: str = "sft"
    added: _Added = _Added()


@pytest.mark.parametrize("written", STORED)
def test_a_new_key_refuses_nothing_that_is_stored(written: str) -> None:
    tree, digest, rows, parts = STORED[written]
    later = _Wider.model_validate(tree)
    assert spec_digest(later) == digest
    assert list(training_digests(later, Method.LORA, data_digest(rows)).values()) == parts
    out = _Wider.model_validate(later.model_dump(mode="json"))  # as it is stored, with every default written out
    assert spec_digest(out) == digest


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"lora": {"use_new": True}}, "lora"),
        ({"training": {"new_factor": 0.5}}, "training"),
        ({"objective": "dpo"}, "job"),
        ({"added": {"new_margin": 0.1}}, "job"),
    ],
)
def test_a_new_key_that_says_something_is_told_apart(said: dict[str, Any], part: str) -> None:
    plain, other = _Wider.model_validate(MINIMAL), _Wider.model_validate({**MINIMAL, **said})
    assert spec_digest(other) != spec_digest(plain)
    before, now = (training_digests(spec, Method.LORA, data_digest(ROWS)) for spec in (plain, other))
    assert {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} == {part}
