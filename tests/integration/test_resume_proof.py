"""A training that is killed three times, at random steps, ends as one that was not killed: bit for bit.

Real trainer processes under the real supervisor, with SIGKILL; the third attempt runs on another box, which knows no
more than what the artifact store and the database hold. The last one starts cold, with a hash seed of its own.
RESUME_SEED=7 repeats a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from loractl.common.artifacts import WEIGHTS, ArtifactStore, open_store
from loractl.common.binding import result_binding
from loractl.common.job.method import Method, Need, permitted_methods
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason, Status
from loractl.common.memory.fit import MemoryPlan
from loractl.common.settings import TRAINER, load_settings
from loractl.common.store.database import make_engine
from loractl.common.store.records import Claim, NodeState, Submission
from loractl.common.store.store import Store
from loractl.worker.attempt.attempt import SupervisedAttempt, begin
from loractl.worker.attempt.storage.client import StoreClient
from loractl.worker.attempt.supervisor import supervise
from loractl.worker.attempt.workplace import Drain, Workplace
from loractl.worker.base.arithmetic import Precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.model import load_tokenizer
from loractl.worker.data.prepared import prepare_data
from loractl.worker.device.devices import find_devices
from loractl.worker.protocol.marker import MARKER, Checkpoint, close_checkpoint
from loractl.worker.protocol.messages import Note, Saved, Start, Stepped, Told
from loractl.worker.recipe import arguments, recipe
from loractl.worker.recipe.recipe import train
from loractl.worker.recipe.resume import PROOF_TOLERANCE, ResumeProof, belongs_to, checkpoint_to_resume, tell_resumed
from loractl.worker.recipe.run import Run, Stopped

from .. import warm
from ..models import make_tiny_model, write_helpdesk
from ..unit.factories import Clock

STEPS, SAVE_EVERY = 24, 5
SEED = int(os.environ.get("RESUME_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@dataclass
class Kill:
    """SIGKILL for the trainer of this process, `delay` seconds after it told the step."""

    step: int
    delay: float
    done: threading.Event = field(default_factory=threading.Event)

    def hear(self, attempt: SupervisedAttempt, message: Told) -> None:
        """In place of SupervisedAttempt.hear: passes everything on, and strikes."""
        HEAR(attempt, message)
        if isinstance(message, Stepped) and message.step >= self.step and not self.done.is_set():
            time.sleep(self.delay)
            self.strike()

    def strike(self) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended has no command line
                if child.cmdline()[-1:] in ([warm.__name__], [TRAINER]):  # not a server
                    child.kill()
                    self.done.set()


HEAR = SupervisedAttempt.hear
WARM = {"LORACTL_TRAINER": warm.__name__}


@dataclass
class Lab:
    """A database and an artifact store, and boxes that share no other file."""

    folder: Path
    clock: Clock
    store: Store
    artifacts: ArtifactStore

    def submit(self, model: Path, method: str) -> int:
        data = write_helpdesk(self.folder / "data.jsonl", 40)
        uri, sha256 = self.artifacts.put_dataset(data)
        spec = JobSpec.model_validate(
            {
                "name": "tiny", "base_model": str(model), "method": method, "max_retries": 9,
                "dataset": {"path": str(data), "max_length": 128},
                "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
                "training": {
                    "max_steps": STEPS, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "eval_steps": 7,
                    "gradient_accumulation_steps": 1, "save_steps": SAVE_EVERY, "logging_steps": 1,
                },
                "evaluation": {"samples": 0},
            }
        )  # fmt: skip
        need = Need(lora=None, qlora=None)
        stored = {"path": {"uri": uri, "sha256": sha256}}
        plan = MemoryPlan(need=need, planned=need)
        wanted = Submission(spec=spec, user="ada", data=stored, plan=plan, methods=permitted_methods(spec.method))
        return self.store.jobs.submit(wanted)

    def attempt(self, box: str) -> Status | None:
        """Claim and run on a box."""
        home = self.folder / box
        settings = load_settings({"LORACTL_HOME": str(home), "LORACTL_ARTIFACTS_URL": self.artifacts.url, **WARM})
        (device,) = find_devices(load_settings({"LORACTL_HOME": str(home), "LORACTL_DEVICES": "cpu"}))
        self.clock.forward(3600)  # whatever it waits for is over
        self.store.cards.see(
            NodeState(node=f"{box}:0", host=box, gpu="cpu", device_name="CPU", kind="cpu", total=2**40)
        )
        claim = self.store.attempts.claim(f"{box}:0")
        assert isinstance(claim, Claim)
        place = Workplace(
            settings=settings, store=self.store, artifacts=StoreClient(self.artifacts.url), device=device,
            node=f"{box}:0", drain=Drain(),
        )  # fmt: skip
        return supervise(place, begin(claim, settings.work_dir))

    def curve(self, job_id: int, name: str) -> dict[tuple[int, int], float]:
        return {(p.attempt, p.step): p.value for p in self.store.jobs.metrics(job_id, name)}

    def adapter(self, job_id: int) -> dict[str, bytes]:
        import torch
        from safetensors.torch import load

        stored = result_binding(self.store, self.store.jobs.get(job_id))
        assert stored.manifest_sha256 is not None
        weights = load(self.artifacts.read_bytes(stored, WEIGHTS))
        return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in weights.items()}


@pytest.fixture
def lab(sqlite_template: Path, tmp_path: Path) -> Any:
    clock, engine = Clock(), make_engine(f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'lab.db')}")
    settings = load_settings({"LORACTL_HOME": str(tmp_path / "lab")})
    yield Lab(tmp_path, clock, Store(engine, clock), open_store(settings))
    engine.dispose()


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.long), "qlora"])
def test_three_kills_in_one_run_change_no_bit_of_it(
    lab: Lab,
    tiny_model: Path,
    method: str,
    warm_start: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    for name, value in {**warm_start, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    chance = random.Random(f"{SEED} {method}")
    kills = [Kill(step, chance.uniform(0, 0.03)) for step in sorted(chance.sample(range(2, STEPS - 2), 3))]
    whole, killed = lab.submit(tiny_model, method), lab.submit(tiny_model, method)
    assert lab.attempt("heron") is Status.SUCCEEDED

    for kill, box in zip(kills, ("heron", "heron", "owl"), strict=True):
        monkeypatch.setattr(SupervisedAttempt, "hear", lambda attempt, message, kill=kill: kill.hear(attempt, message))
        assert lab.attempt(box) is Status.QUEUED
        assert kill.done.is_set()
        if lab.store.jobs.get(killed).held:  # thrice without a further checkpoint
            lab.store.jobs.release(killed, "ada")
    monkeypatch.setattr(SupervisedAttempt, "hear", HEAR)
    monkeypatch.delenv(warm.SOCKET)
    assert lab.attempt("owl") is Status.SUCCEEDED

    attempts = lab.store.attempts.of_job(killed)
    assert [a.reason for a in attempts] == [*[Reason.KILLED] * 3, Reason.OK]
    resumed = [a.resumed_from_step or 0 for a in attempts[1:]]
    reached = [max(step for n, step in lab.curve(killed, "loss") if n == a.attempt) for a in attempts[:3]]
    lost = [step - begin for step, begin in zip(reached, resumed, strict=True)]
    differences = {}
    for name in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        right = {step: value for (_, step), value in lab.curve(whole, name).items()}
        seen = lab.curve(killed, name)
        assert {step for _, step in seen} == right.keys(), f"every {name} was logged"
        differences[name] = max(abs(value - right[step]) for (_, step), value in seen.items())
    mine, theirs = lab.adapter(killed), lab.adapter(whole)
    same = mine == theirs and len(mine) > 0

    row = f"{method:6} killed after steps {reached}, resumed from {resumed}; "
    row += f"largest difference of any logged value {max(differences.values())}; "
    row += f"adapter {'equal' if same else 'DIFFERENT'} in {len(mine)} tensors; seed {SEED}"
    print(f"\n{row}")
    record_property("resume", row)
    assert differences == dict.fromkeys(differences, 0.0)
    assert same
    # the one whose saving the kill may have cut, and the last that was whole before it
    assert all(steps < 2 * SAVE_EVERY for steps in lost)


def test_an_attempt_whose_checkpoint_is_broken_on_its_box_goes_on_from_the_store_s_copy(
    lab: Lab, tiny_model: Path, warm_start: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**warm_start, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    job, kill = lab.submit(tiny_model, "lora"), Kill(SAVE_EVERY + 2, 0.0)
    monkeypatch.setattr(SupervisedAttempt, "hear", lambda attempt, message: kill.hear(attempt, message))
    assert lab.attempt("heron") is Status.QUEUED
    monkeypatch.setattr(SupervisedAttempt, "hear", HEAR)
    (state,) = (lab.folder / "heron").glob(f"work/{job}/attempt-1/checkpoints/*/training_state.json")
    state.write_bytes(state.read_bytes()[:-2] + b"]]")
    assert lab.attempt("heron") is Status.SUCCEEDED
    assert [a.resumed_from_step for a in lab.store.attempts.of_job(job)] == [None, SAVE_EVERY]
    told = [event.text for event in lab.store.jobs.events(job) if event.kind in ("withdrawn", "resumed")]
    assert told[0].startswith(f"the checkpoint of step {SAVE_EVERY} can't be read: ")
    assert told[0].endswith("; it is withdrawn on this box")
    assert told[1:] == [f"resumed from the checkpoint of step {SAVE_EVERY}"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"training": {"per_device_train_batch_size": 2}}, "training"),
    "learning rate": ({"training": {"learning_rate": 1e-4}}, "training"),
    "rank": ({"lora": {"r": 8}}, "lora"),
    "base revision": ({"revision": "v2"}, "base_model"),
    "method": ({"method": "qlora"}, "method"),
    "data": ({}, "data"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_checkpoint_of_something_else_is_refused_and_the_history_says_what_differs(
    tiny_model: Path, tmp_path: Path, changed: str
) -> None:
    keys, differs = CHANGES[changed]
    before, _ = _run(tmp_path / "before", tiny_model)
    rows = write_helpdesk(tmp_path / "data.jsonl")
    saved = tmp_path / "before" / "checkpoints" / "checkpoint-4"
    saved.mkdir(parents=True)
    close_checkpoint(saved, step=4, finished=False, belongs_to=belongs_to(before.order, _data(rows, tiny_model)))

    again, told = _run(tmp_path / "again", tiny_model, earlier=saved.parent)
    assert checkpoint_to_resume(again, _data(rows, tiny_model)) is not None, "of the same job it is taken up"
    again, told = _run(tmp_path / "changed", tiny_model, earlier=saved.parent, **keys)
    if changed == "data":
        rows = write_helpdesk(tmp_path / "other.jsonl", 30)
    assert checkpoint_to_resume(again, _data(rows, tiny_model)) is None
    assert [(m.kind, m.text) for m in told if isinstance(m, Note)] == [
        ("refused", f"the checkpoint of step 4 is not resumed: {differs} differ")
    ]


def test_another_base_under_the_same_name_is_noticed_and_its_checkpoint_not_tried_again(tmp_path: Path) -> None:
    """Two boxes whose copies of a model differ: all names and hashes of the job are equal, the losses are not."""
    model = make_tiny_model(tmp_path / "model")
    rows = write_helpdesk(tmp_path / "data.jsonl")
    first, told = _run(tmp_path / "first", model, data=rows, stop_after=3)
    with pytest.raises(Stopped):
        train(first)
    (saved,) = (Path(m.path) for m in told if isinstance(m, Saved))
    _change_weights(model)
    second, told = _run(tmp_path / "second", model, data=rows, earlier=saved.parent)
    with pytest.raises(TrainingFailed, match="its proof rows is") as failed:
        train(second)
    assert failed.value.withdrawn == str(saved)
    assert not any(isinstance(message, Note) and message.kind == "resumed" for message in told)
    assert not (saved / MARKER).exists()
    third, told = _run(tmp_path / "third", model, data=rows, earlier=saved.parent)
    assert checkpoint_to_resume(third, _data(rows, model)) is None
    assert [message.text for message in told if isinstance(message, Note)] == [
        "no whole checkpoint is left, so the training starts again from its first step"
    ]


class Measured(ResumeProof):
    """A model whose loss is known."""

    def loss(self, model: float) -> float:
        return model


@pytest.mark.parametrize("way", [-1, 1])
def test_a_proof_that_differs_in_either_direction_withdraws_its_checkpoint(tmp_path: Path, way: int) -> None:
    """Another base may do better on the proof rows, too."""
    proof = Measured(rows=(), pad=0, compute=torch.float32, lean=True)
    saved = Checkpoint(path=tmp_path, step=3, finished=False, proof=2.0)
    proof.check(2.0 * (1 + 0.9 * way * PROOF_TOLERANCE), saved)
    with pytest.raises(TrainingFailed, match="its proof rows is") as failed:
        proof.check(2.0 * (1 + 1.1 * way * PROOF_TOLERANCE), saved)
    assert failed.value.withdrawn == str(tmp_path)


DAMAGE = {
    "the random streams": ("training_state.json", '"python"', '"pithon"'),
    "a number of them": ("training_state.json", '"python", {"tuple": [3,', '"python", {"tuple": [7,'),
    "the course": ("training_state.json", '"log_history"', '"lag_history"'),
    "a loss of it": ("training_state.json", '["step", 1]', '["stap", 1]'),
    "the best evaluation": ("best.json", '"loss"', '"lass"'),
    "its adapter": ("best_adapter.safetensors", '{"', "{["),
}


@pytest.mark.parametrize("part", DAMAGE)
def test_a_damaged_part_of_a_checkpoint_is_found_before_the_first_step_and_not_tried_again(
    begun: Path, tiny_model: Path, tmp_path: Path, part: str
) -> None:
    """Its marker calls it complete: each file has its size."""
    name, right, wrong = DAMAGE[part]
    saved = tmp_path / "checkpoints" / begun.name
    shutil.copytree(begun, saved)
    whole = (saved / name).read_bytes()
    assert right.encode() in whole
    (saved / name).write_bytes(whole.replace(right.encode(), wrong.encode(), 1))
    again, told = _run(
        tmp_path / "again", tiny_model, data=begun.parents[2] / "data.jsonl", earlier=saved.parent, **BEST
    )
    with pytest.raises(TrainingFailed, match=r"the checkpoint of step \d can't be read"):
        train(again)
    assert not (saved / MARKER).exists()
    assert not any(isinstance(message, Stepped) for message in told)


BEST: dict[str, Any] = {"training": {"eval_steps": 2, "load_best_model_at_end": True, "logging_steps": 1}}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The checkpoint of a training that was stopped half-way, with its best adapter."""
    folder = tmp_path_factory.mktemp("begun")
    rows = write_helpdesk(folder / "data.jsonl")
    run, told = _run(folder / "run", tiny_model, data=rows, stop_after=4, **BEST)
    with pytest.raises(Stopped):
        train(run)
    return next(Path(m.path) for m in told if isinstance(m, Saved))


def test_a_training_goes_on_with_the_optimizer_that_it_began_with_where_the_device_would_take_another(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QLoRA without a word about the optimizer takes AdamW in paged 8 bit on a card, and torch's on a processor."""
    rows = write_helpdesk(tmp_path / "data.jsonl")
    keys: dict[str, Any] = {"method": "qlora", "lora": {"r": 64}, "training": {"logging_steps": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "optimizer_name", lambda *_, **__: "paged_adamw_8bit")  # as on a card
        whole, _ = _run(tmp_path / "whole", tiny_model, data=rows, **keys)
        train(whole)
        first, told = _run(tmp_path / "first", tiny_model, data=rows, stop_after=3, **keys)
        with pytest.raises(Stopped):
            train(first)
    (saved,) = (Path(m.path) for m in told if isinstance(m, Saved))
    second, told = _run(tmp_path / "second", tiny_model, data=rows, earlier=saved.parent, **keys)
    train(second)
    (said,) = (message.text for message in told if isinstance(message, Note) and message.kind == "resumed")
    assert said.endswith(", with the optimizer that it began with: paged_adamw_8bit")
    weights = [(run / "result" / "adapter" / "adapter_model.safetensors").read_bytes() for run in
               (tmp_path / "whole", tmp_path / "second")]  # fmt: skip
    assert weights[0] == weights[1], "as one that was never interrupted"
    assert json.loads((tmp_path / "second" / "result" / "job.json").read_text())["training_arguments"]["optim"] == (
        "paged_adamw_8bit"
    )


def test_a_training_goes_on_in_the_device_s_number_format_with_a_scaler_of_its_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And back again, as a card that takes bfloat16 does with what one before Ampere has saved."""
    rows = write_helpdesk(tmp_path / "data.jsonl")
    formats = [
        Precision(base=torch.float32, amp=None),
        Precision(base=torch.float16, amp="fp16"),
        Precision(base=torch.bfloat16, amp="bf16"),
    ]
    saved, said = None, []
    for number, precision in enumerate(formats):
        monkeypatch.setattr(recipe, "choose_precision", lambda *_, precision=precision: precision)
        stop_after = (2, 4, None)[number]
        logs: dict[str, Any] = {"training": {"logging_steps": 1}}
        run, told = _run(tmp_path / str(number), tiny_model, data=rows, earlier=saved, stop_after=stop_after, **logs)
        with contextlib.suppress(Stopped):
            train(run)
        saved = tmp_path / str(number) / "checkpoints"
        said += [
            message.text.partition("; ")[2]
            for message in told
            if isinstance(message, Note) and message.kind == "resumed"
        ]
    assert said == [
        "it was trained in fp32 and continues in fp16 with a fresh loss scaler, as this device computes",
        "it was trained in fp16 and continues in bf16, as this device computes",
    ]
    assert (tmp_path / "2" / "result" / "report.json").exists()


def test_the_history_says_that_an_earlier_version_computed_losses_of_pairs_differently(
    tiny_model: Path, tmp_path: Path
) -> None:
    args: Any = SimpleNamespace(bf16=False, fp16=False)
    for task, dtype, says in (("preference", None, True), ("preference", "fp32", False), ("CAUSAL_LM", None, False)):
        run, told = _run(tmp_path / f"{task}-{dtype}", tiny_model, task_type=task)
        tell_resumed(run, Checkpoint(path=tmp_path, step=3, finished=False, dtype=dtype), args)
        (said,) = (message.text for message in told if isinstance(message, Note))
        assert said.endswith("which computed some losses of pairs differently") == says


def _change_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})


def _run(
    folder: Path,
    model: Path,
    *,
    data: Path | None = None,
    earlier: Path | None = None,
    stop_after: int | None = None,
    **keys: Any,
) -> tuple[Run, list[Told]]:
    """An order on the CPU that has not begun, and what it will tell."""
    settings: dict[str, Any] = {
        "name": "tiny", "base_model": str(model), "method": "lora", "dataset": {"path": str(data or "x.jsonl")},
        "lora": {"r": 4},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        "evaluation": {"samples": 0},
    }  # fmt: skip
    for key, value in keys.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    spec = JobSpec.model_validate(settings)
    (folder / "result").mkdir(parents=True)
    told: list[Told] = []
    order = Start(
        job_id=1, attempt=1, user="t", node="n:0", gpu="cpu", device="cpu", spec=spec, method=Method(spec.method),
        vram_planned=None, data_path=spec.dataset.path, data_sha256=None, eval_path=None,
        output_dir=str(folder / "result"), checkpoint_dir=str(folder / "checkpoints"),
        earlier_checkpoints=[str(earlier)] if earlier else [], cache_dir=str(folder / "cache"),
    )  # fmt: skip

    def tell(message: Told) -> None:
        told.append(message)
        if stop_after is not None and isinstance(message, Stepped) and message.step >= stop_after:
            run.stop.saves.set()
            run.stop.came.set()

    run = Run(order=order, tell=tell)
    return run, told


def _data(rows: Path, model: Path) -> Any:
    spec = JobSpec.model_validate({"name": "t", "base_model": "m", "dataset": {"path": "x.jsonl"}})
    return prepare_data(spec.dataset, str(rows), None, None, load_tokenizer(str(model)), None)
