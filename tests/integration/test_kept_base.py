"""A base that stays between trainings: what comes out is that of a new process, and what is left is found."""

from __future__ import annotations

import _thread
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bitsandbytes import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loractl.common.job.method import Method
from loractl.common.job.status import Reason
from loractl.worker.base import lora, model
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.kept import remains
from loractl.worker.base.kept.base_cache import BaseCache
from loractl.worker.base.kept.knowledge import Knowledge, Known
from loractl.worker.base.kept.model_snapshot import ModelSnapshot
from loractl.worker.base.kept.remains import ProcessBaseline
from loractl.worker.base.model import load_base
from loractl.worker.engine.passes import attention, check_cache, choice, lean, product, shared
from loractl.worker.engine.passes.check_cache import CheckCache
from loractl.worker.engine.passes.lean import LeanPass
from loractl.worker.protocol.messages import Note, Start, Stepped
from loractl.worker.recipe import recipe as recipe_module

from .conftest import Recipe

WEIGHTS = Path("result") / "adapter" / "adapter_model.safetensors"

PAIRS = {
    "lora": ({"lora": {"r": 8, "lora_dropout": 0.1}}, {}),
    "dora after others": (
        {"training.neftune_noise_alpha": 5.0, "training.gradient_checkpointing": True},
        {"lora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}},
    ),
    "qlora": ({"method": "qlora", "training.eval_steps": 2}, {"method": "qlora", "training.eval_steps": 3}),
    "exact qlora": (
        {"method": "qlora", "training.exact": True, "training.gradient_checkpointing": True},
        {"method": "qlora", "training.exact": True, "training.dtype": "auto"},
    ),
}


@pytest.fixture
def tiny_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy: these tests change its files, and the whole run shares the first."""
    return shutil.copytree(tiny_model, tmp_path / "base" / "tiny")


def keys(options: dict[str, Any]) -> dict[str, Any]:
    return {"max_steps": 4, **{name.removeprefix("training."): value for name, value in options.items()}}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_training_on_a_base_that_stayed_equals_one_on_its_own_bit_for_bit(
    recipe: Recipe, tmp_path: Path, pair: str
) -> None:
    first, second = map(keys, PAIRS[pair])
    alone, told_alone = recipe("alone", **second)
    assert alone.reason is Reason.OK
    base_cache = BaseCache()
    for where, options, was_here in (("first", first, False), ("second", second, True)):
        base_cache.begin()
        ended, told = recipe(where, base_cache=base_cache, **options)
        assert ended.reason is Reason.OK
        loaded = [n.text for n in told if isinstance(n, Note) and n.kind == "phase" and "tiny" in n.text]
        assert [("loaded already" in text) for text in loaded] == [was_here]
        size, why = base_cache.settle()
        assert why == "" and size is not None and size > 100_000
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    # how often progress is told is not compared: the second one's base may be measured already
    losses = [[m.metrics for m in said if isinstance(m, Stepped) and m.metrics] for said in (told, told_alone)]
    assert losses[0] == losses[1] and losses[0]


def test_a_base_stays_after_a_training_whose_optimizer_pages(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a card bitsandbytes keeps all paged state in a list for good, and its memory is never given back."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    make = Optimizer8bit.get_state_buffer

    def as_on_a_card(self: Any, parameter: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made: torch.Tensor = make(self, parameter, dtype)
        if self.is_paged:
            self.page_mng.paged_tensors.append(made)
        return made

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", as_on_a_card)
    asked = {"method": "qlora", "optim": "paged_adamw_8bit", "max_steps": 2, "lora": {"r": 512}}
    recipe("alone", **asked)
    listed = F.GlobalPageManager.get_instance().paged_tensors
    assert listed, "a process that ends with its training pages"
    listed.clear()
    base_cache = BaseCache()
    base_cache.begin()
    ended, _ = recipe("kept", base_cache=base_cache, **asked)
    assert ended.reason is Reason.OK
    assert base_cache.settle()[1] == ""
    assert (tmp_path / "kept" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()


def test_a_base_that_was_measured_in_smaller_batches_is_measured_anew_for_the_next_one(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Smaller batches take other kernels: what they give is rounded otherwise."""
    room, scores = 1, LeanPass.scores

    def with_room(self: LeanPass, rows: Any) -> Any:
        if len(rows) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scores(self, rows)

    monkeypatch.setattr(LeanPass, "scores", with_room)
    base_cache, measured = BaseCache(), {}
    for job_id in (1, 2, 3):
        base_cache.begin()
        recipe(str(job_id), base_cache=base_cache, job_id=job_id, max_steps=1)
        assert base_cache.settle()[1] == ""
        report = json.loads((tmp_path / str(job_id) / "result" / "report.json").read_text())
        measured[job_id], room = report["evaluation"]["base_measured_by_job"], 99
    assert measured == {1: None, 2: None, 3: 2}


def test_other_files_under_the_same_name_are_loaded_anew(recipe: Recipe, tiny_model: Path) -> None:
    base_cache = BaseCache()
    base_cache.begin()
    recipe("one", base_cache=base_cache, max_steps=1)
    assert base_cache.settle()[1] == ""
    with_one_bit_more(tiny_model / "model.safetensors")
    base_cache.begin()
    _, told = recipe("two", base_cache=base_cache, max_steps=1)
    assert not is_here_already(told)


def with_one_bit_more(file: Path) -> None:
    """Other weights, of the same size and date, where the old ones were."""
    content, dates = file.read_bytes(), file.stat()
    file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))


def is_here_already(told: list[Any]) -> bool:
    return any("loaded already" in note.text for note in told if isinstance(note, Note))


def test_files_of_the_same_content_are_the_same_base_whatever_else_of_them_changed(
    recipe: Recipe, start: Callable[..., Start], tiny_model: Path, tmp_path: Path
) -> None:
    base_cache, file = BaseCache(), tiny_model / "model.safetensors"
    base_cache.begin()
    recipe("one", base_cache=base_cache, max_steps=1)
    order = start("two", keep=True)

    def joins() -> bool:
        source, load = (order.spec.base_model, order.spec.revision), pytest.fail
        return base_cache.base(order.keep, source, load, joins=True)[1]

    assert joins()
    file.chmod(0o600)
    assert joins()
    (tmp_path / "link").hardlink_to(file)
    assert joins()
    os.utime(file)
    assert joins()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    (tiny_model / "chat_template.jinja.txt").write_text("no part of the base")
    assert joins()
    with_one_bit_more(file)
    with pytest.raises(TrainingFailed, match="has another base"):
        joins()
    file.write_bytes(content)
    assert joins(), "the base that is here was loaded from these"


def test_settings_that_came_or_went_are_loaded_anew(
    recipe: Recipe, start: Callable[..., Start], tiny_model: Path, tmp_path: Path
) -> None:
    settings, base_cache, loaded = tiny_model / "generation_config.json", BaseCache(), list[int]()
    settings.unlink()
    base_cache.begin()
    recipe("without", base_cache=base_cache, max_steps=1)
    order = start("now", keep=True)

    def ends() -> Any:
        """After which tokens an answer ends."""

        def load() -> Any:
            loaded.append(1)
            return load_base(order.spec.base_model, Method.LORA, "cpu", choose_precision("cpu"))

        source = (order.spec.base_model, order.spec.revision)
        base, _ = base_cache.base(order.keep, source, load)
        base_cache.identify(tmp_path / "cache", source).wait()
        return base.generation_config.eos_token_id

    assert ends() == 2 and not loaded
    settings.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert ends() == [2, 7] and len(loaded) == 1
    assert ends() == [2, 7] and len(loaded) == 1
    settings.unlink()
    assert ends() == 2 and len(loaded) == 2


def test_whatever_a_training_leaves_ends_the_host(tmp_path: Path) -> None:
    before = ProcessBaseline()
    assert before.left([]) is None
    leak = torch.zeros(2**20)
    assert "4.0 MiB of tensors are still there" in str(before.left([]))
    assert before.left([leak]) is None, "it is the base's"
    del leak
    with (tmp_path / "open").open("w"):
        assert str(tmp_path / "open") in str(before.left([]))
    held = [os.memfd_create("driver"), os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY)]
    assert before.left([]) is None, "on no disk"
    for number in held:
        os.close(number)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten")
    thread.start()
    remains_join, remains.JOIN_S = remains.JOIN_S, 0.01
    try:
        assert "forgotten still runs" in str(before.left([]))
    finally:
        remains.JOIN_S = remains_join
        stop.set()
        thread.join()
    assert before.left([]) is None


def test_a_thread_that_a_library_started_is_nothing_left_though_python_has_logged_in_it() -> None:
    """Autograd's thread of a card stays for the next training. Python can't join it, and calls it alive for ever."""
    before, logged, stop = ProcessBaseline(), threading.Event(), threading.Event()

    def as_in_a_backward_pass() -> None:
        logging.getLogger("loractl.worker").warning("a hook of a gradient logs this")
        logged.set()
        stop.wait()

    _thread.start_new_thread(as_in_a_backward_pass, ())  # threading knows nothing of it, as of a thread of C++
    assert logged.wait(10)
    try:
        assert before.left([]) is None
    finally:
        stop.set()


def test_so_does_a_process_that_it_started() -> None:
    before = ProcessBaseline()
    with subprocess.Popen(["sleep", "60"]) as child:
        assert before.left([]) == f"process {child.pid} still runs"
        child.kill()
    assert before.left([]) is None


def test_threads_that_end_meanwhile_disturb_no_look() -> None:
    """A library's threads come and go: the kernel's list of one is gone before it is read."""
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            short = threading.Thread(target=time.sleep, args=(0.0001,))
            short.start()
            short.join()

    busy = threading.Thread(target=come_and_go)
    busy.start()
    try:
        for _ in range(200):
            remains.ProcessBaseline(tensors=())
    finally:
        ended.set()
        busy.join()


def test_a_base_is_put_back_and_a_changed_weight_is_found() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 3, bias=False))
    snapshot = ModelSnapshot(model)
    first, weight = model[0], model[0].weight
    model[0] = torch.nn.Identity()
    first.forward = lambda x: x
    first.register_forward_hook(lambda *_: None)
    weight.data = weight.data.double()
    weight.requires_grad_(False)
    snapshot.restore()
    assert model[0] is first and "forward" not in vars(first) and not first._forward_hooks
    assert first.weight is weight and weight.dtype is torch.float32 and weight.requires_grad
    assert snapshot.change() is None
    with torch.no_grad():
        weight[0, 0] += 1e-3
    snapshot.restore()
    assert snapshot.change() == "a weight of the base has changed"


SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "the default dtype": (
        lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)
    ),
    "the default device": (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    "the deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)
    ),
    "the precision of matrix products": (
        lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")
    ),
    "the attention back ends": (
        lambda: torch.backends.cuda.enable_math_sdp(False), lambda: torch.backends.cuda.enable_math_sdp(True)
    ),
    "a switch of cuDNN": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
        lambda: setattr(torch.backends.cudnn, "benchmark", False),
    ),
    "the recording of gradients": (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    "the search for anomalies": (
        lambda: torch.autograd.set_detect_anomaly(True), lambda: torch.autograd.set_detect_anomaly(False)
    ),
    "the number of torch's threads": (
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.set_num_threads(torch.get_num_threads() - 1),
    ),
    "a hook of all modules": (
        lambda: KEPT.append(torch.nn.modules.module.register_module_forward_hook(lambda *_: None)),
        lambda: KEPT.pop().remove(),
    ),
    "torch.nn.functional.silu": (
        lambda: KEPT.append(torch.nn.functional.silu) or setattr(torch.nn.functional, "silu", lambda x, **_: x),
        lambda: setattr(torch.nn.functional, "silu", KEPT.pop()),
    ),
    "LlamaRMSNorm.forward": (
        lambda: KEPT.append(LlamaRMSNorm.forward) or setattr(LlamaRMSNorm, "forward", lambda self, x: x),
        lambda: setattr(LlamaRMSNorm, "forward", KEPT.pop()),
    ),
    "the umask": (lambda: os.umask(0o77), lambda: os.umask(0o22)),
    "a limit of the process": (
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])),
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2),
    ),
    "a signal's handler": (
        lambda: signal.signal(signal.SIGUSR2, lambda *_: None), lambda: signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    ),
    "the limit of recursion": (
        lambda: KEPT.append(sys.getrecursionlimit()) or sys.setrecursionlimit(4321),
        lambda: sys.setrecursionlimit(KEPT.pop()),
    ),
}  # fmt: skip
"""How each is switched, and switched back."""

KEPT: list[Any] = []


def test_whatever_a_training_switches_for_the_next_one_ends_the_host(
    tiny_model: Path, request: pytest.FixtureRequest
) -> None:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    os.umask(0o22)
    core = resource.getrlimit(resource.RLIMIT_CORE)  # else processes that later tests crash leave files behind
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_CORE, core))
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    base_cache = BaseCache()
    base_cache.begin()
    base_cache.base("key", (str(tiny_model), None), load)
    assert base_cache.settle()[1] == "", "as it is"
    for name, (switch, back) in SWITCHES.items():
        base_cache.begin()
        switch()
        try:
            size, why = base_cache.settle()
        finally:
            back()
        assert size is None and name in why and why.endswith("is not as it was"), (name, why)
    base_cache.begin()
    assert base_cache.settle()[1] == "", "each was switched back"


def test_a_training_on_a_base_that_stayed_makes_no_tokenizer_and_tries_no_rows_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = list[str]()
    for module, name in ((recipe_module, "load_tokenizer"), (choice, "rows_together")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, name=name, **k: (made.append(name), own(*a, **k))[1])
    base_cache = BaseCache()
    for where in ("one", "two"):
        base_cache.begin()
        recipe(where, base_cache=base_cache, max_steps=1)
        assert base_cache.settle()[1] == ""
    assert made == ["load_tokenizer", "rows_together"]
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / where / "result" / "adapter").glob("*token*")}
        for where in ("one", "two")
    ]
    assert files[0] == files[1] and files[0]


def test_a_new_process_tries_no_rows_that_the_box_knows_to_be_right(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path
) -> None:
    own, times = choice.rows_together, list[int]()
    monkeypatch.setattr(choice, "rows_together", lambda *a, **k: (times.append(1), own(*a, **k))[1])

    def tries(where: str, **options: Any) -> int:
        before = len(times)
        assert recipe(where, max_steps=1, **options)[0].reason is Reason.OK
        return len(times) - before

    assert [tries("first"), tries("again")] == [1, 0]
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    assert tries("other layers", lora={"target_modules": ["q_proj"]}) == 1
    assert tries("other method", method="qlora") == 1
    with monkeypatch.context() as patch:
        patch.setattr(check_cache.transformers, "__version__", "99")
        assert tries("other code") == 1
    with_one_bit_more(tiny_model / "model.safetensors")
    assert tries("other files") == 1


@pytest.mark.parametrize("module", [attention, choice, lean, product, shared, lora, model])
def test_a_check_follows_from_the_code_that_it_checks(module: ModuleType) -> None:
    """Wherever that code is moved: an answer of other code would be believed."""
    assert Path(module.__file__ or "").parent in check_cache.ROOMS


def test_what_was_wrong_is_tried_again_and_few_answers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_cache, "KEPT", 4)

    def asked(question: str, wrong: str | None) -> bool:
        """Whether it was tried."""
        known, done = Knowledge(), list[int]()

        def once(question: str, find_out: Callable[[], Any], /, *, keeps: Callable[[Any], bool]) -> Known[Any]:
            return known.once(question, 1, find_out, check_stop=lambda: None, keeps=keeps)

        def find_out() -> str | None:
            done.append(1)
            return wrong

        said = CheckCache(folder=tmp_path, about=["x"], once=once)(
            question, find_out, keeps=lambda found: found is None
        )
        assert said.answer == (wrong if done else None)
        return bool(done)

    assert asked("a", "it is wrong") and asked("a", "it is wrong") and asked("a", None) and not asked("a", "wrong")
    assert asked("b", None) and not asked("b", None)
    for n in range(5):
        for place, file in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(file, (place, place))  # as if some time had passed
        asked(f"more {n}", None)
        assert not asked("b", None), "what is asked for stays"
    assert len(list(tmp_path.iterdir())) == 4
