"""A base model that stays in memory, with adapters loaded on demand and evicted when room is needed."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loractl.common.adapter_config import CONFIG, check_adapter_config
from loractl.common.errors import ArtifactError, LoractlError, UsageError
from loractl.common.job.method import Method
from loractl.worker.base.adapter import WEIGHTS
from loractl.worker.base.arithmetic import Precision, choose_precision, keep_nf4_in_training_mode, settle_nf4
from loractl.worker.base.gauge import is_out_of_memory
from loractl.worker.base.model import load_base, load_tokenizer
from loractl.worker.base.source import family_of

from .library import Arithmetic, Library, Listed

BASE = "__base__"
"""peft's name for "no adapter" in a batch of several."""


NAMED = 5
"""The most adapters named in a warning."""

_OPTIONAL = {"position_ids", "logits_to_keep"}


class NoRoom(LoractlError):
    """The adapters in use leave no room for another now; there will be room when answers end."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An adapter on the base."""

    key: str  # peft's name for it
    size: int  # bytes of its tensors
    mixes: bool  # whether its rows can share a batch with other adapters' rows
    whole_modules: bool  # it has modules trained in full, in fp32 over a 16-bit base
    seconds: float  # that loading took


@dataclass(frozen=True, kw_only=True)
class BaseChoice:
    """What to load, and how."""

    model: str
    revision: str | None
    method: Method = Method.LORA  # qlora: in NF4
    device: str = "cpu"
    dtype: str = "auto"
    exact: bool = False  # with NF4, all else in fp32
    run_code: bool = False

    @classmethod
    def of(
        cls,
        base: tuple[str, str | None],
        arithmetic: Arithmetic,
        device: str,
        *,
        dtype: str = "auto",
        run_code: bool,
    ) -> BaseChoice:
        """A base, by its name and revision, in an arithmetic on a device. `dtype`: what a person asks for overrides the
        arithmetic's own, even if the device can't compute in it: that is refused when the base is loaded."""
        model, revision = base
        return cls(
            model=model,
            revision=revision,
            method=arithmetic.method,
            exact=arithmetic.exact,
            device=device,
            dtype=arithmetic.on(device).dtype if dtype == "auto" else dtype,
            run_code=run_code,
        )


class AdapterPool:
    """One loaded base. Not thread-safe.

    `memory`: bytes that adapters may take together; None: no limit.
    """

    def __init__(self, base: BaseChoice, memory: int | None = None) -> None:
        began = time.monotonic()
        self._family = family_of(base.model, base.revision)
        self.precision: Precision = choose_precision(base.device, base.dtype, self._family)
        self.tokenizer = load_tokenizer(base.model, base.revision, run_code=base.run_code)
        model = load_base(base.model, base.method, base.device, self.precision, base.revision, run_code=base.run_code)
        if base.method is Method.QLORA:
            model = settle_nf4(model, whole=base.exact)
        model.eval()
        model.requires_grad_(False)
        self.base = base
        self.bytes = _bytes_of(model)
        self.seconds = time.monotonic() - began
        self.model = model  # the base; with the first adapter it becomes a PeftModel
        self._memory = memory
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first
        self._used: Counter[str] = Counter()
        self._layers: dict[str, list[Any]] = {}  # by key, the layers with the adapter
        self._takes = inspect.signature(model.forward).parameters.keys()

    @property
    def number_format(self) -> str:
        """The base's number format, for people."""
        if self.base.method is Method.QLORA:
            return str(Arithmetic(method=Method.QLORA, exact=self.base.exact))
        return str(self.precision.base).removeprefix("torch.")

    def as_trained(self, adapter: Listed) -> bool:
        """Whether the base computes here like a training of the adapter would on this device."""
        own = adapter.arithmetic
        precision = choose_precision(self.base.device, own.on(self.base.device).dtype, self._family)
        alike = own.method is self.base.method and own.exact is self.base.exact
        return alike and precision.base is self.precision.base

    @property
    def adapter_memory(self) -> int:
        """Bytes that further adapters may take; 0 without a limit."""
        return max(0, (self._memory or 0) - sum(each.size for each in self._loaded.values()))

    @property
    def loaded(self) -> dict[str, Loaded]:
        """What is in memory now, by key."""
        return dict(self._loaded)

    def hold(self, adapter: Listed, folder: Path) -> Loaded:
        """Load an adapter unless already loaded, and keep it until `let_go`. Raises NoRoom, UsageError."""
        key = f"job{adapter.job_id}"
        if key not in self._loaded:
            self._make_room(adapter)
            self._loaded[key] = self._load(key, folder)
        self._loaded.move_to_end(key)
        self._used[key] += 1
        return self._loaded[key]

    def let_go(self, loaded: Loaded) -> None:
        """One user fewer. An adapter without users may be evicted."""
        self._used[loaded.key] -= 1

    def forward(self, keys: Sequence[str], **tensors: Any) -> Any:
        """Run row i of the tensors through the base with adapter keys[i]. Several keys are only for adapters that mix.

        position_ids and logits_to_keep go to models that take them; others derive positions from the mask. `cache` is
        called past_key_values by older models.
        """
        if "cache" in tensors and "cache" not in self._takes:
            tensors["past_key_values"] = tensors.pop("cache")
        tensors = {name: t for name, t in tensors.items() if name in self._takes or name not in _OPTIONAL}
        with torch.inference_mode():
            if not self._loaded:
                return self.model(**tensors)
            named = [key for key in dict.fromkeys(keys) if key != BASE]
            if not named:
                with self.model.disable_adapter():
                    return self.model(**tensors)
            self.switch(named[0])
            if len(named) == 1 and BASE not in keys:
                with self.arithmetic(named[0]):
                    return self.model(**tensors)
            with self._routed(keys):
                return self.model.get_base_model()(**tensors)

    def switch(self, key: str) -> None:
        """Make one adapter the active one."""
        if self.model.active_adapters != [key]:
            self.model.set_adapter(key, inference_mode=True)

    def arithmetic(self, key: str | None) -> Any:
        """A context for a forward with one adapter: its fully trained modules are in fp32 over a 16-bit base, and
        compute in the base's format, as in training."""
        mixed = key is not None and self._loaded[key].whole_modules and self.precision.base is not torch.float32
        return torch.autocast(self.base.device, dtype=self.precision.base, enabled=mixed)

    def _load(self, key: str, folder: Path) -> Loaded:
        from peft import PeftConfig

        if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
            raise ArtifactError(f"the files of {key} are gone from {folder}", "ask again: they are then fetched again")
        check_adapter_config(folder / CONFIG)
        began, before = time.monotonic(), _bytes_of(self.model)
        config = PeftConfig.from_pretrained(str(folder))
        whole = bool(config.modules_to_save)
        try:
            self._put_on(key, folder, config)
            mixes = not (config.use_dora or whole) and self._mixes(key)
        except BaseException as error:  # after any error the base must be as before
            self._take_off(key)
            if is_out_of_memory(error):
                raise LoractlError(f"no memory is left for the adapter of {key}") from error
            if not isinstance(error, (ValueError, RuntimeError, KeyError, SafetensorError)):
                raise
            lines = str(error).strip().splitlines() or [repr(error)]
            raise UsageError(f"the adapter of {key} does not fit this base: {lines[0]}") from error
        size, seconds = _bytes_of(self.model) - before, time.monotonic() - began
        return Loaded(key=key, size=size, mixes=mixes, whole_modules=whole, seconds=seconds)

    def _put_on(self, key: str, folder: Path, config: Any) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        if self._loaded:
            self.model.load_adapter(str(folder), adapter_name=key, is_trainable=False)
        else:
            self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=key, config=config)
        self.model.eval()
        if self.base.method is Method.QLORA:
            keep_nf4_in_training_mode(self.model)
        adapted = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        self._layers[key] = [layer for layer in adapted if key in layer.lora_A or key in layer.lora_embedding_A]

    def _take_off(self, key: str) -> None:
        """Clean up after a load that failed half-way: peft leaves its layers in the base when it is the first."""
        self._layers.pop(key, None)
        if self._loaded:
            if key in self.model.peft_config:
                self.model.delete_adapter(key)
            return
        if hasattr(self.model, "get_base_model"):
            self.model = self.model.get_base_model()
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for name, module in list(self.model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                plain = module.get_base_layer()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                plain = module.original_module
            else:
                continue
            above, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(above), last, plain)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def _mixes(self, key: str) -> bool:
        """Whether rows of the adapter and of the base can share a batch. With peft they can't if a layer's input has no
        rows any more, as in a mixture of experts, or if an adapter is on parameters rather than on layers."""
        tokens = torch.full((2, 2), int(self.tokenizer.eos_token_id), device=self.model.device)
        self.switch(key)
        try:
            with torch.inference_mode(), self._routed([BASE, key]):
                self.model.get_base_model()(input_ids=tokens, use_cache=False)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return False
        return True

    def _make_room(self, adapter: Listed) -> None:
        """Evict the least recently used adapters until this one fits."""
        if self._memory is None:
            return
        if adapter.size > self._memory:
            raise UsageError(
                f"{adapter.name} has {adapter.size / 2**20:.0f} MiB, the adapters may take {self._memory / 2**20:.0f}",
                "raise --adapter-memory",
            )
        while sum(each.size for each in self._loaded.values()) + adapter.size > self._memory:
            spare = next((key for key in self._loaded if not self._used[key]), None)
            if spare is None:
                raise NoRoom(f"the adapters in use leave no room for {adapter.name}")
            self.evict(spare)

    def evict(self, key: str) -> None:
        """Take an adapter out of memory."""
        del self._loaded[key], self._layers[key]
        if not self._loaded:
            self.model = self.model.unload()
            return
        if self.model.active_adapters == [key]:
            self.switch(next(iter(self._loaded)))
        self.model.delete_adapter(key)

    @contextlib.contextmanager
    def _routed(self, keys: Sequence[str]) -> Iterator[None]:
        """Give every adapted layer the adapter of each row, like peft's own `adapter_names`. But peft 0.21 leaves its
        hooks behind if the forward fails, and every later one would fail too."""

        def name_rows(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": list(keys)}

        layers = {id(layer): layer for key in {*keys} - {BASE} for layer in self._layers[key]}
        hooks = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in layers.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def open_pool(
    base: BaseChoice,
    library: Library,
    adapters: Sequence[Listed],
    tell: Callable[[str], None],
    warn: Callable[[str], None],
    memory: int | None = None,
) -> AdapterPool:
    """Load a base, say how long it took, and warn about adapters trained on other files of it, or in another
    arithmetic."""
    changed = library.warnings_about(adapters)  # first: a tampered result is refused before a base loads
    pool = AdapterPool(base, memory)
    size = f"{pool.bytes / 2**20:.0f} MiB"
    tell(f"{base.model.rpartition('/')[2]} is loaded in {pool.seconds:.1f} s ({size}, {pool.number_format}).")
    for sentence in changed:
        warn(sentence)
    warn_of_arithmetic(pool, adapters, warn)
    return pool


def warn_of_arithmetic(pool: AdapterPool, adapters: Sequence[Listed], warn: Callable[[str], None]) -> None:
    """Name the adapters whose base computes differently here than in their training, one sentence per arithmetic."""
    found: dict[str, dict[int, str]] = {}
    for each in adapters:
        if not pool.as_trained(each):
            found.setdefault(str(each.arithmetic), {})[each.job_id] = f"{each.name} (job {each.job_id})"
    for trained, names in found.items():
        first, more = list(names.values())[:NAMED], max(0, len(names) - NAMED)
        who = ", ".join(first) + (f" and {more} more" if more else "")
        what = f"trained on a base in {trained}, and answer here on one in {pool.number_format}"
        warn(f"{what}: {who}; not all of their answers will be those of their reports")


def _bytes_of(model: Any) -> int:
    """Bytes of all its tensors; shared ones count once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
