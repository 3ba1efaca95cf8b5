# SPDX-License-Identifier: Apache-2.0
"""Scores of answers against references, by name."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Sequence

from jft import errors
from jft.evals import labels, matching, numbers, overlap, own, result, structured

FORMATS = ("", "json")
Measure = Callable[[matching.Answers], result.Result]


@dataclasses.dataclass(frozen=True)
class Score:
    """One entry of the table.

    Attributes:
      about: what it says, for people.
      measure: of the answers; of one that takes an argument, a function of the argument that gives it.
      argument: what stands behind the colon: "" (nothing), "[X]" (optional) or "X".
    """

    about: str
    measure: Callable[..., object]
    argument: str = ""


SCORES = {
    "exact_match": Score("equals the reference, but for white space at both ends", matching.exact),
    "normalised_match": Score(
        "equals it in lower case without punctuation and articles (SQuAD)", matching.normalised
    ),
    "token_f1": Score("shares words with it: F1 of normalised words (SQuAD)", matching.token_f1),
    "number": Score("its last number is the reference's", numbers.score, "[TOLERANCE]"),
    "label": Score("gives the right label", labels.accuracy),
    "macro_f1": Score("mean over labels of their F1", labels.macro_f1),
    "json": Score("is one JSON value and nothing else", structured.valid),
    "json_keys": Score("is JSON with the reference's keys", structured.keys),
    "json_schema": Score("is JSON that fits a schema", structured.schema, "FILE"),
    "field_f1": Score("F1 over the fields of JSON", structured.field_f1),
    "regex": Score(
        "holds a pattern; with a group, with the reference's text in it",
        matching.pattern,
        "PATTERN",
    ),
    "rouge_1": Score("ROUGE-1: words shared with the reference", overlap.rouge("rouge1")),
    "rouge_2": Score("ROUGE-2: pairs of words", overlap.rouge("rouge2")),
    "rouge_l": Score("ROUGE-L: words in the same order", overlap.rouge("rougeL")),
    "bleu": Score("BLEU of the corpus", overlap.bleu),
    "chrf": Score("chrF of the corpus: parts of words, for any language", overlap.chrf),
    "length": Score("tokens in an answer", matching.length),
    "refusals": Score("begins as a refusal", matching.refusals),
    "never_stopping": Score("was cut by the limit of tokens", matching.never_stopping),
}


def named(spec: str) -> Measure:
    """The score of "NAME", "NAME:ARGUMENT" or "FILE.py:FUNCTION".

    Raises:
      UserError: there is no such score, or its argument cannot be used.
    """
    name, colon, argument = spec.partition(":")
    if name not in SCORES and ".py" in spec:
        return own.score(spec)
    if name not in SCORES:
        near = difflib.get_close_matches(name, SCORES, 1)
        told = f"did you mean {near[0]}?" if near else f"known are {', '.join(SCORES)}"
        raise errors.UserError(f"score {spec}: there is none of that name; {told}")
    entry = SCORES[name]
    if not entry.argument:
        if colon:
            raise errors.UserError(f"score {spec}: {name} takes nothing behind its name")
        return entry.measure  # type: ignore[return-value]
    if not argument and not entry.argument.startswith("["):
        raise errors.UserError(f"score {name}: write {name}:{entry.argument}")
    return entry.measure(argument)  # type: ignore[return-value]


def measure(spec: str, answers: Sequence[result.Answer]) -> result.Result:
    """The score of these answers.

    Raises:
      UserError: there are none, or as `named`, or the score cannot be had of them.
    """
    if not answers:
        raise errors.UserError(f"score {spec}: there is no answer to judge")
    return named(spec)(answers)


def exact_match(answer: str, reference: str) -> bool:
    """Equal, but for white space at both ends."""
    return answer.strip() == reference.strip()


def valid_format(answer: str, reference: str, kind: str) -> bool:
    """Whether the answer has the reference's form.

    Args:
      answer: the model's text.
      reference: the wanted text.
      kind: "" (anything will do) or "json": one JSON value and nothing else; if the reference is an object, an
        object with exactly its keys.

    Raises:
      UserError: the reference itself is not JSON.
    """
    if not kind:
        return True
    try:
        json.loads(reference)
    except ValueError as error:
        raise errors.UserError(
            f"validate.format=json, but a reference is not JSON: {reference[:80]!r} ({error})"
        ) from error
    return structured.keys([result.Answer("", reference, answer)]).value == 1.0
