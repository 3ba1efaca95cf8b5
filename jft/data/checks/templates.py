# SPDX-License-Identifier: Apache-2.0
"""Texts that hold a prompt template already: training puts the model's own around it, so there would be two."""

import re

from jft.data import findings
from jft.data.checks import found

TEMPLATE = found.Words(
    "template",
    "warning",
    "with a prompt template in the text",
    "take it out, since the model's own template comes around it; or train with data.chat_template=plain and give such prompts to the model later",
)

# What a text has to hold to be looked at, and the marks by which each template is told: all of them, each at the
# beginning of a line.
_HINTS = ("### ", "<|", "[INST]", "<start_of_turn>", "Human:", "USER:", "ASSISTANT:")
_TEMPLATES = {
    "Alpaca": (
        r"### (?:Instruction|Input):?\s*\n",
        r"### (?:Response|Output|Answer):?\s*(?:\n|\Z)",
    ),
    "ChatML": (r"<\|im_start\|>(?:system|user|assistant)\n",),
    "Llama 3": (r"<\|start_header_id\|>(?:system|user|assistant)<\|end_header_id\|>",),
    "Llama 2": (r"(?:<s>)?\s*\[INST\]", r".*\[/INST\]"),
    "Gemma": (r"<start_of_turn>(?:user|model)\n",),
    "Phi": (r"<\|(?:user|system)\|>\s*\n", r"<\|assistant\|>"),
    "Vicuna": (r"(?:.* )?USER: ", r"(?:.* )?ASSISTANT:"),
    "Human/Assistant": (r"(?:### )?Human: ", r"(?:### )?Assistant:"),
}
_PATTERNS = {
    name: [re.compile(rf"^{mark}", re.MULTILINE) for mark in marks]
    for name, marks in _TEMPLATES.items()
}


class Templates:
    """Rows whose turns spell a template of conversations."""

    def __init__(self) -> None:
        self._found = found.Found()

    def add(self, row: int, text: str, part: str) -> None:
        if not any(hint in text for hint in _HINTS):
            return
        for name, marks in _PATTERNS.items():
            if all(mark.search(text) for mark in marks):
                self._found.add(row, name, part)

    def told(self, places: found.Places) -> list[findings.Finding]:
        return found.tell(TEMPLATE, self._found, places)
