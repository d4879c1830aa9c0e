"""The recipe on a tiny model in this process."""

from __future__ import annotations

import datetime as dt
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.settings import load_settings
from loractl.common.store.database import connect
from loractl.common.store.store import Store
from loractl.common.units import GIB
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.base.kernels import load_kernels
from loractl.worker.device.devices import CpuDevice
from loractl.worker.protocol.messages import Ended, Start, Stepped
from loractl.worker.recipe.run import Run, Stopped

from ..conftest import kept_engine
from ..models import write_helpdesk
from ..roles import KeptLab, Logins

load_kernels()  # before a test's import does it at its own cost

Recipe = Callable[..., tuple[Ended, list]]


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Leave what the libraries made out of every collection: looking through it is half of a small training's time."""
    _settle()


def _settle() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def kept_lab(postgres_server: str) -> Iterator[KeptLab]:
    kept = KeptLab(postgres_server)
    yield kept
    kept.close()


@pytest.fixture
def owner_url(kept_lab: KeptLab) -> Iterator[str]:
    """The owner's login to a database with the roles of a lab."""
    yield kept_lab.url()
    kept_lab.empty()


@pytest.fixture
def lab(owner_url: str, kept_lab: KeptLab) -> Logins:
    """A login of a person and of a box to it."""
    return kept_lab.logins


@pytest.fixture
def person(lab: Logins) -> Iterator[Store]:
    yield Store(engine := kept_engine(lab.person))
    engine.dispose()


@pytest.fixture
def box(lab: Logins) -> Iterator[Store]:
    yield Store(engine := kept_engine(lab.box))
    engine.dispose()


@pytest.fixture
def cpu_place(upgraded_home: Path) -> Callable[[str], Workplace]:
    """A node on a processor with trainers of a module."""

    def make(trainer: str) -> Workplace:
        settings = load_settings({"LORACTL_HOME": str(upgraded_home), "LORACTL_TRAINER": trainer})
        return Workplace(
            settings=settings, store=Store(connect(settings)), device=CpuDevice(total=24 * GIB), node="box:0",
            artifacts=StoreClient(settings.artifacts_url), drain=Drain(),
        )  # fmt: skip

    return make


@pytest.fixture
def quick_place(
    cpu_place: Callable[[str], Workplace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Workplace]:
    """A node on a processor whose trainers are this program: they import nothing but what it does."""

    def make(program: str) -> Workplace:
        (tmp_path / "quick.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return cpu_place("quick")

    return make


_trained = itertools.count()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a box: one for all tests of a module, so that each way of putting rows behind each other is tried
    once. A module that is about this has an empty one for each test. Every training measures its base: a measurement
    is believed only where the order names its file, and that of `start` names none."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path, cache: Path) -> Callable[..., Start]:
    """An order for a tiny model; keyword arguments go into the spec's training section, `job` beside it."""
    data = write_helpdesk(tmp_path / "data.jsonl")

    def make(
        where: str = "a",
        *,
        job_id: int = 1,
        method: str = "lora",
        resume: str | None = None,
        lora: dict | None = None,
        dataset: dict | None = None,
        evaluation: dict | None = None,
        job: dict | None = None,
        memory_limit: int | None = None,
        lm_eval_tasks: Path | None = None,
        cache_dir: Path | None = None,
        day: dt.date | None = None,
        **training: object,
    ) -> Start:
        spec = JobSpec.model_validate(
            {
                "name": "tiny",
                "base_model": str(tiny_model),
                "method": method,
                "dataset": {"path": str(data), "max_length": 128, **(dataset or {})},
                "lora": {"r": 4, "lora_alpha": 8, **(lora or {})},
                "training": {
                    "max_steps": 8,
                    "learning_rate": 5e-3,
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 1,
                    "logging_steps": 1,
                    "save_steps": 4,
                    **training,
                },
                "evaluation": {"samples": 2, "max_new_tokens": 6, **(evaluation or {})},
                **(job or {}),
            }
        )
        folder = tmp_path / where
        (folder / "result").mkdir(parents=True, exist_ok=True)
        return Start(
            job_id=job_id,
            attempt=1,
            user="t",
            node="n:0",
            gpu="cpu",
            device="cpu",
            spec=spec,
            method=Method(method),
            vram_planned=None,
            memory_limit=memory_limit,
            day=day,
            data_path=spec.dataset.path,
            data_sha256=None,
            more_paths=[source.path for source in spec.dataset.more],
            more_sha256=["b" * 64 for _ in spec.dataset.more],
            eval_path=spec.dataset.eval_path,
            final_path=spec.dataset.final_path,
            regression_path=spec.evaluation.regression,
            output_dir=str(folder / "result"),
            checkpoint_dir=str(folder / "checkpoints"),
            earlier_checkpoints=[str(tmp_path / resume / "checkpoints")] if resume else [],
            cache_dir=str(cache_dir or cache),
            lm_eval_tasks=str(lm_eval_tasks) if lm_eval_tasks else None,
        )

    return make


@pytest.fixture
def recipe(start: Callable[..., Start]) -> Recipe:
    """Run the recipe on a tiny model, by what `start` takes."""
    from loractl.worker.recipe.recipe import train

    def run(where: str = "a", *, stop_after: int | None = None, **keys: Any) -> tuple[Ended, list]:
        told: list = []
        state = Run(order=start(where, **keys), tell=told.append)
        if stop_after is not None:

            def tell(message: object) -> None:
                told.append(message)
                if isinstance(message, Stepped) and message.step >= stop_after:
                    state.stop.saves.set()
                    state.stop.came.set()

            object.__setattr__(state, "tell", tell)
        try:
            return train(state), told
        except Stopped:
            return Ended(job_id=1, reason=Reason.DRAINED, message="stopped"), told
        finally:
            if next(_trained) == 0:
                _settle()  # what a training imports when it comes to it

    return run
