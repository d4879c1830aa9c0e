"""The stored adapters as text: all of them in a table, or one with its origin."""

from __future__ import annotations

from typing import Any

from loractl.common.text import clean_line
from loractl.common.units import amount, clock
from loractl.scheduler.cli.screen import Screen, fit, table

from .answer import AdapterList, Lineage


def adapters_text(answer: AdapterList, screen: Screen) -> str:
    """The stored adapters, and how to use one."""
    if not answer.adapters:
        return "No adapter is stored yet; a job that succeeds stores one."
    begun = any(adapter.init_from is not None for adapter in answer.adapters)
    rows = [
        [
            str(adapter.job_id),
            screen.style(fit(adapter.name, 24), bold=True),
            *([str(adapter.init_from or "")] if begun else []),
            fit(", ".join(adapter.tags), 20),
            adapter.method,
            amount(adapter.size),
            clock(adapter.created_at, answer.now),
            fit(adapter.base_model.rpartition("/")[2], 30),
        ]
        for adapter in answer.adapters
    ]
    head = ["JOB", "NAME", *(["FROM"] if begun else []), "TAGS", "METHOD", "SIZE", "STORED", "BASE MODEL"]
    lines = table(head, rows, screen, right=("JOB", "FROM", "SIZE", "STORED"))
    if answer.after is not None:
        lines.append(screen.dim(f"Older ones: the same command with --after {answer.after}"))
    return "\n".join([*lines, "", screen.dim(f"Use one: loractl adapters pull {answer.adapters[-1].job_id} DIR")])


def lineage_text(answer: Lineage) -> str:
    """One adapter: who made it, from which base and data, and with what result."""
    adapter, of = answer.adapter, answer.report["adapter"]
    data = answer.report["data"]
    made = f"job {adapter.job_id}, attempt {adapter.attempt}, of {clean_line(answer.user)}"
    revision = f", revision {answer.spec['revision']}" if answer.spec.get("revision") else ""
    shape = f"{adapter.method}, r {of['r']}, lora_alpha {of['lora_alpha']:g}: {', '.join(of['modules'])}"
    unbound = "" if answer.bound else ", not bound to its row: loractl adapters bind"
    parts = {
        "made by": f"{made}, {clock(adapter.created_at, answer.now)}",
        "base": f"{clean_line(adapter.base_model)}{revision}",
        "shape": shape,
        **({"begun": _ancestry(of["init_from"])} if of.get("init_from") else {}),
        "data": f"{data['train_rows']} rows ({data['format']}), sha256 {data['sha256'] or 'unknown: from the hub'}",
        "result": clean_line(answer.report["verdict"]["sentence"]),
        "weights": f"sha256 {of['sha256']}",
        "files": f"{amount(adapter.size)}, {clean_line(adapter.uri)}{unbound}",
        "versions": ", ".join(f"{name} {version}" for name, version in answer.report["versions"].items()),
    }
    names = [f"{clean_line(adapter.name)}:{tag}" for tag in adapter.tags_set]
    head = f"{clean_line(adapter.name)} (job {adapter.job_id})" + (f", tagged {', '.join(names)}" if names else "")
    return "\n".join([head, "", *(f"{name:<9} {clean_line(text)}" for name, text in parts.items())])


def _ancestry(ancestor: dict[str, Any]) -> str:
    name = clean_line(str(ancestor["name"]))
    return f"from the adapter of {name} (job {ancestor['job_id']}), sha256 {ancestor['sha256']}"
