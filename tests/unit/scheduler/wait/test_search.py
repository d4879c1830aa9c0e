"""Why a job waits, against a plain search over random fleets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from loractl.common.job.method import Method
from loractl.common.store.tables import DrainOrder, Job, Node
from loractl.common.units import GIB
from loractl.scheduler.wait.cards import card_fits
from loractl.scheduler.wait.reasons import Tier, explain

from ....conftest import examples
from ...factories import NOON
from ...fleets import card, drained, fleet, in_seconds, running, waits

LORA_ONLY = (Method.LORA,)
TWO_HOURS_AGO = in_seconds(-7200)
NOTEBOOK = {"pid": 4711, "user": "tomas", "name": "vllm", "bytes": 16 * GIB}


@dataclass(frozen=True)
class Asked:
    """A QUEUED row in plain numbers (GiB), beside the row itself."""

    row: Job
    sizes: list[float | None]  # that may start it now
    later: list[float | None]  # and once it has waited long enough for LoRA
    labels: dict[str, str]


def _sizes(row: Job, names: list[str]) -> list[float | None]:
    found = {"lora": row.vram_lora, "qlora": row.vram_qlora}
    return [found[name] for name in names]


def _asked(row: Job) -> Asked:
    now = ["lora"] if row.lora_until is not None and row.lora_until > NOON else list(row.methods)
    return Asked(row, _sizes(row, now), _sizes(row, list(row.methods)), row.spec["resources"]["node_labels"])


class Search:
    """What can be said of a job by looking at every card, without the code under test."""

    def __init__(self, nodes: list[Node], ran: list[Job], orders: list[DrainOrder]) -> None:
        shut = {o.target for o in orders if o.until is None or o.until > NOON}
        self.nodes = nodes
        self.open = {
            n.node: not n.draining
            and (NOON - n.seen_at).total_seconds() <= 60
            and not {n.node, n.node.split(":")[0]} & shut
            for n in nodes
        }
        self.jobs = {n.node: [j for j in ran if j.node == n.node] for n in nodes}
        self.users = [j.user for j in ran]

    def labelled(self, job: Asked) -> list[Node]:
        return [n for n in self.nodes if all(n.labels.get(k) == v for k, v in job.labels.items())]

    def ever(self, job: Asked, node: Node) -> bool:
        """By size and labels, everything else gone from it."""
        return node in self.labelled(job) and any(s is None or s <= node.total - node.margin for s in job.later)

    def always_left_to_gpus(self, job: Asked, node: Node) -> bool:
        return all(self.left_to_gpus(node, sizes) for sizes in (job.sizes, job.later))

    def left_to_gpus(self, node: Node, sizes: list[float | None]) -> bool:
        gpus = [n.total - n.margin for n in self.nodes if n.kind != "cpu" and self.open[n.node]]
        if node.kind != "cpu" or not gpus or not sizes:
            return False
        return None in sizes or min(s for s in sizes if s is not None) <= max(gpus)

    def free(self, node: Node) -> int:
        held = sum(max(j.vram_reserved or 0, node.used.get(str(j.job_id), 0)) for j in self.jobs[node.node])
        return max(0, node.total - node.margin - node.outside_bytes) - held

    def starts(self, job: Asked, node: Node) -> bool:
        """Whether the card would take it at this moment, were it the only job that waits."""
        here, free = self.jobs[node.node], self.free(node)
        if not self.open[node.node] or node not in self.labelled(job) or len(here) >= node.max_jobs or free <= 0:
            return False
        if self.left_to_gpus(node, job.sizes):
            return False
        return not here if None in job.sizes else any(s <= free for s in job.sizes if s is not None)

    def tier(self, job: Asked) -> Tier | None:
        """None: capacity or next."""
        possible = [n for n in self.nodes if self.ever(job, n)]
        if not job.later or (self.nodes and not possible):
            return Tier.NEVER
        limits = [n.user_limit for n in self.nodes if self.open[n.node] and n.user_limit is not None]
        waits_for_time = job.row.not_before is not None and job.row.not_before > NOON
        if job.row.held or waits_for_time or (limits and self.users.count(job.row.user) >= min(limits)):
            return Tier.POLICY
        if not any(self.open[n.node] and not self.always_left_to_gpus(job, n) for n in possible):
            return Tier.FLEET
        return None


names = st.sampled_from(["ada", "bob", "cyd"])
label_sets = st.sampled_from([{}, {}, {"nvlink": "yes"}])
seconds = st.sampled_from([None, 60.0, 600.0])
unlabelled_sizes = st.sampled_from([None, 2, 4, 8, 12, 20, 24, 40])


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[Node], list[Job], list[DrainOrder]]:
    nodes, ran = [], []
    for index in range(draw(st.integers(0, 4))):
        name = f"{'ab'[index % 2]}:{index}"
        total, margin = draw(st.sampled_from([8, 16, 24, 48])), draw(st.sampled_from([0, 1]))
        one = card(
            name, total, margin=margin, outside_bytes=draw(st.sampled_from([0, 0, 0, 6, 20, 48])),
            max_jobs=draw(st.integers(1, 3)), labels=draw(label_sets),
            kind=draw(st.sampled_from(["nvml", "sim", "cpu"])),
            draining=draw(st.sampled_from([False] * 4 + [True])), user_limit=draw(st.sampled_from([None, None, 1, 2])),
            seen_at=draw(st.sampled_from([NOON] * 4 + [TWO_HOURS_AGO])),
            outside=draw(st.sampled_from([[], [NOTEBOOK]])),
        )  # fmt: skip
        for _ in range(draw(st.integers(0, one.max_jobs))):
            size = draw(st.sampled_from([2, 4, 8]))
            ran.append(running(100 + len(ran), name, size, draw(seconds), user=draw(names)))
            if draw(st.booleans()):
                one.used = {**one.used, str(ran[-1].job_id): draw(st.integers(1, 6)) * GIB}
        nodes.append(one)
    times = st.sampled_from([None, NOON, in_seconds(900)])
    targets = draw(st.lists(st.sampled_from(["a", "b", "a:0", "b:1"]), max_size=1))
    return nodes, ran, [drained(target, until=draw(times)) for target in targets]


@st.composite
def queues(draw: st.DrawFn) -> list[Job]:
    found = []
    ages = sorted(draw(st.lists(st.sampled_from([0, 30, 2400, 90_000]), min_size=1, max_size=5)), reverse=True)
    for number, age in enumerate(ages, start=1):
        lora, qlora = draw(unlabelled_sizes), draw(unlabelled_sizes)
        methods = draw(
            st.sampled_from([(Method.LORA, Method.QLORA)] * 3 + [LORA_ONLY, (Method.QLORA, Method.LORA), ()])
        )
        patient = methods == (Method.LORA, Method.QLORA) and draw(st.booleans())
        job = waits(
            number, lora, qlora, methods, draw(label_sets), user=draw(names), priority=draw(st.sampled_from([0, 0, 1])),
            submitted_at=in_seconds(-age), held=draw(st.sampled_from([False] * 5 + [True])),
            not_before=draw(st.sampled_from([None] * 4 + [in_seconds(-1), in_seconds(60)])),
            lora_until=in_seconds(draw(st.sampled_from([-5, 3600]))) if patient else None,
        )  # fmt: skip
        if not methods:
            job.spec = {"resources": {"max_vram": GIB, "node_labels": job.spec["resources"]["node_labels"]}}
        found.append(job)
    return found


@settings(max_examples=examples(150))
@given(fleets(), queues(), st.dictionaries(names, st.floats(0, 50)))
def test_every_reason_agrees_with_a_plain_search(
    built: tuple[list[Node], list[Job], list[DrainOrder]], waiting: list[Job], charges: dict[str, float]
) -> None:
    nodes, ran, orders = built
    view, search = fleet(nodes, ran, waiting, orders, charges), Search(nodes, ran, orders)
    placed = {d.placed.job.job_id: d.placed.node for d in view.decisions if d.placed is not None}
    for row in waiting:
        job, wait = _asked(row), explain(row, view)
        expected = search.tier(job)
        if expected is None:
            expected = Tier.NEXT if row.job_id in placed else Tier.CAPACITY
        assert wait.tier is expected, f"{wait} for {row.job_id}"
        assert wait.word and wait.sentence and not wait.sentence.endswith((" ", "."))
        _is_true(wait.word, wait.sentence, job, search, waiting, placed)
        for fit in card_fits(row, view):
            node = next(n for n in nodes if n.node == fit.node)
            assert (fit.when == "now") == search.starts(job, node), fit
            never = not search.ever(job, node) or (search.open[node.node] and search.always_left_to_gpus(job, node))
            assert (fit.when == "never") == never, fit
            assert fit.then


def _is_true(word: str, sentence: str, job: Asked, search: Search, waiting: list[Job], placed: dict[int, str]) -> None:
    """What the sentence says of cards and other jobs is so."""
    named = [node for node in search.nodes if node.node in sentence]
    startable = [node.node for node in search.nodes if search.starts(job, node)]
    others = {row.job_id for row in waiting if row.job_id != job.row.job_id}
    if word == "next":
        assert placed[job.row.job_id] in startable and placed[job.row.job_id] in sentence
    elif word in ("order", "share"):
        (first,) = [int(n) for n in re.findall(r"goes to job (\d+) first", sentence)]
        assert first in others and placed[first] == named[0].node and named[0].node in startable
        if word == "share":
            assert next(row.user for row in waiting if row.job_id == first) != job.row.user
    elif word == "kept":
        (first,) = [int(n) for n in re.findall(r"kept for job (\d+)", sentence)]
        assert first in others and first not in placed and named[0].node in startable
    elif word in ("memory", "busy") and " when " in sentence:
        named_jobs = re.sub(r"and \d+ more", "", sentence.partition(" when ")[2].partition(" end")[0])
        ids = [int(n) for n in re.findall(r"\d+", named_jobs)]
        assert ids and {j.job_id for j in search.jobs[named[0].node]} >= set(ids)
        assert "kept" in sentence or named[0].node not in startable
        assert word != "busy" or len(search.jobs[named[0].node]) >= named[0].max_jobs
    elif word == "memory":
        assert named[0].outside_bytes > 0 and named[0].node not in startable
    elif word == "patience":
        assert not startable and len(job.later) == 2
    elif word == "limit" and "goes first" in sentence:
        (first,) = [int(n) for n in re.findall(r"^job (\d+) goes first", sentence)]
        assert startable and placed[first] == named[0].node
        assert next(row for row in waiting if row.job_id == first).user == job.row.user
    elif word == "limit":
        assert f"runs {search.users.count(job.row.user)} job" in sentence
    elif word in ("drained", "stopping", "offline", "version"):
        assert not search.open[named[0].node] and search.ever(job, named[0])
