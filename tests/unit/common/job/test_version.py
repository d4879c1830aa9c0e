"""A worker leaves a job that only a newer one can read, by its version: so what a job file may say has one version."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from loractl import __version__
from loractl.common.job.spec import WITHOUT_EFFECT, JobSpec, spec_keys

SAYS = {
    "0.2.0": "48a50bfd1e48d922",
    "0.3.0": "0f277c9850980f85",
    "0.4.0": "8da1736f550dff5b",
    "0.5.0": "e5b4778d5ca488a0",
    "0.6.0": "766d96263bce812b",
}
"""Of each version a digest of the job file's keys and of the words that they take."""


def test_what_a_job_file_may_say_changes_only_with_the_version() -> None:
    schema = JobSpec.model_json_schema()
    said = "\n".join([*sorted([*spec_keys(), *WITHOUT_EFFECT]), *sorted(set(_words(schema)))])
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    assert SAYS.get(__version__) == digest, (
        "the keys of the job file or their words have changed: raise __version__ in src/loractl/__init__.py, for an "
        f"older worker would fail such a job as bad_spec, and note {{{__version__!r} or later: {digest!r}}} in SAYS"
    )


def _words(part: Any) -> Iterator[str]:
    """The words of all choices in a JSON schema."""
    if isinstance(part, dict):
        words = (*part.get("enum", ()), *([part["const"]] if isinstance(part.get("const"), str) else []))
        yield from (f"{part.get('title', '')}: {word}" for word in words)
        yield from (word for inner in part.values() for word in _words(inner))
    elif isinstance(part, list):
        yield from (word for inner in part for word in _words(inner))
