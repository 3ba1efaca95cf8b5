# SPDX-License-Identifier: Apache-2.0
"""Examples to rows of tokens, with the tokens to train on marked.

The ids of a prompt are those of `prompt_tokens`, in training and in generation alike. A response is what the
conversation with the assistant's turn has beyond the prompt, up to and with the stop token; it is found by rendering
both, never by searching for strings.

A template need not write a turn alike once others follow: Qwen3's writes its think block in the last turns only. An
answer is trained in the form in which the model would give it, so a conversation becomes as many rows as it takes: each
begins exactly as generation would, and holds every earlier answer that stands in it unchanged.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import examples, rows, template, tokenising

TRAIN_ON = ("assistant", "last", "weight", "everything")

Encoded = list[rows.Row] | examples.Fault


@dataclasses.dataclass
class Counts:
    """What became of assistant turns, for the report."""

    turns: int = 0
    untrained_turns: int = (
        0  # greetings, which answer nothing, and what `train_on` and weights leave out
    )
    expanded: int = 0  # conversations that took several rows


@dataclasses.dataclass(frozen=True)
class _Answer:
    """One assistant turn and what is before it; `branch` tells chosen from rejected."""

    example: int
    branch: int
    turns: list[examples.Turn]


_Texts = tuple[template.Rendered, template.Rendered]  # of the prompt; of the prompt and the answer


class Encoder:
    """Encodes for one tokenizer with the template that it has now.

    Args:
        tokenizer: a transformers fast tokenizer.
        train_on: "assistant" (every assistant turn but those of weight 0), "last" (the last one), "weight" (those of
            weight 1), "everything" (prompts as well). In plain text every token is trained.
        system: a system message for conversations that have none.

    Raises:
        errors.UserError: `train_on` is unknown.
    """

    def __init__(self, tokenizer: Any, *, train_on: str = "assistant", system: str = "") -> None:
        if train_on not in TRAIN_ON:
            raise errors.UserError(
                f"data.train_on={train_on}: unknown; known are {', '.join(TRAIN_ON)}"
            )
        self.tokenizer = tokenizer
        self.counts = Counts()
        self._train_on = train_on
        self._system = system

    def __reduce__(self) -> tuple[Any, ...]:
        """An equal one with counts of its own: what it knows of the tokenizer is found anew."""
        settings = {"train_on": self._train_on, "system": self._system}
        return functools.partial(Encoder, **settings), (self.tokenizer,)

    def encode(self, some: Sequence[examples.Example]) -> list[Encoded]:
        """The rows of each example, or why it has none.

        A conversation with nothing to train has no rows; a preference pair has two, the chosen and the rejected.

        Raises:
            errors.UserError: there is no template, or it can't be used.
        """
        found: list[Encoded] = self._plain_texts(some)
        answers = [a for i, example in enumerate(some) for a in self._answers(i, example)]
        if answers:
            _ = self._template  # its own faults are no row's
        texts = self._render(some, answers)
        wanted = [pair for pair in texts if not isinstance(pair, errors.UserError)]
        ids = iter(
            self._tokens.encode([text for pair in wanted for text in pair]) if wanted else []
        )
        branches: dict[tuple[int, int], list[rows.Row]] = {}
        for answer, pair in zip(answers, texts, strict=True):
            example = some[answer.example]
            try:
                if isinstance(pair, errors.UserError):
                    raise pair
                row = self._row(pair, _sound(next(ids), next(ids)), example.source)
            except errors.UserError as error:
                found[answer.example] = _fault(example, error)
                continue
            _place(branches.setdefault((answer.example, answer.branch), []), row)
        for (i, _), placed in branches.items():
            self.counts.expanded += len(placed) > 1
            here = found[i]
            if isinstance(here, list):
                here += reversed(placed)
        return found

    def one(self, example: examples.Example) -> list[rows.Row]:
        """The rows of one example.

        Raises:
            errors.UserError: it can't be encoded.
        """
        found = self.encode([example])[0]
        if isinstance(found, examples.Fault):
            raise errors.UserError(found.message)
        return found

    @functools.cached_property
    def _template(self) -> template.Template:
        return template.analysed(self.tokenizer)

    @functools.cached_property
    def _tokens(self) -> tokenising.Tokeniser:
        return _tokens(self._template)

    def _plain_texts(self, some: Sequence[examples.Example]) -> list[Encoded]:
        """Rows of plain texts: BOS, the text, the end token; no rows yet for conversations."""
        found: list[Encoded] = [[] for _ in some]
        at = [i for i, example in enumerate(some) if not example.messages]
        if not at:
            return found
        end = self.tokenizer.eos_token_id
        for i, ids in zip(
            at, plain_tokens(self.tokenizer, [some[i].text for i in at]), strict=True
        ):
            if isinstance(ids, errors.UserError):
                found[i] = _fault(some[i], ids)
                continue
            whole = np.append(ids, [] if end is None else end).astype(np.int32)
            found[i] = [rows.Row(whole, np.ones(len(whole), bool), some[i].source)]
        return found

    def _answers(self, index: int, example: examples.Example) -> list[_Answer]:
        """The assistant turns to train, of each branch the last one first."""
        found = []
        for branch, messages in enumerate(branches(example)):
            turns = template.with_system(messages, self._system)
            more = len(turns) - len(messages)
            wanted = self._wanted(messages, example.shared)
            found += [_Answer(index, branch, turns[: at + more + 1]) for at in wanted]
        return found

    def _wanted(self, messages: Sequence[examples.Turn], shared: int) -> list[int]:
        """Places of the assistant turns to train behind those that a pair's branches share, the last one first."""
        turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        # A greeting before any user turn has no prompt to answer.
        answers = [i for i in turns if any(turn["role"] == "user" for turn in messages[:i])]
        if self._train_on == "weight":
            trained = [i for i in answers if messages[i].get("weight") == 1]
        else:
            some = answers if self._train_on == "assistant" else answers[-1:]
            trained = [i for i in some if messages[i].get("weight") != 0]
        trained = [i for i in trained if i >= shared]
        self.counts.turns += len(turns)
        self.counts.untrained_turns += len(turns) - len(trained)
        return trained[::-1]

    def _render(
        self, some: Sequence[examples.Example], answers: Sequence[_Answer]
    ) -> list[_Texts | errors.UserError]:
        """Each answer's texts. Those that share their tools go through the template together, alone if that fails."""
        groups: dict[str, list[int]] = {}
        for n, answer in enumerate(answers):
            groups.setdefault(json.dumps(some[answer.example].tools), []).append(n)
        found: dict[int, _Texts | errors.UserError] = {}
        for group in groups.values():
            tools = some[answers[group[0]].example].tools
            try:
                texts = self._render_all([answers[n].turns for n in group], tools)
                found |= dict(zip(group, texts, strict=True))
            except errors.UserError:
                found |= {n: self._render_one(answers[n].turns, tools) for n in group}
        return [found[n] for n in range(len(answers))]

    def _render_all(self, turns: Sequence[list[examples.Turn]], tools: Any) -> list[_Texts]:
        for one in turns:
            self._template.check_tools(one, tools)
        marks = [template.unused_character(one, tools) for one in turns]
        if tools:
            marks = [template.unused_character(turns, tools)] * len(turns)
        prompts = self._template.render([one[:-1] for one in turns], tools, True, marks)
        wholes = self._template.render(turns, tools, False, marks)
        return [
            (
                prompt,
                whole if whole.text.startswith(prompt.text) else self._behind(prompt, one, tools),
            )
            for one, prompt, whole in zip(turns, prompts, wholes, strict=True)
        ]

    def _behind(
        self, prompt: template.Rendered, turns: list[examples.Turn], tools: Any
    ) -> template.Rendered:
        """The last turn as the template writes it behind one user's turn, put behind the prompt of inference.

        Mistral's templates, for one, write the system message before the last turn if that is the user's, so not at all
        in a conversation that ends with an answer.
        """
        short = [{"role": "user", "content": "x"}, turns[-1]]
        asked = self._template.render([short[:-1]], tools, True, [prompt.mark])[0]
        whole = self._template.render([short], tools, False, [prompt.mark])[0]
        if not whole.text.startswith(asked.text):
            raise errors.UserError(
                "the chat template's generation prompt is not how it begins an assistant's turn, so no response can be "
                "told from its prompt; set data.chat_template to one where it is"
            )
        return template.Rendered(prompt.text + whole.text[len(asked.text) :], prompt.mark)

    def _render_one(self, turns: list[examples.Turn], tools: Any) -> _Texts | errors.UserError:
        try:
            return self._render_all([turns], tools)[0]
        except errors.UserError as error:
            return error

    def _row(
        self, texts: _Texts, ids: tuple[tokenising.Ids, tokenising.Ids], source: str
    ) -> rows.Row:
        """The ids up to the stop token, of which those behind the prompt are trained."""
        prompt, whole = ids
        start = len(prompt)
        if not np.array_equal(whole[:start], prompt):
            # The answer's first characters merge with the prompt's last into one token, as in "\n" + "\n- one". The
            # prompt has to have the ids that generation gives it.
            tail = texts[1].text[len(texts[0].text) :]
            behind = self._tokens.encode_after(template.Rendered(tail, texts[1].mark))
            whole = np.concatenate([prompt, behind])
        stops = np.flatnonzero(whole[start:] == self._template.stop)
        if not len(stops):
            raise errors.UserError(
                "the chat template ends this turn without "
                f"{self.tokenizer.convert_ids_to_tokens(self._template.stop)!r}; check data.chat_template"
            )
        end = start + int(stops[0]) + 1
        trained = np.zeros(end, bool)
        trained[0 if self._train_on == "everything" else start :] = True
        return rows.Row(whole[:end], trained, source)


def prompt_tokens(
    tokenizer: Any, messages: template.Messages, *, system: str | None = None, tools: Any = ()
) -> list[int]:
    """The ids after which the model answers: those before the response in a row of `Encoder.encode`.

    Raises:
        errors.UserError: there is no template, it refuses the messages, or there are none.
    """
    if not messages:
        raise errors.UserError("prompt: there are no messages")
    known = template.analysed(tokenizer)
    turns = template.with_system(messages, system)
    try:
        known.check_tools(turns, tools)
        mark = template.unused_character(turns, tools)
        (ids,) = _sound(*_tokens(known).encode(known.render([turns], tools, True, [mark])))
        return ids.tolist()
    except errors.UserError as error:
        raise errors.UserError(f"prompt: {error}") from error


def plain_tokens(tokenizer: Any, texts: Sequence[str]) -> list[tokenising.Ids | errors.UserError]:
    """The ids of plain texts, after BOS where the tokenizer puts one by itself; no control token but that."""
    control, found = _without_template(tokenizer)
    return found.encode([template.broken(text, control) for text in texts])


def stop_tokens(tokenizer: Any) -> set[int]:
    """The ids at which generation ends: the trained end of turn, and the tokenizer's end token."""
    stops = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        stops.add(template.analysed(tokenizer).stop)
    return stops


def branches(example: examples.Example) -> list[tuple[examples.Turn, ...]]:
    """The conversations in an example: one, or of a preference pair the chosen and the rejected one; none in a text."""
    if not example.rejected:
        return [example.messages] if example.messages else []
    return [example.messages, (*example.messages[: example.shared], *example.rejected)]


@functools.lru_cache(maxsize=8)
def _without_template(tokenizer: Any) -> tuple[re.Pattern[str], tokenising.Tokeniser]:
    added = template.added_tokens(tokenizer)
    control = {text: added[text] for text in template.special_tokens(tokenizer)}
    return template.any_of(control), tokenising.Tokeniser(tokenizer, control)


@functools.lru_cache(maxsize=8)
def _tokens(known: template.Template) -> tokenising.Tokeniser:
    return tokenising.Tokeniser(known.tokenizer, known.control_ids)


def _place(placed: list[rows.Row], row: rows.Row) -> None:
    """Marks the row's answer in a later row that begins with the same ids, or keeps it as a row of its own."""
    n = len(row.tokens)
    for other in placed:
        if len(other.tokens) >= n and np.array_equal(other.tokens[:n], row.tokens):
            other.trained[:n] |= row.trained
            return
    placed.append(row)


def _sound(*found: tokenising.Ids | errors.UserError) -> Any:
    for ids in found:
        if isinstance(ids, errors.UserError):
            raise ids
    return found


def _fault(example: examples.Example, error: errors.UserError) -> examples.Fault:
    return examples.Fault("template", f"{example.source}: {error}", example.path, example.number)
