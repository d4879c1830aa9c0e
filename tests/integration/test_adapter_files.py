"""What is stored as an adapter, and whose code runs for it."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loractl.common.adapter_config import CONFIG, allowed, check_adapter_config
from loractl.common.job.method import Method
from loractl.common.job.spec import JobSpec
from loractl.common.job.status import Reason
from loractl.worker.base.adapter import save_adapter
from loractl.worker.base.arithmetic import choose_precision
from loractl.worker.base.failure import TrainingFailed
from loractl.worker.base.lora import add_adapter
from loractl.worker.base.model import load_base, load_tokenizer

COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_the_example_s_model_may_be_read_by_all_whom_the_umask_lets_read(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    get_model = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "get_model.py"))
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model))
    get_model["save"](model, load_tokenizer(str(tiny_model)), tmp_path / "model")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\.(?:mlp|self_attn)\.(q|up)_proj"])
def test_a_stored_adapter_has_the_allowed_settings_alone_and_peft_loads_it(
    tiny_model: Path, tmp_path: Path, targets: object
) -> None:
    from peft import PeftModel

    spec = _spec(tiny_model, lora={"r": 4, "lora_alpha": 8, "target_modules": targets})
    precision = choose_precision("cpu")
    tuned = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", precision), spec, Method.LORA)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # else the adapter changes nothing
    tuned.peft_config["default"].auto_mapping = {"base_model_class": "Model", "parent_library": "os"}
    tuned.peft_config["default"].base_model_name_or_path = "/root/.cache/somewhere"
    tokenizer = load_tokenizer(str(tiny_model))
    save_adapter(tuned, tokenizer, spec, tmp_path / "adapter")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    check_adapter_config(tmp_path / "adapter" / CONFIG)
    assert config == allowed(config) and "auto_mapping" not in config
    assert (config["base_model_name_or_path"], config["revision"]) == (tiny_model.name, None)
    files = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert not [path.name for path in files if str(tiny_model).encode() in path.read_bytes()], "paths of this box"
    assert config["inference_mode"] is True
    assert [p.name for p in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]

    loaded = PeftModel.from_pretrained(
        load_base(str(tiny_model), Method.LORA, "cpu", precision), str(tmp_path / "adapter")
    )
    ids = tokenizer("queue priority", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits for model in (tuned, loaded))
        base = load_base(str(tiny_model), Method.LORA, "cpu", precision).eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, base)


@pytest.mark.parametrize(
    ("expression", "stored"),
    [
        (r"model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
         ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (r"^(?!.*mlp).*(q|v)_proj$", ["q_proj", "v_proj"]),
        (r"model\.layers\.1\.self_attn\.[qk]_proj",
         ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]),
    ],
)  # fmt: skip
def test_an_expression_adapts_what_peft_would_adapt_and_names_alone_are_stored(
    tiny_model: Path, tmp_path: Path, expression: str, stored: list[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    def base() -> Any:
        return load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu"))

    spec = _spec(tiny_model, lora={"r": 4, "target_modules": expression})
    tuned = add_adapter(base(), spec, Method.LORA)
    plain = get_peft_model(base(), LoraConfig(r=4, target_modules=expression, task_type="CAUSAL_LM"))
    assert _trained(tuned) == _trained(plain) != set()
    save_adapter(tuned, load_tokenizer(str(tiny_model)), spec, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == stored


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        (r".*\.c_attn", "matches no linear layer of this model; it matches whole names, like model.layers.0.mlp."),
        ("q_pro.", "matches no linear layer"),
        (r".*(q_proj|lm_head)", "matches lm_head too, which is not a linear layer of its blocks"),
        (r".*mlp.*", r"matches model.layers.0.mlp too"),
    ],
)
def test_an_expression_that_reaches_no_layer_or_more_than_layers_is_refused(
    tiny_model: Path, expression: str, what: str
) -> None:
    base = load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu"))
    with pytest.raises(TrainingFailed, match=re.escape(what)) as failure:
        add_adapter(base, _spec(tiny_model, lora={"target_modules": expression}), Method.LORA)
    assert failure.value.reason is Reason.BAD_SPEC


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_list_of_targets_reaches_layers_that_are_no_linear(tmp_path: Path) -> None:
    """GPT-2's are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    spec = _spec(tmp_path, lora={"r": 4, "target_modules": ["c_attn"]})
    adapted = add_adapter(GPT2LMHeadModel(config), spec, Method.LORA)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 and all(".c_attn.lora_" in name for name in trained)
    with pytest.raises(
        TrainingFailed, match=r"q_proj is not a linear layer of this model; it has c_attn, c_fc, c_proj"
    ):
        add_adapter(GPT2LMHeadModel(config), _spec(tmp_path, lora={"target_modules": ["q_proj"]}), Method.LORA)


def test_what_peft_refuses_is_the_job_file_s_fault(tmp_path: Path) -> None:
    """Experts in one tensor take no dropout."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, vocab_size=40, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(TrainingFailed, match="does not work with lora_dropout") as failure:
        add_adapter(MixtralForCausalLM(config), _spec(tmp_path), Method.LORA)
    assert failure.value.reason is Reason.BAD_SPEC
    add_adapter(MixtralForCausalLM(config), _spec(tmp_path, lora={"lora_dropout": 0}), Method.LORA)


def test_code_and_pickles_are_not_stored(tiny_model: Path, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            for name in ("tokenizer.json", "tokenization_own.py", "extra.bin", "weights.pt"):
                (Path(folder) / name).write_text("{}")

    spec = _spec(tiny_model)
    model = add_adapter(load_base(str(tiny_model), Method.LORA, "cpu", choose_precision("cpu")), spec, Method.LORA)
    save_adapter(model, Tokenizer(), spec, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "adapter_model.safetensors", "adapter_config.json"} <= names
    assert not {"tokenization_own.py", "extra.bin", "weights.pt"} & names


def test_an_adapter_in_place_of_a_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Its config names another model, which transformers would load from wherever that is."""
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model)}
    disguised = tmp_path / "disguised"
    shutil.copytree(tiny_model, disguised)
    (disguised / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingFailed, match="holds an adapter") as failure:
        load_base(str(disguised), Method.LORA, "cpu", choose_precision("cpu"))
    assert failure.value.reason is Reason.BAD_SPEC
    with pytest.raises(TrainingFailed, match="holds an adapter"):
        load_tokenizer(str(disguised))


@pytest.mark.parametrize(
    ("file", "changed", "says"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "vocab": "{secret}"}, "vocab is"),
        ("tokenizer_config.json", {"init_inputs": ["{secret}"]}, "init_inputs is"),
        ("tokenizer_config.json", {"extra": {"sp_model_kwargs": {"model_file": "{secret}"}}}, "model_file is"),
        ("config.json", {"attn_implementation": "org/kernel"}, "asks for a kernel from the hub"),
        ("config.json", {"_attn_implementation": {"": "org/kernel@main"}}, "asks for a kernel from the hub"),
        ("config.json", {"_attn_implementation_internal": "org/kernel"}, "asks for a kernel from the hub"),
    ],
)
def test_a_model_that_names_files_of_the_box_or_a_kernel_is_refused(
    tiny_model: Path, tmp_path: Path, file: str, changed: dict[str, object], says: str
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhunter2\n")
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    if file == "tokenizer_config.json":
        (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / file).read_text()) | json.loads(
        json.dumps(changed).replace("{secret}", str(secret))
    )
    (folder / file).write_text(json.dumps(settings))
    with pytest.raises(TrainingFailed, match=says) as caught:
        load_tokenizer(str(folder))
    assert caught.value.reason is Reason.BAD_SPEC
    with pytest.raises(TrainingFailed, match=says):
        load_base(str(folder), Method.LORA, "cpu", choose_precision("cpu"))


def test_a_model_may_name_its_own_files(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_file": str(folder / "tokenizer.json"), "name_or_path": "/", "chat_template": str(tmp_path)}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **own}))
    assert load_tokenizer(str(folder)).vocab_size


@pytest.mark.long
def test_a_hub_model_s_own_code_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its cache's place once."""
    mark = tmp_path / "it-ran"
    _in_the_cache(tmp_path, "org/own", "modeling.Config", mark)
    _in_the_cache(tmp_path, "org/borrowed", "org/own--modeling.Config", mark)
    asked = (
        f"'org/own', '{COMMIT}'",
        f"'org/borrowed', '{COMMIT}', run_code=True",
        f"'org/own', '{COMMIT}', run_code=True",
    )
    distrusted, borrowed, trusted = _loads(tmp_path, mark, *asked)
    assert "MODEL_NOT_FOUND" in distrusted and distrusted.endswith("False")
    assert "runs code of another repository" in borrowed and borrowed.endswith("False")
    assert trusted.endswith("True"), "the owner's list is what lets it run"


def _spec(model: Path, **keys: object) -> JobSpec:
    return JobSpec.model_validate({"name": "t", "base_model": str(model), "dataset": {"path": "org/data"}, **keys})


def _in_the_cache(home: Path, name: str, reference: str, mark: Path) -> None:
    """A model with code of its own, as if it had been downloaded."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (snapshot / "modeling.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "own-kind", "auto_map": {"AutoConfig": reference}}))


def _loads(home: Path, mark: Path, *asked: str) -> list[str]:
    """What a process says that loads a tokenizer with each of these arguments, and whether the mark is there then."""
    code = (
        "from pathlib import Path\n"
        "from loractl.worker.base.failure import TrainingFailed\n"
        "from loractl.worker.base.model import load_tokenizer\n"
    )
    for arguments in asked:
        code += (
            "said = ''\n"
            f"try: load_tokenizer({arguments})\n"
            "except TrainingFailed as error: said = f'{error.reason.name} {error.sentence}'\n"
            "except Exception as error: said = repr(error)\n"
            f"print('SAID', ' '.join(said.split()), Path({str(mark)!r}).exists())\n"
        )
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert len(said) == len(asked), done.stderr
    return said
