"""Questions that give their answer away, and those in which it stands since that is the task."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial

import pytest

from loractl.common.data.examples import Example, Turn
from loractl.common.data.findings import Finding
from loractl.common.data.giveaway import MOST_ROWS, Giveaway, unquoted
from loractl.common.data.inspection import check_examples

LABELS = ("alarm", "info", "warning")
PEOPLE = ("Anke", "Dmitri", "Elif", "Olga", "Priya", "Quentin", "Rosa", "Sven")
Ask = Callable[[int, str], str]  # the question of a row with this number and this answer


def drawn(number: int) -> random.Random:
    return random.Random(number)


def ticket(number: int) -> str:
    parts = [("The", "A", "Our"), ("pump", "laser", "oven", "shelf"), ("stopped", "moved", "hums", "drips")]
    return f"{' '.join(drawn(number).choice(part) for part in parts)} on day {number * 7} (see {number * 31})."


def code(number: int) -> str:
    return str(drawn(number).randrange(1000, 10**6))


def label(number: int) -> str:
    return drawn(number).choice(LABELS)


def person(number: int) -> str:
    return drawn(number).choice(PEOPLE)


def chat(number: int, asked: str, answer: str, system: str = "") -> Example:
    first = (Turn(role="system", content=system),) if system else ()
    said = (Turn(role="user", content=asked), Turn(role="assistant", content=answer))
    return Example(number=number, turns=(*first, *said))


def chats(ask: Ask, answer: Callable[[int], str] = label, count: int = 100, begin: int = 1) -> list[Example]:
    return [chat(n, ask(n, answer(n)), answer(n)) for n in range(begin, begin + count)]


def found(train: list[Example], held_out: list[Example] | None = None) -> list[Finding]:
    kinds = ("answer in the question", "answers within questions")
    return [finding for finding in check_examples(train, held_out or []) if finding.kind in kinds]


def clean(number: int, answer: str) -> str:
    return ticket(number)


def choices(number: int, answer: str) -> str:
    return f"Sort it: {', '.join(drawn(number + 10**6).sample(LABELS, 3))}. {ticket(number)}"


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda n, a: f"{ticket(n)} [gold={a}]", label),
        (lambda n, a: f"{ticket(n)} [gold={a.upper()}]", label),
        (lambda n, a: f"{choices(n, a)} [gold={a}]", label),
        (lambda n, a: f"{ticket(n)} [gold={a}]" if n % 5 == 0 else ticket(n), label),
        (lambda n, a: f"Answer: {a}\n{ticket(n)}", label),
        (lambda n, a: f"{ticket(n)}\nThe correct answer is {a}.", label),
        (lambda n, a: f"{ticket(n)} ({a})", label),
        (lambda n, a: f"{ticket(n)}\n{a}", label),
        (lambda n, a: f'{{"text": "{ticket(n)}", "class": "{a}"}}', label),
        (lambda n, a: f"<answer>{a}</answer> {ticket(n)}", label),
        (lambda n, a: f"{ticket(n)} key={a if n % 10 else 'none'}", label),
        (lambda n, a: f"{ticket(n)} [gold={a}]", lambda n: "no" if n % 12 else "yes"),
        (lambda n, a: f"{ticket(n)} [gold={a}]", code),
        (lambda n, a: f"What does it cost? {ticket(n)}\nAnswer: {a}", code),
    ],
)
def test_an_answer_at_a_fixed_place_of_its_question_is_found(ask: Ask, answer: Callable[[int], str]) -> None:
    told = found(chats(ask, answer))
    assert [finding.kind for finding in told] == ["answer in the question"] and told[0].level == "warning"
    assert found(chats(clean, answer)) == []


@pytest.mark.parametrize(
    ("ask", "answer", "taken"),
    [
        (clean, label, None),
        (lambda n, a: f"Is it alarm, info or warning? {ticket(n)}", label, "choices"),
        (choices, label, "choices"),
        (lambda n, a: f"Options:\n- alarm\n- info\n- warning\n{ticket(n)}", label, "choices"),
        (lambda n, a: f"Is it an alarm? {ticket(n)}", lambda n: "alarm" if n % 20 else "info", "extraction"),
        (lambda n, a: f"A) {label(n + 1)} B) {a} C) {label(n + 2)}. {ticket(n)}" if n % 2
         else f"A) {a} B) {label(n + 1)} C) {label(n + 2)}. {ticket(n)}", label, "choices"),
        (lambda n, a: f"The {a} bell rang. {ticket(n)}" if n % 3 == 0 else ticket(n), label, None),
        (lambda n, a: f"{ticket(n)} It was moved by {a}. Who moved it?", person, "extraction"),
        (lambda n, a: f"{ticket(n)} {a} has seen it, and {person(n + 1)} not. Who has?", person, "choices"),
        (lambda n, a: f"Owner: {a}. Date: {n}. {ticket(n)} Who is the owner?", person, "extraction"),
        (lambda n, a: f"{ticket(n)} The code is {a} today. What is it?", code, "extraction"),
        (lambda n, a: f"What is the code?\n{ticket(n)}\nCode: {a}\nRoom: {n}", code, "extraction"),
        (lambda n, a: f"Context: {a} moved the oven on day {n}. Who was it?", person, "extraction"),
        (lambda n, a: f"Begin of: {a} {ticket(n)}", ticket, "copying"),
        (lambda n, a: f"Repeat after me: {a}", code, "copying"),
        (lambda n, a: ("Repeat: {}", "Say: {}", "Write this: {}")[n % 3].format(a), code, "copying"),
        (lambda n, a: f"{ticket(n)} Label: {label(n + 1)}\n{ticket(n + 2)} Label: {label(n + 2)}\n{ticket(n)} Label:",
         label, "choices"),
    ],
)  # fmt: skip
def test_answers_that_are_the_task_are_no_leak(ask: Ask, answer: Callable[[int], str], taken: str | None) -> None:
    told = found(chats(ask, answer))
    assert [finding.level for finding in told] == ["note"] * (taken is not None), told
    assert taken is None or told[0].text.endswith(f"taken for {taken}")


def test_the_share_and_a_pair_are_told_of_both_sides() -> None:
    leak: Ask = lambda n, a: f"Pump {n} hums. [gold={a}]" if n % 5 else ticket(n)  # noqa: E731
    (told,) = found(chats(leak), chats(leak, count=20, begin=101))
    assert told.text == (
        "80 % of 100 rows to train on and 80 % of 20 rows held out hold the answer in the question, behind “[gold=”: "
        f"row 1 asks “pump 1 hums. [gold={label(1)}]”, and its answer is “{label(1)}”"
    )
    assert unquoted(f"Worse on x. {told.text}. 3 rows were cut.") == (
        "Worse on x. 80 % of 100 rows to train on and 80 % of 20 rows held out hold the answer in the question. "
        "3 rows were cut."
    )


def test_rows_held_out_alone_may_give_answers_away() -> None:
    (told,) = found(chats(clean), chats(lambda n, a: f"{ticket(n)} [gold={a}]", count=40, begin=101))
    assert told.level == "warning" and told.text.startswith("100 % of 40 rows held out hold the answer")


def test_a_system_s_message_and_a_prompt_are_questions_and_a_tool_s_answer_is_none() -> None:
    train = [chat(n, ticket(n), label(n), system=f"Be kind. Label: {label(n)}") for n in range(1, 60)]
    assert [finding.level for finding in found(train)] == ["warning"]
    prompts = [f"{ticket(n)} gold={label(n)}\nA:" for n in range(1, 60)]
    train = [Example(number=n, prompt=prompt, text=f"{prompt} {label(n)}") for n, prompt in enumerate(prompts, start=1)]
    assert [finding.level for finding in found(train)] == ["warning"]
    seen = [Turn(role="tool", content=f"state={label(n)}") for n in range(1, 60)]
    asked = [Turn(role="user", content=ticket(n)) for n in range(1, 60)]
    ends = [Turn(role="assistant", content=label(n)) for n in range(1, 60)]
    train = [Example(number=n, turns=turns) for n, turns in enumerate(zip(asked, seen, ends, strict=True), start=1)]
    assert found(train) == []


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (lambda n, a: f"{ticket(n)} [gold={a}]", "warning"),
        (lambda n, a: f"{a} {ticket(n)}" if n % 2 else f"{ticket(n)} it is {a} again", "warning"),
        (lambda n, a: f"{ticket(n)} It is an {a}." if n % 4 == 0 else ticket(n), None),
        (lambda n, a: f"alarm, info or warning: {ticket(n)}", "note"),
        (clean, None),
    ],
)
def test_a_classifier_s_text_that_holds_its_label(text: Ask, level: str | None) -> None:
    train = [Example(number=n, text=text(n, label(n)), label=label(n)) for n in range(1, 101)]
    assert [finding.level for finding in found(train)] == [level] * (level is not None)


def test_of_many_rows_some_are_looked_at_and_the_sentence_says_so() -> None:
    count = 4 * MOST_ROWS
    (told,) = found(chats(lambda n, a: f"{n} [gold={a}]" if n % 2 else str(n), count=count))
    shown = re.match(rf"(\d+) % of (\d+) of {count} rows to train on hold", told.text)
    assert shown is not None and 44 <= int(shown[1]) <= 56 and MOST_ROWS * 0.9 <= int(shown[2]) <= MOST_ROWS * 1.1


def test_few_rows_are_no_habit_and_rows_that_ask_nothing_are_left_out() -> None:
    assert found(chats(lambda n, a: f"{ticket(n)} [gold={a}]" if n < 8 else ticket(n), count=60)) == []
    assert found([Example(number=n, text=f"gold={label(n)}") for n in range(1, 60)]) == []
    assert found([chat(n, label(n), label(n)) for n in range(1, 60)]) == []


@pytest.mark.parametrize("labelled", [False, True])
def test_an_answer_that_is_part_of_many_words_of_its_question_is_still_found(labelled: bool) -> None:
    answers = {n: drawn(n).choice(("no", "yes")) for n in range(1, 61)}
    asked = {n: f"Nobody knows another notion, note {n}:\n{answer}" for n, answer in answers.items()}
    rows = [
        Example(number=n, text=asked[n], label=answer) if labelled else chat(n, asked[n], answer)
        for n, answer in answers.items()
    ]
    (told,) = found(rows)
    assert told.level == "warning" and told.count == len(rows)


def by_length(number: int) -> str:
    """A question that says nothing of its label but by its length."""
    return " ".join(drawn(number).choices(("pump", "oven", "hums", "shelf"), k=5 + 7 * LABELS.index(label(number))))


def look(train: list[Example], held_out: list[Example]) -> tuple[list[Finding], str]:
    giveaway = Giveaway(len(train), held_out)
    for example in train:
        giveaway.see(example)
    return list(giveaway.findings()), giveaway.read_off


def test_labels_that_follow_from_the_length_of_the_question_are_found() -> None:
    rows = chats(lambda n, a: by_length(n), count=120)
    (told,), read_off = look(rows[:100], rows[100:])
    assert (told.level, told.kind, read_off) == (
        "warning", "length tells the label", "the length of a question tells its label"
    )  # fmt: skip
    assert "kappa of " in told.text and told.hint is not None
    assert told.text.endswith("; if the label is about that, a rule without a model may do as well")
    clean_rows = chats(clean, count=120)
    assert look(clean_rows[:100], clean_rows[100:]) == ([], "")
    assert look(rows[:100], clean_rows[100:]) == ([], ""), "on both sides"
    assert look(rows[:10], []) == ([], ""), "few lengths say nothing"


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (str.upper, "case tells the label"), (str.capitalize, "case tells the label"),
        ("{} ".format, "spaces tell the label"), ("{}\n".format, "spaces tell the label"),
        ("\u200b{}".format, "spaces tell the label"), (partial(re.sub, " ", "  ", count=1), "spaces tell the label"),
        ("{}!".format, "first or last sign tells the label"), ("{}?!".format, "first or last sign tells the label"),
        ("- {}".format, "first or last sign tells the label"), ("“{}".format, "first or last sign tells the label"),
        (str, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["{}", "Read this: {}\nYour answer:"])
def test_labels_that_follow_from_case_spaces_or_signs_are_found(
    write: Callable[[str], str], kind: str | None, frame: str
) -> None:
    draw = random.Random(3)

    def row(n: int) -> Example:
        label, text = (
            draw.choice(["alarm", "ticket"]),
            " ".join(draw.choices(["pump", "valve", "leak", "door"], k=9)),
        )
        asked = frame.format(write(text) if label == "alarm" else text)
        return Example(number=n, turns=(Turn(role="user", content=asked), Turn(role="assistant", content=label)))

    found, read_off = look([row(n) for n in range(200)], [row(n) for n in range(200, 260)])
    assert [one.kind for one in found] == ([kind] if kind else []) and bool(read_off) == bool(kind)


@pytest.mark.parametrize(("sign", "what"), [("?", "the last sign"), (" and so on for long", "the length")])
def test_a_rule_by_the_form_is_learned_from_rows_to_train_on_and_scored_on_held_out_ones(sign: str, what: str) -> None:
    """Every fifth held-out row has the other label, and one a sign that no row to train on has."""

    def row(n: int, *, other: bool = False, end: str | None = None) -> Example:
        asks = n % 2 == 0
        text = " ".join(drawn(n).choices(["pump", "valve", "leak", "door"], k=9))
        text += (sign if asks else ".") if end is None else end
        return chat(n, text, "question" if asks != other else "statement")

    train, held = [row(n) for n in range(100)], [row(n, other=n % 10 == 0) for n in range(100, 160)]
    giveaway = Giveaway(len(train), [*held, row(161, end=";")])
    for example in train:
        giveaway.see(example)
    assert list(giveaway.findings()) and giveaway.rule is not None and giveaway.rule.what == what
    told = dict(giveaway.rule.right)
    assert set(told) == {*range(100, 160), 161}
    assert [number for number in range(100, 160) if not told[number]] == [100, 110, 120, 130, 140, 150]
    clean_rows = chats(clean, count=120)
    giveaway = Giveaway(100, clean_rows[100:])
    for example in clean_rows[:100]:
        giveaway.see(example)
    assert not list(giveaway.findings()) and giveaway.rule is None


@pytest.mark.parametrize("form", ["(A) {} (B) {}", "\nA) {}\nB) {}", "\n1. {}\n2. {}"])
def test_an_answer_that_is_always_the_first_choice_is_found(form: str) -> None:
    draw = random.Random(3)

    def row(n: int, *, first: bool) -> Example:
        label, other = draw.sample(["alarm", "ticket", "note"], 2)
        asked = f"what is case {n}? {form.format(*((label, other) if first or n % 2 else (other, label)))}"
        return Example(number=n, turns=(Turn(role="user", content=asked), Turn(role="assistant", content=label)))

    sides = [[row(n, first=True) for n in range(200)], [row(n, first=True) for n in range(200, 260)]]
    found, read_off = look(*sides)
    assert [one.kind for one in found] == ["answer in the question"] and read_off
    either = [[row(n, first=False) for n in range(200)], [row(n, first=False) for n in range(200, 260)]]
    assert look(*either)[1] == "", "a choice between them is the task"


def test_the_verdict_is_told_if_most_held_out_answers_can_be_read_off() -> None:
    leak, half = (
        (lambda n, a: f"{ticket(n)} [gold={a}]"),
        (lambda n, a: f"{ticket(n)} [gold={a}]" if n % 2 else clean(n, a)),
    )
    assert look(chats(leak), chats(leak, count=40, begin=101))[1] == (
        "100 % of 40 rows held out hold the answer in the question"
    )
    assert look(chats(leak), chats(half, count=40, begin=101))[1] == "", "half of them can be judged"
    assert look(chats(leak), chats(clean, count=40, begin=101))[1] == ""


def sum_of(number: int) -> tuple[str, int]:
    a, b = drawn(number).randrange(2, 40), drawn(number + 7).randrange(2, 40)
    return f"Olga has {a} pens and buys {b} more. How many are there?", a + b


def hinted(number: int, answer: str) -> str:
    question, total = sum_of(number)
    return f"{question} (hint: the teacher says {total})"


def in_a_sentence(number: int) -> str:
    return f"It is {sum_of(number)[1]}."


def solved(number: int) -> str:
    return f"She adds the two, so there are {sum_of(number)[1]} pens.\n#### {sum_of(number)[1]}"


def joined(number: int) -> str:
    return f"{label(number)}_due"


@pytest.mark.parametrize(
    ("ask", "answer", "mark", "read_off"),
    [
        (hinted, lambda n: str(sum_of(n)[1]), "hint: the teacher says", True),
        (hinted, in_a_sentence, "hint: the teacher says", True),
        (hinted, solved, "hint: the teacher says", True),
        (lambda n, a: f"{ticket(n)} (expected: {label(n)})", lambda n: f"The queue is {label(n)}.", "(expected:", True),
        (lambda n, a: f"{ticket(n)} [{a.replace('_', ' ').upper()}]", joined, "[", True),
        (lambda n, a: f"{ticket(n)} Please route this to {a} now", label, "this to", False),
    ],
    ids=["number", "in a sentence", "in a solution", "label in a sentence", "label with spaces", "any two words"],
)  # fmt: skip
def test_an_answer_in_another_form_is_found(ask: Ask, answer: Callable[[int], str], mark: str, read_off: bool) -> None:
    rows = chats(ask, answer, count=140)
    (told,), clause = look(rows[:100], rows[100:])
    assert told.kind == "answer in the question" and f"behind “{mark}”" in told.text
    assert bool(clause) == read_off, "two words that name no answer may be extraction: a warning, no verdict"


def at_length(number: int) -> str:
    """A solution of many words with its result in the middle, where neither end of it is."""
    return f"{'We add the two numbers. ' * 9}That makes {sum_of(number)[1]}. {'So it is done. ' * 9}"


def test_a_number_in_the_middle_of_a_long_answer_is_found_and_so_is_a_long_answer() -> None:
    rows = chats(hinted, at_length, count=140)
    assert look(rows[:100], rows[100:])[1] == "100 % of 40 rows held out hold the answer in the question"
    rows = chats(lambda n, a: f"{sum_of(n)[0]} (the teacher's answer: {a})", lambda n: f"{n} {at_length(n)}", count=140)
    assert look(rows[:100], rows[100:])[1] == "100 % of 40 rows held out hold the answer in the question"


@pytest.mark.parametrize("answer", [in_a_sentence, solved, at_length])
def test_numbers_of_the_question_in_an_answer_are_no_leak(answer: Callable[[int], str]) -> None:
    rows = chats(lambda n, a: sum_of(n)[0], answer, count=140)
    assert look(rows[:100], rows[100:]) == ([], "")


@pytest.mark.parametrize("sizes", [(3, 4), (30, 60), (40, 41)])
def test_the_order_of_a_file_tells_no_label(sizes: tuple[int, int]) -> None:
    """Many files are sorted by label, and many of their questions have one length."""
    draw = random.Random(5)
    rows = [("x" * draw.randrange(*sizes) + "?", answer) for answer in ("ham", "spam") for _ in range(200)]
    train = [chat(n, asked, answer) for n, (asked, answer) in enumerate(rows)]
    assert look(train, train[150:250]) == ([], "") and look(train, []) == ([], "")


def test_final_rows_are_called_so() -> None:
    rows = chats(lambda n, a: f"{ticket(n)} [gold={a}]", count=140)
    giveaway = Giveaway(100, rows[100:], "of the final file")
    for row in rows[:100]:
        giveaway.see(row)
    list(giveaway.findings())
    assert giveaway.read_off == "100 % of 40 rows of the final file hold the answer in the question"
