"""Labs: one whose adapters are trained once for all who only use them, and one with a quick trainer for each test."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from loractl.common.queue.valkey import stop_embedded
from loractl.common.settings import load_settings
from loractl.common.store.database import make_engine

from ..conftest import MEMORY, Cli, once
from ..models import make_tiny_model, write_job
from .quick_lab import Lab, quick_lab

ANSWERS = {"red": "crimson and scarlet", "green": "moss and fern", "blue": "sky and sea"}
"""What each adapter has learned to say."""

BASE = "tiny"


@pytest.fixture(scope="session")
def trained(warm_start: dict[str, str], shared_folder: Path) -> Iterator[Cli]:
    """Jobs 1 to 4: red of one step and green of LoRA, blue of DoRA, and red, each on the same tiny base.

    Trained once for all processes of a run; each has a copy of the home.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACTL_", "AWS_"))}
    home = Path(tempfile.mkdtemp(prefix="loractl-", dir=MEMORY))
    own = {"LORACTL_HOME": str(home), "LORACTL_USER": "ada", "HF_HUB_OFFLINE": "1", "LORACTL_DEVICES": "cpu"}
    cli = Cli({**kept, **own, **warm_start})
    with once(shared_folder / "colours") as folder:
        if folder is not None:
            _train_colours(cli, folder)
            stop_embedded(load_settings(cli.environment))
            shutil.copytree(home, folder / "home", ignore=shutil.ignore_patterns("*.sock"))
            (folder / "from").write_text(str(home))
        else:
            _copy_home(shared_folder / "colours", home)
    yield cli
    stop_embedded(load_settings(cli.environment))
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def base_of_trained(trained: Cli, shared_folder: Path) -> Path:
    """What they are trained on. No test may change it."""
    return shared_folder / "colours" / BASE


def _train_colours(cli: Cli, folder: Path) -> None:
    base = make_tiny_model(folder / BASE)
    for name, steps in (("red", 1), ("green", 60), ("blue", 60), ("red", 60)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"what is in {n}?"},
                    {"role": "assistant", "content": ANSWERS[name]},
                ]
            }
            for n in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = write_job(folder, base, name=name, data=f"{name}.jsonl")
        more = [f"--set=training.max_steps={steps}", "--set=training.dtype=float32", "--set=training.save_steps=60"]
        cli("submit", job, *more, *(["--set=lora.use_dora=true"] if name == "blue" else []))
    cli("worker", "--drain-when-idle", timeout=300)


def _copy_home(folder: Path, home: Path) -> None:
    """What another process has trained, with its rows saying where the copy is."""
    shutil.copytree(folder / "home", home, dirs_exist_ok=True)
    there = (folder / "from").read_text()
    engine = make_engine(f"sqlite:///{home / 'loractl.db'}")
    with engine.begin() as connection:
        seen = inspect(connection)
        for table in seen.get_table_names():
            for column in seen.get_columns(table):
                moved = f'UPDATE "{table}" SET "{column["name"]}" = replace("{column["name"]}", :there, :here)'
                where = f' WHERE instr("{column["name"]}", :there)'
                connection.execute(text(moved + where), {"there": there, "here": str(home)})
    engine.dispose()


@pytest.fixture
def lab(make_cli: Callable[..., Cli], home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """On SQLite, or on the database that the test names."""
    url = getattr(request, "param", None) and str(request.getfixturevalue(request.param))
    with quick_lab(make_cli, home, tmp_path, url) as found:
        yield found
