"""The model card for a hub: what of a report stands there, and what never does."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from loractl.common.job.spec import JobSpec
from loractl.common.model_card import License, Published, hub_card

from ...acceptance.test_report_page import report as page_report
from ..factories import spec

PLACE = Published(repository="lab/support", base="org/base", license=License(id="mit"), datasets=(), final="")


def report(**changed: Any) -> dict[str, Any]:
    return {**page_report(), "versions": {"loractl": "0.4.0"}, **changed}


def card(told: dict[str, Any], of: JobSpec | None = None, place: Published = PLACE) -> str:
    return hub_card(told, of or spec(), place)


def test_no_row_of_the_data_and_no_answer_stands_in_the_card() -> None:
    told = report()
    for answer in told["evaluation"]["answers"]:
        answer |= {"prompt": "SECRET question", "expected": "SECRET answer", "base": "SECRET", "tuned": "SECRET"}
    quoted = "9 % of 90 rows held out hold the answer in the question, behind “SECRET=”: row 1 asks “SECRET”, and its "
    told["verdict"]["aside"] = f"{quoted}answer is “SECRET”. 1 of 8 held-out rows were cut at dataset.max_length."
    text = card(told)
    assert "SECRET" not in text
    assert "1.25.** 9 % of 90 rows held out hold the answer in the question. 1 of 8 held-out rows were cut" in text


def test_a_name_in_a_report_makes_no_line_and_no_cell_of_its_own() -> None:
    told = report(versions={"loractl": "1\n# Owned", "x": "\x1b[2J"})
    told["evaluation"]["metrics"][0]["label"] = "loss | better | 99"
    text = card(told, place=Published(**{**vars(PLACE), "base": "org/a\n---\nlicense: mine"}))
    assert "\n# Owned" not in text and "\x1b" not in text
    assert "| loss &#124; better &#124; 99, nats | 3.50 |" in text
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["license"] == "mit"


def test_benchmarks_and_final_rows_are_told_where_there_are_some() -> None:
    told = report()
    told["evaluation"]["lm_eval"]["metrics"][0] |= {"group": None, "base": 0.25, "tuned": 0.5, "change": 0.25}
    text = card(told, place=Published(**{**vars(PLACE), "final": "Better: loss 2 -> 1 on final rows."}))
    assert "| lm-eval task | base | tuned |" in text and "| lab_queues acc | 0.250 | 0.500 | +0.250 |" in text
    assert "loss 3.50 -> 1.25.** Better: loss 2 -> 1 on final rows." in text
    told["evaluation"]["lm_eval"] = None
    assert "lm-eval" not in card(told)


@pytest.mark.parametrize(
    ("keys", "tag", "tags"),
    [
        ({}, "text-generation", ["lora", "loractl"]),
        ({"task_type": "SEQ_CLS"}, "text-classification", ["lora", "loractl"]),
        ({"task_type": "preference"}, "text-generation", ["lora", "dpo", "loractl"]),
        (
            {"task_type": "preference", "preference": {"loss_type": ["simpo", "sft"]}},
            "text-generation",
            ["lora", "simpo", "sft", "loractl"],
        ),
    ],
)
def test_each_kind_of_training_has_its_words(keys: dict[str, Any], tag: str, tags: list[str]) -> None:
    told = report()
    told["data"]["labels"] = {"no": {}, "yes": {}} if tag == "text-classification" else None
    content = yaml.safe_load(card(told, spec(**keys)).split("---\n")[1])
    assert (content["pipeline_tag"], content["tags"]) == (tag, tags)
    if told["data"]["labels"]:
        assert 'It classifies texts, with a head of its own: "no", "yes".' in card(told, spec(**keys))


def test_a_base_without_a_name_is_said_to_have_none() -> None:
    text = card(report(base_model="/srv/models/Base-1B"), place=Published(**{**vars(PLACE), "base": None}))
    assert "`Base-1B`, a folder whose name on the hub is not known" in text and "/srv" not in text
    assert 'base, adapter = "/path/to/the/base", "lab/support"' in text
