"""What a job's need is known by, and which adapters are refused before it is queued."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest

from loractl.common.errors import UsageError
from loractl.common.job.spec import JobSpec
from loractl.common.memory.need_key import need_key
from loractl.common.memory.plan import predict
from loractl.common.memory.step import Stack
from loractl.common.settings import load_settings
from loractl.common.store.store import Store
from loractl.scheduler.plan.answer import JobToPlan, memory_need
from loractl.scheduler.submit import need
from loractl.scheduler.submit.lengths import row_lengths
from loractl.scheduler.submit.need import check_adapter, own_devices, plan_job
from loractl.scheduler.submit.preflight import check_base, check_model

from ....conftest import Cli
from ....databases import SQLITE_ALONE
from ...factories import another_person, node_state, spec

SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 100_000,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path)


def classifier(base: str, **keys: Any) -> JobSpec:
    return spec(base_model=base, task_type="SEQ_CLS", **keys)


def test_what_is_measured_of_a_classifier_teaches_nothing_of_other_jobs(base: str) -> None:
    data = {"path": {"uri": "x", "sha256": "a" * 64}}
    assert need_key(spec(base_model=base), data) != need_key(classifier(base), data)
    assert need_key(classifier(base), data) == need_key(classifier(base, name="other"), data)


def test_a_pair_is_planned_for_as_a_row_of_both_its_answers(base: str) -> None:
    told = row_lengths(spec(base_model=base, task_type="preference")).sentence
    assert told == "Planned for pairs of twice max_length, 2048 tokens: there is no tokenizer to count them with."


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/dev/zero", "/dev/zero: has none of the endings .jsonl, .json, .csv, .parquet"),
        ("pipe.jsonl", "{tmp_path}/pipe.jsonl: is not a regular file"),
        ("folder.json", "{tmp_path}/folder.json: is a folder"),
        ("none.jsonl", "{tmp_path}/none.jsonl is not on this machine to count them"),
    ],
)
def test_what_submit_would_not_read_as_data_is_not_counted_for_a_plan(
    base: str, tmp_path: Path, name: str, why: str
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.json").mkdir()
    told = row_lengths(spec(base_model=base, dataset={"path": str(tmp_path / name)})).sentence
    assert told == f"Planned for rows of max_length, 1024 tokens: {why.format(tmp_path=tmp_path)}."


def test_a_classifier_needs_less_than_a_job_that_learns_words(base: str) -> None:
    words, labels = predict(spec(base_model=base)), predict(classifier(base))
    assert words.lora is not None and labels.lora is not None and labels.lora < words.lora / 1.2
    assert words.qlora is not None and labels.qlora is not None and labels.qlora < words.qlora / 1.2


@SQLITE_ALONE
def test_where_only_processors_are_known_every_figure_is_one_plan_for_a_processor(base: str, store: Store) -> None:
    asked = spec(base_model=base, method="lora")
    card, processor = predict(asked).lora, predict(asked, stack=Stack(on_gpu=False)).lora
    assert card != processor
    assert plan_job(asked, "ada", {}, store).plan.need.lora == card, "a GPU box may come"
    assert plan_job(asked, "ada", {}, store, devices="cpu").plan.need.lora == processor
    store.cards.see(node_state("box:0", kind="cpu"))
    job_id = store.jobs.submit(plan_job(asked, "ada", {}, store))
    row = store.jobs.get(job_id)
    answer = memory_need(store, JobToPlan(title="1", spec=asked, data={}), None, solve=False)
    assert (row.vram_needed, row.planned["lora"], answer.reserved.lora) == (processor, processor, processor)
    assert not answer.on_gpu
    store.cards.see(node_state("box:1"))
    assert plan_job(asked, "ada", {}, store, devices="cpu").plan.need.lora == card


def test_before_any_worker_the_machine_itself_says_what_it_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = {"LORACTL_HOME": str(tmp_path)}
    lab = {**home, "LORACTL_DATABASE_URL": "postgresql://ada@server/loractl"}
    monkeypatch.setattr(need, "_DRIVERS", (str(tmp_path / "driver"),))
    assert own_devices(load_settings(home)) == "cpu" == own_devices(load_settings({**lab, "LORACTL_DEVICES": "cpu"}))
    assert own_devices(load_settings(lab)) is None, "the boxes are others"
    (tmp_path / "driver").touch()
    assert own_devices(load_settings(home)) is None


def test_an_expression_is_checked_where_the_base_is_at_hand_and_planned(base: str) -> None:
    some = spec(base_model=base, lora={"target_modules": r".*\.1\..*(q|v)_proj"})
    check_adapter(some)
    planned, whole = predict(some).lora, predict(spec(base_model=base)).lora
    assert planned is not None and whole is not None and planned < whole
    with pytest.raises(UsageError, match="c_attn matches no linear layer of") as refused:
        check_adapter(spec(base_model=base, lora={"target_modules": r".*\.c_attn"}))
    assert "like model.layers.0.self_attn.q_proj" in str(refused.value.hint)
    check_adapter(spec(base_model="org/not-here", lora={"target_modules": r".*\.c_attn"}))  # the worker will say


@pytest.mark.parametrize("layer", ["score", "lm_head"])
def test_a_head_gets_no_adapter(base: str, layer: str) -> None:
    with pytest.raises(UsageError, match=f"lora.target_modules: {layer} is not a linear layer"):
        check_adapter(classifier(base, lora={"target_modules": ["q_proj", layer]}))


@pytest.mark.parametrize("name", ["tool\nuse", "tool\x1b[2J", "t" * 233])
@pytest.mark.parametrize("listed", [False, True])
def test_a_chat_template_that_no_store_could_keep_is_refused_before_a_training(
    base: str, name: str, *, listed: bool
) -> None:
    (Path(base) / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (Path(base) / "tokenizer.json").write_text("{}")
    if listed:
        templates = [{"name": "default", "template": "d"}, {"name": name, "template": "t"}]
        (Path(base) / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    else:
        (Path(base) / "additional_chat_templates").mkdir()
        (Path(base) / "additional_chat_templates" / f"{name}.jinja").write_text("t")
    with pytest.raises(UsageError) as refused:
        check_base(Path(base))
    assert f"has a chat template of the name {name!r}" in refused.value.sentence


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "tokenizer_config.json"])
def test_a_pipe_in_a_base_s_folder_is_refused_and_nobody_waits_for_its_writer(base: str, name: str) -> None:
    (Path(base) / "tokenizer.json").write_text("{}")
    os.mkfifo(Path(base) / name)
    with pytest.raises(UsageError, match=f"{name} is not a regular file"):
        check_base(Path(base))


@pytest.mark.parametrize("closed", ["model.safetensors", "config.json", "."])
def test_a_base_that_this_person_may_not_read_is_said_to_be_so(closed: str) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:
        base = Path(open_to_all) / "base"
        base.mkdir()
        Path(open_to_all).chmod(0o755)
        (base / "config.json").write_text(json.dumps(SMALL))
        (base / "tokenizer.json").write_text("{}")
        (base / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        settings = load_settings({"LORACTL_HOME": open_to_all})
        before = (base / closed).stat().st_mode
        (base / closed).chmod(0)
        with another_person(), pytest.raises(UsageError) as refused:
            check_model(spec(base_model=str(base)), settings)
        (base / closed).chmod(before)
    assert refused.value.sentence == f"{base / closed} can't be read: Permission denied"
    assert refused.value.hint == f"ask its owner for the right to: chmod -R a+rX {base}"


def test_nf4_weights_are_no_foreign_format(tmp_path: Path) -> None:
    own = {**SMALL, "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    check_adapter(spec(base_model=str(tmp_path)))


def test_a_plan_that_no_card_holds_does_not_say_submit_it_nor_none(base: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(f"name: t\nbase_model: {base}\nmethod: lora\ndataset: {{path: d.jsonl, max_length: 4096}}\n")
    fits = cli("plan", job, "--gpu", "80GiB").stdout
    assert f"Submit it: loractl submit {job}" in fits
    never = cli("plan", job, "--gpu", "1GiB").stdout
    assert "never" in never and "Submit it" not in never
    assert f"No card holds it as it is. What would fit: loractl plan {job} --solve" in " ".join(never.split())
    solved = cli("plan", job, "--gpu", "1GiB", "--solve").stdout
    assert "none" not in solved and "Submit it" not in solved and "No card holds it as it is: shorter rows" in solved


def test_a_key_without_effect_is_taken_with_a_warning_and_not_stored(base: str, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    job = tmp_path / "job.yaml"
    text = f"name: t\nbase_model: {base}\ndataset: {{path: d.jsonl}}\nresources: {{cards: 1, exclusive: true}}\n"
    said = "Warning: resources.exclusive has no effect: every job trains in a process of its own. Remove it; "
    for command in (("submit", job), ("sweep", job, "--set", "lora.r=4,8")):
        job.write_text(text)
        done = cli(*command, "--dry-run", "--json")
        assert done.stderr.count(said) == 1
        assert "max_vram" in done.stdout and "exclusive" not in done.stdout
        job.write_text(text.replace("true", "false"))
        assert "exclusive" not in cli(*command, "--dry-run", "--json").stderr
