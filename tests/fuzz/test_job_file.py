"""No job file and no override ends in anything but a spec or an error for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loractl.common.job.file import load_spec, override_spec
from loractl.common.job.identity import spec_digest
from loractl.common.job.spec import JobSpec

from .counting import answered, fuzz
from .documents import GOOD, files, keys, scalars, soup, yaml_texts


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fuzz") / "job.yaml"
    yield path
    path.unlink(missing_ok=True)


@fuzz
@given(content=files)
@example(content=b"")
@example(content=b"a: &a [*a]")
@example(content=(GOOD + "priority: 0x" + "f" * 5000).encode())
@example(content=(GOOD + "priority: " + "1:" * 3000 + "1").encode())
def test_a_job_file_of_any_bytes(job_file: Path, content: bytes) -> None:
    job_file.write_bytes(content)
    spec = answered("job file", lambda: load_spec(job_file))
    if spec is not None:
        _complete(spec)


overrides = st.one_of(
    st.tuples(keys, st.one_of(scalars, soup, yaml_texts)).map("=".join),
    st.text(max_size=20),
)


@fuzz
@given(changes=st.lists(overrides, min_size=1, max_size=4))
@example(changes=["training.max_steps=" + "9" * 5000])
@example(changes=["priority=0x" + "f" * 5000])
@example(changes=["labels=2001-99-99"])
@example(changes=["labels=" + "[" * 20_000])
def test_overrides_of_any_text(job_file: Path, changes: list[str]) -> None:
    job_file.write_text(GOOD)
    spec = answered("override", lambda: load_spec(job_file, changes))
    if spec is not None:
        _complete(spec)
        answered("override", lambda: override_spec(spec.model_dump(mode="json"), changes, "job 1"))


def _complete(spec: JobSpec) -> None:
    """An accepted job can be written into a row and read back as it was."""
    stored = json.dumps(spec.model_dump(mode="json"), allow_nan=False)
    assert JobSpec.model_validate(json.loads(stored)) == spec
    assert spec_digest(spec)
