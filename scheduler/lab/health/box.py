"""The condition of this machine: its disks, its models, its cards."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loractl.common.errors import WrongState
from loractl.common.memory.config import hub_cache, hub_is_off
from loractl.common.settings import Settings
from loractl.common.units import GIB, amount
from loractl.scheduler.database.answer import no_worker

from .condition import Condition, broken, fine, skipped, warning

LEAST_BYTES, FEW_BYTES = GIB, 10 * GIB
"""With less than the first no job starts (worker/attempt/order.py); with less than the second that may come soon."""

CARD_CHECK = "loractl.worker.node.health.self_test"

_NO_STACK = "not checked: this is a client without the training stack"
_HINT = "a GPU box needs it: pip install 'loractl[worker]'"


def has_training_stack() -> bool:
    """Whether this machine could serve; nothing is imported."""
    return importlib.util.find_spec("torch") is not None


def see_disk(settings: Settings) -> Iterator[Condition]:
    """Free space where attempts, models and, in a folder store, results are written."""
    places = {"home": settings.home}
    if has_training_stack():
        places["models of the hub"] = hub_cache()
    if settings.artifacts_url.startswith("file://"):
        places["artifacts"] = Path(settings.artifacts_url.removeprefix("file://"))
    seen: set[int] = set()
    for what, folder in places.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if (disk := there.stat().st_dev) not in seen:
            seen.add(disk)
            yield _room(what, folder, there)


def _room(what: str, folder: Path, there: Path) -> Condition:
    free = shutil.disk_usage(there).free
    sentence = f"{amount(free)} are free for {what}: {folder}"
    if not os.access(there, os.W_OK | os.X_OK):
        return broken("disk", f"{there} can't be written to", "set LORACTL_HOME or HF_HOME to a folder of this user")
    if free < LEAST_BYTES:
        return broken("disk", sentence, "below 1 GiB no job begins: free space; loractl gc removes what it can")
    if free < FEW_BYTES:
        return warning("disk", sentence, "a base model may not fit: loractl gc removes what it can")
    return fine("disk", sentence)


def see_models(settings: Settings) -> Iterator[Condition]:
    """The folders that may hold a base model, and what the hub's library has here."""
    for root in settings.model_roots:
        if not root.is_dir():
            yield broken(
                "models", f"LORACTL_MODEL_ROOTS names {root}, which is not a folder here", "mount it, or correct it"
            )
        elif not os.access(root, os.R_OK | os.X_OK):
            yield broken("models", f"{root} can't be read by this user", f"chmod -R a+rX {root}")
        else:
            yield fine("models", f"{root}: {_models_in(root)}")
    if not has_training_stack():
        if not settings.model_roots:
            yield skipped("models", _NO_STACK, _HINT)
        return
    cached = len(list(hub_cache().glob("models--*"))) if hub_cache().is_dir() else 0
    offline = hub_is_off()
    sentence = f"{cached} of the hub are in {hub_cache()}"
    if offline and not cached and not settings.model_roots:
        yield warning("models", f"{sentence}, and HF_HUB_OFFLINE forbids downloads", "unset it, or copy models")
    else:
        yield fine("models", sentence + (", no other is fetched (HF_HUB_OFFLINE)" if offline else ""))


def _models_in(root: Path) -> str:
    found = {path.parent for pattern in ("*/config.json", "*/*/config.json", "*/*.gguf") for path in root.glob(pattern)}
    return f"{len(found)} model{'s' * (len(found) != 1)}"


def see_cards(settings: Settings) -> Iterator[Condition]:
    """Each card's self-test, unless a worker serves them: that worker has tested them, and its jobs need their
    memory."""
    if not has_training_stack():
        yield skipped("cards", _NO_STACK, _HINT)
        return
    try:
        with no_worker(settings):
            tested = _tested()
    except WrongState:
        yield fine("cards", f"a worker serves them, {_TESTS}")
        return
    for card in tested:
        yield _card(settings, card)


_TESTS = "and tests each before it takes jobs: loractl gpus shows the results"


def _tested() -> list[dict[str, Any]]:
    """The result from a process of the worker's own: no driver is loaded here. It bounds each card's test."""
    done = subprocess.run(
        [sys.executable, "-m", CARD_CHECK], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            answer = json.loads(line)
            return list(answer["cards"])
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "nothing was said")
    return [{"number": "", "name": "", "fault": f"the test of the cards ended with {done.returncode}: {last[:300]}"}]


def _card(settings: Settings, card: dict[str, Any]) -> Condition:
    name = f"{settings.host}:{card['number']} {card['name']}".replace(f"{settings.host}: ", "").strip()
    if card["fault"] is not None:
        hint = card.get("hint") or "docs/deploy.md#cards-that-fail says what to do"
        return broken("cards", f"{name}: {card['fault']}".removeprefix(": "), hint)
    if card.get("served"):
        return fine("cards", f"{name}: a worker of another home serves it, {_TESTS}")
    if card["seconds"] is None:
        return fine("cards", f"{name}: it needs no self-test")
    return fine("cards", f"{name}: passed its self-test in {card['seconds']:.1f} s (torch {card['torch']})")
