"""Held-out rows that resemble a row to train on, and those that only have its form."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable

import pytest

from loractl.common.data.examples import Example, Turn
from loractl.common.data.resemblance import Resemblance, folded_words

QUESTION = "Where is ffmpeg on kestrel since this morning?"


def chat(number: int, *said: str, system: str = "") -> Example:
    first = (Turn(role="system", content=system),) if system else ()
    turns = (Turn(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(said))
    return Example(number=number, turns=(*first, *turns))


def found(held_out: Example, *train: Example) -> dict[int, int]:
    look = Resemblance([held_out])
    for example in train:
        look.see(example)
    return look.found


@pytest.mark.parametrize(
    "held_out",
    [
        f"{QUESTION}?", f"please {QUESTION}", f"{QUESTION} thanks a", QUESTION.upper(), QUESTION.replace("k", "\u043a"),
        QUESTION.replace("e", "\u00e9"), QUESTION.replace("ffmpeg", "\uff46\uff46mpeg"),
        QUESTION.replace("morning", "mornin"),
        QUESTION.replace(" since", ""), QUESTION.replace(" ", " \u200b"), QUESTION.replace("kestrel", "kestrels"),
    ],
)  # fmt: skip
def test_a_sign_a_word_or_a_letter_hides_nothing(held_out: str) -> None:
    assert found(chat(7, held_out, "x"), chat(1, "Which queue?", "y"), chat(2, QUESTION, "another answer")) == {7: 2}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (QUESTION, QUESTION.replace("kestrel", "heron")),
        (QUESTION, f"{QUESTION} And where is blender on heron?"),
        ("Book the laser on Monday from nine", "Book the laser on Sunday from nine"),
        ("The printer in room 118 is broken", "The printer in room 119 is broken"),
        ("Who is the oldest male of them", "Who is the oldest female of them"),
        ("Ship it", "Sell it"), ("What now", "What"), ("no", "yes"),
    ],
)  # fmt: skip
def test_rows_of_one_form_do_not_resemble_each_other(one: str, other: str) -> None:
    assert found(chat(7, one, "x"), chat(2, other, "x")) == {}


def written(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choice("bdklmnrst") + rng.choice("aeiou") for _ in range(3)) for _ in range(count))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_long_instruction_that_all_rows_share_hides_no_row(first: bool) -> None:
    rng = random.Random(3)
    rule, mails = written(rng, 420), [written(rng, 60) for _ in range(40)]
    asked = [f"{rule}\n{mail}" if first else f"{mail}\n{rule}" for mail in mails]
    look = Resemblance([chat(n, text.replace("ba", "da", 1), "bug") for n, text in enumerate(asked[:30])])
    for n, text in enumerate(asked[20:]):
        look.see(chat(120 + n, text, "bug"))
    assert look.found == {n: 100 + n for n in range(20, 30)}


def test_several_questions_about_one_long_document_are_several() -> None:
    rng = random.Random(4)
    documents = [written(rng, 420) for _ in range(12)]
    asked = [f"{text}\nWhat about {written(rng, 8)}?" for text in documents for _ in range(3)]
    look = Resemblance([chat(n, text, written(rng, 9)) for n, text in enumerate(asked[::3])])
    for n, text in enumerate(asked):
        if n % 3:
            look.see(chat(100 + n, text, written(rng, 9)))
    assert look.found == {}


def test_what_many_rows_have_in_common_makes_none_of_them_alike() -> None:
    look = Resemblance([chat(n, f"Please sort this ticket for me: item {chr(97 + n)}", "x") for n in range(25)])
    for n in range(25):
        look.see(chat(100 + n, f"Please sort this ticket for me: thing {chr(97 + n)}", "x"))
    assert look.found == {}


def test_systems_messages_and_answers_are_not_compared() -> None:
    system = "You are a helpful assistant of the lab who answers shortly and always names the queue."
    assert found(chat(7, "Ship it", "x", system=system), chat(2, "Sell the other one", "x", system=system)) == {}
    assert found(chat(7, QUESTION, "x", system=system), chat(2, QUESTION, "y")) == {7: 2}
    several = chat(7, "hello there", "hi", QUESTION, "x")
    assert found(several, chat(2, "hello there!", "hello", QUESTION, "x")) == {7: 2}


def test_plain_and_labelled_texts_are_compared_whole() -> None:
    plain = Example(number=7, text="a stirring, funny film about nothing", label="good")
    assert found(plain, Example(number=2, text="A stirring funny film, about nothing!", label="bad")) == {7: 2}
    prompt = Example(number=7, prompt="Q: who filled the furnace?\nA:", text="Q: who filled the furnace?\nA: Sven")
    assert found(
        prompt, Example(number=2, prompt="Q: who filled the furnace\nA:", text="Q: who filled the furnace\nA: x")
    )


def test_where_the_library_is_missing_the_same_words_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rapidfuzz" else there(name))
    assert found(chat(7, f"{QUESTION}?", "x"), chat(2, QUESTION.upper(), "y")) == {7: 2}
    assert found(chat(7, f"please {QUESTION}", "x"), chat(2, QUESTION, "y")) == {}


@pytest.mark.parametrize(
    "hidden", ["\u00ad", "\u200b", "\u200b\u200b", "\u200d", "\u2060", "\ufeff", "\ufe0f", "\U000e0041"]
)
def test_characters_that_nobody_sees_hide_no_row(hidden: str) -> None:
    text = " ".join(word[:2] + hidden + word[2:] for word in QUESTION.split())
    assert found(chat(7, text, "x"), chat(2, QUESTION, "y")) == {7: 2}


def test_words_of_other_scripts_are_words() -> None:
    assert folded_words("\u0e01\u0e32\u200b\u0e14\u0e32") == ["\u0e01\u0e32", "\u0e14\u0e32"], "Thai divides words so"
    assert folded_words("Как дела?") == folded_words("как  дела") and len(folded_words("Как дела")) == 2
    assert folded_words("磁盘已满") == list("磁盘已满")


CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def word(draw: random.Random) -> str:
    return "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(3))


def rows_of_prose(count: int) -> list[list[str]]:
    """Questions of three sentences, as people write them: few words are in many rows."""
    draw = random.Random(11)
    vocabulary = [word(draw) for _ in range(600)]
    return [
        [" ".join(draw.choices(vocabulary, k=draw.randrange(4, 7))).capitalize() + "." for _ in range(3)]
        for _ in range(count)
    ]


PROSE = rows_of_prose(340)
POLITE = ("Good morning, I hope you are well today.", "I would be very grateful for your help, many thanks.")


def with_synonyms(sentences: list[str]) -> str:
    """Every fourth word is another one."""
    words = " ".join(sentences).split()
    return " ".join(f"{one}xo" if place % 4 == 3 else one for place, one in enumerate(words))


@pytest.mark.parametrize(
    ("changed", "least"),
    [
        (lambda row: " ".join([POLITE[0], *row, POLITE[1]]), 40),
        (lambda row: " ".join([row[2], row[0], row[1]]), 40),
        (lambda row: " ".join([POLITE[0], row[1], row[2], row[0]]), 40),
        (with_synonyms, 36),
        (lambda row: " ".join(row[:2]), 40),
    ],
    ids=["a sentence before and after", "other order", "both", "other words", "a part"],
)  # fmt: skip
@pytest.mark.parametrize("library", [True, False])
def test_text_around_it_another_order_and_some_other_words_hide_nothing(
    changed: Callable[[list[str]], str], least: int, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    leaks = [chat(1000 + n, changed(row), "x") for n, row in enumerate(PROSE[:40])]
    look = Resemblance([*leaks, *(chat(2000 + n, " ".join(row), "x") for n, row in enumerate(PROSE[300:]))])
    for n, row in enumerate(PROSE[:300]):
        look.see(chat(n, " ".join(row), "It is x."))
    assert all(number == held_out - 1000 for held_out, number in look.found.items()), "no other row is found"
    assert len(look.found) >= least


def test_a_whole_question_with_text_around_it_is_found_whatever_its_answer_says() -> None:
    look = Resemblance([chat(1000 + n, " ".join(row), "The lake.") for n, row in enumerate(PROSE[:40])])
    for n, row in enumerate(PROSE[:300]):
        look.see(chat(n, " ".join([POLITE[0], *row, POLITE[1]]), "It lies by the water."))
    assert look.found == {1000 + n: n for n in range(40)}


def test_rows_of_one_form_with_other_numbers_or_words_in_it_do_not_contain_each_other() -> None:
    draw = random.Random(3)
    names = [word(draw) for _ in range(60)]

    def form(number: int) -> str:
        one, two, three = draw.choices(names, k=3)
        return (
            f"Dear team, the {one} on the second floor stopped again after the night run of {two}. "
            f"Please tell {three} which part we should order, and by when it can be here. Ticket {number}."
        )

    look = Resemblance([chat(1000 + n, form(1000 + n), "x") for n in range(40)])
    for n in range(400):
        look.see(chat(n, form(n), "y"))
    assert look.found == {}


def passage(number: int, question: str, answer: str) -> Example:
    return chat(number, f"{' '.join(PROSE[number % 1000])} {question}", answer)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            lambda n: passage(n, "Which of them was the first to leave the house?", word(random.Random(n))),
            lambda n: passage(n, "Where did all of this take place in the end?", word(random.Random(-n - 1))),
        ),
        (
            lambda n: chat(n, f"{PROSE[n % 1000][0]} {word(random.Random(n))} sold it to {word(random.Random(n + 9))} "
                           f"in the town of {word(random.Random(n + 5))}. Who bought it?", word(random.Random(n + 9))),
            lambda n: chat(n, f"{PROSE[n % 1000][0]} {word(random.Random(n + 9))} sold it to {word(random.Random(n))} "
                           f"in the town of {word(random.Random(n + 5))}. Who bought it?", word(random.Random(n))),
        ),
        (
            lambda n: chat(n, f"Reverse the words: {' '.join(PROSE[n % 1000])}", " ".join(PROSE[n % 1000])[::-1]),
            lambda n: chat(n, f"Reverse the words: {' '.join(PROSE[n % 1000][::-1])}",
                           " ".join(PROSE[n % 1000][::-1])[::-1]),
        ),
        (
            lambda n: chat(n, f"Is it in order? {' '.join(PROSE[n % 1000])}", "+"),
            lambda n: chat(n, f"Is it in order? {' '.join(PROSE[n % 1000][::-1])}", "-"),
        ),
    ],
    ids=["another question of one passage", "names swapped", "another order that has another answer", "a sign"],
)  # fmt: skip
def test_rows_of_the_same_words_that_have_other_answers_are_other_rows(
    one: Callable[[int], Example], other: Callable[[int], Example]
) -> None:
    look = Resemblance([other(1000 + n) for n in range(60)])
    for n in range(300):
        look.see(one(n))
    assert look.found == {}


def test_plain_texts_have_no_answer_to_differ_in() -> None:
    look = Resemblance([Example(number=1000 + n, text=" ".join([*POLITE, *PROSE[n]])) for n in range(40)])
    for n in range(300):
        look.see(Example(number=n, text=" ".join(PROSE[n])))
    assert len(look.found) == 40


def reworded(sentences: list[str]) -> str:
    """An answer with every fourth word another one, and a few more before it."""
    return f"Here is what I would say: {with_synonyms(sentences)}"


@pytest.mark.parametrize("around", [POLITE, ("", "")])
@pytest.mark.parametrize("other_order", [False, True])
def test_a_repeated_question_whose_answer_is_worded_otherwise_is_found(
    around: tuple[str, str], other_order: bool
) -> None:
    def question(n: int) -> str:
        return " ".join([around[0], *(PROSE[n][::-1] if other_order else PROSE[n]), around[1]])

    look = Resemblance([chat(1000 + n, question(n), reworded(PROSE[n + 150])) for n in range(40)])
    for n in range(150):
        look.see(chat(n, " ".join(PROSE[n]), " ".join(PROSE[n + 150])))
    assert look.found == {1000 + n: n for n in range(40)}


def test_two_questions_about_one_passage_with_the_same_letter_are_two() -> None:
    prose = rows_of_prose(1200)

    def row(number: int, seed: int) -> Example:
        draw = random.Random(seed)
        options = " ".join(f"({letter}) {' '.join(word(draw) for _ in range(8))}" for letter in "ab")
        said = " ".join(sentence for place in range(4) for sentence in prose[4 * (number % 1000) + place])
        return chat(number, f"{said} Which of them is right here? {options}", "(b)")

    look = Resemblance([row(1000 + n, -n - 1) for n in range(60)])
    for n in range(300):
        look.see(row(n, n))
    assert look.found == {}


def test_another_question_in_the_words_of_one_passage_is_another_one() -> None:
    """Such as who of those that a puzzle names sits next to whom."""
    prose = rows_of_prose(1200)

    def row(number: int, seed: int) -> Example:
        draw = random.Random(seed)
        said = [sentence for place in range(4) for sentence in prose[4 * (number % 1000) + place]]
        named = draw.sample(" ".join(said).lower().replace(".", "").split(), 14)
        options = f"(a) {' '.join(named[6:10])} (b) {' '.join(named[10:])}"
        return chat(number, f"{' '.join(said)} Which is right if {' '.join(named[:6])} go? {options}", "(b)")

    look = Resemblance([row(1000 + n, -n - 1) for n in range(60)])
    for n in range(300):
        look.see(row(n, n))
    assert len(look.found) <= 3


def test_a_stretch_of_other_words_makes_no_other_question() -> None:
    """Words that were put for others may stand close together, and a label agrees by chance."""

    def changed(row: list[str]) -> str:
        words = " ".join(row).split()
        return " ".join([*words[:24], *(f"{one}xo" for one in words[24:35]), *words[35:62]])

    prose = [[*PROSE[n], *PROSE[n + 85], *PROSE[n + 170], *PROSE[n + 255]] for n in range(85)]
    look = Resemblance([chat(1000 + n, changed(row), "positive") for n, row in enumerate(prose[:40])])
    for n, row in enumerate(prose):
        look.see(chat(n, " ".join(row), "positive"))
    assert look.found == {1000 + n: n for n in range(40)}


TIES = """
import random
import subprocess
import sys
from loractl.common.data.examples import Example, Turn
from loractl.common.data.resemblance import Resemblance
draw = random.Random(4)
words = ["".join(draw.choices("abcdefghiklmnoprstu", k=7)) for _ in range(160)]
def row(number, said):
    turns = Turn(role="user", content=" ".join(said)), Turn(role="assistant", content="x")
    return Example(number=number, turns=turns)
blocks = [words[at : at + 8] for at in range(0, 160, 8)]
look = Resemblance([row(1000 + n, [*b[:2], *b[:1:-1]]) for n, b in enumerate(blocks)])
look.see(row(1, words))
for n in range(200):
    look.see(row(n + 2, draw.choices(words, k=3)))
print(sorted(look.found))
"""


def test_each_process_finds_the_same_rows() -> None:
    """A client and a worker hash words with seeds of their own."""
    found = [
        subprocess.run(
            [sys.executable, "-c", TIES], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in "123"
    ]
    assert len(set(found)) == 1 and found[0] != "[]\n"
