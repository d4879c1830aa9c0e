"""Expressions for module names mean what Python's `re` takes them for, and none holds a process."""

from __future__ import annotations

import re
import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loractl.common.module_pattern import MOST_DEPTH, MOST_LETTERS, ModulePattern

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.act_fn")
NAMES = [f"model.{tower}.layers.{n}.{layer}" for tower, n, layer in product(("text", "vision"), range(3), LAYERS)]

FOUND_IN_THE_WILD = [
    r"model.text.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
    r"model\.text\.layers\.[\d]+\.(_checkpoint_wrapped_module\.)?(mlp|self_attn)\.(up|down|gate|q|k|v|o)_proj",
    r"^(?!.*(?:vision|lm_head)).*(?:q_proj|up_proj)$",
    r".*\.layers\.(0|2)\.self_attn\.[qv]_proj",
    r"(?=.*text).*\.[^.]*_proj",
    r"model\..{4,6}?\.layers\.[0-1]\.\w+\.\w{6}",
]


@pytest.mark.parametrize("text", FOUND_IN_THE_WILD)
def test_an_expression_matches_the_names_that_peft_would_match(text: str) -> None:
    found = ModulePattern(text=text).matches(NAMES)
    assert found == [name for name in NAMES if re.fullmatch(text, name)] and 0 < len(found) < len(NAMES)


LETTERS = st.sampled_from(["a", "b", r"\.", ".", r"\w", r"\d", r"\S", "[ab]", "[^a.]", "[a-c_-]", r"[\d.]", "0", "_"])
REPEATS = st.sampled_from(["", "", "*", "+", "?", "*?", "+?", "{2}", "{1,}", "{0,2}", "{,3}"])
EXPRESSIONS = st.recursive(
    st.builds(lambda letter, repeat: letter + repeat, LETTERS, REPEATS),
    lambda inner: (
        st.lists(inner, max_size=4).map("".join)
        | st.builds(lambda parts, repeat: f"({'|'.join(parts)}){repeat}", st.lists(inner, min_size=1), REPEATS)
        | inner.map(lambda part: f"(?!{part})")
        | inner.map(lambda part: f"(?:^{part}$)")
        | inner.map(lambda part: f"(?={part})")
    ),
    max_leaves=8,
)


@given(text=EXPRESSIONS, name=st.text("ab.0_-", max_size=8))
def test_any_expression_means_what_it_means_to_python(text: str, name: str) -> None:
    assert (ModulePattern(text=text).matches([name]) == [name]) is (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    "text", [r"(x+x+)+y", r"((\w*)*)*!", r"(a|a|aa)*$b", r"(.?){9999}" * 5 + "z", "(?=(.*)*!)" * 40]
)
def test_an_expression_that_would_run_for_hours_ends(text: str) -> None:
    begun = time.process_time()
    pattern = ModulePattern(text=text)
    try:
        assert not any(name.endswith("!") for name in pattern.matches(["x" * 200, *NAMES]))
    except ValueError as error:
        assert "too long" in str(error)
    assert time.process_time() - begun < 20


def test_what_takes_too_long_over_many_names_is_refused_by_its_steps() -> None:
    with pytest.raises(ValueError, match="takes too long"):
        ModulePattern(text=r".*\.q_proj").matches(NAMES * 1000, most_steps=100_000)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("(a", "unbalanced bracket at letter 3"),
        ("a)", "unbalanced bracket at letter 2"),
        ("[a", "unbalanced bracket"),
        ("*a", "a repeat of nothing"),
        ("a**", "two repeats in a row"),
        ("a{3,2}", "ends before it begins"),
        (r"(a)\1", "an escape that"),
        ("(?<=a)b", "a kind of bracket"),
        ("(?i)a", "a kind of bracket"),
        ("a\\", "an escape that"),
        ("[z-a]", "a range that"),
        ("(" * (MOST_DEPTH + 1) + "a" + ")" * (MOST_DEPTH + 1), "brackets in brackets"),
        ("a" * (MOST_LETTERS + 1), f"more than {MOST_LETTERS} letters"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_place(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        ModulePattern(text=text).check()
