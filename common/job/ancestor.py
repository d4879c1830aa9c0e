"""The adapter that a job begins from, and whether it fits the job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .names import parse_reference
from .sections import AncestorJob, LoraSpec
from .spec import JobSpec

_SAME = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save")
"""Keys of `lora` that shape an adapter or what it computes: with another value the job would not begin where the stored
adapter ended."""


def ancestor_job(spec: JobSpec, best: int | None = None) -> int | None:
    """The job whose adapter this one begins from; a stored spec names it by its number. `best`: the member that was
    chosen where it names a sweep (`jobs.ancestor`)."""
    named = spec.lora.init_from
    if isinstance(named, AncestorJob):
        return best
    return None if named is None else parse_reference(named).job_id


def may_go_without(spec: Mapping[str, Any], awaits: int | None) -> bool:
    """Whether a stored spec's job could start without those for which it still waits: not if it needs the adapter of
    one of them."""
    begun = (spec.get("lora") or {}).get("init_from")
    if isinstance(begun, dict):  # a sweep, whose members are all in the list
        return False
    left = spec.get("after") or []
    left = left[left.index(awaits) :] if awaits in left else left
    return begun not in list(map(str, left))


def settled_on(spec: JobSpec, best: int | None) -> JobSpec:
    """The spec with the number of the member that was chosen, where it names a sweep."""
    if best is None or not isinstance(spec.lora.init_from, AncestorJob):
        return spec
    lora = spec.lora.model_copy(update={"init_from": str(best)})
    return spec.model_copy(update={"lora": lora})


def with_numbers(spec: JobSpec, numbers: Mapping[str, int]) -> JobSpec:
    """The spec with numbers in place of the job names. `numbers`: of the jobs submitted with it, by name."""
    after = list(dict.fromkeys(numbers.get(one, one) if isinstance(one, str) else one for one in spec.after))
    lora, begun = spec.lora, spec.lora.init_from
    if isinstance(begun, AncestorJob) and begun.job is not None:
        number = numbers.get(begun.job, begun.job) if isinstance(begun.job, str) else begun.job
        lora = lora.model_copy(update={"init_from": str(number)})
    return spec.model_copy(update={"after": after, "lora": lora})


def misfits(spec: JobSpec, ancestor: JobSpec) -> list[str]:
    """Why the job can't begin from the adapter that `ancestor` made, a clause for each difference."""
    pairs = [(key, getattr(spec, key), getattr(ancestor, key)) for key in ("base_model", "revision")]
    if spec.kind.peft != ancestor.kind.peft:  # what has learned answers may learn which are preferred
        pairs.append(("task_type", spec.task_type, ancestor.task_type))
    pairs += [(f"lora.{key}", _of(spec.lora, key), _of(ancestor.lora, key)) for key in _SAME]
    if spec.dataset.template is not ancestor.dataset.template:
        pairs.append(("dataset.template", spec.dataset.template, ancestor.dataset.template))
    return [
        f"{key} is {_shown(ours)}, and that adapter's {_shown(theirs)}" for key, ours, theirs in pairs if ours != theirs
    ]


def _of(lora: LoraSpec, key: str) -> Any:
    """A value, with names in any order."""
    value = getattr(lora, key)
    return sorted(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
