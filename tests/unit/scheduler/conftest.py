"""A lab that is put together once, for its page and for what --json prints of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ... import webs
from ...conftest import once
from ..factories import NOON


@pytest.fixture(scope="session")
def seeded(sqlite_template: Path, shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a lab's database and results, put together once for all processes; copy it to change it."""
    with once(shared_folder / "lab") as folder:
        if folder is not None:
            shutil.copy(sqlite_template, folder / "lab.db")
            lab = webs.seed(f"sqlite:///{folder / 'lab.db'}", folder / "artifacts", NOON)
            lab.store.engine.dispose()
    return shutil.copytree(shared_folder / "lab", tmp_path_factory.mktemp("seeded") / "lab")
