"""A trained adapter leaves the lab: peft loads what a hub got of it, and none of its files tells of the lab."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from ..conftest import Cli
from ..hub_writes import TOKEN, WritableHub


def test_a_trained_adapter_is_pushed_with_its_report_as_the_card(
    trained: Cli, base_of_trained: Path, tmp_path: Path
) -> None:
    hub = WritableHub(tmp_path / "hub")
    with hub.serving() as url:
        environment = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        cli = trained.with_environment(HF_HOME=str(tmp_path / "hf"), **environment)
        done = cli("adapters", "push", "blue", "lab/colours", "--base-name", "org/tiny")
    commit, folder = hub.find("models", "lab/colours", "main")
    assert f"lab/colours (private) has it, as commit {commit[:12]}: {url}/lab/colours/commit/{commit}\n" in done.stdout
    assert len(hub.messages) == 1 and TOKEN not in done.stdout + done.stderr
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert {"README.md", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= texts.keys()
    for told in ("ada", "tester", "blue", socket.gethostname(), trained.environment["LORACTL_HOME"], base_of_trained):
        bare = re.compile(rf"(?<!\w){re.escape(str(told))}(?!\w)")
        assert [name for name, text in texts.items() if bare.search(text)] == [], told
    assert "| loss, nats |" in texts["README.md"] and "| use_dora | true |" in texts["README.md"]
    assert "license of `org/tiny` is not known" in texts["README.md"]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_of_trained)
    tuned = PeftModel.from_pretrained(base, folder, torch_device="cpu")
    assert tuned.peft_config["default"].base_model_name_or_path == "org/tiny"
