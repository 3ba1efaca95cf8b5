# SPDX-License-Identifier: Apache-2.0
"""An example as texts, each with what training makes of it."""

from collections.abc import Iterator

from jft.data import examples, near

# What a text is. Only an answer is trained; a rejected one is there to be worse, so that a refusal or
# a loop in it is no fault of the data.
ANSWER, CONTEXT, REJECTED = "answer", "context", "rejected"
PARTS = (ANSWER, CONTEXT, REJECTED)


def parts(example: examples.Example) -> Iterator[tuple[str, str]]:
    """(text, part) of each turn; a plain text is an answer to nothing."""
    if not example.messages:
        yield example.text, ANSWER
        return
    for turn in example.messages:
        trained = turn["role"] == "assistant" and turn.get("weight", 1)
        answer = REJECTED if example.label is False else ANSWER
        yield near.said(turn), answer if trained else CONTEXT
    for turn in example.rejected:
        yield near.said(turn), REJECTED if turn["role"] == "assistant" else CONTEXT
