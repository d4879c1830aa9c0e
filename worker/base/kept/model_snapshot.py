"""A snapshot of a loaded base: restored after a training, and compared bit for bit.

A training changes a base in place: layers are wrapped by an adapter, norms are cast, hooks and methods are set on
modules, settings are switched. All of that hangs on the modules' own dictionaries, on their parameters and on the
configs. These are copied, a level deep, when the base is loaded; the weights themselves are kept by reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

_CONTAINERS = (dict, list, set)


class ModelSnapshot:
    """The state of a model. Take it from a base just loaded."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._modules = [(module, copied(vars(module))) for module in model.modules()]
        self._weights = [_Weight(tensor) for tensor in _own_tensors(model)]
        self._settings = [(config, copy.deepcopy(vars(config))) for config in _configs_of(model)]
        self._sums = self._all_sums()

    def restore(self) -> None:
        """Restore everything except the weights' own bits."""
        for module, saved in self._modules:
            vars(module).clear()
            vars(module).update(copied(saved))
        for weight in self._weights:
            weight.restore()
        known = {id(config) for config, _ in self._settings}
        for config, saved in self._settings:
            kept = {name: value for name, value in vars(config).items() if id(value) in known}
            vars(config).clear()
            vars(config).update({**copy.deepcopy(saved), **kept})  # nested configs are restored themselves

    def change(self) -> str | None:
        """What has changed, even while trainings use it: a weight whose bits differ; None if nothing."""
        return None if self._all_sums() == self._sums else "a weight of the base has changed"

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the base, those of a quantised weight's state included."""
        return [tensor for weight in self._weights for tensor in weight.tensors()]

    @property
    def size(self) -> int:
        """Bytes of all tensors, each storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())

    def _all_sums(self) -> list[tuple[Any, ...]]:
        return [_sum_of(tensor) for weight in self._weights for tensor in weight.bits()]


class _Weight:
    """A parameter or buffer, where its bits are, and what is attached to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.data
        self._trained = tensor.requires_grad
        self._attributes = dict(vars(tensor))
        self._states = [(state, dict(vars(state))) for state in _states_of(tensor)]

    def restore(self) -> None:
        tensor = self._tensor
        if tensor.data_ptr() != self._data.data_ptr() or tensor.dtype != self._data.dtype:
            tensor.data = self._data
        tensor.requires_grad_(self._trained)
        tensor.grad = None
        vars(tensor).clear()
        vars(tensor).update(self._attributes)
        for state, saved in self._states:
            vars(state).clear()
            vars(state).update(saved)

    def tensors(self) -> list[torch.Tensor]:
        of_states = [v for state, _ in self._states for v in vars(state).values() if isinstance(v, torch.Tensor)]
        return [self._tensor, *of_states]

    def bits(self) -> list[torch.Tensor]:
        """What was loaded, whatever a training has put in its place since."""
        of_states = [v for _, saved in self._states for v in saved.values() if isinstance(v, torch.Tensor)]
        return [self._data, *of_states]


def _states_of(tensor: torch.Tensor) -> list[Any]:
    """The state of a quantised weight, and the state of that state's scales."""
    found, state = [], getattr(tensor, "quant_state", None)
    while state is not None and hasattr(state, "__dict__"):
        found.append(state)
        state = getattr(state, "state2", None)
    return found


def copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """What is attached to an object now: containers are copied, so that they may change afterwards."""
    return {name: copy.copy(value) if isinstance(value, _CONTAINERS) else value for name, value in attributes.items()}


def _own_tensors(model: Any) -> list[torch.Tensor]:
    every = (*model.parameters(), *model.buffers())
    return list({id(tensor): tensor for tensor in every}.values())


def _configs_of(model: Any) -> list[Any]:
    """The configs that modules refer to, and the configs nested in these, each once."""
    found: dict[int, Any] = {}

    def add(value: Any) -> None:
        if id(value) not in found:
            found[id(value)] = value
            for inner in vars(value).values():
                if _is_config(inner):
                    add(inner)

    for module in model.modules():
        for value in vars(module).values():
            if _is_config(value):
                add(value)
    return list(found.values())


def _is_config(value: Any) -> bool:
    return hasattr(value, "__dict__") and type(value).__name__.endswith("Config") and not isinstance(value, type)


def _sum_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A checksum that changes with any bit: the sums of the tensor's bytes as integers, plain and weighted by
    position."""
    flat = tensor.data.contiguous().view(-1).view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()  # it does not start at an integer's boundary
    whole = flat[: flat.numel() // 8 * 8].view(torch.int64)
    rest = tuple(flat[whole.numel() * 8 :].tolist())
    halves = [int(part.sum()) for part in _parts(whole)]  # it wraps around, which loses nothing
    return (tuple(tensor.shape), str(tensor.dtype), rest, *halves)


def _parts(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """Two parts: they detect bits that moved more often than one sum does. Halves: reading every second number takes
    twice as long."""
    half = whole.numel() // 2
    yield whole[:half]
    yield whole[half:]
