"""`loractl sim`: what it reads, what it says, and what it draws."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.errors import DataError, UsageError
from loractl.common.placement.replay import Presence, replay
from loractl.common.placement.shares import Allowance
from loractl.common.units import GIB
from loractl.scheduler.cli.screen import Screen
from loractl.scheduler.simulation.assumptions import start_s
from loractl.scheduler.simulation.baselines import fifo
from loractl.scheduler.simulation.outcome import (
    POLICIES,
    Course,
    Nodes,
    Simulation,
    load_of,
    mean,
    outcome_of,
    quantile,
    simulate,
)
from loractl.scheduler.simulation.picture import _STYLES, binned, draw
from loractl.scheduler.simulation.quotas import parse_quotas
from loractl.scheduler.simulation.text import span, text
from loractl.scheduler.simulation.workload import (
    BEGIN,
    Chosen,
    TraceJob,
    Workload,
    choose,
    fleet_text,
    parse_fleet,
    parse_presences,
    read_trace,
    to_replay,
    without_slow,
)

from ....conftest import Cli

OWN = """arrival,vram,duration,user,priority
0,20GiB,2h,ada,
30m,6442450944,90s,bob,1
10,100GiB,5h,ada,
1h,70GiB,1h30m,cyd,0
"""
OPENB = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time
pod-0,20000,65536,0,0,,LS,Running,5,90,6
pod-1,8000,30517,1,500,,BE,Running,100,260,160
pod-2,8000,30517,1,1000,,LS,Failed,40,50,45
pod-3,8000,30517,2,1000,,LS,Failed,40,50,45
pod-4,8000,30517,1,1000,,LS,Pending,40,,
"""
PIPE = Screen(width=80, unicode=True, color=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    path.write_text(OWN)
    return path


def simulated(path: Path, fleet: str = "24GiB,80GiB", **more: float) -> Simulation:
    cards, trace = parse_fleet(fleet), read_trace(path)
    return simulate(choose(trace, cards, more.get("longest", 1e9), None), cards, more.get("compress", 1.0), 0.5)


# --- what it reads ---


def test_its_own_form_is_read_in_the_order_of_arrival(own: Path) -> None:
    jobs = read_trace(own).jobs
    assert [(j.arrival, j.need / GIB, j.seconds, j.user, j.priority) for j in jobs] == [
        (0, 20, 7200, "ada", 0),
        (10, 100, 18000, "ada", 0),
        (1800, 6, 90, "bob", 1),
        (3600, 70, 5400, "cyd", 0),
    ]


def test_openbs_pods_on_a_part_of_one_card_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "openb.csv"
    path.write_text(OPENB)
    trace = read_trace(path)
    assert [(j.arrival, j.need / GIB, j.seconds, j.user) for j in trace.jobs] == [
        (40, 24, 5, "LS"),
        (100, 12, 100, "BE"),
    ]
    assert (trace.left_out, trace.users_are) == (3, "qos class")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("0,20Gib,2 hours,ada", ":2: duration '2 hours' is not a duration"),
        ("0,many,2h,ada", ":2: vram 'many' is not a size"),
        ("soon,1GiB,2h,ada", ":2: arrival 'soon' is not a duration"),
        ("0,1GiB", ":2: duration is missing"),
        ("0,0,2h,ada", ":2: vram is 0"),
        ("0,1GiB,2h,ada\n\n0,1GiB,-5,ada", ":4: duration '-5' is not a duration"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"arrival,vram,duration,user\n{row}\n")
    with pytest.raises(DataError) as error:
        read_trace(path)
    assert what in error.value.sentence


def test_another_header_is_refused_with_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("arrival,vram,user\n0,1GiB,ada\n")
    with pytest.raises(DataError) as error:
        read_trace(path)
    assert ":1: its header lacks duration" in error.value.sentence
    assert "arrival,vram,duration,user" in (error.value.hint or "")


def test_a_fleet_is_read_with_the_workers_own_limits() -> None:
    cards = parse_fleet("2x12GiB, 80GiB")
    assert [(c.node, c.total // GIB, c.max_jobs) for c in cards] == [
        ("sim:0", 12, 1),
        ("sim:1", 12, 1),
        ("sim:2", 80, 4),
    ]
    assert [c.max_jobs for c in parse_fleet("12GiB,80GiB", 3)] == [3, 3]


@pytest.mark.parametrize("fleet", ["", "12GiB,", "0x12GiB", "x", "-1GiB", "0GiB", "2x2x12GiB", "99999x12GiB"])
def test_a_fleet_that_is_none_is_refused(fleet: str) -> None:
    with pytest.raises(UsageError, match="--fleet"):
        parse_fleet(fleet)


def test_a_fleet_says_when_its_cards_are_there() -> None:
    text = "2x12GiB open 4h shut 90min, 24 GiB  until 3d ,80GiB"
    assert [(card.node, card.total // GIB) for card in parse_fleet(text)] == [
        ("sim:0", 12),
        ("sim:1", 12),
        ("sim:2", 24),
        ("sim:3", 80),
    ]
    often, once = Presence(open_s=4 * 3600, shut_s=5400), Presence(open_s=3 * 86400)
    assert parse_presences(text) == {"sim:0": often, "sim:1": often, "sim:2": once}
    said = "2x12 GiB open 4 h and shut 1 h 30 min, and 24 GiB until 3 d 0 h, and 80 GiB"
    assert fleet_text(parse_fleet(text), parse_presences(text)) == said


@pytest.mark.parametrize(
    ("fleet", "what"),
    [
        ("12GiB open 4h", "'12GiB open 4h' is not a size"),
        ("12GiB open 4h shut", "is not a size"),
        ("12GiB open soon shut 2h", "says open soon, which is not a duration"),
        ("12GiB open 4h shut 5s", "says shut 5s, which is below 60 s"),
        ("12GiB until 0", "says until 0, which is below 60 s"),
        ("until 4h", "'until 4h' is not a size"),
        ("12GiB until 4h open 2h shut 2h", "is not a size"),
        ("12GiB open 4h shut 1e9h", "says shut 1e9h, which is not a duration"),
    ],
)
def test_a_card_that_is_there_at_no_time_is_refused(fleet: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_presences(fleet)
    assert what in error.value.sentence
    assert "24GiB open 4h shut 2h" in (error.value.hint or "")


def test_arrivals_are_compressed_from_the_first_on(own: Path) -> None:
    jobs = to_replay(read_trace(own).jobs, 2.0)
    assert [(job.waiting.since - BEGIN).total_seconds() for job in jobs] == [0, 5, 900, 1800]


def test_a_trace_may_say_the_size_of_each_jobs_base(tmp_path: Path) -> None:
    path = tmp_path / "based.csv"
    head = "arrival,vram,duration,user,base_size\n"
    path.write_text(f"{head}0,20GiB,2h,ada,5GiB\n1,20GiB,2h,ada,4GiB\n2,20GiB,2h,ada,\n")
    jobs = read_trace(path).jobs
    assert [job.base_size // GIB for job in jobs] == [5, 4, 0]
    path.write_text(head + "0,5GiB,2h,ada,5GiB\n")
    with pytest.raises(DataError, match=":2: base_size is not below vram"):
        read_trace(path)


def test_an_earlier_trace_that_names_base_models_is_read_and_each_job_loads_its_own(tmp_path: Path) -> None:
    path = tmp_path / "based.csv"
    path.write_text("arrival,vram,duration,user,base_model,base_size\n0,20GiB,2h,ada,llama-8b,5GiB\n")
    (job,) = read_trace(path).jobs
    assert job.base_size == 5 * GIB


def test_a_size_for_all_is_half_the_need_of_a_small_job_and_does_not_replace_the_trace_s_own() -> None:
    jobs = tuple(TraceJob(arrival=n, need=need * GIB, seconds=1, user="ada") for n, need in enumerate((20, 4)))
    chosen = Chosen(workload=Workload(jobs=jobs), jobs=jobs, never=0, longer=0)
    sized = chosen.on_bases_of(5 * GIB)
    assert [job.base_size // GIB for job in sized.jobs] == [5, 2]
    with pytest.raises(UsageError, match="the trace has a column base_size itself"):
        sized.on_bases_of(5 * GIB)


def test_a_job_loads_its_base_before_its_first_step_and_a_fork_saves_the_imports(cli: Cli, own: Path) -> None:
    def took(*options: object) -> float:
        found = json.loads(cli("sim", own, "--fleet", "80GiB", "--limit", 1, *options, "--json").stdout)
        return float(found["policies"]["loractl"]["mean_jct_s"])

    assert took() == 7200
    assert took("--base-size", "14GiB") == pytest.approx(7200 + 0.6 + 14 / 0.28)
    assert took("--base-size", "14GiB", "--no-fork-server") == pytest.approx(7200 + 0.6 + 14 / 0.28 + 7.4)


def test_a_start_takes_what_was_measured() -> None:
    """SmolLM2-135M in bf16, 257 MiB: 9.2 s cold; 8B in 16 bit: a minute and more."""
    assert start_s(257 * 2**20, forks=False) == pytest.approx(9.2, rel=0.05)
    assert start_s(15 * GIB, forks=False) == pytest.approx(60, rel=0.05)
    assert start_s(15 * GIB, forks=True) == pytest.approx(54, rel=0.05)
    assert start_s(0, forks=False) == 0, "not known"


# --- what it measures ---


def test_the_measures_are_those_of_the_replay(own: Path) -> None:
    done = simulated(own, "80GiB")
    assert (done.chosen.never, done.chosen.longer, len(done.chosen.jobs)) == (1, 0, 3)
    out = done.outcomes["fifo"]  # 0-2h, then the two others, one after the other
    assert [(c.wait, c.took) for c in out.courses] == [(0, 7200), (5400, 5490), (3690, 9090)]
    assert out.makespan == 7200 + 90 + 5400
    assert out.utilisation == pytest.approx((20 * 7200 + 6 * 90 + 70 * 5400) / 80 / out.makespan)
    assert [c.need // GIB for c in out.largest_tenth] == [70]
    assert {size: len(found) for size, found in out.by_class().items()} == {8: 1, 24: 1, 80: 1}


def test_a_quantile_is_a_value_that_so_many_do_not_exceed() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
    assert quantile([], 0.5) == 0


def test_the_load_is_that_of_the_cards_that_bind(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "steady.csv"
    rows = [f"{n * 100},{20 if n % 2 else 8}GiB,100s,ada" for n in range(400)]
    path.write_text("\n".join(["arrival,vram,duration,user", *rows]))
    jobs = to_replay(read_trace(path).jobs, 1.0)
    assert load_of(jobs, parse_fleet("12GiB,24GiB")) == pytest.approx(0.5, rel=0.02)
    assert load_of(jobs, parse_fleet("3x12GiB,24GiB")) == pytest.approx(0.5, rel=0.02), (
        "half the jobs need the large one"
    )
    assert load_of(jobs, parse_fleet("2x24GiB")) == pytest.approx(0.5, rel=0.02)
    assert load_of(to_replay(read_trace(path).jobs, 4.0), parse_fleet("2x24GiB")) == pytest.approx(2.0, rel=0.02)
    assert "load 0.50, contention" in cli("sim", path, "--fleet", "2x24GiB").stdout


def test_memory_over_time_adds_up_to_the_utilisation(own: Path) -> None:
    for out in simulated(own).outcomes.values():
        means = binned(out, out.makespan, 7)
        assert sum(means) / 7 / out.total == pytest.approx(out.utilisation)
        assert max(means) <= out.total


def test_a_card_that_comes_and_goes_counts_for_its_part_of_the_time() -> None:
    jobs = to_replay([TraceJob(arrival=n * 100, need=GIB, seconds=100, user="ada") for n in range(400)], 1.0)
    whole = load_of(jobs, parse_fleet("24GiB"))
    for fleet, part in (("24GiB open 4h shut 2h", 2 / 3), ("24GiB until 19950s", 0.5), ("24GiB until 30d", 1.0)):
        assert load_of(jobs, parse_fleet(fleet), parse_presences(fleet)) == pytest.approx((whole or 0) / part)


def test_jobs_that_no_card_stays_for_are_counted_and_not_replayed() -> None:
    jobs = [
        TraceJob(arrival=n, need=need * GIB, seconds=60, user="ada", base_size=3 * GIB)
        for n, need in enumerate((20, 60))
    ]
    text, workload = "24GiB until 2min,80GiB open 60s shut 1h", Workload(jobs=tuple(jobs))
    chosen = choose(workload, parse_fleet(text), 1e9, None)
    assert without_slow(chosen, parse_fleet(text), parse_presences(text), forks=True).slow == 0
    slow = replace(chosen, jobs=tuple(replace(job, base_size=19 * GIB) for job in jobs))
    left = without_slow(slow, parse_fleet(text), parse_presences(text), forks=True)
    assert ([job.need // GIB for job in left.jobs], left.slow) == ([20], 1), "68 s: two minutes are enough"
    stays = without_slow(slow, parse_fleet("24GiB,80GiB"), {}, forks=True)
    assert stays.slow == 0


# --- what it says ---


def test_the_text_begins_with_a_sentence_and_fits_eighty_columns(own: Path) -> None:
    lines = text(simulated(own), PIPE).splitlines()
    assert lines[0].startswith("With loractl a job ends ")
    assert max(map(len, lines)) <= 80
    assert "Larger than every card, and not replayed: 1." in lines
    assert sum(line.startswith(("loractl ", "fifo ", "shortest first* ", "best fit ")) for line in lines) == 4
    assert [line.split()[:4] for line in lines if line.startswith("≤")] == [
        ["≤", "8", "GiB", "1"],
        ["≤", "24", "GiB", "1"],
        ["≤", "80", "GiB", "1"],
    ]


def test_times_are_one_number_each() -> None:
    assert [span(s) for s in (0, 89, 90, 5399, 5400, 172_000, 200_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
        "47.8 h",
        "2.3 d",
    ]


def test_the_json_names_every_rule_and_measure(own: Path) -> None:
    value = json.loads(json.dumps(simulated(own, longest=6000).as_json()))
    assert list(value["policies"]) == ["loractl", "fifo", "shortest_first", "best_fit"]
    assert (value["jobs"], value["never"], value["longer"]) == (2, 1, 1)
    stays = {"open_s": None, "shut_s": None}
    assert value["fleet"] == [{"vram": 24 * GIB, "max_jobs": 1, **stays}, {"vram": 80 * GIB, "max_jobs": 4, **stays}]
    assert {"mean_jct_s", "p99_jct_s", "mean_wait_s", "makespan_s"} < set(value["policies"]["fifo"])


def test_the_picture_is_a_png_of_some_size(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "sim.png"
    draw(simulated(own), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000
    with pytest.raises(UsageError, match="can't be written"):
        draw(simulated(own), tmp_path / "no" / "sim.png")


# --- the rule's worth ---


def test_the_rule_beats_whole_cards_by_age_on_a_busy_lab_and_makes_large_jobs_wait_no_longer() -> None:
    """Many short and a few long jobs of all sizes on a lab's cards, at a load that whole cards just about carry."""
    rng, clock, jobs = random.Random(3), 0.0, []
    for _ in range(1500):
        clock += rng.expovariate(1 / 400)
        need, seconds = rng.choice((6, 9, 11, 18, 22, 40, 70)) * GIB, min(86400, rng.lognormvariate(6.9, 1.3))
        jobs.append(TraceJob(arrival=clock, need=need, seconds=seconds, user=rng.choice("abcdef")))
    cards, busy = parse_fleet("2x12GiB,2x24GiB,48GiB,80GiB"), to_replay(jobs, 1.0)
    assert 0.7 < load_of(busy, cards) < 1.2
    ours, theirs = (
        outcome_of(busy, cards, replay(busy, cards, BEGIN, rule, contention=0.5)) for rule in (None, fifo())
    )
    assert mean([c.took for c in ours.courses]) < 0.7 * mean([c.took for c in theirs.courses])
    assert p99_wait(ours.largest_tenth) <= p99_wait(theirs.largest_tenth)


def p99_wait(courses: Sequence[Course]) -> float:
    return quantile([course.wait for course in courses], 0.99)


def in_their_room(jobs: Sequence[TraceJob], fleet: str) -> Simulation:
    cards, workload = parse_fleet(fleet), Workload(jobs=tuple(jobs))
    return simulate(choose(workload, cards, 1e9, None), cards, 1.0, 0.5, Nodes(roomy=True), ("loractl", "recomputing"))


def test_a_job_alone_takes_less_time_in_its_room_and_a_later_one_waits_for_its_end() -> None:
    first, later = (TraceJob(arrival=at, need=10 * GIB, seconds=1000, user="ada") for at in (0, 100))
    done = in_their_room([first, later], "24GiB")
    assert [(c.took, c.roomy) for c in done.outcomes["loractl"].courses] == [(740, True), (1380, True)]
    assert [c.took for c in done.outcomes["recomputing"].courses] == [1000, 1900]
    assert done.later == [-260, -520]
    half = in_their_room([replace(first, need=20 * GIB)], "24GiB")
    assert [(c.took, c.roomy) for c in half.outcomes["loractl"].courses] == [(880, True)], "every second block"
    wide = in_their_room([first, replace(later, need=70 * GIB)], "80GiB")
    assert [c.took for c in wide.outcomes["loractl"].courses] == [740, 640 + 1000]
    assert wide.outcomes["recomputing"].courses[1].wait == 0 < wide.outcomes["loractl"].courses[1].wait


def test_jobs_that_come_together_have_their_needs() -> None:
    jobs = [TraceJob(arrival=0, need=10 * GIB, seconds=1000, user="ada")] * 3
    assert in_their_room(jobs, "80GiB").outcomes["loractl"].roomy == 0
    assert in_their_room(jobs, "24GiB,24GiB,24GiB").outcomes["loractl"].roomy == 1, "no other runs beside them"


def test_on_a_busy_lab_the_room_makes_the_mean_job_end_sooner() -> None:
    rng, clock, jobs = random.Random(3), 0.0, []
    for _ in range(600):
        clock += rng.expovariate(1 / 400)
        need, seconds = rng.choice((6, 9, 11, 18, 22, 40, 70)) * GIB, min(86400, rng.lognormvariate(6.9, 1.3))
        jobs.append(TraceJob(arrival=clock, need=need, seconds=seconds, user=rng.choice("abcdef")))
    done = in_their_room(jobs, "2x12GiB,2x24GiB,48GiB,80GiB")
    assert mean(done.later) < 0
    ours, without = (done.outcomes[name] for name in ("loractl", "recomputing"))
    assert p99_wait(ours.largest_tenth) <= 1.05 * p99_wait(without.largest_tenth)


def test_the_command_tells_what_room_saves_and_whom_it_costs(cli: Cli, own: Path) -> None:
    done = cli("sim", own, "--fleet", "24GiB,80GiB", "--roomy").stdout
    assert "of the jobs recomputed nothing, or every second block alone." in done and "\nrecomputing " in done
    value = json.loads(cli("sim", own, "--fleet", "24GiB,80GiB", "--roomy", "--json").stdout)
    assert list(value["policies"])[:2] == ["loractl", "recomputing"]
    assert value["policies"]["loractl"]["roomy"] > 0 == value["policies"]["recomputing"]["roomy"]
    assert set(value["later"]) == {"jobs", "most_s"}
    assert json.loads(cli("sim", own, "--fleet", "80GiB", "--json").stdout)["later"] is None


def test_the_command_prints_text_or_json_and_draws(cli: Cli, own: Path, tmp_path: Path) -> None:
    done = cli("sim", own, "--fleet", "2x12GiB,24GiB,80GiB", "--plot", tmp_path / "a.png")
    assert done.stdout.startswith("With loractl a job ends ")
    assert "The picture is in" in done.stderr
    assert (tmp_path / "a.png").stat().st_size > 20_000
    value = json.loads(cli("sim", own, "--fleet", "80GiB", "--limit", 1, "--json").stdout)
    assert value["jobs"] == 1
    few = cli("sim", own, "--fleet", "80GiB", "--limit", 1).stdout
    assert value["load"] is None and "load" not in few, "one job has no rate"
    assert load_of([], parse_fleet("24GiB")) is None


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--fleet", "4GiB"], "has no job that this fleet and these options leave"),
        (["--fleet", "80GiB", "--compress", "0"], "--compress 0 is not above 0"),
        (["--fleet", "80GiB", "--compress", "nan"], "--compress nan is not above 0"),
        (["--fleet", "80GiB", "--longest", "soon"], "--longest soon is not a duration"),
        (["--fleet", "80GiB", "--contention", "inf"], "--contention inf is not a number"),
        (["--fleet", "80"], "--fleet 80: "),
        (["--fleet", "80GiB", "--base-size", "2"], "--base-size 2 is not a size"),
        (["--fleet", "80GiB", "--base-size", "0GiB"], "--base-size 0GiB is not a base"),
        (["--fleet", "80GiB", "--quota", "aad=100h/week"], "Hint: did you mean ada?"),
        (["--fleet", "80GiB", "--quota", "zoe=100h/week"], "Hint: its users: ada, bob, cyd"),
        (["--fleet", "80GiB", "--quota", "zoe=100h/week"], "the trace has no user 'zoe'"),
        (["--fleet", "80GiB", "--quota", "100h/week"], "--quota 100h/week names no user"),
        (["--fleet", "80GiB", "--quota", "ada=100h/year"], "'100h/year' is not a quota"),
        (["--fleet", "80GiB", "--quota", "ada=1h/day", "--quota", "ada=2h/day:soft"], "ada has two quotas"),
        (["--fleet", "80GiB until soon"], "says until soon, which is not a duration"),
    ],
)
def test_a_wrong_option_is_a_sentence_and_exit_code_two(cli: Cli, own: Path, args: list[str], what: str) -> None:
    done = cli("sim", own, *args, code=2)
    assert "Error: " in done.stderr
    assert what in done.stderr
    assert "Traceback" not in done.stderr


# --- quotas and cards that go ---


def test_quotas_are_read_in_the_words_of_loractl_quota() -> None:
    assert parse_quotas(["ada=100h/week", "b=b=1.5/day:soft"], ["ada", "b=b", "cyd"]) == {
        "ada": Allowance(card_hours=100, window_s=7 * 86400, soft=False, used=0, below_at=None),
        "b=b": Allowance(card_hours=1.5, window_s=86400, soft=True, used=0, below_at=None),
    }


def test_the_command_tells_what_quotas_cost(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    rows = [f"{n}h,20GiB,1h,{'ada' if n % 2 else 'bob'}" for n in range(40)]
    path.write_text("\n".join(["arrival,vram,duration,user", *rows]))
    args = ("sim", path, "--fleet", "24GiB", "--quota", "ada=4h/day")
    lines = cli(*args).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("without quotas ") for line in lines)
    start = next(n for n, line in enumerate(lines) if line.startswith("WAITS BY QUOTA"))
    assert [line.split()[:4] for line in lines[start + 1 : start + 3]] == [
        ["ada", "4", "a", "day"],
        ["others", "20", "0", "0"],
    ]
    value = json.loads(cli(*args, "--quota", "bob=5h/day:soft", "--json").stdout)
    ada, bob = value["quotas"]
    assert (ada["user"], ada["card_hours"], ada["window_s"], ada["soft"], ada["jobs"]) == ("ada", 4, 86400, False, 20)
    assert ada["mean_wait_s"] > 6 * 3600 and ada["mean_wait_without_s"] == 0
    assert (bob["soft"], bob["mean_wait_s"], bob["unfinished"]) == (True, 0, 0)
    assert value["policies"]["fifo"]["mean_wait_s"] == 0, "it knows no quotas"
    none = json.loads(cli("sim", path, "--fleet", "24GiB", "--quota", "ada=0h/day", "--json").stdout)
    assert [one["unfinished"] for one in none["quotas"]] == [20, 0]
    assert (none["policies"]["loractl"]["unfinished"], none["policies"]["without_quotas"]["unfinished"]) == (20, 0)
    said = cli("sim", path, "--fleet", "24GiB", "--quota", "ada=0h/day").stdout.splitlines()
    assert "Not ended under loractl's rule, and in none of its means: 20." in said
    assert said[0] == "With loractl a job ends 60 min after it arrives, as soon as by fifo."
    assert said[1] == "This compares the 20 jobs that end under both."
    assert next(line.split()[-4:] for line in said if line.startswith("ada ")) == ["–", "–", "0", "s"]
    assert none["quotas"][0]["mean_wait_s"] is None


def test_a_class_of_which_a_rule_ends_no_job_is_a_dash(cli: Cli, tmp_path: Path) -> None:
    """By fifo the small job waits behind the large one until the only card goes."""
    path = tmp_path / "two.csv"
    path.write_text("arrival,vram,duration,user\n0,40GiB,10h,ada\n1min,4GiB,10min,bob\n")
    lines = cli("sim", path, "--fleet", "80GiB until 2h").stdout.splitlines()
    assert lines[:1] == ["No job ended both with loractl and by fifo."]
    (small,) = (line for line in lines if line.startswith("≤ 8 GiB"))
    assert small.split()[3:] == ["1", "0", "s", "–", "–", "0", "s"], "of the rules ours and best fit alone end it"
    assert next(line.split()[1:] for line in lines if line.startswith("fifo ")) == 7 * ["–"]
    path.write_text("arrival,vram,duration,user\n0,40GiB,10h,ada\n")
    lines = cli("sim", path, "--fleet", "80GiB until 2h").stdout.splitlines()
    assert lines[1] == "1 job of 1 user,"
    assert not any(line.startswith("MEAN WAIT BY NEED") for line in lines)
    path.write_text("arrival,vram,duration,user,base_size\n0,70GiB,10h,ada,60GiB\n")
    refused = cli("sim", path, "--fleet", "80GiB open 60s shut 1h", "--no-fork-server", code=2).stderr
    assert "Hint: cards that stay longer" in refused


def test_every_policy_has_a_line_of_its_own() -> None:
    assert set(_STYLES) == set(POLICIES)
