"""evaluation.lm_eval: tasks of the lm-eval harness on base and tuned, from the folder of the box's owner."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from loractl.common.errors import SpecError
from loractl.common.job.file import load_spec
from loractl.common.job.identity import spec_digest
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.report.text import report_text
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import Learner, load_base, load_tokenizer
from loractl.worker.evaluation.comparison import paired_interval
from loractl.worker.evaluation.harness import Scored, compare, find_tasks, score_tasks
from loractl.worker.recipe.run import Stopped

from ..conftest import Cli
from ..models import write_job
from .conftest import Recipe

QUEUES = ("storage", "network", "gpu")
ASKED = ["lab_queues", "lab_answers"]
LIMIT = 20

CHOICES = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/tickets.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}\\nqueue:"
doc_to_choice: [storage, network, gpu]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: median, higher_is_better: true}
"""
ANSWERS = """
task: lab_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/tickets.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}\\n"
doc_to_target: "queue"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
process_results: !function scoring.score
metric_list:
  - {metric: letters, aggregation: mean, higher_is_better: true}
"""
SCORING = """
from pathlib import Path

def score(doc, results):
    if Path("FOLDER/away").exists():
        Path("FOLDER/away").unlink()  # the next attempt finds it mended
        raise RuntimeError("no score for it")
    return {"letters": float(sum(c in "queue: " for c in results[0]))}
"""
GROUP = "group: lab\ntask: [lab_queues]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a box's owner: choices, answers with code of their own, a group, and two that can't be served.

    One for all tests: lm_eval reads its 14,000 files once for a folder.
    """
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("owner's tasks")
    rows = [{"text": f"ticket {n}: something with {QUEUES[n % 3]} is broken", "answer": n % 3} for n in range(24)]
    (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "queues.yaml": CHOICES.replace("NAME", "lab_queues"),
        "gone.yaml": CHOICES.replace("NAME", "lab_gone").replace("tickets", "gone"),
        "unsafe.yaml": CHOICES.replace("NAME", "lab_unsafe") + "unsafe_code: true\n",
        "answers.yaml": ANSWERS,
        "scoring.py": SCORING,
        "lab.yaml": GROUP,
    }
    for name, text in files.items():
        (folder / name).write_text(text.replace("FOLDER", str(folder)))
    return folder


def spec_of(model: Path, **evaluation: Any) -> JobSpec:
    sections = {"dataset": {"path": "a/b"}, "lora": {"r": 4}, "evaluation": {"lm_eval": ["lab_queues"], **evaluation}}
    return JobSpec.model_validate({"name": "t", "base_model": str(model), "method": "lora", **sections})


def score(
    model: Any, tiny_model: Path, folder: Path, check: Callable[[], None], started: Any = None, **evaluation: Any
) -> Any:
    spec, tokenizer = spec_of(tiny_model, **evaluation), load_tokenizer(str(tiny_model))
    precision = choose_precision("cpu", "float32")
    learner = Learner(model=model, tokenizer=tokenizer, precision=precision, started=started)
    return score_tasks(learner, spec, find_tasks(spec, str(folder)), check)


@pytest.mark.long
def test_a_job_s_tasks_are_scored_on_base_and_tuned_and_a_failing_one_keeps_the_training(
    make_cli: Callable[..., Cli], tiny_model: Path, tasks: Path, tmp_path: Path
) -> None:
    """Through command and worker, against lm_eval itself on the adapter that was pulled."""
    cli = make_cli(LORACTL_LM_EVAL_TASKS=str(tasks))
    exact = ["--set=training.dtype=float32", f"--set=evaluation.lm_eval_limit={LIMIT}", "--set=max_retries=1"]
    cli("submit", write_job(tmp_path, tiny_model), *exact, f"--set=evaluation.lm_eval={json.dumps(ASKED)}")
    (tasks / "away").touch()
    cli("worker", "--drain-when-idle", timeout=240)
    attempts = json.loads(cli("status", 1, "--json").stdout)["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["evaluation_failed", "ok"]
    assert "no score for it" in cli("status", 1, "--full").stdout

    whole = json.loads(cli("report", 1, "--json").stdout)
    assert whole["training"]["resumed_from_step"] == whole["training"]["steps"] == 6, "trained once"
    found = whole["evaluation"]["lm_eval"]
    assert (found["asked"], found["limit"], found["batch"]) == (ASKED, LIMIT, 8)
    assert found["tasks"]["lab_queues"]["documents"] == LIMIT < found["tasks"]["lab_queues"]["of"] == 24
    shown = cli("report", 1).stdout
    assert re.search(r"^lab_answers .*\n  letters$", shown, re.M) and re.search(r"^lab_queues .*\n  acc$", shown, re.M)
    assert "* unpaired" in shown
    cli("adapters", "pull", 1, tmp_path / "pulled")
    _equal_to_a_direct_run(found, tiny_model, tmp_path / "pulled", tasks)


def _equal_to_a_direct_run(found: dict[str, Any], model: Path, adapter: Path, tasks: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    numbers = {(m["task"], m["metric"]): m for m in found["metrics"]}
    assert numbers.keys() == {("lab_queues", "acc"), ("lab_queues", "acc_norm"), ("lab_answers", "letters")}
    changed = set()
    for which in ("base", "tuned"):
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        whole = plain if which == "base" else PeftModel.from_pretrained(plain, adapter).merge_and_unload()
        wrapped = HFLM(pretrained=whole, tokenizer=load_tokenizer(str(model)), batch_size=8)
        direct = lm_eval.simple_evaluate(
            wrapped, tasks=[*ASKED], task_manager=manager, limit=LIMIT, bootstrap_iters=1000
        )
        assert direct is not None
        for (task, metric), number in numbers.items():
            theirs = direct["results"][task]
            assert number[which] == pytest.approx(theirs[f"{metric},none"], abs=1e-6), (which, task, metric)
            assert number[f"{which}_stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"], abs=1e-6)
            changed.add((task, number["base"] != number["tuned"]))
    assert ("lab_answers", True) in changed, "the adapter was on for one and off for the other"
    kinds = {(task, metric): m["interval"] for (task, metric), m in numbers.items()}
    assert kinds["lab_queues", "acc"] == kinds["lab_answers", "letters"] == "paired"
    assert kinds["lab_queues", "acc_norm"] == "unpaired"


@pytest.mark.long
def test_no_limit_scores_every_row_and_a_group_s_average_stands_for_its_members(
    recipe: Recipe, tasks: Path, tmp_path: Path
) -> None:
    asked = {"lm_eval": ["lab"], "lm_eval_limit": None, "samples": 0}
    recipe(max_steps=1, evaluation=asked, lm_eval_tasks=tasks)
    report = json.loads((tmp_path / "a" / "result" / "report.json").read_text())
    found = report["evaluation"]["lm_eval"]
    assert found["tasks"]["lab_queues"]["documents"] == 24
    numbers = {(m["task"], m["metric"]): m for m in found["metrics"]}
    average, member = numbers["lab", "acc"], numbers["lab_queues", "acc"]
    assert (average["group"], average["interval"], average["cases"]) == (None, "unpaired", 24)
    assert (member["group"], member["interval"], member["base"]) == ("lab", "paired", average["base"])
    shown = report_text(report, Screen(width=100, unicode=True, color=False), 0)
    assert "lab acc" in shown and "lab_queues" not in shown
    assert "2 more numbers, of the groups' members" in shown
    page = (tmp_path / "a" / "result" / "report.html").read_text()
    assert 'id="lm-eval"' in page and "lab_queues acc_norm" in page and "unpaired" in page


@pytest.mark.long
def test_a_stop_ends_it_and_out_of_memory_halves_its_batch(tiny_model: Path, tasks: Path) -> None:
    base = load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu", "float32"))
    model = add_adapter(base, spec_of(tiny_model), Method.LORA)
    calls = []

    def full_at_first() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    halved = score(model, tiny_model, tasks, full_at_first, per_device_eval_batch_size=4)
    assert halved.batch == 2
    assert [s.compared.change for s in halved.scored] == [0, 0], "a fresh adapter changes nothing"

    def stop() -> None:
        calls.append(2)
        if calls.count(2) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        score(model, tiny_model, tasks, stop)
    assert calls.count(2) == 3, "at the next batch"
    with pytest.raises(torch.OutOfMemoryError):
        score(model, tiny_model, tasks, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))


@pytest.mark.long
def test_the_base_of_a_job_on_pairs_is_the_adapter_that_it_started_from(tiny_model: Path, tasks: Path) -> None:
    """The report calls that adapter base, and its other measures are against it."""
    model = add_adapter(
        load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu", "float32")),
        spec_of(tiny_model),
        Method.LORA,
    )

    def trained(spread: float) -> list[torch.Tensor]:
        torch.manual_seed(5)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = spread * torch.randn(parameter.shape)
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def numbers(started: Any = None) -> list[tuple[float, float]]:
        found = score(model, tiny_model, tasks, lambda: None, started, lm_eval=["lab_answers"]).scored
        return [(one.compared.base, one.compared.tuned) for one in found]

    started = trained(0.5)
    bare_and_started = numbers()
    trained(1.0)
    bare_and_tuned = numbers()
    assert numbers(started) == [
        (of_started, tuned) for (_, of_started), (_, tuned) in zip(bare_and_started, bare_and_tuned, strict=True)
    ]
    assert bare_and_started != [(of_started, of_started) for _, of_started in bare_and_started], "they differ"


@pytest.mark.parametrize("method", [Method.LORA, Method.QLORA])
def test_scoring_leaves_the_model_as_it_was(tiny_model: Path, tasks: Path, tmp_path: Path, method: Method) -> None:
    """Also with a head trained in full on tied embeddings, which lm_eval would tie again, and on NF4."""
    tied = shutil.copytree(tiny_model, tmp_path / "tied")
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    spec = spec_of(tied).model_copy(
        update={"lora": spec_of(tied).lora.model_copy(update={"modules_to_save": ["lm_head"]})}
    )
    base = load_base(str(tied), method, "cpu", choose_precision("cpu", "float32"))
    model = add_adapter(base, spec, method).train()
    ids = torch.arange(3, 40)[None]

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    score(model, tied, tasks, lambda: None)
    after = gradients()
    assert before and before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.long
def test_what_a_worker_can_t_serve_ends_before_it_trains(
    recipe: Recipe, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text((tasks / "queues.yaml").read_text())
    monkeypatch.chdir(tmp_path)  # lm_eval would read a file that is named like a task
    refused = {
        "lab_queue": r"no task of lm_eval [\d.]+ on this worker or of its owner's folder is named lab_queue$",
        "mine.yaml": "is named mine.yaml$",
        "lab_gone": "lab_gone can't be set up on this worker: ",
        "lab_unsafe": "lab_unsafe runs what the model writes as a program",
    }
    for name, words in refused.items():
        with pytest.raises(TrainingFailed, match=words) as failure:
            recipe(evaluation={"lm_eval": ["lab_queues", name]}, lm_eval_tasks=tasks)
        assert failure.value.reason is Reason.BAD_SPEC
    with pytest.raises(TrainingFailed, match="lab, lab_queues can't be set up on this worker: Duplicate task"):
        recipe(evaluation={"lm_eval": ["lab", "lab_queues"]}, lm_eval_tasks=tasks)
    assert not list((tmp_path / "a").glob("checkpoints/*")) and not (tmp_path / "a/result/adapter").exists()
    with pytest.raises(TrainingFailed, match="LORACTL_LM_EVAL_TASKS of this worker is not a folder"):
        recipe(evaluation={"lm_eval": ["lab_queues"]}, lm_eval_tasks=tmp_path / "nowhere")


def test_a_worker_without_the_package_says_so(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    with pytest.raises(
        TrainingFailed, match=r"evaluation\.lm_eval: the package lm_eval is not on this worker"
    ) as failure:
        recipe(evaluation={"lm_eval": ["arc_easy"]})
    assert failure.value.reason is Reason.BAD_SPEC


def test_the_job_file_names_tasks_never_a_path(tmp_path: Path, tiny_model: Path) -> None:
    job = write_job(tmp_path, tiny_model)
    asked = load_spec(job, ['evaluation.lm_eval=["arc_easy", "mmlu"]', "evaluation.lm_eval_limit=7"]).evaluation
    assert (asked.lm_eval, asked.lm_eval_limit) == (["arc_easy", "mmlu"], 7)
    for path in ("/etc/task.yaml", "../task", "tasks/a.yaml", "~root"):
        with pytest.raises(SpecError, match=r"evaluation\.lm_eval\.0: .* is not a task name"):
            load_spec(job, [f'evaluation.lm_eval=["{path}"]'])
    with pytest.raises(SpecError, match="names no task to limit"):
        load_spec(job, ["evaluation.lm_eval_limit=7"])
    classifier = {"name": "t", "base_model": "a/b", "task_type": "SEQ_CLS", "dataset": {"path": "a/b"}}
    with pytest.raises(ValidationError, match=r"evaluation\.lm_eval: a classifier generates no text"):
        JobSpec.model_validate({**classifier, "evaluation": {"lm_eval": ["arc_easy"]}})
    plain = spec_of(tiny_model, lm_eval=[])
    assert "lm_eval" not in json.dumps(plain.model_dump(exclude={"evaluation"}))
    limited = plain.model_copy(update={"evaluation": plain.evaluation.model_copy(update={"lm_eval_limit": 7})})
    assert spec_digest(plain) == spec_digest(limited) != spec_digest(spec_of(tiny_model))


def results(values: list[float], stderr: float | str, *, mean: float | None = None) -> dict[str, Any]:
    """As simple_evaluate returns them: one task, its metric `m`."""
    samples = [{"doc_id": n, "filter": "none", "m": value} for n, value in enumerate(values)]
    total = float(np.mean(values)) if mean is None else mean
    return {
        "results": {"t": {"alias": "t", "sample_len": len(values), "m,none": total, "m_stderr,none": stderr}},
        "samples": {"t": samples},
        "higher_is_better": {"t": {"m": True}},
    }


def one(base: dict[str, Any], tuned: dict[str, Any]) -> Scored:
    (found,) = compare(base, tuned)
    return found


def test_intervals_are_paired_where_the_number_is_the_documents_mean_and_say_so_where_not() -> None:
    rng = np.random.default_rng(5)
    base = list((rng.random(60) < 0.4).astype(float))
    tuned = [max(value, float(n % 4 == 0)) for n, value in enumerate(base)]
    paired = one(results(base, 0.06), results(tuned, 0.06))
    expected = paired_interval(np.array(base), np.array(tuned), np.ones(60))[2:]
    assert (paired.interval, paired.compared.low, paired.compared.high) == ("paired", *expected)
    assert paired.reading == "better" and paired.compared.cases == 60
    # an F1 is no mean of the documents: from 0.30 ± 0.05 to 0.42 ± 0.04
    unpaired = one(results(base, 0.05, mean=0.30), results(tuned, 0.04, mean=0.42))
    reach = 1.96 * math.sqrt(0.05**2 + 0.04**2)
    assert unpaired.interval == "unpaired" and unpaired.reading == "no clear change"
    assert (unpaired.compared.low, unpaired.compared.high) == pytest.approx((0.12 - reach, 0.12 + reach))
    unknown = one(results(base, "N/A", mean=0.30), results(tuned, "N/A", mean=0.42))
    assert (unknown.interval, unknown.reading, unknown.base_stderr) == ("none", "not known", None)
    downwards = results(tuned, 0.06) | {"higher_is_better": {"t": {"m": False}}}
    assert one(results(base, 0.06), downwards).reading == "worse"
    undirected = results(tuned, 0.06) | {"higher_is_better": {"t": {"m": None}}}
    assert one(results(base, 0.06), undirected).reading == "not known"
    assert one(results(base[:5], 0.2), results(tuned[:5], 0.2)).reading == "too few cases"
