"""What the pages show, on both databases; their filters and parts, and what they say when something is wrong."""

from __future__ import annotations

import datetime as dt
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from loractl.common.job.status import Reason, Status
from loractl.common.store.records import Progress
from loractl.scheduler.status.job import state_of
from loractl.scheduler.web.pages.markup import static_url
from loractl.scheduler.web.pages.pages import commands_for
from loractl.scheduler.web.pages.shelf import ReportShelf
from loractl.scheduler.web.site import FRESH_S

from .... import webs
from ...factories import NOON, job, node_state, submission
from .conftest import PAGES, Web


def test_every_page_is_drawn_from_either_database(any_web: Web) -> None:
    web = any_web
    for address in PAGES:
        answer = web.client.get(address)
        assert answer.status_code == 200, f"{address}: {answer.text[:600]}"
        assert "<h1>" in answer.text and "�" not in answer.text
    assert "4 running, 5 waiting, heron:2 drained by lena" in web.client.get("/").text


def test_the_lab_says_first_what_runs_and_who_holds_what(web: Web) -> None:
    page = words(web.client.get("/").text)
    assert "4 running, 5 waiting, heron:2 drained by lena" in page
    assert re.search(r"Next to start: 17 on osprey:0 at about \d\d:\d\d", page)
    assert "vllm serve of tomás holds 41.0 GiB of heron:1 outside the queue" in page
    assert "priya · 12 · 61.0" in page and "Drained by lena: replacing a fan" in page
    assert (
        "needs 92.0 GiB, and the largest card has 79.5 GiB" in page
        and "held by wei: until the new data are there" in page
    )
    assert "held held" not in page


def test_a_lab_in_which_nothing_waits_says_so_in_sentences(own_web: Web) -> None:
    for queued in own_web.lab.store.jobs.matching(statuses=[Status.QUEUED]):
        own_web.lab.store.jobs.cancel(queued.job_id, "ada")
    assert re.search(r"Nothing waits\. Today \d+ done", words(own_web.client.get("/").text))


def test_what_waits_stands_in_the_order_in_which_the_rule_tries_it(web: Web) -> None:
    shown = re.findall(r'data-key="w(\d+)"', web.client.get("/").text)
    tried = [job.job_id for job in web.lab.store.jobs.ready(10)]
    never = 18
    assert [int(n) for n in shown] == [*(n for n in tried if n != never), 20, never], "held ones and hopeless ones last"


def test_a_job_s_page_has_its_attempts_memory_report_answers_and_settings(web: Web) -> None:
    html = web.client.get("/jobs/11").text
    page = words(html)
    assert html.count('class="again"') >= 4, "the steps that were repeated, in both sizes of the picture"
    assert "3 attempts, 40 steps repeated" in page and "1 · kestrel:0" in page and "3 · heron:2" in page
    assert "loss 100 cases, nats; lower is better 2.50 0.90" in page and "−1.72 to −1.48" in page
    assert "base wrong, tuned right 12" in page and page.index("Ticket 0:") < page.index("Ticket 4:")
    assert "training.learning_rate 0.0002" in page and "loractl adapters pull 11 DIR" in page
    assert "step 900: loss" in page, "the end of its log"


@pytest.mark.parametrize(
    ("reason", "offered"),
    [
        (Reason.BAD_DATA, ["loractl submit --like 7 --set KEY=VALUE"]),
        (Reason.TRAINER_ERROR, ["loractl retry 7", "loractl submit --like 7 --set KEY=VALUE"]),
    ],
)
def test_a_failed_job_s_page_offers_what_does_not_fail_in_the_same_way(reason: Reason, offered: list[str]) -> None:
    assert commands_for(state_of(job(status=Status.FAILED, reason=reason))) == offered


def test_answers_are_listed_by_what_changed_and_in_parts(web: Web) -> None:
    broken = words(web.client.get("/jobs/11?answers=broken&from=6").text)
    assert "Ticket 21:" in broken and "Ticket 17:" not in broken and "Ticket 1:" not in broken


def test_a_job_that_learned_from_pairs_shows_both_answers_beside_those_of_the_models(own_web: Web) -> None:
    lab = own_web.lab
    claim = webs.run(lab, "pairs", "mara", "kestrel:0", 3)
    value = webs.the_report(claim.job_id, "pairs", "mara", 0.69, 0.52)["evaluation"]
    loss = {**value["metrics"][0], "label": "preference loss"}
    texts = {"expected": "Ask <b>support</b>.", "rejected": "", "base_ended": False, "base_exact": True}
    answers = [{**answer, **texts} for answer in value["answers"][:6]]
    webs.store_result(lab, claim, 0.69, 0.52, evaluation={**value, "metrics": [loss], "answers": answers})
    page = own_web.client.get(f"/jobs/{claim.job_id}").text
    told = words(page)
    assert "Answers 6" in told and "base wrong" not in told and "Expected" not in told
    assert "Ticket 0: /scratch on heron is full Chosen Ask <b>support</b>. Rejected Base cut off I" in told
    assert "<b>support" not in page
    assert "Ticket 5:" in words(own_web.client.get(f"/jobs/{claim.job_id}?answers=all&from=6").text)
    assert "preference loss" in words(own_web.client.get("/adapters").text), "a column of its own"


def test_a_waiting_job_s_page_says_card_by_card_why(web: Web) -> None:
    page = words(web.client.get("/jobs/17").text)
    assert "osprey:0 when job 12 ends" in page and "smaller than the job" in page
    assert "has 6.5 GiB left: vllm serve of tomás (pid 4711) holds 41.0 GiB" in page


def test_a_sweep_s_page_names_the_best_and_marks_what_differs(web: Web) -> None:
    html = web.client.get("/sweeps/1").text
    page = words(html)
    assert "Best: 1 (learning_rate 5e-05, r 16), held-out loss 0.951" in page
    assert "loractl compare --sweep 1" in page
    assert "r 16 r 32" in page and "learning_rate 0.0001" in page and html.count('class="ghost"') >= 3
    assert "worse" in page and "The same in all members" in page
    varied = re.findall(r'<div class="varied"><dt>([\w.]+)', web.client.get("/jobs/1").text)
    assert sorted(varied) == ["lora.r", "training.learning_rate"]


def test_a_sweep_without_a_result_offers_no_comparison(own_web: Web) -> None:
    """The command was there to be copied, and ended with an error."""
    one = webs.submission(lora=1, user="mara", name="late")
    members = [replace(one, spec=webs.spec(name="late", lora={"r": r})) for r in (4, 8)]
    own_web.lab.store.sweeps.submit(webs.NewSweep(name="late", varied={"lora.r": "4,8"}), members)
    page = words(own_web.client.get("/sweeps/2").text)
    assert "loractl cancel --sweep 2" in page and "loractl compare" not in page


def test_a_sweep_whose_losses_cannot_be_compared_has_no_best_member(own_web: Web) -> None:
    one, key = webs.submission(lora=1, user="mara", name="late"), "max_length"
    members = [replace(one, spec=webs.spec(name="late", dataset={"path": "org/data", key: most})) for most in (64, 128)]
    varied = {f"dataset.{key}": "64,128"}
    own_web.lab.store.sweeps.submit(webs.NewSweep(name="late", varied=varied), members)
    said = f"osses of different dataset.{key} can't be compared"
    assert f"L{said}, so no member is the best." in words(own_web.client.get("/sweeps/2").text)
    assert f"losses of different dataset.{key} " in own_web.client.get("/sweeps").text, "as the dash's title"


def test_the_adapters_page_compares_and_tells_where_one_comes_from(own_web: Web) -> None:
    from loractl.common.job.names import parse_reference

    own_web.lab.store.adapters.tag(parse_reference("7"), "prod", "mara")
    page = words(own_web.client.get("/adapters?adapter=7").text)
    assert "triage-r32" in page and "prod" in page and "−4.24" in page
    assert "job 7 , attempt 1," in page and "loractl serve --adapters 7" in page


def test_filters_and_parts_are_parameters_of_the_address(own_web: Web) -> None:
    for n in range(60):
        webs.queue(own_web.lab, f"many-{n}", "ada", 4)
    first = own_web.client.get("/jobs?user=ada").text
    assert first.count('data-key="j') == 50
    after = re.search(r'href="(/jobs\?user=ada&amp;after=\d+)"', first)
    assert after is not None
    second = own_web.client.get(after[1].replace("&amp;", "&")).text
    assert second.count('data-key="j') == 10
    assert own_web.client.get("/jobs?status=failed").text.count('data-key="j') == 2
    assert "many-7" in own_web.client.get("/jobs?name=many-7&status=queued").text
    assert "No job matches." in own_web.client.get("/jobs?name=nobody").text
    waiting = own_web.client.get("/").text
    assert len(re.findall(r'data-key="w\d', waiting)) == 50 and "by priority, then the oldest first" in waiting
    more = re.search(r'href="(/\?after=\d+)"', waiting)
    assert more is not None and len(re.findall(r'data-key="w\d', own_web.client.get(more[1]).text)) == 15


@pytest.mark.parametrize(
    ("address", "status", "sentence"),
    [
        ("/jobs/999", 404, "There is no job 999"), ("/sweeps/9", 404, "There is no sweep 9"),
        ("/nothing", 404, "There is no such page"), ("/jobs?after=x", 400, "is not a number"),
        ("/jobs?status=asleep", 400, "is not a job state"), ("/jobs?label=team", 400, "has no value"),
        ("/?after=999", 404, "There is no job 999"), ("/jobs/99999999999999999999", 404, "There is no"),
        ("/sweeps/99999999999999999999", 404, "There is no"),
        ("/jobs?after=000000000001999999999999999999", 400, "is not a number"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_sentence(web: Web, address: str, status: int, sentence: str) -> None:
    answer = web.client.get(address)
    assert answer.status_code == status and sentence in words(answer.text)


def test_the_box_at_the_top_finds_a_job_by_number_or_name(web: Web) -> None:
    found = web.client.get("/find?q=%2311", follow_redirects=False)
    assert (found.status_code, found.headers["location"]) == (303, "/jobs/11")
    assert "sql-gen-r64" in web.client.get("/find?q=sql-gen-r64").text
    assert web.client.get("/find?q=", follow_redirects=False).headers["location"] == "/jobs"


def test_the_whole_log_is_plain_text(web: Web) -> None:
    answer = web.client.get("/jobs/11/log")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith("loading\n") and "step 900: loss" in answer.text.splitlines()[-1]
    assert answer.text.count("step ") == 40 + 68 + 80
    assert web.client.get("/jobs/999/log").status_code == 404


def test_a_log_that_only_its_result_has_is_read_from_there(own_web: Web, tmp_path: Path) -> None:
    own_web.alter("DELETE FROM log_chunks")
    assert own_web.client.get("/jobs/12/log").text == "", "nothing was logged, or it is gone"
    assert own_web.client.get("/jobs/11/log").text == "the log of job 11\n"
    shutil.rmtree(tmp_path / "lab" / "artifacts")
    assert own_web.client.get("/jobs/11/log").status_code == 503


def test_a_page_that_has_not_changed_is_not_sent_again(own_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loractl.scheduler.web.site.FRESH_S", -1.0)
    first = own_web.client.get("/jobs")
    again = own_web.client.get("/jobs", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    own_web.lab.store.jobs.cancel(17, "wei")
    assert own_web.client.get("/jobs", headers={"if-none-match": first.headers["etag"]}).status_code == 200


def test_a_page_is_drawn_once_for_all_who_look_at_the_same_moment(own_web: Web) -> None:
    assert FRESH_S < 4, "less than the time between two looks of one browser"
    before = own_web.client.get("/jobs").text
    own_web.lab.store.jobs.cancel(17, "wei")
    assert own_web.client.get("/jobs").text == before


def test_without_the_artifact_store_a_finished_job_still_has_its_page(own_web: Web, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "lab" / "artifacts")
    page = words(own_web.client.get("/jobs/11").text)
    assert "The report can’t be shown:" in page.replace("'", "’") and "3 attempts" in page
    assert own_web.client.get("/sweeps/1").status_code == 200
    assert "report not read" in own_web.client.get("/adapters").text


def test_a_report_of_another_form_breaks_no_page(own_web: Web) -> None:
    own_web.lab.store.cards.end_drain("heron:2")
    webs.see_cards(own_web.lab.store)
    own_web.lab.store.jobs.cancel(19, "tomás")
    own_web.lab.store.jobs.cancel(16, "priya")
    claim = webs.run(own_web.lab, "forged", "eve", "heron:2", 17, steps=20)
    webs.store_result(own_web.lab, claim, 2.0, 1.0, evaluation={"metrics": "none"})
    page = words(own_web.client.get(f"/jobs/{claim.job_id}").text)
    assert "its report has another form than loractl's" in page.replace("&#39;", "'")
    assert all(own_web.client.get(address).status_code == 200 for address in ("/", "/adapters"))


def test_while_the_database_is_away_the_page_says_so(own_web: Web) -> None:
    file = Path(own_web.url.removeprefix("sqlite:///"))
    file.rename(file.with_name("elsewhere"))
    answer = own_web.client.get("/")
    assert answer.status_code == 503 and "The database does not answer" in answer.text


def test_a_slow_artifact_store_holds_no_page(own_web: Web) -> None:
    import threading

    away = threading.Event()

    def open_artifacts() -> object:
        away.wait(20)
        return own_web.lab.artifacts

    shelf = ReportShelf(own_web.lab.store, open_artifacts)  # type: ignore[arg-type]
    assert shelf.report(11, own_web.lab.store.jobs.get(11).manifest_sha256, wait_s=0.05) is None
    away.set()
    found = shelf.report(11, own_web.lab.store.jobs.get(11).manifest_sha256, wait_s=10)
    assert found is not None and found["job"]["job_id"] == 11


def test_an_ended_job_leaves_the_lab(own_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loractl.scheduler.web.site.FRESH_S", -1.0)
    assert 'data-key="r14"' in own_web.client.get("/").text
    own_web.lab.store.cards.arrive(node_state("kestrel:0"))
    assert 'data-key="r14"' not in own_web.client.get("/").text


def test_a_warning_about_the_data_is_said_once_for_all_attempts_that_have_it(own_web: Web) -> None:
    lab = own_web.lab
    first = webs.run(lab, "warned", "mara", "kestrel:0", 3)
    both, later = ("warning", "data: few rows: 80 to train on"), ("warning", "data: long warm-up")
    lab.store.attempts.beat(first, Progress(events=(both,)))
    lab.store.attempts.finish(first, Reason.WORKER_LOST, "kestrel was silent for 60 s", Progress())
    lab.store.attempts.beat(webs.begin(lab, "kestrel:0", steps=0, of=9, size=3), Progress(events=(both, later)))
    page = words(own_web.client.get(f"/jobs/{first.job_id}").text)
    assert page.count("few rows: 80 to train on") == 1 and "80 to train on (attempt" not in page
    assert "Data: long warm-up (attempt 2)" in page


def test_what_a_person_ordered_is_not_drawn_as_a_fault(own_web: Web) -> None:
    lab = own_web.lab
    claim = webs.run(lab, "moved", "mara", "kestrel:0", 3, steps=30)
    lab.store.attempts.finish(claim, Reason.DRAINED, "kestrel:0 is drained by lena: a fan", Progress())
    lost = webs.begin(lab, "kestrel:0", steps=40, of=90, size=3)
    lab.store.attempts.finish(lost, Reason.WORKER_LOST, "kestrel was silent for 60 s", Progress())
    page = own_web.client.get(f"/jobs/{claim.job_id}").text
    events = dict(re.findall(r'<li class="(\w*)" data-key="[^"]+">.*?<p>Attempt \d ended \((\w+)\)', page))
    assert {reason: tone for tone, reason in events.items()} == {"drained": "", "worker_lost": "bad"}
    assert re.findall(r'<rect class="span (\w*)"', page)[:2] == ["", "bad"]
    lab.store.cards.drain("osprey:0", "lena", "moves")
    page = own_web.client.get("/jobs/12").text
    assert "its card is drained by lena" in words(page) and 'badt">its card' not in page


def test_a_silent_card_is_a_fault_and_one_whose_worker_is_stopped_is_none(
    own_web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loractl.scheduler.web.site.FRESH_S", -1.0)
    red = r'class="badt">(silent for|being stopped)'
    webs.see_cards(own_web.lab.store, **{"osprey:0": {"draining": True}})
    page = own_web.client.get("/").text
    assert "being stopped" in page and not re.search(red, page)
    own_web.lab.now += dt.timedelta(seconds=40)
    assert re.search(red, own_web.client.get("/").text)
    assert 'badt">its card is silent' in own_web.client.get("/jobs/12").text


def test_a_job_without_a_plan_has_no_bar_of_one(own_web: Web) -> None:
    lab = own_web.lab
    lab.store.jobs.cancel(16, "priya")
    odd = submission(lora=None, qlora=None, user="jonas", name="odd", method="lora", priority=60)
    job_id = lab.store.jobs.submit(odd)
    claim = webs.begin(lab, "kestrel:1", steps=20, of=90, size=6)
    assert claim.job_id == job_id and claim.vram_planned is None
    page = own_web.client.get(f"/jobs/{job_id}").text
    assert "no plan, reserved 23.5" in words(page)
    bar = page.partition('id="h-mem"')[2].partition("</ul>")[0]
    assert 'class="planned"' not in bar and 'class="reserved"' not in bar
    assert "planned –" not in words(page)


def test_a_job_that_logs_nothing_now_shows_what_was_measured_last(own_web: Web) -> None:
    """An attempt's start clears the job's values: "Loss –, Steps –" stood above a chart of 72 steps."""
    lab = own_web.lab
    claim = webs.run(lab, "stopped", "mara", "kestrel:0", 3, steps=70, of=90)
    lab.store.attempts.finish(claim, Reason.DRAINED, "kestrel:0 is drained by lena: a fan", Progress())
    again = webs.begin(lab, "kestrel:0", steps=0, of=90)
    lab.store.jobs.cancel(again.job_id, "mara")
    lab.store.attempts.finish(again, Reason.CANCELLED, "cancelled while it ran", Progress())
    page = words(own_web.client.get(f"/jobs/{claim.job_id}").text)
    last = re.search(r"Loss (\d\.\d\d) training .*Steps (\d+)", page)
    assert last is not None and last[2] == "70", page[:400]
    assert "Loss –" not in page and "Speed" not in page


def test_the_adapters_page_leaves_out_what_the_loss_says_already(own_web: Web) -> None:
    lab = own_web.lab
    claim = webs.run(lab, "tone", "mara", "kestrel:0", 3)
    value = webs.the_report(claim.job_id, "tone", "mara", 9.6, 2.2)["evaluation"]
    same = {"name": "perplexity", "label": "perplexity", "unit": "", "base": 14764.8, "tuned": 9.0, "change": -14755.8}
    f1 = {**value["metrics"][1], "name": "macro_f1", "label": "macro F1 of the labels"}
    measures = [*value["metrics"], {**value["metrics"][0], **same}, f1]
    webs.store_result(lab, claim, 9.6, 2.2, evaluation={**value, "metrics": measures})
    page = own_web.client.get("/adapters").text
    heads = re.findall(r'<th scope="col" class="c">([^<]+)<', page)
    assert heads == ["loss", "exact match", "ROUGE-L", "macro F1 of the labels"]
    assert 'data-label="ROUGE-L, %"' in page, "each value has its measure where the columns have no room"
    assert "perplexity" in words(own_web.client.get(f"/jobs/{claim.job_id}").text)


def test_a_cell_without_a_value_can_be_left_out_where_there_is_little_room(web: Web) -> None:
    for address in PAGES:
        page = web.client.get(address).text
        assert not re.findall(r"<(?:td|span class=.r num)[^>]*>(?:<b>)?–", page), address
    assert "td:has(.none)" in web.client.get(static_url("page.css")).text


def test_a_sentence_names_a_person_without_a_mark(web: Web) -> None:
    for address, named in (
        ("/jobs/12", "by priya"),
        ("/sweeps/1", "Submitted by mara ."),
        ("/adapters?adapter=7", "by mara"),
    ):
        page = web.client.get(address).text
        assert named in words(page)
        assert not re.search(r'<(?:p class="lede"|dd)>(?:(?!</p>|</dd>).)*class="who"', page), address


def test_a_legend_names_only_what_is_drawn(own_web: Web) -> None:
    lab = own_web.lab

    def key(address: str, heading: str) -> str:
        return words(
            "<main>" + own_web.client.get(address).text.partition(f'id="{heading}">')[2].partition("</header>")[0]
        )

    assert key("/jobs/12", "h-loss").endswith("training, as logged smoothed held out")
    assert key("/jobs/15", "h-loss") == "Loss"
    short = webs.run(lab, "short", "mara", "kestrel:0", 3, steps=60)
    assert key(f"/jobs/{short.job_id}", "h-loss") == "Loss training"
    assert "outside" in key("/", "h-cards")
    assert "worse" in key("/adapters", "h-m") and "no clear change" in key("/adapters", "h-m")


def test_a_share_beyond_a_quota_is_what_was_used_and_not_what_puts_it_last(own_web: Web) -> None:
    """It said 1000000000279, ran over its panel, and left every other bar empty; a hard quota's bar was nan."""
    usage = own_web.lab.store.usage
    usage.set_quota("mara", 0.01, 7 * 86400, soft=True)
    usage.set_quota("wei", 0.01, 7 * 86400, soft=False)
    html = own_web.client.get("/").text
    shares = words("<main>" + html.partition('data-key="shares"')[2])
    assert re.search(r"mara [\d.]{2,4} beyond the quota: new jobs go last", shares), shares
    assert "wei – beyond the quota: new jobs wait" in shares and "nan" not in html and "inf" not in shares
    assert html.count('rx="3" class="d') > 4 and 'width="100.0%"' in html


def test_a_card_whose_worker_stops_at_a_time_says_it_under_what_is_free(own_web: Web) -> None:
    evening = {"until": NOON.replace(hour=18), "window_s": 36_000.0}
    webs.see_cards(own_web.lab.store, **{"kestrel:1": evening})
    assert re.search(r":1 RTX 4090 23\.5 / 24 until \d\d:\d\d", words(own_web.client.get("/").text))


def test_a_list_of_jobs_says_that_one_can_never_start_and_after_which_one_starts(own_web: Web) -> None:
    follower = webs.queue(own_web.lab, "follower", "ada", 4, after=[12])
    page = words(own_web.client.get("/jobs").text)
    assert "Waits never needs 92.0 GiB" in page and "Waits after job 12 (med-summ-70b), which runs on" in page
    assert "Held by wei: until the new data are there" in page
    waits = words(own_web.client.get(f"/jobs/{follower}").text)
    assert "Llama-3.1-8B, r16 α32, lr" in waits, "no method is chosen yet"
    assert "No attempt has started yet." in waits and "the whole log as text" not in waits


def test_a_file_s_name_begins_no_sentence(web: Web) -> None:
    page = words(web.client.get("/jobs/10").text)
    assert page.count("data/law.jsonl: row 4120") == 2 and "Data/law" not in page


def test_a_peak_is_red_beyond_what_was_reserved_and_else_a_warning(own_web: Web) -> None:
    """An attempt that ended well in the memory it was given looked like a failure."""
    html = own_web.client.get("/jobs/11").text
    assert html.count('"peak past"') == 2 and '"peak over"' not in html
    own_web.alter("UPDATE attempts SET vram_process = vram_reserved + 1 WHERE job_id = 9")
    assert '"peak over"' in own_web.client.get("/jobs/9").text


def test_one_of_a_thing_is_one(own_web: Web) -> None:
    assert "in the last day, including" in words(own_web.client.get("/usage?days=1").text)
    assert "in the last 7 days, including" in words(own_web.client.get("/usage?days=7").text)
    evaluation = webs.the_report(9, "dialect-r8", "lena", 3.0, 2.98)["evaluation"]
    one = {**evaluation, "rows": 1, "metrics": [{**metric, "cases": 1} for metric in evaluation["metrics"]]}
    claim = webs.run(own_web.lab, "single", "ada", "kestrel:1", 3)
    webs.store_result(own_web.lab, claim, 2.0, 1.5, evaluation=one)
    page = words(own_web.client.get(f"/jobs/{claim.job_id}").text)
    assert "1 held-out row;" in page and "1 case, nats" in page and "1 attempt until" not in page


def test_usage_has_bars_and_its_words_below(web: Web) -> None:
    html = web.client.get("/usage").text
    page = words(html)
    assert re.search(r"Total \d+\.\d \d+ \d+ % \d+\.\d h \d+", page) and "Lost: the card hours of" in page
    assert 'width="100.0%"' in html, "the largest"


def words(html: str) -> str:
    """The page's text."""
    import html as entities

    main = html.partition("<main")[2].partition(">")[2].partition("</main>")[0]
    return " ".join(entities.unescape(re.sub(r"<[^>]+>", " ", main)).split())
