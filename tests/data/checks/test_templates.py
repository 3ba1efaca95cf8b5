# SPDX-License-Identifier: Apache-2.0
"""Prompts that hold a template already, and texts that only look a little so."""

import pytest

from jft.data import checks, examples, findings

ALPACA = "Below is an instruction.\n\n### Instruction:\nsay hello\n\n### Response:\n"
HELD = {
    "Alpaca": ALPACA,
    "ChatML": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "Llama 3": "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>",
    "Llama 2": "<s>[INST] hello [/INST]",
    "Gemma": "<start_of_turn>user\nhello<end_of_turn>\n",
    "Phi": "<|user|>\nhello<|end|>\n<|assistant|>",
    "Vicuna": "A chat. USER: hello ASSISTANT:",
    "Human/Assistant": "Human: hello\n\nAssistant:",
}
CLEAN = (
    "What is Human: resource management?",
    "### Instruction manual\nfold it",
    "The tag <|im_start|> begins a turn.",
    "array[INST] holds [/INST]",
    "Who was the first Human: in space, and the first Assistant: on Earth?",
    "## Response\nnothing",
)


def found(*prompts: str) -> list[findings.Finding]:
    examination = checks.Examination(near=False, languages=False)
    for number, prompt in enumerate(prompts, start=1):
        turns = examples.pair(prompt, f"answer {number}")
        examination.add(examples.Example(turns, f"f:row {number}", "f", number))
    return [finding for finding in examination.findings() if finding.kind == "template"]


@pytest.mark.parametrize("name", HELD)
def test_templates_are_found(name: str) -> None:
    (finding,) = found("plain", HELD[name], "plain too")
    assert finding.places == (("f", 2),) and finding.severity == "warning"
    assert finding.details["patterns"] == {name: 1}


def test_what_only_looks_so_is_left_alone() -> None:
    assert found(*CLEAN) == []
