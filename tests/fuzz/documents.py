"""Job files and values as a careless or a hostile person might write them."""

from __future__ import annotations

from hypothesis import strategies as st

from loractl.common.job.spec import spec_keys

GOOD = """name: job
base_model: org/model
method: auto
dataset: {path: org/data, max_length: 128, format: messages}
lora: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}
training: {max_steps: 20, learning_rate: 2.0e-4, seed: 1}
evaluation: {samples: 4, metrics: [loss, rouge]}
resources: {max_vram: 12GiB, time_limit: 2h, node_labels: {nvlink: "yes"}}
labels: {project: support}
"""

FRAGMENTS = [
    "name", "base_model", "dataset:", "path: ", "{", "}", "[", "]", ": ", "- ", "\n", "\n  ", ", ", "?", "|", ">", "#",
    "'", '"', "*a", "&a ", "<<: *a", "!!binary ", "!!set ", "!!omap ", "!!timestamp ", "!!int ", "!!float ", "!!null ",
    "!!python/object/apply:os.system [id]", "!!python/name:os.system", "!x ", "---\n", "...\n", "%YAML 9.9\n", "~",
    ".nan", ".inf", "-.inf", "1e999", "0x" + "f" * 5000, "9" * 5000, "9" * 400, "1:" * 40 + "1", "1:" * 3000 + "1",
    "2001-99-99", "2001-01-01T25:61:61Z", "0001-01-01", "true", "null", "\t", "\0", "\x7f", "\x85", "\ufeff", "\u2028",
    '"\\ud800"', '"\\x00"', '"\\U0010FFFF"', "\u202e", "é", "e\u0301", "🦙", "../../etc/passwd", "/dev/zero", "~root/x",
    "~nobody-there/x", "/" * 300, "a" * 5000, "a." * 200,
]  # fmt: skip
"""Pieces of YAML that mean something, or nearly do."""

keys = st.one_of(
    st.sampled_from([*spec_keys(), "dataset", "lora", "training", "resources", "evaluation"]),
    st.sampled_from(["", ".", "..", "name.", ".name", "dataset.path.x", "labels.a", "labels.a.b", "x.y.z", "<<"]),
    st.text(max_size=8),
)

scalars = st.one_of(
    st.sampled_from(FRAGMENTS),
    st.integers().map(str),
    st.integers(min_value=-(10**400), max_value=10**400).map(str),
    st.floats().map(str),
    st.text(max_size=20),
)

soup = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=30).map("".join)

lines = st.lists(st.tuples(keys, st.one_of(scalars, soup)), max_size=8).map(
    lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs)
)

deep = st.builds(
    lambda opening, inner, closing, depth: opening * depth + inner + closing * depth,
    st.sampled_from(["[", "{a: ", "- ", "? ", "[{a: ", "(", "&a [", "!x ["]),
    st.sampled_from(["", "1", "*a", "x: y"]),
    st.sampled_from(["", "]", "}", "}]"]),
    st.one_of(st.integers(1, 40), st.sampled_from([17, 400, 20_000])),
)

bombs = st.builds(
    lambda width, height, form: "\n".join(
        ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} {form.format(', '.join([f'*a{n - 1}'] * width))}" for n in range(1, height)]
    ),
    st.integers(1, 12),
    st.integers(1, 60),
    st.sampled_from(["[{0}]", "{{<<: [{0}]}}", "{{b: [{0}]}}", "{{? [{0}] : 1}}"]),
)


@st.composite
def mutated(draw: st.DrawFn, text: str = GOOD) -> str:
    """A good document with a few pieces cut out, doubled, or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 20)))
        piece = draw(
            st.one_of(st.just(""), st.sampled_from(FRAGMENTS), st.text(max_size=3), st.just(text[start:end] * 2))
        )
        text = text[:start] + piece + text[end:]
    return text


yaml_texts = st.one_of(
    mutated(), soup, lines, lines.map(lambda text: GOOD + text), deep, bombs, bombs.map(GOOD.__add__)
)

files = st.one_of(st.binary(max_size=400), yaml_texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
"""Bytes of a job file."""
