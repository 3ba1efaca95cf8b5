# SPDX-License-Identifier: Apache-2.0
"""What is wrong with examples once they are tokens: templates that refuse them, rows too long, nothing to train on."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from jft import errors
from jft.data import encoding, examples, findings, fitting, rows, template

Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What rows have to keep to; 0 = no limit."""

    max_length: int = 0  # positions in a row of a batch
    overlength: str = "error"  # what happens to longer rows: one of `fitting.OVERLENGTH`
    vocab_size: int = 0  # rows of the model's embedding


class Account:
    """Encodes examples and keeps account of every one that training would leave out or cut.

    Attributes:
      kept: examples that would be trained on so far.
    """

    def __init__(self, encoder: encoding.Encoder, limits: Limits) -> None:
        self._encoder, self._limits = encoder, limits
        self._control = template.any_of(template.special_tokens(encoder.tokenizer))
        self._template: list[examples.Fault] = []
        self._untrained: list[Place] = []
        self._long: list[Place] = []
        self._cut: list[Place] = []
        self._tokens_cut = 0
        self._longest = 0
        self._spelled: dict[Place, set[str]] = {}
        self.kept = 0

    def add(self, batch: Sequence[examples.Example]) -> list[encoding.Encoded]:
        """What the encoder makes of them, each taken into account."""
        made = self._encode(batch)
        for example, result in zip(batch, made, strict=True):
            self._look_for_control(example)
            if isinstance(result, examples.Fault):
                self._template.append(result)
            else:
                self.kept += self._fits((example.path, example.number), result)
        return made

    def _encode(self, batch: Sequence[examples.Example]) -> list[encoding.Encoded]:
        try:
            return self._encoder.encode(batch)
        except errors.UserError as error:  # of the template itself: no row can be encoded
            return [examples.Fault("template", str(error), e.path, e.number) for e in batch]

    def _fits(self, place: Place, made: Sequence[rows.Row]) -> bool:
        """Whether an example is trained on; notes why not."""
        trained = [row for row in made if row.trained[1:].any()]
        if not trained:
            self._untrained.append(place)
            return False
        unknown = [fault for row in trained if (fault := self._unknown_token(row, place))]
        if unknown:
            self._template.append(unknown[0])
            return False
        limit, overlength = self._limits.max_length, self._limits.overlength
        long = [row for row in trained if limit and len(row.tokens) - 1 > limit]
        if not long:
            return True
        self._longest = max(self._longest, *(len(row.tokens) - 1 for row in long))
        # Of a conversation that takes several rows, the others stay.
        if overlength == "split" or (overlength == "drop" and len(long) < len(trained)):
            self._cut.append(place)
            return True
        if overlength == "truncate_prompt" and all(_response_fits(row, limit) for row in long):
            self._cut.append(place)
            self._tokens_cut += sum(len(row.tokens) - 1 - limit for row in long)
            return True
        self._long.append(place)
        return False

    def _unknown_token(self, row: rows.Row, place: Place) -> examples.Fault | None:
        token, known = int(row.tokens.max()), self._limits.vocab_size
        if not known or token < known:
            return None
        message = f"{row.source}: token {token} is not one of the model's {known} embedding rows"
        return examples.Fault("template", f"{message}; take its text out", *place)

    def _look_for_control(self, example: examples.Example) -> None:
        texts = [example.text, *(str(turn.get("content") or "") for turn in example.messages)]
        held = {text for content in texts for text in self._control.findall(content)}
        if held:
            self._spelled[example.path, example.number] = held

    def found(self) -> list[findings.Finding]:
        found = (self._templates(), self._empty(), self._dropped(), self._truncated())
        return [finding for finding in (*found, self._control_tokens()) if finding]

    def _templates(self) -> findings.Finding | None:
        if not self._template:
            return None
        first = self._template[0]
        causes = {_cause(fault) for fault in self._template}
        more = f" ({len(causes)} causes in all)" if len(causes) > 1 else ""
        return findings.Finding(
            "template",
            "error",
            len(self._template),
            _places(self._template),
            f"{_rows(self._template)} can't be encoded: {_cause(first)}{more}",
            "change these rows, or set data.chat_template to a template that takes them",
            {"causes": sorted(causes)[:20]},
            left_out=len(self._template),
        )

    def _empty(self) -> findings.Finding | None:
        if not self._untrained:
            return None
        return findings.Finding(
            "empty",
            "warning",
            len(self._untrained),
            tuple(self._untrained),
            f"{_rows(self._untrained)} without a token to train on, so they are left out",
            "look at one with --rows=N, and at what data.train_on selects",
            left_out=len(self._untrained),
        )

    def _dropped(self) -> findings.Finding | None:
        if not self._long:
            return None
        limit, overlength = self._limits.max_length, self._limits.overlength
        what = {
            "error": ": training refuses to start",
            "drop": ": they are left out",
            "truncate_prompt": " even without their prompts: training refuses to start",
        }[overlength]
        advice = (
            f"raise data.max_length (the longest needs {self._longest}), or set data.overlength to "
        )
        others = [kind for kind in fitting.OVERLENGTH if kind not in ("error", overlength)]
        return findings.Finding(
            "dropped",
            "warning" if overlength == "drop" else "error",
            len(self._long),
            tuple(self._long),
            f"{_rows(self._long)} longer than max_length={limit}{what}",
            f"{advice}{', '.join(others[:-1])} or {others[-1]}",
            {"max_length": limit, "overlength": overlength, "longest": self._longest},
            left_out=len(self._long),
        )

    def _truncated(self) -> findings.Finding | None:
        if not self._cut:
            return None
        limit, overlength = self._limits.max_length, self._limits.overlength
        what = {
            "split": "split",
            "drop": "some of their answers are left out",
            "truncate_prompt": f"cut by {self._tokens_cut:,} tokens of their prompts",
        }[overlength]
        return findings.Finding(
            "truncated",
            "note" if overlength == "split" else "warning",
            len(self._cut),
            tuple(self._cut),
            f"{_rows(self._cut)} longer than max_length={limit}: {what}",
            f"raise data.max_length (the longest needs {self._longest}) where the memory allows it",
            {"max_length": limit, "longest": self._longest, "tokens_cut": self._tokens_cut},
        )

    def _control_tokens(self) -> findings.Finding | None:
        if not self._spelled:
            return None
        counts: dict[str, int] = {}
        for text in sorted(text for held in self._spelled.values() for text in held):
            counts[text] = counts.get(text, 0) + 1
        named = ", ".join(f"{text} in {number:,}" for text, number in list(counts.items())[:3])
        return findings.Finding(
            "control_token",
            "warning",
            len(self._spelled),
            tuple(self._spelled),
            f"{_rows(self._spelled)} with the text of a control token ({named})",
            "it is kept as ordinary text; if the data holds a template already, take that out",
            {"tokens": counts},
        )


def merged(found: Iterable[findings.Finding]) -> list[findings.Finding]:
    """One finding of each kind and severity, sorted by severity, then by kind as `findings.KINDS` has them."""
    kinds: dict[tuple[str, str], findings.Finding] = {}
    for finding in found:
        key = finding.kind, finding.severity
        kinds[key] = _joined(kinds[key], finding) if key in kinds else finding

    def order(finding: findings.Finding) -> tuple[int, int]:
        return findings.SEVERITIES.index(finding.severity), findings.KINDS.index(finding.kind)

    return sorted(kinds.values(), key=order)


def _joined(a: findings.Finding, b: findings.Finding) -> findings.Finding:
    return dataclasses.replace(
        a,
        count=a.count + b.count,
        left_out=a.left_out + b.left_out,
        places=tuple(sorted({*a.places, *b.places})),
        message=f"{a.message}; {b.message}",
        advice=a.advice if a.advice == b.advice else f"{a.advice}; {b.advice}",
        details={**a.details, **b.details},
    )


def _response_fits(row: rows.Row, limit: int) -> bool:
    """Whether the row fits once tokens are taken out of its prompt, its first token apart."""
    return len(row.tokens) - 1 - limit <= int(row.trained.argmax()) - 1


def _places(faults: Sequence[examples.Fault]) -> tuple[Place, ...]:
    return tuple((fault.path, fault.number) for fault in faults)


def _rows(places: Collection[Any]) -> str:
    return f"{len(places):,} row{'' if len(places) == 1 else 's'}"


def _cause(fault: examples.Fault) -> str:
    """The message without its place."""
    return fault.message.removeprefix(f"{fault.path}:row {fault.number}: ")
