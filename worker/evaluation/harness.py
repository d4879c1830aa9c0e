"""Tasks of EleutherAI's lm-eval harness on base and tuned: the package's own, and those in the box owner's folder.

https://github.com/EleutherAI/lm-evaluation-harness. The package is not a dependency of loractl: a worker without it
refuses jobs that ask for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from loractl.common.job.sections import EvaluationSpec
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import in_own_thread, is_out_of_memory, release
from loractl.worker.base.model import Learner, measuring
from loractl.worker.base.source import Refusal, refusal

from .comparison import Array, Compared, Measure, paired_interval

PACKAGE = "lm_eval"

KEY = "evaluation.lm_eval"

BOOTSTRAP_ITERATIONS = 1000
"""Samples for lm_eval's own standard errors of F1, perplexity and BLEU; for a mean it has a formula."""

NORMAL_95 = 1.96
"""Half the width of a 95% interval in standard errors, for a normal error."""

Results = dict[str, Any]
"""What simple_evaluate returns."""

Interval = Literal["paired", "unpaired", "none"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One metric of one task, of base and tuned, with lm_eval's standard errors."""

    task: str
    metric: str
    filter: str  # what lm_eval extracted from the answer before scoring it; "none": nothing
    group: str | None  # the task's group, if that has its own average
    interval: Interval
    """paired: bootstrap over the documents, the same for both. unpaired: from the two standard errors, as if each had
    seen other documents, so it is too wide. none: neither exists, or lm_eval does not say which way is better."""
    base_stderr: float | None
    tuned_stderr: float | None
    compared: Compared

    @property
    def reading(self) -> str:
        return "not known" if self.interval == "none" else self.compared.reading


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """What the report says about the tasks."""

    asked: tuple[str, ...]
    limit: int | None
    version: str
    batch: int  # rows at once, after halving for out-of-memory
    seconds: float
    tasks: dict[str, dict[str, Any]]  # for each: its version, examples in the prompt, documents scored and in all
    seeds: dict[str, int]
    scored: list[Scored]


def check_package(spec: JobSpec) -> None:
    """Refuse an evaluation.lm_eval on a worker without the package. Raises TrainingFailed(bad_spec)."""
    if spec.evaluation.lm_eval and importlib.util.find_spec(PACKAGE) is None:
        raise TrainingFailed(Reason.BAD_SPEC, f"{KEY}: the package {PACKAGE} is not on this worker")


def find_tasks(spec: JobSpec, folder: str | None) -> Any:
    """lm_eval's TaskManager over the package's tasks and the owner's folder; None for a job that asks for no task.

    Every task is set up once, including its data set: if one is missing, the job ends before it trains. Raises
    TrainingFailed.
    """
    names = spec.evaluation.lm_eval
    if not names:
        return None
    check_package(spec)
    manager = _manager(names, folder)
    # lm_eval takes an unknown name for the path of a YAML file
    if unknown := [name for name in names if name not in manager.all_tasks]:
        where = f"lm_eval {version(PACKAGE)} on this worker" + (" or of its owner's folder" if folder else "")
        raise TrainingFailed(Reason.BAD_SPEC, f"{KEY}: no task of {where} is named {', '.join(unknown)}")
    for task in _load(manager, names)["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            what = "runs what the model writes as a program, which loractl does not allow"
            raise TrainingFailed(Reason.BAD_SPEC, f"{KEY}: {task.task_name} {what}")
    return manager


def score_tasks(
    learner: Learner,
    spec: JobSpec,
    manager: Any,
    check_stop: Callable[[], None],
) -> Benchmarks:
    """Run the job's tasks on what the report calls base, see `measuring`, and on the tuned model.

    `manager`: from `find_tasks`. Raises what `check_stop` raises, before a batch; out-of-memory if one row at a time
    does not fit; and any error of a task.
    """
    began = time.monotonic()
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork this process, with model and device, once per core
    asked, batch, both = spec.evaluation, spec.evaluation.per_device_eval_batch_size, []

    def score(rows: int, *, base: bool) -> Results:
        found: list[Results] = []

        def work() -> None:
            wrapped = _wrapped(learner.model, learner.tokenizer, rows, check_stop)
            found.append(_results(wrapped, asked, manager, rows))

        measuring(learner, work, base=base)
        return found[0]

    for base in (True, False):
        while True:
            try:
                both.append(in_own_thread(functools.partial(score, batch, base=base)))
                break
            except Exception as error:
                if batch == 1 or not is_out_of_memory(error):
                    raise
            batch //= 2  # lm_eval takes the longest rows first, so little is done twice
            in_own_thread(release)  # outside the handler: until it ends, the error's traceback holds the tensors
    config = both[1]["config"]
    return Benchmarks(
        asked=tuple(asked.lm_eval),
        limit=asked.lm_eval_limit,
        version=version(PACKAGE),
        batch=batch,
        seconds=time.monotonic() - began,
        tasks={name: _task(name, both[1]) for name in both[1]["n-samples"]},
        seeds={name: config[name] for name in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")},
        scored=compare(*both),
    )


def compare(base: Results, tuned: Results) -> list[Scored]:
    """Every number that both runs have, task by task; a group's members carry its name if it has numbers."""
    parents = {
        member: group
        for group, members in tuned.get("group_subtasks", {}).items()
        if any(_metrics(tuned, group))
        for member in members
    }
    return [
        _scored(task, key, base, tuned, parents.get(task))
        for task in tuned["results"]
        for key in _metrics(tuned, task)
        if key in base["results"][task]
    ]


def _manager(names: list[str], folder: str | None) -> Any:
    """Only of the owner's folder if that has every task; a group there may have members from the package."""
    if folder is not None and not Path(folder).is_dir():
        raise TrainingFailed(Reason.BAD_SPEC, f"{KEY}: LORACTL_LM_EVAL_TASKS of this worker is not a folder: {folder}")
    if folder is not None and set(names) <= set((own := _indexed(folder, packaged=False)).all_subtasks):
        return own
    return _indexed(folder, packaged=True)


@functools.cache
def _indexed(folder: str | None, *, packaged: bool) -> Any:
    """With `packaged`, it also reads the package's task files, some 14,000: that takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=packaged)


def _load(manager: Any, names: list[str]) -> Any:
    """All of them; they may not overlap. Raises TrainingFailed with the name of the first that can't be loaded."""
    try:
        return manager.load(list(names))
    except Exception as error:  # a task is other people's program and may fail in any way
        for name in names if len(names) > 1 else ():
            _load(manager, [name])
        answer = refusal(error)
        said = answer or next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = Reason.TRAINER_ERROR if answer is Refusal.AWAY else Reason.BAD_SPEC  # only an absent hub is temporary
        raise TrainingFailed(reason, f"{KEY}: {', '.join(names)} can't be set up on this worker: {said}") from error


def _results(wrapped: Any, asked: EvaluationSpec, manager: Any, batch: int) -> Results:
    """One model's results, with lm_eval's own seeds, so that they compare with other users' numbers; nothing is
    sent."""
    import lm_eval

    with _machine_unasked():
        return lm_eval.simple_evaluate(
            wrapped,
            tasks=list(asked.lm_eval),
            limit=asked.lm_eval_limit,
            batch_size=batch,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
        )


@contextlib.contextmanager
def _machine_unasked() -> Iterator[None]:
    """lm_eval asks pip, gcc and nvidia-smi about the machine, which takes a second; the report has its own
    description."""
    from torch.utils import collect_env

    ask = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = lambda: ""
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = ask


def _wrapped(model: Any, tokenizer: Any, batch: int, check_stop: Callable[[], None]) -> Any:
    """lm_eval's wrapper around a loaded model; before each batch it checks whether to stop."""
    from lm_eval.models.huggingface import HFLM

    class Stoppable(HFLM):
        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            check_stop()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            check_stop()
            return super()._model_generate(*args, **kwargs)

    # HFLM ties embeddings and head again, which fails if peft has replaced them with a fully trained module
    model.tie_weights = lambda: None
    try:
        return Stoppable(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    finally:
        del model.tie_weights


def _task(name: str, results: Results) -> dict[str, Any]:
    counts = results["n-samples"][name]
    return {
        "version": str(results["versions"].get(name)),
        "shots": results["n-shot"].get(name),
        "documents": counts["effective"],
        "of": counts["original"],
    }


def _metrics(results: Results, task: str) -> list[str]:
    """lm_eval's keys, "metric,filter", of numbers that are not standard errors."""
    values = results["results"].get(task, {})
    return [key for key, value in values.items() if "," in key and "_stderr," not in key and _is_number(value)]


def _scored(task: str, key: str, base: Results, tuned: Results, group: str | None) -> Scored:
    metric, _, taken = key.partition(",")
    before, after = (float(results["results"][task][key]) for results in (base, tuned))
    errors = [_stderr(results["results"][task], metric, taken) for results in (base, tuned)]
    higher = tuned["higher_is_better"].get(task, {}).get(metric)
    interval: Interval = "none"
    low = high = math.nan
    if higher is not None and (documents := _paired(task, key, base, tuned)) is not None:
        interval = "paired"
        _, _, low, high = paired_interval(*documents, np.ones(len(documents[0])))
    elif higher is not None and None not in errors:
        interval = "unpaired"
        reach = NORMAL_95 * math.hypot(*(error for error in errors if error is not None))
        low, high = after - before - reach, after - before + reach
    label = f"{task} {metric}" + (f" ({taken})" if taken != "none" else "")
    measure = Measure(name=f"{task}/{key}", label=label, unit="", higher_is_better=bool(higher))
    counted = tuned["results"][task].get("sample_count", {}).get(key, tuned["results"][task]["sample_len"])
    return Scored(
        task=task,
        metric=metric,
        filter=taken,
        group=group,
        interval=interval,
        base_stderr=errors[0],
        tuned_stderr=errors[1],
        compared=measure.compared(counted, before, after, low, high),
    )


def _paired(task: str, key: str, base: Results, tuned: Results) -> tuple[Array, Array] | None:
    """The documents' own values, if the metric is their mean; an F1 or a perplexity is not."""
    both = [_of_documents(task, key, results) for results in (base, tuned)]
    if both[0].keys() != both[1].keys() or not both[0]:
        return None
    arrays = [np.array([values[number] for number in both[0]]) for values in both]
    means = [results["results"][task][key] for results in (base, tuned)]
    if not all(np.isclose(array.mean(), mean) for array, mean in zip(arrays, means, strict=True)):
        return None
    return arrays[0], arrays[1]


def _of_documents(task: str, key: str, results: Results) -> dict[int, float]:
    """By the document's number; empty unless every document has a number."""
    metric, _, taken = key.partition(",")
    samples = [sample for sample in results["samples"].get(task, ()) if sample["filter"] == taken]
    if not all(_is_number(sample.get(metric)) for sample in samples):
        return {}
    return {sample["doc_id"]: float(sample[metric]) for sample in samples}


def _stderr(values: dict[str, Any], metric: str, taken: str) -> float | None:
    """None if lm_eval has none: it then writes "N/A"."""
    value = values.get(f"{metric}_stderr,{taken}")
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (Real, np.bool_))
