"""The job file: every problem at once with its place and a hint, overrides, paths, and the round trip."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from loractl.common.errors import SpecError, SpecProblem
from loractl.common.job.document import MAX_FILE_BYTES
from loractl.common.job.file import amended_spec, load_spec
from loractl.common.job.identity import spec_digest
from loractl.common.job.method import Method
from loractl.common.job.sections import DataFormat, Metric, RowFields, TaskType
from loractl.common.job.spec import JobSpec, spec_keys

MINIMAL_TREE = {"name": "tiny", "base_model": "org/model", "dataset": {"path": "org/data"}}
MINIMAL = "name: tiny\nbase_model: org/model\ndataset: {path: org/data}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[SpecProblem]:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    return caught.value.problems


def only(path: Path, *overrides: str) -> SpecProblem:
    (problem,) = problems(path, *overrides)
    return problem


def test_a_minimal_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, MINIMAL))
    assert spec.method is Method.AUTO
    assert (spec.lora.r, spec.lora.lora_alpha, spec.lora.target_modules) == (16, 32, "all-linear")
    assert (spec.training.num_train_epochs, spec.training.max_steps) == (3, None)
    assert spec.evaluation.metrics == [metric for metric in Metric if metric is not Metric.PREFERENCES]
    assert (spec.max_retries, spec.priority, spec.labels) == (2, 0, {})


def test_every_problem_is_reported_at_once_with_its_line_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        MINIMAL + "lora:\n  rank: 8\n  lora_alpha: high\ntraining: {seed: -1}\nmethod: qlorra\nlr: 1.0e-4\n",
    )
    assert [str(p) for p in problems(path)] == [
        f"{path}:5: lora.rank: unknown key",
        f'{path}:6: lora.lora_alpha: "high" is not a number',
        f"{path}:7: training.seed: -1 must be at least 0",
        f'{path}:8: method: "qlorra" is not one of auto, lora, qlora',
        f"{path}:9: lr: unknown key",
    ]


@pytest.mark.parametrize(
    ("line", "key", "meant"),
    [
        ("lora: {rank: 8}", "lora.rank", "lora.r"),
        ("lora_r: 8", "lora_r", "lora.r"),
        ("lora_alpha: 8", "lora_alpha", "lora.lora_alpha"),
        ("lr: 1", "lr", "training.learning_rate"),
        ("learning_rate: 1", "learning_rate", "training.learning_rate"),
        ("epochs: 3", "epochs", "training.num_train_epochs"),
        ("training: {epochs: 3}", "training.epochs", "training.num_train_epochs"),
        ("training: {warmup_ratio: 0.1}", "training.warmup_ratio", "training.warmup_steps"),
        ("training: {max_step: 3}", "training.max_step", "training.max_steps"),
        ("sequence_len: 512", "sequence_len", "dataset.max_length"),
        ("model_name_or_path: x", "model_name_or_path", "base_model"),
        ("piority: 3", "piority", "priority"),
        ("gradient_checkpoint: true", "gradient_checkpoint", "training.gradient_checkpointing"),
        ("mixed_precision: bf16", "mixed_precision", "training.dtype"),
    ],
)
def test_an_unknown_key_is_named_with_the_key_that_was_meant(tmp_path: Path, line: str, key: str, meant: str) -> None:
    problem = only(write(tmp_path, MINIMAL + line))
    assert (problem.line, problem.key, problem.what) == (4, key, "unknown key")
    assert problem.hint == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("deepspeed: zero3.json", "write resources.cards and resources.parallel: sharded"),
        ("training: {deepspeed: zero3.json}", "write resources.cards and resources.parallel: sharded"),
        ("output_dir: out", "leave it out: the result is stored"),
        ("adapter: lora", "known keys here: name, base_model"),
        ("load_best: true", "known keys here: name, base_model"),
    ],
)
def test_a_key_that_is_no_slip_of_ours_is_not_taken_for_one(tmp_path: Path, line: str, hint: str) -> None:
    assert (only(write(tmp_path, MINIMAL + line)).hint or "").startswith(hint)


def test_columns_the_wrong_way_round_are_refused_with_the_right_one(tmp_path: Path) -> None:
    problem = only(write(tmp_path, MINIMAL), "dataset.columns={question: prompt}")
    assert (problem.file, problem.key) == ("--set", "dataset.columns.question")
    assert problem.hint == "loractl's name comes first, then the data's, like {prompt: question}"


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("training.optim", "adamw", "adamw_torch"),
        ("training.optim", "AdamW", "adamw_torch"),
        ("training.optim", "adam", "adamw_torch"),
        ("training.optim", "adamw_hf", "adamw_torch"),
        ("training.optim", "adamw_bnb_8bit", "adamw_8bit"),
        ("training.optim", "paged_adamw", "paged_adamw_32bit"),
        ("training.optim", "lion", "lion_32bit"),
        ("training.optim", "paged_lion", "paged_lion_32bit"),
        ("training.dtype", "bf16", "bfloat16"),
        ("training.dtype", "fp16", "float16"),
        ("training.dtype", "fp32", "float32"),
        ("training.attn_implementation", "flash_attention", "flash_attention_2"),
        ("training.attn_implementation", "flash", "flash_attention_2"),
        ("training.lr_scheduler_type", "cosine_with_warmup", "cosine"),
        ("training.lr_scheduler_type", "constant_warmup", "constant_with_warmup"),
        ("training.train_sampling_strategy", "shuffle", "random"),
        ("dataset.format", "openai", "messages"),
        ("dataset.format", "chat", "messages"),
        ("dataset.on_overflow", "skip", "drop"),
        ("evaluation.metrics", "[accuracy]", "token_accuracy"),
        ("evaluation.metrics", "[rougeL]", "rouge"),
        ("evaluation.metrics", "[F1]", "labels"),
        ("task_type", "classification", "SEQ_CLS"),
        ("task_type", "seq_cls", "SEQ_CLS"),
        ("task_type", "dpo", "preference"),
        ("task_type", "DPO", "preference"),
        ("task_type", "preferences", "preference"),
        ("preference.loss_type", "sigmod", "sigmoid"),
    ],
)
def test_an_unknown_value_is_told_with_the_value_that_was_meant(
    tmp_path: Path, key: str, written: str, meant: str
) -> None:
    with pytest.raises(SpecError) as wrong:
        load_spec(write(tmp_path, MINIMAL), [f"{key}={written}"])
    assert [problem.hint for problem in wrong.value.problems] == [f"did you mean {meant}?"]


@pytest.mark.parametrize(
    "key",
    [
        "training.report_to",
        "evaluation.metrics",
        "evaluation.lm_eval",
        "lora.modules_to_save",
        "lora.target_modules",
        "notify",
    ],
)
@pytest.mark.parametrize("written", ["wandb", "wandb, mlflow"])
def test_a_word_where_a_list_is_wanted_is_told_how_to_write_it(tmp_path: Path, key: str, written: str) -> None:
    with pytest.raises(SpecError) as wrong:
        load_spec(write(tmp_path, MINIMAL), [f"{key}='{written}'"])
    assert [(p.what, p.hint) for p in wrong.value.problems] == [(f'"{written}" is not a list', f"write [{written}]")]


def test_what_can_be_no_list_of_words_gets_no_such_hint(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as wrong:
        load_spec(write(tmp_path, MINIMAL), ["training.report_to=3"])
    assert [problem.hint for problem in wrong.value.problems] == [None]


def test_an_unknown_key_without_a_relative_lists_the_keys_of_its_section(tmp_path: Path) -> None:
    hint = only(write(tmp_path, MINIMAL + "lora: {zzzz: 1}")).hint
    assert hint is not None and hint.startswith("known keys here: r, lora_alpha, lora_dropout, target_modules, ")


def test_a_template_is_for_rows_with_turns(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/data}", "org/data, format: text, template: alpaca}")
    problem = only(write(tmp_path, text))
    assert (problem.line, problem.key) == (3, "dataset.template")
    assert problem.what.startswith("rows of the format text are taken as they are")


@pytest.mark.parametrize(
    ("line", "key", "what"),
    [
        ("lora: {r: 8.5}", "lora.r", "8.5 is not a whole number"),
        ("lora: {r: true}", "lora.r", "true is not a whole number"),
        ("evaluation: {samples: false}", "evaluation.samples", "false is not a whole number"),
        ("training: {neftune_noise_alpha: true}", "training.neftune_noise_alpha", "true is not a number"),
        ("training: {eval_steps: true}", "training.eval_steps", "true is not a number"),
        (
            "preference: {loss_type: [sigmoid], loss_weights: [true]}",
            "preference.loss_weights.0",
            "true is not a number",
        ),
        (
            "training: {lr_scheduler_kwargs: {power: true}}",
            "training.lr_scheduler_kwargs.power",
            "true is not a number",
        ),
        ("training: {lr_scheduler_kwargs: {power: [2]}}", "training.lr_scheduler_kwargs.power", "[2] is not a number"),
        (
            "training: {lr_scheduler_kwargs: {power: nan}}",
            "training.lr_scheduler_kwargs.power",
            '"nan": input should be a finite number',
        ),
        ("lora: {r: 0}", "lora.r", "0 must be at least 1"),
        ("lora: {r: 2000}", "lora.r", "2000 must be at most 1024"),
        ("lora: {lora_dropout: 1}", "lora.lora_dropout", "1 must be below 1.0"),
        ("lora: {lora_alpha: 0}", "lora.lora_alpha", "0 must be above 0.0"),
        ("lora: {lora_alpha: .inf}", "lora.lora_alpha", "Infinity: input should be a finite number"),
        ("lora: {target_modules: []}", "lora.target_modules", "[] is empty; write all-linear or name at least one"),
        ("lora: {target_modules: [1]}", "lora.target_modules.0", "1 is not text; write it in quotes"),
        ("lora: {target_modules: 3}", "lora.target_modules", "3 is not a list; write it like [q_proj, v_proj]"),
        ("lora: {target_modules: 'q_proj, v_proj'}", "lora.target_modules", '"q_proj, v_proj" is not a list'),
        ("lora: {target_modules: '.*[qv_proj'}", "lora.target_modules", '".*[qv_proj" is an expression with an unbal'),
        ("lora: 5", "lora", "5 is not a mapping of keys"),
        ("labels: [a]", "labels", '["a"] is not a mapping'),
        ("labels: {year: 2024}", "labels.year", "2024 is not text; write it in quotes"),
        ("evaluation: {metrics: [bleu]}", "evaluation.metrics.0", '"bleu" is not one of loss, perplexity'),
        ("resources: {max_vram: huge}", "resources.max_vram", '"huge" is not a size; write it like 12GiB or 800MiB'),
        ("resources: {cards: 9}", "resources.cards", "9 is not a number of cards: auto, or 1 to 8 of one box"),
        ("resources: {cards: 3}", "resources.cards", "3 can't share the 16 rows of a step (per_device_train_batch_si"),
        ("resources: {cards: 1, parallel: data}", "resources.parallel", "says how several cards divide a job, and"),
        (
            "resources: {parallel: data}",
            "resources.parallel",
            "data has the whole base on each card, so auto takes one",
        ),
        ("resources: {time_limit: soon}", "resources.time_limit", '"soon" is not a duration; write it like 90s'),
        (
            "training: {gradient_checkpointing: maybe}",
            "training.gradient_checkpointing",
            '"maybe" is not true, false or half',
        ),
        ("training: {gradient_checkpointing: 2}", "training.gradient_checkpointing", "2 is not true, false or half"),
        ("max_retries: -1", "max_retries", "-1 must be at least 0"),
    ],
)
def test_a_wrong_type_or_range_says_what_would_be_right(tmp_path: Path, line: str, key: str, what: str) -> None:
    problem = only(write(tmp_path, MINIMAL + line))
    assert (problem.line, problem.key) == (4, key)
    assert problem.what.startswith(what)


def test_a_dataset_that_is_a_bare_path_gets_its_form(tmp_path: Path) -> None:
    problem = only(write(tmp_path, "name: plain\nbase_model: org/model\ndataset: data/x.json\n"))
    assert (problem.key, problem.hint) == ("dataset", "write {path: data/x.json}")


def test_a_template_is_for_rows_that_are_conversations(tmp_path: Path) -> None:
    dataset = "dataset: {path: a/b, format: text, template: alpaca}\n"
    problem = only(write(tmp_path, f"name: plain\nbase_model: org/model\n{dataset}"))
    assert (problem.line, problem.key) == (3, "dataset.template")
    assert problem.what.startswith("rows of the format text are taken as they are")


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 64, "ü"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    problem = only(write(tmp_path, MINIMAL.replace("tiny", f'"{name}"')))
    assert (problem.line, problem.key) == (1, "name")
    assert "is not a name: letters, digits, '.', '_' and '-' only, at most 63" in problem.what


def test_a_warm_up_of_the_only_step_is_refused(tmp_path: Path) -> None:
    one = f"{MINIMAL}\ntraining:\n  max_steps: 1\n  warmup_steps: 1\n"
    problem = only(write(tmp_path, one))
    assert problem.key == "training.warmup_steps"
    assert problem.what == "the only step would have learning rate 0 and learn nothing; leave it out"
    for said in (one.replace("max_steps: 1", "max_steps: 2"), one.replace("warmup_steps: 1", "warmup_steps: 0.03")):
        load_spec(write(tmp_path, said))
    load_spec(write(tmp_path, f"{one}  lr_scheduler_type: constant\n"))


def test_missing_keys_are_all_named_with_the_line_to_add(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "method: lora\n"))
    assert [(p.key, p.what, p.hint) for p in found] == [
        ("base_model", "is missing", "add a line base_model: ..."),
        ("dataset", "is missing", "add a line dataset: ..."),
        ("name", "is missing", "add a line name: ..."),
    ]


def test_keys_that_contradict_each_other_are_all_reported_with_their_lines(tmp_path: Path) -> None:
    text = (
        "name: tiny\nbase_model: org/model\nmethod: lora\n"
        "dataset: {path: org/data, eval_path: org/more,\n  test_size: 0.2}\n"
        "training:\n  max_steps: 3\n  num_train_epochs: 2\n  optim: paged_adamw_8bit\n"
    )
    found = problems(write(tmp_path, text))
    assert [(p.line, p.key) for p in found] == [
        (5, "dataset.test_size"),
        (8, "training.num_train_epochs"),
        (9, "training.optim"),
    ]
    assert found[1].what == "training.max_steps already says when to stop; keep one of them"


def test_final_rows_are_named_once_and_leave_rows_to_train_on(tmp_path: Path) -> None:
    head = "name: tiny\nbase_model: org/model\n"
    both = only(write(tmp_path, head + "dataset: {path: org/data, final_path: org/more, final_size: 0.2}\n"))
    assert both.key == "dataset.final_size" and "dataset.final_path already says which rows are final" in both.what
    most = only(write(tmp_path, head + "dataset: {path: org/data, test_size: 0.6, final_size: 0.4}\n"))
    assert most.key == "dataset.final_size" and "leaves no row to train on" in most.what
    load_spec(write(tmp_path, head + "dataset: {path: org/data, eval_path: org/more, final_size: 0.6}\n"))


def test_metrics_that_need_answers_are_refused_without_samples(tmp_path: Path) -> None:
    problem = only(write(tmp_path, MINIMAL + "evaluation: {samples: 0, metrics: [loss, rouge]}"))
    assert (problem.line, problem.key) == (4, "evaluation")
    assert problem.what == "samples is 0, so rouge can't be measured; set samples or drop them from metrics"
    spec = load_spec(write(tmp_path, MINIMAL + "evaluation: {samples: 0}"))
    assert spec.evaluation.samples == 0, "without a list of metrics those that can't be measured are left out"


def test_a_tracker_s_names_need_a_tracker(tmp_path: Path) -> None:
    named = "training: {tracker: {project: tickets}, report_to: [%s]}"
    for without in ("", "tensorboard"):
        problem = only(write(tmp_path, MINIMAL + named % without))
        assert (problem.key, problem.line) == ("training.tracker", 4)
        assert problem.what == "names a run for wandb, mlflow or trackio; add one to training.report_to"
    spec = load_spec(write(tmp_path, MINIMAL + named % "trackio"))
    assert (spec.training.tracker.project, spec.training.tracker.run_name) == ("tickets", None)


@pytest.mark.parametrize(
    ("metrics", "key", "what"),
    [
        ("[{name: a, extract: 'b(c', compare: exact}]", "0.extract", "does not compile: missing ): b(c; its syntax is"),
        ("[{name: a, extract: abc}]", "0.extract", '"abc" is an expression with no group: write (...) around the pa'),
        ("[{name: a, compare: same}]", "0.compare", '"same" is not one of exact, number, json, contains'),
        ("[{name: loss}]", "0.name", '"loss" is the name of a measure that loractl has; take another'),
        ("[loss, {name: cheap_trick}]", "1.name", '"cheap_trick" is the name of a measure that loractl has'),
        ("[{name: new_rows_sum}]", "0.name", '"new_rows_sum" is the name of a measure that loractl has'),
        ("[{name: expected_tokens}]", "0.name", '"expected_tokens" is the name of a measure that loractl has'),
        ("[{compare: json}]", "0.name", "is missing"),
        ("[{name: a}, {name: a, compare: json}]", "", "defines a twice; give each measure a name of its own"),
    ],
)
def test_a_measure_that_is_none_is_a_sentence(tmp_path: Path, metrics: str, key: str, what: str) -> None:
    problem = only(write(tmp_path, MINIMAL + f"evaluation: {{metrics: {metrics}}}"))
    assert problem.key == f"evaluation.metrics.{key}".strip(".") and what in problem.what


def test_what_decides_is_a_measure_that_the_job_defines_and_has_answers(tmp_path: Path) -> None:
    def said(evaluation: str, head: str = MINIMAL) -> tuple[str, str]:
        problem = only(write(tmp_path, head + f"evaluation: {{{evaluation}}}"))
        return problem.key, problem.what

    own = "metrics: [{name: sum, compare: number}, {name: form, compare: json}]"
    assert said(f"{own}, decide_by: summ") == (
        "evaluation.decide_by",
        "summ is no measure that evaluation.metrics defines; it defines sum, form",
    )
    assert said("decide_by: exact_match")[1].endswith("it defines none, like {name: gsm8k, compare: number}")
    assert said(f"{own}, samples: 0") == (
        "evaluation",
        "samples is 0, so form, sum can't be measured; set samples or drop them from metrics",
    )
    plain = MINIMAL.replace("path: org/data", "path: org/data, format: text")
    assert said(own, plain)[1] == "sum, form can't be measured of plain text, which asks nothing; leave it out"
    assert "sum, form can't be measured of pairs" in said(own, MINIMAL + "task_type: preference\n")[1]
    assert said(f"{own}, decide_by: sum") == (
        "evaluation.decide_by",
        "16 answers (evaluation.samples) are too few to judge by; set 20 or more",
    )
    spec = load_spec(write(tmp_path, MINIMAL + f"evaluation: {{{own}, decide_by: sum, samples: 20}}"))
    assert [metric.name for metric in spec.evaluation.own] == ["sum", "form"] and not spec.evaluation.wanted


@pytest.mark.parametrize("line", ['base_model: "a\\0b"', 'labels: {k: "\\e[31m"}'])
def test_control_characters_are_refused_since_they_would_reach_a_terminal(tmp_path: Path, line: str) -> None:
    text = MINIMAL.replace("base_model: org/model\n", "") + ("" if "base_model" in line else "base_model: m\n") + line
    assert only(write(tmp_path, text)).what.endswith("holds control characters")


def test_overrides_win_over_the_file_and_make_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora: {r: 4, lora_alpha: 8}\n")
    spec = load_spec(path, ["lora.r=2", "training.max_steps=20", "training.learning_rate=1e-3", "labels.team=nlp"])
    assert (spec.lora.r, spec.lora.lora_alpha) == (2, 8)
    assert (spec.training.max_steps, spec.training.learning_rate) == (20, 1e-3)
    assert spec.labels == {"team": "nlp"}


def test_a_wrong_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora: {r: 4}\n")
    assert str(only(path, "lora.r=many")) == '--set: lora.r: "many" is not a whole number'
    unknown = only(path, "lora.rank=4")
    assert (str(unknown), unknown.hint) == ("--set: lora.rank: unknown key", "did you mean lora.r?")
    open_bracket = only(path, "lora.r=[1")
    assert str(open_bracket).startswith("--set: lora.r: is not valid YAML: expected ',' or ']'")
    assert open_bracket.hint == "the bracket of line 1 is not closed"


@pytest.mark.parametrize("override", ["lora.r", "=4"])
def test_an_override_that_is_no_assignment_shows_the_right_form(tmp_path: Path, override: str) -> None:
    problem = only(write(tmp_path, MINIMAL), override)
    assert problem.what == "is not of the form key=value"
    assert problem.hint == "like --set training.max_steps=20, without spaces"


def test_a_stored_spec_with_every_key_validates_again_to_the_same_value(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training: {max_steps: 20}\nresources: {max_vram: 20GiB, time_limit: 2h}\n")
    spec = load_spec(path)
    dump = spec.model_dump(mode="json")
    assert dump["training"]["num_train_epochs"] is None, "a default that another key overrules is not kept"
    assert JobSpec.model_validate(dump) == spec
    assert (spec.resources.max_vram, spec.resources.time_limit) == (20 * 2**30, 7200)


@pytest.mark.parametrize("more", ["training: {max_steps: 20}\n", "evaluation: {samples: 0}\n", ""])
def test_a_resolved_job_is_a_job_file_again(more: str, tmp_path: Path) -> None:
    first = load_spec(write(tmp_path, MINIMAL + more))
    again = load_spec(write(tmp_path, yaml.safe_dump(first.model_dump(mode="json"))))
    assert again == first


def test_an_override_takes_the_place_of_what_the_file_says_in_another_way(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training: {num_train_epochs: 2}\n")
    assert load_spec(path, ["training.max_steps=20"]).training.num_train_epochs is None
    assert load_spec(path, ["training.num_train_epochs=5"]).training.num_train_epochs == 5
    with pytest.raises(SpecError, match="keep one of them"):
        load_spec(path, ["training.max_steps=20", "training.num_train_epochs=5"])


def test_the_same_key_in_a_section_is_proposed_before_a_similar_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as wrong:
        load_spec(write(tmp_path, MINIMAL), ["max_steps=2"])
    assert [p.hint for p in wrong.value.problems] == ["did you mean training.max_steps?"]


def test_one_wrong_key_is_one_problem_and_an_unknown_section_of_an_override_is_blamed_on_it(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(SpecError) as wrong:
        load_spec(path, ["lora.target_modules=q_proj"])
    assert [str(p) for p in wrong.value.problems] == ['--set: lora.target_modules: "q_proj" is not a list']
    with pytest.raises(SpecError) as wrong:
        load_spec(path, ["trainign.max_steps=2"])
    assert [p.file for p in wrong.value.problems] == ["--set"]


def test_the_hash_covers_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    plain = spec_digest(load_spec(path))
    same = load_spec(path, ["name=other", "priority=5", "labels.a=b", "max_retries=0", "resources.time_limit=1h"])
    assert spec_digest(same) == plain
    assert spec_digest(load_spec(path, ["training.seed=1"])) != plain


def test_the_keys_are_those_of_the_whole_file_without_sections() -> None:
    keys = spec_keys()
    assert {"name", "base_model", "lora.r", "training.learning_rate", "resources.max_vram", "labels"} <= set(keys)
    assert not {"lora", "training", "dataset"} & set(keys)
    assert len(keys) == len(set(keys))


def test_local_paths_are_resolved_against_the_folder_of_the_job_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "model").mkdir()
    text = "name: t\nbase_model: ../model\ndataset: {path: data.jsonl, eval_path: sub/held.csv}\n"
    monkeypatch.chdir("/")
    spec = load_spec(write(tmp_path / "jobs", text))
    assert spec.base_model == str(tmp_path / "model")
    assert spec.dataset.path == str(tmp_path / "jobs" / "data.jsonl"), "an ending of ours is a path, present or not"
    assert spec.dataset.eval_path == str(tmp_path / "jobs" / "sub" / "held.csv")


def test_further_data_sets_are_paths_too_and_each_is_read_as_it_says_or_as_the_first(tmp_path: Path) -> None:
    more = "more: [{path: b.csv, share: 0.2, columns: {text: body}}, {path: o/d@v1, split: 'train[:5%]'}]"
    text = MINIMAL.replace("{path: org/data}", f"{{path: a.jsonl, split: 'train[10:]', format: text, {more}}}")
    spec = load_spec(write(tmp_path, text))
    assert spec.data_sets() == {
        "path": str(tmp_path / "a.jsonl"), "more.0": str(tmp_path / "b.csv"), "more.1": "o/d@v1",
    }  # fmt: skip
    first, second, third = spec.dataset.sources
    assert (first.split, first.format, first.columns) == ("train[10:]", DataFormat.TEXT, {})
    assert (second.split, second.format, second.columns) == ("train", DataFormat.TEXT, {"text": "body"})
    assert (third.split, third.share) == ("train[:5%]", None)
    moved = spec.with_data_sets({"more.1": "o/d@" + "1" * 40})
    assert moved.data_sets() == {**spec.data_sets(), "more.1": "o/d@" + "1" * 40}
    assert moved.dataset.more[1].split == "train[:5%]"


def test_each_data_set_of_a_job_may_lie_beside_its_file_or_elsewhere(tmp_path: Path) -> None:
    data = "{path: a.csv, more: [{path: b.csv}], eval_path: c.csv, final_path: d.csv}"
    text = MINIMAL.replace("{path: org/data}", data) + "evaluation: {regression: e.csv}\n"
    spec = load_spec(write(tmp_path, text))
    assert list(spec.data_sets().values()) == [str(tmp_path / f"{name}.csv") for name in "abcde"]
    elsewhere = {key: f"/elsewhere/{key}" for key in spec.data_sets()}
    assert spec.with_data_sets(elsewhere).data_sets() == elsewhere


@pytest.mark.parametrize(
    ("dataset", "key", "what"),
    [
        ("split: 'train[:5'", "dataset.split", '"train[:5" is not a split of a data set'),
        ("more: [{path: b, split: 'train[1:5%]'}]", "dataset.more.0.split", "has one bound in rows and one in percent"),
        ("eval_path: b, eval_split: 'test[:900%]'", "dataset.eval_split", "has a bound beyond 100 %"),
        ("more: [{path: b, share: 0.5}, {path: c, share: 0.5}]", "dataset.more", "leave nothing for dataset.path"),
        ("more: [{path: b, share: 1}]", "dataset.more.0.share", "1 must be below 1"),
        ("more: [{path: b, shre: 0.1}]", "dataset.more.0.shre", "unknown key"),
        ("eval_split: test", "dataset.eval_split", "is for dataset.eval_path, and there is none"),
    ],
)
def test_a_split_and_a_share_that_can_not_be_are_refused(tmp_path: Path, dataset: str, key: str, what: str) -> None:
    problem = only(write(tmp_path, MINIMAL.replace("org/data}", f"org/data, {dataset}}}")))
    assert problem.key == key and what in problem.what
    if "data set" in what or "bound" in what:
        assert problem.hint is not None and "train[10%:20%]" in problem.hint
    if "shre" in key:
        assert problem.hint == "did you mean dataset.more.0.share?"


def test_what_is_no_path_here_stays_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/model", "~nobody-has-this-name/model", "a" * 300):
        assert load_spec(write(tmp_path, MINIMAL), [f"base_model={name}"]).base_model == name
    assert load_spec(write(tmp_path, MINIMAL), ["base_model=~/m"]).base_model == str(tmp_path / "m")


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    problem = only(write(tmp_path, MINIMAL + "lora:\n  r: 4\n  r: 8\n"))
    assert (problem.line, problem.what) == (6, "is not valid YAML: duplicate key: lora.r")


def test_broken_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    problem = only(write(tmp_path, "name: a\nlora: {r: 1\ntraining: ]\n"))
    assert problem.line == 3
    assert problem.what.startswith("is not valid YAML: ")
    (tmp_path / "README.md").write_text("# A\n\n`x`: y\n- z\n")
    assert str(only(tmp_path / "README.md").hint).startswith("a job file is YAML")


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("name: a\nlora:\n    r: 1\n  lora_alpha: 2\n", 4, "the keys of one section begin in the same column"),
        ("name: a\nlora:\n  r: 1\n   lora_alpha: 2\n", 4, "a key in the wrong column"),
        ("name: a: b\n", 1, "an unquoted text with a colon"),
        ("name a\nmethod: lora\n", 2, "here or one line above: a missing colon"),
        ("name: a\nmethod\n", 3, "write a colon and a space after a key, like name: mine"),
        ("name: a\nlora: {r: 1\nmethod: lora\n", 3, "the bracket of line 2 is not closed"),
        ("name: 'a\nmethod: lora\n", 3, "the quote of line 1 is not closed"),
        ("name: a\nresources: {time_limit: 1:30}\n", 2, "put quotes around what is a time"),
        ("training:\n  max_steps: 010\n", 2, "without a leading zero"),
    ],
)
def test_a_slip_in_yaml_is_told_in_plain_words(tmp_path: Path, text: str, line: int, hint: str) -> None:
    """ "expected <block end>, but found '<block mapping start>'" was all."""
    problem = only(write(tmp_path, text))
    assert problem.line == line and hint in str(problem.hint)


@pytest.mark.parametrize(
    ("written", "number"), [("010", "in base 8, as 8"), ("1:30", "in base 60, as 90"), ("-0_7", "in base 8, as -7")]
)
def test_a_number_that_yaml_reads_in_another_base_is_refused(tmp_path: Path, written: str, number: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec(write(tmp_path, MINIMAL), [f"training.max_steps={written}"])
    [problem] = refused.value.problems
    assert (problem.file, problem.what) == ("--set", f"is not valid YAML: YAML reads {written} {number}")
    assert "decimal digits" in str(problem.hint)
    for same in ("16", "0x10", "0b1_0000", "1_6", "+16"):
        assert load_spec(write(tmp_path, MINIMAL), [f"training.max_steps={same}"]).training.max_steps == 16
    assert load_spec(write(tmp_path, MINIMAL), ["training.warmup_steps=0"]).training.warmup_steps == 0


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_a_file_without_keys_points_at_an_example(tmp_path: Path, text: str) -> None:
    problem = only(write(tmp_path, text))
    assert (problem.what, problem.hint) == ("is empty", "start from examples/helpdesk-lora.yaml")
    assert (Path(__file__).parents[4] / "examples" / "helpdesk-lora.yaml").exists()


@pytest.mark.parametrize(
    ("text", "what"), [("- a\n- b\n", "a list"), ("just text\n", "one text"), ("name:a\nmethod:lora\n", "one text")]
)
def test_a_file_of_something_else_is_told_how_keys_are_written(tmp_path: Path, text: str, what: str) -> None:
    problem = only(write(tmp_path, text))
    assert problem.what == f"is {what}, not keys"
    assert problem.hint == "write a colon and a space after each key, like name: mine"


def test_a_file_that_cannot_be_a_job_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16"):
        other = tmp_path / f"{encoding}.yaml"
        other.write_bytes("method: lora\nname: Büro\n".encode(encoding))
        problem = only(other)
        assert problem.what == "is not UTF-8 text"
        assert str(problem.hint).endswith(f"iconv -f {encoding} -t utf-8 {encoding}.yaml")
    assert only(tmp_path / "latin-1.yaml").line == 2
    problem = only(write(tmp_path, 'name: a\nrevision: "a\0b"\n'))
    assert (problem.line, problem.what) == (2, "holds a character that no text has, U+0000")
    problem = only(tmp_path)
    assert (problem.what, problem.hint) == ("is a folder, not a job file", "name one file in it")
    assert only(tmp_path / "absent.yaml").what == "no such file"
    assert only(tmp_path / "jobs.yml").hint == f"did you mean {tmp_path / 'job.yaml'}?"


@pytest.mark.parametrize("key", ["1", "~", "true", "2026-01-01"])
def test_a_key_is_the_text_that_is_written(tmp_path: Path, key: str) -> None:
    problem = only(write(tmp_path, MINIMAL + f"{key}: x\n"))
    assert (problem.line, problem.key, problem.what) == (4, key, "unknown key")
    assert load_spec(write(tmp_path, MINIMAL + f"labels: {{{key}: x}}\n")).labels == {key: "x"}


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("training:", "indent its keys below it, or leave it out"),
        ("training: {learning_rate: '0,0001'}", "write 0.0001"),
        ("training: {max_steps: 1e3}", "write 1000"),
        ("training: {max_steps: '1,000'}", "None"),
        ("dataset: {path: org/data, test_size: 10%}", "write 0.1"),
        ("dataset: {path: [a.jsonl, b.jsonl]}", "name one file here; dataset.more takes the others"),
        ("labels: [a, b]", "write {key: value}"),
        ('revision: "a\\Users"', "write single quotes, and / between folders"),
    ],
)
def test_a_value_in_another_form_gets_the_one_that_was_meant(tmp_path: Path, line: str, hint: str) -> None:
    kept = MINIMAL.replace("dataset: {path: org/data}\n", "") if line.startswith("dataset") else MINIMAL
    assert hint in str(only(write(tmp_path, kept + line + "\n")).hint)


def test_a_date_as_a_name_is_told_to_be_quoted(tmp_path: Path) -> None:
    problem = only(write(tmp_path, MINIMAL.replace("tiny", "2026-06-01")))
    assert problem.what == '"2026-06-01" is not text; write it in quotes'


def test_the_address_of_a_data_set_s_page_is_its_name(tmp_path: Path) -> None:
    page = "https://huggingface.co/datasets/org/data"
    assert load_spec(write(tmp_path, MINIMAL.replace("org/data", page))).dataset.path == "org/data"


@pytest.mark.parametrize("line", ["[a, b]: x", "name: {{ name }}"])
def test_a_list_or_braces_as_a_key_are_told_how_to_be_written(tmp_path: Path, line: str) -> None:
    problem = only(write(tmp_path, f"method: lora\n{line}\n"))
    assert problem.line == 2 and "begins with a bracket or a brace goes into quotes" in str(problem.hint)


def test_a_file_over_the_size_limit_is_taken_for_data(tmp_path: Path) -> None:
    fits, over = "#" * (MAX_FILE_BYTES - len(MINIMAL)), "#" * (MAX_FILE_BYTES - len(MINIMAL) + 1)
    assert load_spec(write(tmp_path, MINIMAL + fits)).name == "tiny"
    problem = only(write(tmp_path, MINIMAL + over))
    assert problem.what == f"has {MAX_FILE_BYTES + 1} bytes, a job file at most {MAX_FILE_BYTES}"
    assert problem.hint == "put the data into a separate file: dataset.path"


@pytest.mark.timeout(20)
def test_nested_aliases_that_double_with_every_line_are_refused_at_once(tmp_path: Path) -> None:
    doubling = "".join(f"k{n + 1}: &k{n + 1} {{a: *k{n}, b: *k{n}}}\n" for n in range(60))
    assert "aliases" in only(write(tmp_path, MINIMAL + "k0: &k0 {a: 1}\n" + doubling)).what
    shared = load_spec(write(tmp_path, MINIMAL + "labels: {a: &team nlp, b: *team}\n"))
    assert shared.labels == {"a": "nlp", "b": "nlp"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    path.chmod(0)
    assert only(path).what == "can't be read: Permission denied"


@pytest.mark.parametrize(
    "deep",
    [
        "labels: " + "[" * 17 + "]" * 17,
        "labels: " + "{a: " * 5000 + "1" + "}" * 5000,
        "k0: &k0 [1]\n" + "".join(f"k{n + 1}: &k{n + 1} [*k{n}]\n" for n in range(20)),
        "labels: &a [*a]",
    ],
    ids=["brackets", "very deep", "by aliases", "itself"],
)
def test_a_file_that_is_nested_too_deep_is_refused(tmp_path: Path, deep: str) -> None:
    assert "nested deeper than 16 levels" in only(write(tmp_path, MINIMAL + deep)).what


@pytest.mark.parametrize(
    "number", ["9" * 5000, "0x" + "f" * 5000, "1:" * 3000 + "1"], ids=["decimal", "hex", "base 60"]
)
def test_a_number_that_python_could_not_print_is_refused_with_its_line(tmp_path: Path, number: str) -> None:
    problem = only(write(tmp_path, MINIMAL + f"priority: {number}\n"))
    assert (problem.line, problem.what) == (4, "is not valid YAML: a number of more than 64 digits")
    with pytest.raises(SpecError, match=r"^--set: priority: is not valid YAML: a number of more than 64 digits$"):
        load_spec(write(tmp_path, MINIMAL), [f"priority={number}"])


@pytest.mark.parametrize("value", ["2001-99-99", "1:" * 300 + "1.5", "!!int x", "!!bool x"])
def test_a_value_that_pyyaml_fails_on_is_refused(tmp_path: Path, value: str) -> None:
    assert "is not valid YAML" in only(write(tmp_path, MINIMAL + f"priority: {value}\n")).what


@pytest.mark.parametrize("value", ["!!map [a, b]", "!!map abc", "!!set [a]"])
def test_a_list_that_is_called_keys_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    problem = only(write(tmp_path, MINIMAL + f"labels: {value}\n"))
    assert problem.what.startswith("is not valid YAML: expected a mapping node, but found ") and problem.line == 4


@pytest.mark.parametrize(
    "key",
    [
        "dataset.max_length", "lora.r", "training.max_steps", "training.num_train_epochs",
        "training.per_device_train_batch_size", "training.gradient_accumulation_steps", "training.warmup_steps",
        "training.logging_steps", "training.save_steps", "training.eval_steps", "evaluation.samples",
        "evaluation.max_new_tokens", "evaluation.max_rows", "evaluation.per_device_eval_batch_size", "max_retries",
        "priority", "resources.time_limit", "lora_patience",
    ],
)  # fmt: skip
def test_a_number_that_neither_database_nor_calendar_holds_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, MINIMAL)
    assert "must be at most" in only(path, f"{key}=2147483648").what


@pytest.mark.parametrize(("value", "read"), [("8", 8), ("8.0", 8), ("0.25", 0.25), ("1e-1", 0.1), ("null", None)])
def test_eval_steps_are_steps_or_below_1_a_share(tmp_path: Path, value: str, read: float | None) -> None:
    spec = load_spec(write(tmp_path, MINIMAL), [f"training.eval_steps={value}"])
    assert spec.training.eval_steps == read and isinstance(spec.training.eval_steps, type(read))
    stored = JobSpec.model_validate(spec.model_dump(mode="json"))
    assert json.dumps(stored.model_dump(mode="json")) == json.dumps(spec.model_dump(mode="json")), "8 stays 8"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("0", "0 must be above 0"), ("-1", "-1 must be above 0"), ("1.5", "1.5 is not a whole number; below 1"),
        ("many", '"many" is not a number'), ("true", "true is not a number"), ("[1]", "[1] is not a number"),
    ],
)  # fmt: skip
def test_other_eval_steps_are_refused(tmp_path: Path, value: str, says: str) -> None:
    assert says in only(write(tmp_path, MINIMAL), f"training.eval_steps={value}").what


def test_a_classifier_has_defaults_of_its_own_and_any_other_job_those_it_had(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, MINIMAL + "task_type: SEQ_CLS\n"))
    assert (spec.task_type, spec.dataset.format) == (TaskType.SEQ_CLS, DataFormat.CLASSIFICATION)
    assert (spec.evaluation.metrics, spec.evaluation.samples) == ([Metric.LOSS, Metric.LABELS], 0)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    plain = load_spec(write(tmp_path, MINIMAL))
    assert (plain.task_type, plain.dataset.format, plain.evaluation.samples) == ("CAUSAL_LM", "auto", 16)
    assert spec_digest(plain) != spec_digest(spec)


@pytest.mark.parametrize(
    ("lines", "key", "says"),
    [
        ("dataset: {path: org/data, format: messages}", "dataset.format", "messages has no labels: SEQ_CLS reads"),
        ("evaluation: {metrics: [loss, rouge, context]}", "evaluation.metrics", "rouge, context can't be measured"),
        ("evaluation: {samples: 4}", "evaluation.samples", "a classifier generates no answers"),
        ("evaluation: {max_new_tokens: 4}", "evaluation.max_new_tokens", "a classifier generates no answers"),
        ("evaluation: {regression: org/other}", "evaluation.regression", "knows nothing but its labels"),
        ("evaluation: {lm_eval: [arc_easy]}", "evaluation.lm_eval", "generates no text"),
        ("training: {packing: true}", "training.packing", "one text with one label; set packing: false"),
        ("lora: {modules_to_save: [lm_head]}", "lora.modules_to_save", "lm_head: a classifier has only its own head"),
    ],
)
def test_what_a_classifier_can_do_nothing_with_is_refused(tmp_path: Path, lines: str, key: str, says: str) -> None:
    start = MINIMAL if not lines.startswith("dataset") else MINIMAL.partition("dataset")[0]
    problem = only(write(tmp_path, f"{start}task_type: SEQ_CLS\n{lines}\n"))
    line = 5 if start == MINIMAL else 4
    assert (problem.key, problem.line) == (key, line) and says in problem.what


def test_rows_with_labels_need_a_task_that_learns_them(tmp_path: Path) -> None:
    problem = only(write(tmp_path, MINIMAL), "dataset.format=classification")
    assert problem.key == "dataset.format" and "is for task_type: SEQ_CLS" in problem.what
    assert load_spec(tmp_path / "job.yaml", ["dataset.format=classification", "task_type=SEQ_CLS"])
    assert only(write(tmp_path, MINIMAL + "task_type: SEQCLS\n")).hint == "did you mean SEQ_CLS?"
    with pytest.raises(ValidationError, match=r"training\.packing: a classifier"):  # a stored row is held to it as well
        JobSpec.model_validate(MINIMAL_TREE | {"task_type": "SEQ_CLS", "training": {"packing": True}})


PAIRS = MINIMAL + "task_type: preference\n"


def test_a_job_of_pairs_has_defaults_of_its_own_and_what_it_says_stands(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, PAIRS))
    assert (spec.task_type, spec.dataset.format) == (TaskType.PREFERENCE, DataFormat.PREFERENCE)
    assert (spec.training.learning_rate, spec.lora.lora_dropout, spec.resources.cards) == (1e-5, 0.0, "auto")
    assert spec.evaluation.metrics == [Metric.LOSS, Metric.PREFERENCES] and spec.evaluation.samples == 16
    assert spec.preference.losses == ("sigmoid",) and spec.preference.has_reference
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert load_spec(tmp_path / "job.yaml", ["dataset.format=auto"]).dataset.format is DataFormat.PREFERENCE
    said = load_spec(tmp_path / "job.yaml", ["training.learning_rate=5e-6", "evaluation.metrics=[loss]"])
    assert (said.training.learning_rate, said.evaluation.metrics) == (5e-6, [Metric.LOSS])
    assert Metric.PREFERENCES not in load_spec(write(tmp_path, MINIMAL)).evaluation.metrics


@pytest.mark.parametrize(
    "said", ["training.learning_rate=2e-4", "lora.lora_dropout=0.05", "lora.lora_dropout=0.05\ntraining.warmup_steps=2"]
)
def test_a_value_that_others_have_by_default_stays_when_another_key_changes(tmp_path: Path, said: str) -> None:
    spec = load_spec(write(tmp_path, PAIRS), said.split("\n"))
    amended = amended_spec(spec.model_dump(mode="json"), ["max_retries=5"], "job 1", tmp_path)
    assert amended == spec.model_copy(update={"max_retries": 5})


def test_a_number_without_a_point_is_one_for_a_scheduler_and_a_loss_although_yaml_reads_a_text(tmp_path: Path) -> None:
    arguments = "training.lr_scheduler_kwargs={min_lr: 1e-6, num_cycles: 2, decay_type: linear}"
    training = load_spec(write(tmp_path, MINIMAL), [arguments]).training
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6, "num_cycles": 2.0, "decay_type": "linear"}
    pairs = load_spec(write(tmp_path, PAIRS), ["preference={loss_type: [sigmoid, sft], loss_weights: [1, 1e-3]}"])
    assert pairs.preference.loss_weights == [1, 1e-3]


@pytest.mark.parametrize(("stored", "read"), [("1e-6", 1e-6), ("nan", "nan"), ("1e999", "1e999"), (0.1, 0.1)])
def test_a_scheduler_s_argument_that_is_stored_as_a_text_still_loads(stored: object, read: object) -> None:
    spec = {"name": "a", "base_model": "org/model", "dataset": {"path": "org/data"}}
    spec["training"] = {"lr_scheduler_kwargs": {"min_lr": stored}}
    assert JobSpec.model_validate(spec).training.lr_scheduler_kwargs == {"min_lr": read}


def test_a_data_section_that_a_change_writes_anew_is_read_as_in_a_job_file(tmp_path: Path) -> None:
    """All fields of its rows, where a stored job without the key reads roles and contents alone."""
    stored = load_spec(write(tmp_path, MINIMAL)).model_dump(mode="json")
    amended = amended_spec(stored, ["dataset={path: org/other}"], "job 1", tmp_path)
    assert (amended.dataset.path, amended.dataset.fields) == ("org/other", RowFields.ALL)
    del stored["dataset"]["fields"]
    assert amended_spec(stored, ["dataset.max_length=64"], "job 1", tmp_path).dataset.fields is RowFields.TEXT


@pytest.mark.parametrize(
    ("lines", "key", "says"),
    [
        ("dataset: {path: org/data, format: alpaca}", "dataset.format", "alpaca has no pairs: preference reads rows"),
        ("evaluation: {metrics: [loss, rouge]}", "evaluation.metrics", "rouge can't be measured of pairs"),
        ("evaluation: {regression: org/other}", "evaluation.regression", "no loss that other rows share"),
        ("training: {packing: true}", "training.packing", "a pair is one row already; set packing: false"),
        ("training: {label_smoothing_factor: 0.1}", "training.label_smoothing_factor", "preference.label_smoothing"),
        ("preference: {loss_type: [orpo, sft]}", "preference.loss_type", "orpo has its own term"),
        ("preference: {loss_type: [sigmoid, simpo]}", "preference.loss_type", "one compares with the base"),
        ("preference: {loss_type: sft}", "preference.loss_type", "sft alone learns chosen answers"),
        ("preference: {loss_type: [sigmoid, sigmoid]}", "preference.loss_type", "names the same loss twice"),
        ("preference: {loss_type: []}", "preference.loss_type", "is empty; write a loss like sigmoid"),
        ("preference: {loss_type: [sigmoid, kto]}", "preference.loss_type", '"kto" is not one of sigmoid, ipo'),
        ("preference: {loss_weights: [1, 2]}", "preference", "loss_weights has 2 for 1 of loss_type"),
        ("preference: {loss_weights: [0]}", "preference.loss_weights.0", "0 must be above 0"),
        (
            "preference: {loss_type: [sigmoid, sft], loss_weights: [0, 1]}",
            "preference.loss_weights.0",
            "0 must be above 0",
        ),
        ("preference: {label_smoothing: 0.1}", "preference.label_smoothing", "is for robust and simpo"),
        ("preference: {loss_type: robust}", "preference.label_smoothing", "robust needs the share of pairs"),
        ("preference: {label_smoothing: 0.5}", "preference.label_smoothing", "0.5"),
        ("preference: {beta: 0}", "preference.beta", "0 must be above 0"),
        ("preference: {simpo_gamma: 1.0}", "preference.simpo_gamma", "is for loss_type: simpo"),
    ],
)
def test_what_a_job_of_pairs_can_do_nothing_with_is_refused(tmp_path: Path, lines: str, key: str, says: str) -> None:
    start = PAIRS if not lines.startswith("dataset") else PAIRS.replace("dataset: {path: org/data}\n", "")
    problem = only(write(tmp_path, f"{start}{lines}\n"))
    assert problem.key == key and says in problem.what
    assert problem.line == (5 if start == PAIRS else 4)


@pytest.mark.parametrize(
    "lines",
    [
        "preference: {loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2]}",
        "preference: {loss_type: [simpo, sft], beta: 2.0, simpo_gamma: 1.0}",
        "preference: {loss_type: robust, label_smoothing: 0.1}",
        "preference: {loss_type: orpo}",
    ],
)
def test_losses_that_go_together_are_taken(tmp_path: Path, lines: str) -> None:
    spec = load_spec(write(tmp_path, f"{PAIRS}{lines}\n"))
    assert spec_digest(spec) != spec_digest(load_spec(write(tmp_path, PAIRS)))
    assert len(spec.preference.weights) == len(spec.preference.losses)


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("preference.beta=0.5", "preference", "is for task_type: preference, which learns from pairs"),
        ("dataset.format=preference", "dataset.format", "is for task_type: preference, which learns from pairs"),
        ("evaluation.metrics=[preferences]", "evaluation.metrics", "preferences can't be measured of answers"),
    ],
)
def test_what_is_for_pairs_is_refused_of_a_job_of_answers(tmp_path: Path, override: str, key: str, says: str) -> None:
    problem = only(write(tmp_path, MINIMAL), override)
    assert problem.key == key and says in problem.what
