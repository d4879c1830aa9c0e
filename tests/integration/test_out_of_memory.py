"""Out of memory on real trainings: the probe, the steps down, and the checkpoint that is taken up in other pieces.

The limit is the kernel's own on the trainer's process (RLIMIT_DATA), so that torch's allocator really fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.job.adjustment import Adjustment
from loractl.common.job.method import Method, Parallel, Roomy
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.common.memory.plan import predict
from loractl.common.memory.step import Stack
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.base.model import load_base
from loractl.worker.protocol.messages import Adjusted, Ended, Note, Planned, Start, Stepped, Told, decode_told, encode
from loractl.worker.recipe import fit
from loractl.worker.recipe.need import lowered_limit
from loractl.worker.recipe.recipe import train
from loractl.worker.recipe.run import Run, Stopped

from .. import warm
from ..gangs import train_on

MIB, GIB = 2**20, 2**30
LIMIT = 600 * MIB
"""Too little for 16 of the rows below at once (about 430 MiB in bf16, twice that in fp32, and the libraries' 256), and
enough for one."""


@pytest.fixture(scope="session")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama made wider: its activations take more than anything that the libraries do beside them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "wide"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 256, 768, 4, 64
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """44 conversations of 200 to 450 tokens, 4 of them held out; their answers have different lengths."""
    return _rows(tmp_path / "data.jsonl", words=20)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """The same with a fifth of the tokens or less, for tests that are not about a limit."""
    return _rows(tmp_path / "short.jsonl", words=2)


def _rows(path: Path, *, words: int) -> Path:
    with path.open("w") as stream:
        for n in range(44):
            user = f"ticket {n}: " + "something is broken " * (words * (8 + (n * 7) % 13) // 20)
            answer = "queue: " + ("storage ", "network ", "gpu ")[n % 3] * (3 + n % 5)
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_order(
    folder: Path,
    model: Path,
    data: Path,
    *,
    method: str = "lora",
    limit: int | None = None,
    adjustment: Adjustment | None = None,
    resume: Path | None = None,
    lora: dict[str, Any] | None = None,
    samples: int = 2,
    job: dict[str, Any] | None = None,
    **training: Any,
) -> Start:
    """An order on the CPU; what it leaves behind comes under `folder`. `job`: keys beside the usual sections."""
    spec = JobSpec.model_validate(
        {
            "name": "tiny",
            "base_model": str(model),
            "method": method,
            "dataset": {"path": str(data), "max_length": 512, "test_size": 0.1},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **(lora or {})},
            "training": {"max_steps": 4, "logging_steps": 1, "save_steps": 2, **training},
            "evaluation": {"samples": samples, "max_new_tokens": 4},
            **(job or {}),
        }
    )
    (folder / "result").mkdir(parents=True)
    return Start(
        job_id=1,
        attempt=1,
        user="t",
        node="n:0",
        gpu="cpu",
        device="cpu",
        spec=spec,
        method=Method(method),
        vram_planned=None,
        memory_limit=limit,
        adjustment=adjustment or Adjustment(),
        data_path=str(data),
        data_sha256=None,
        eval_path=None,
        output_dir=str(folder / "result"),
        checkpoint_dir=str(folder / "checkpoints"),
        earlier_checkpoints=[str(resume / "checkpoints")] if resume else [],
        cache_dir=str(folder.parent / "cache"),
    )


def here(order: Start, *, stop_after: int | None = None) -> list[Told]:
    """Run the recipe in this process, which no limit holds, and return what it told."""
    told: list[Told] = []
    run = Run(order=order, tell=told.append)

    def tell(message: Told) -> None:
        told.append(message)
        if stop_after is not None and isinstance(message, Stepped) and message.step >= stop_after:
            run.stop.saves.set()
            run.stop.came.set()

    run.tell = tell
    try:
        told.append(train(run))
    except Stopped:
        assert stop_after is not None
    return told


def in_a_trainer(order: Start, warm_start: dict[str, str]) -> list[Told]:
    """Run a trainer process to its end and return what it told. oneDNN ends some where it gets no memory; then another
    one is run, as a supervisor would start one."""
    for _ in range(3):
        told, code, errors = _to_its_end(order, warm_start)
        if code != -signal.SIGSEGV:
            break
    assert code == 0, errors
    return told


def _to_its_end(order: Start, warm_start: dict[str, str]) -> tuple[list[Told], int, str]:
    trainer = subprocess.Popen(
        [sys.executable, "-m", warm.OWN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **warm_start, "OMP_NUM_THREADS": "1"},
    )
    assert trainer.stdin and trainer.stdout and trainer.stderr
    trainer.stdin.write(encode(order))
    trainer.stdin.flush()
    told = [decode_told(line) for line in trainer.stdout]  # until it has ended
    errors = trainer.stderr.read()
    return told, trainer.wait(timeout=20), errors


def losses(told: list[Told]) -> dict[int, float]:
    return {m.step: m.metrics["loss"] for m in told if isinstance(m, Stepped) and "loss" in m.metrics}


def notes(told: list[Told]) -> list[str]:
    return [m.text for m in told if isinstance(m, Note) and m.kind == "memory"]


def apart(some: dict[int, float], others: dict[int, float]) -> float:
    """The largest difference of two curves that have the same steps."""
    assert some and some.keys() == others.keys()
    return max(abs(some[step] - others[step]) for step in some)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_probe_changes_no_bit_of_the_run(
    method: str, tiny_model: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, try_longest = [], fit.try_longest
    monkeypatch.setattr(fit, "try_longest", lambda *of: probed.append(try_longest(*of)))  # the real one, counted
    settings: dict[str, Any] = {
        "method": method,
        "samples": 0,
        "lora": {"lora_dropout": 0.1},  # so that the random numbers matter
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_steps": 2,
        "learning_rate": 5e-3,
    }
    without = here(make_order(tmp_path / "without", tiny_model, short, **settings))
    assert not probed, "nothing to try on a processor without a limit"
    probe = here(make_order(tmp_path / "with", tiny_model, short, limit=8 * GIB, **settings))
    assert len(probed) == 1
    assert losses(probe) == losses(without)
    weights = [tmp_path / name / "result" / "adapter" / "adapter_model.safetensors" for name in ("with", "without")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_checkpoint_is_taken_up_in_smaller_pieces_of_the_same_batch(
    tiny_model: Path, short: Path, tmp_path: Path
) -> None:
    """40 rows in batches of 16: each epoch ends with one of 8. The change comes in mid-epoch and the run passes two."""
    settings: dict[str, Any] = {
        "method": "qlora",
        "samples": 0,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    whole = losses(here(make_order(tmp_path / "whole", tiny_model, short, **settings)))
    here(make_order(tmp_path / "first", tiny_model, short, **settings), stop_after=2)
    smaller = Adjustment(micro_batch=4, accumulation=4)
    order = make_order(tmp_path / "rest", tiny_model, short, adjustment=smaller, resume=tmp_path / "first", **settings)
    told = here(order)
    resumed = next(m.resumed_from_step for m in told if isinstance(m, Note) and m.kind == "resumed")
    assert resumed is not None and 2 <= resumed < 8
    assert apart(losses(told), {step: loss for step, loss in whole.items() if step > resumed}) < 1e-3
    report = json.loads((tmp_path / "rest" / "result" / "report.json").read_text())["training"]
    assert (report["per_device_train_batch_size"], report["gradient_accumulation_steps"]) == (4, 4)
    assert report["asked"]["per_device_train_batch_size"] == 8
    assert len(report["losses"]) == 8, "the curve of the report is whole"


def test_a_checkpoint_of_another_effective_batch_is_not_taken_up(tiny_model: Path, short: Path, tmp_path: Path) -> None:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "samples": 0, "max_steps": 2}
    here(make_order(tmp_path / "first", tiny_model, short, **batch))
    batch["gradient_accumulation_steps"] = 1
    told = here(make_order(tmp_path / "rest", tiny_model, short, resume=tmp_path / "first", **batch))
    assert not [m for m in told if isinstance(m, Note) and m.kind == "resumed"]


def test_a_run_that_does_not_fit_learns_the_same_in_smaller_pieces(
    wide_model: Path, data: Path, tmp_path: Path, warm_start: dict[str, str]
) -> None:
    batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 2}
    whole = losses(here(make_order(tmp_path / "whole", wide_model, data, samples=0, **batch)))
    told = in_a_trainer(make_order(tmp_path / "less", wide_model, data, limit=LIMIT, **batch), warm_start)
    ended = told[-1]
    assert isinstance(ended, Ended) and ended.reason is Reason.OK, [*notes(told), ended]
    assert (
        notes(told)[0] == "out of memory with 16 rows at once: continues with 8, accumulating 2 (same effective batch)"
    )
    taken = [m.adjustment for m in told if isinstance(m, Adjusted)]
    assert len(taken) == len(notes(told))
    assert all((a.micro_batch or 0) * (a.accumulation or 0) == 16 for a in taken)
    assert apart(losses(told), whole) < 1e-3
    assert ended.peaks is not None and (ended.peaks.reserved or 0) > 100 * MIB
    report = json.loads((tmp_path / "less" / "result" / "report.json").read_text())
    assert report["training"]["adjustment"] == taken[-1].as_json()
    assert report["training"]["changes"] == notes(told)
    assert "16 × 1 asked: memory ran out" in (tmp_path / "less" / "result" / "report.html").read_text()


@pytest.mark.long
def test_a_rank_without_room_makes_the_batch_smaller_for_all(wide_model: Path, data: Path, tmp_path: Path) -> None:
    # one precision for every processor: what fits below counts fp32
    batch = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 2, "dtype": "float32"}
    whole = train_on(make_order(tmp_path / "whole", wide_model, data, **batch), Parallel.NONE)
    order = make_order(tmp_path / "less", wide_model, data, limit=8 * GIB, **batch)
    # too little for 16 rows, and for 8 enough with the kernels that come later: no room is held for those in the others
    less = train_on(order, Parallel.DATA, limit_of_others=600 * MIB)
    assert less.ends == ["ok", "ok"]
    notes = [m.text for m in less.told if isinstance(m, Note) and m.kind == "memory"]
    less_of_each = "with 16 rows at once on each of 2 cards: continues with 8, accumulating 2 (same effective batch)"
    assert notes[0] == f"out of memory {less_of_each}"
    assert less.losses == pytest.approx(whole.losses, abs=1e-3)


def test_a_run_of_which_not_one_row_fits_says_so_after_every_step_down(
    wide_model: Path, data: Path, tmp_path: Path, warm_start: dict[str, str]
) -> None:
    order = make_order(tmp_path / "none", wide_model, data, limit=140 * MIB, per_device_train_batch_size=2)
    told = in_a_trainer(order, warm_start)
    ended = told[-1]
    assert isinstance(ended, Ended) and ended.reason is Reason.OUT_OF_MEMORY
    assert ended.message.startswith("one row of 447 tokens does not fit, even with gradient checkpointing")
    assert [text.partition(": ")[2] for text in notes(told)] == [
        "continues with 1, accumulating 8 (same effective batch)",
        "continues with gradient checkpointing",
    ]
    assert not losses(told)


def test_the_need_is_planned_again_for_the_lengths_of_the_rows(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    order = make_order(tmp_path / "a", tiny_model, data, max_steps=1, per_device_train_batch_size=2)
    told = here(order)
    planned = next(m for m in told if isinstance(m, Planned))
    asked = predict(order.spec, stack=Stack(on_gpu=False))  # for rows of max_length: longer than these
    assert planned.lora is not None and asked.lora is not None and planned.lora < asked.lora
    assert planned.qlora is not None and asked.qlora is not None and planned.qlora < asked.qlora


@pytest.mark.long
def test_an_attempt_that_was_given_room_plans_its_own_size_and_the_job_s_need(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """On a simulated card: what a trainer plans is a card's, and later attempts have their own room or none."""
    room = Adjustment(micro_batch=1, accumulation=8, gradient_checkpointing=False)
    given = make_order(tmp_path / "a", tiny_model, data, max_steps=1, per_device_train_batch_size=2, adjustment=room)
    other = make_order(tmp_path / "b", tiny_model, data, max_steps=1, per_device_train_batch_size=2)
    roomy, plain = (
        next(m for m in here(order.model_copy(update={"gpu": "sim-0"})) if isinstance(m, Planned))
        for order in (given, other)
    )
    assert (roomy.lora, roomy.qlora, roomy.roomy) == (plain.lora, plain.qlora, plain.roomy)
    whole = Roomy.read(plain.roomy).lora[0]
    assert whole.micro_batch == 2 and roomy.lora is not None and roomy.running is not None and plain.running is None
    assert roomy.lora < roomy.running < whole.bytes, "one of two rows at once"
    page = (tmp_path / "a" / "result" / "report.html").read_text()
    assert "1 × 8 accumulated, 2 × 4 asked: so its card had room to train without recomputing" in page


@pytest.mark.long
def test_a_run_that_was_given_room_recomputes_first_when_it_does_not_fit(
    wide_model: Path, data: Path, tmp_path: Path, warm_start: warm.Start
) -> None:
    room = Adjustment(gradient_checkpointing=False)
    order = make_order(
        tmp_path / "a", wide_model, data, limit=LIMIT, per_device_train_batch_size=16, max_steps=1, adjustment=room
    )
    told = in_a_trainer(order, warm_start)
    ended = told[-1]
    assert isinstance(ended, Ended) and ended.reason is Reason.OK
    assert next(iter(notes(told))) == "out of memory with 16 rows at once: continues with gradient checkpointing"
    adjustments = [m.adjustment for m in told if isinstance(m, Adjusted)]
    assert adjustments[0] == Adjustment(gradient_checkpointing=True)


@pytest.mark.long
@pytest.mark.parametrize(
    ("planned", "size", "limit"), [(10, 8, 9), (None, 8, 8), (10, None, 12), (10, 20, 12)], ids=str
)
def test_a_trainer_is_held_to_what_a_better_plan_leaves_it(
    planned: int | None, size: int | None, limit: int, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    """12 GiB were reserved for a plan of 10: such jobs took a fifth more. The store lowers it by the same rule."""
    order = make_order(tmp_path / "a", tiny_model, data, limit=12 * GIB)
    order = order.model_copy(update={"vram_reserved": 12 * GIB, "vram_planned": planned and planned * GIB})
    lowered = lowered_limit(order, size and size * GIB)
    assert lowered is not None and lowered // GIB == limit


@pytest.mark.parametrize("given", [MIB, 64 * GIB])
def test_an_unknown_architecture_is_traced_and_refused_before_its_weights_are_loaded(
    given: int, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path / "opt"
    shutil.copytree(tiny_model, folder)
    config = OPTConfig(
        vocab_size=400, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    )
    OPTForCausalLM(config).save_pretrained(folder)
    order = make_order(tmp_path / "a", folder, data, max_steps=1, per_device_train_batch_size=2)
    order = order.model_copy(update={"gpu": "SIM-0", "vram_reserved": given})
    if given > MIB:
        assert any(isinstance(m, Planned) and m.lora for m in here(order))
        return
    with pytest.raises(TrainingFailed, match=r"its plan by trace is \d+\.\d GiB, the card gives 0\.0 GiB") as failure:
        here(order)
    assert failure.value.reason is Reason.OUT_OF_MEMORY


@pytest.mark.long
def test_what_does_not_fit_while_it_becomes_nf4_is_out_of_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers collects what fails in its conversion, and raises a sentence that does not say what it was."""

    def too_large(*_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(2**50, dtype=torch.uint8)  # an allocation that really fails

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", too_large)
    with pytest.raises(RuntimeError) as failure:
        load_base(str(tiny_model), Method.QLORA, "cpu", choose_precision("cpu"))
    assert is_out_of_memory(failure.value), failure.value
