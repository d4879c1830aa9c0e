"""What submit notes about a job that it queues all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loractl.common.job.sections import LoraSpec
from loractl.common.settings import load_settings
from loractl.scheduler.submit.intake import doubts_of

from ...factories import submission


def test_submit_notes_what_vllm_will_refuse(home: Path) -> None:
    settings = load_settings({"LORACTL_HOME": str(home)})

    def told(lora: dict[str, Any], **keys: Any) -> list[str]:
        planned = submission(method="lora", **keys)
        asked = planned.spec.model_copy(update={"lora": LoraSpec.model_validate(lora)})
        return [line for line in doubts_of("job 1", replace(planned, spec=asked), settings) if "vLLM" in line]

    assert not told({"r": 512})
    (note,) = told({"r": 1024, "use_dora": True, "modules_to_save": ["lm_head"]})
    what = "it takes no DoRA (lora.use_dora) and no lora.modules_to_save and no ranks above 512 (lora.r is 1024)"
    assert note.startswith("Note: vLLM will refuse the adapter of job 1: ") and what in note
    assert not told({"use_dora": True}, task_type="SEQ_CLS"), "vLLM serves none of them"
