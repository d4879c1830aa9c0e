"""A lab whose time is the test's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ...conftest import kept_engine
from ...held_lab import HeldLab, held_lab


@pytest.fixture
def held(home: Path, upgraded_file: str, tmp_path: Path) -> Iterator[HeldLab]:
    """Without a box yet."""
    with held_lab(home, tmp_path, kept_engine(upgraded_file)) as lab:
        yield lab
