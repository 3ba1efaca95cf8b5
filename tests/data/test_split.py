# SPDX-License-Identifier: Apache-2.0
"""The validation split depends on what rows say, and near duplicates on texts, never on their order."""

import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jft import errors
from jft.data import examples, near, split

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en", "il")]


def sentence(length: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def groups(texts: list[str]) -> np.ndarray:
    signatures = near.Signatures()
    for text in texts:
        signatures.add(text)
    assert len(signatures) == len(texts)
    return signatures.groups()


def partition(labels: np.ndarray, names: list[int]) -> set[frozenset[int]]:
    """The sets of names that share a label."""
    sets: dict[int, set[int]] = {}
    for label, name in zip(labels.tolist(), names, strict=True):
        sets.setdefault(label, set()).add(name)
    return {frozenset(members) for members in sets.values()}


def jaccard(a: str, b: str) -> float:
    """Of the pairs of neighbouring words, written independently of the module."""
    left, right = ({(x, y) for x, y in zip(t.split(), t.split()[1:], strict=False)} for t in (a, b))
    return len(left & right) / len(left | right)


# --- near duplicates


def test_one_name_or_number_apart_is_a_near_duplicate() -> None:
    letter = (
        "Write a friendly letter to {} and ask whether the meeting on {} May could start an hour "
        "later, because the train from the coast is late again and nobody can change that."
    )
    texts = [letter.format("Anna", 3), sentence(30, 1), letter.format("Boris", 3)]
    texts += [letter.format("Anna", 14), sentence(30, 2)]
    assert groups(texts).tolist() == [0, 1, 0, 0, 4]


def test_groups_are_the_pairs_whose_true_similarity_is_high() -> None:
    rng = random.Random(0)
    texts = []
    for number in range(150):
        words = sentence(60, number).split()
        texts.append(" ".join(words))
        for place in rng.sample(
            range(60), rng.choice([1, 20])
        ):  # similarity 0.9 or more, or below 0.6
            words[place] = f"other{place}"
        texts.append(" ".join(words))
    alike = {frozenset((i, i + 1)) for i in range(0, 300, 2) if jaccard(*texts[i : i + 2]) > 0.8}
    assert 50 < len(alike) < 100
    found = partition(groups(texts), list(range(300)))
    assert {members for members in found if len(members) > 1} == alike


def test_short_texts_are_near_only_if_their_words_are_equal() -> None:
    texts = [
        "Where is my card?",
        "where is my  card",
        "Where is my new card?",
        "3 + 4 =",
        "3 - 4 =",
    ]
    texts += ["😀", "😢", "今日は", "今日も", "Where is my card?"]
    assert groups(texts).tolist() == [0, 0, 2, 3, 4, 5, 6, 7, 8, 0]


def test_an_instruction_that_all_rows_share_does_not_make_them_near() -> None:
    instruction = sentence(120, 0)
    texts = [f"{instruction} {sentence(9, number)}" for number in range(1, 400)]
    assert jaccard(texts[0], texts[1]) > 0.8
    assert len(set(groups(texts).tolist())) == len(texts)


@hypothesis.given(st.permutations(range(24)))
@hypothesis.settings(max_examples=20, deadline=None)
def test_groups_do_not_depend_on_order(order: list[int]) -> None:
    texts = [sentence(40, number // 3) + f" {number % 3}" * (number % 2) for number in range(24)]
    expected = partition(groups(texts), list(range(24)))
    assert 1 < len(expected) < 24
    assert partition(groups([texts[i] for i in order]), order) == expected


def test_a_group_is_named_by_its_first_row() -> None:
    text = sentence(40, 1)
    assert groups([sentence(40, 2), text, sentence(40, 3), text + " end", text]).tolist() == [
        0,
        1,
        2,
        1,
        1,
    ]
    assert groups([]).tolist() == []


# --- prompts


def row(prompt: str, response: str = "r") -> examples.Example:
    return examples.Example(examples.pair(prompt, response), "a:row 1")


def test_case_spacing_punctuation_and_the_answer_do_not_tell_prompts_apart() -> None:
    key = split.prompt_key(row("Where is\nmy card?"), 0)
    assert key == split.prompt_key(row("where  is my CARD?", "another"), 0)
    assert key == split.prompt_key(row("Where is my card"), 0)
    assert key != split.prompt_key(row("Where is your card?"), 0)
    assert split.prompt_key(row("3 + 4?"), 0) != split.prompt_key(row("3 - 4?"), 0)
    assert split.prompt_key(row("???"), 0) != split.prompt_key(row("!!!"), 0)
    assert key != split.prompt_key(row("Where is\nmy card?"), 1)
    text = examples.Example((), "a:row 1", text="A text")
    assert split.prompt_key(text, 0) == split.prompt_key(
        examples.Example((), "", text="a  text"), 0
    )
    assert split.prompt_key(text, 0) != split.prompt_key(
        examples.Example((), "", text="no text"), 0
    )
    turns = row("p").messages
    rated = examples.Example(turns, "", rejected=({"role": "assistant", "content": "x"},))
    assert split.prompt_key(rated, 0) == split.prompt_key(row("p"), 0)


def test_tool_calls_belong_to_a_prompt() -> None:
    def called(name: str) -> examples.Example:
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name}}]}
        return examples.Example(
            (*row("p").messages[:1], call, {"role": "assistant", "content": "a"}), ""
        )

    assert split.prompt_key(called("f"), 0) == split.prompt_key(called("f"), 0)
    assert split.prompt_key(called("f"), 0) != split.prompt_key(called("g"), 0)


# --- the split


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[bytes], np.ndarray]:
    """Keys with repeats, and groups of near duplicates named by their first row."""
    size = draw(st.integers(2, 60))
    keys = [b"%d" % draw(st.integers(0, size)) for _ in range(size)]
    drawn = [draw(st.integers(0, 2 * size)) for _ in range(size)]
    return keys, np.array([drawn.index(group) for group in drawn])


@hypothesis.given(tables(), st.floats(0.01, 0.9), st.integers(0, 3), st.randoms())
@hypothesis.settings(max_examples=150, deadline=None)
def test_split_keeps_groups_whole_and_ignores_order(
    table: tuple[list[bytes], np.ndarray], fraction: float, seed: int, rng: random.Random
) -> None:
    keys, labels = table
    try:
        held = split.held_out(keys, labels, fraction, seed)
    except errors.UserError:
        hypothesis.reject()
    for i in range(len(keys)):
        for j in range(i):
            if keys[i] == keys[j] or labels[i] == labels[j]:
                assert held[i] == held[j]
    assert 0 < held.sum() < len(keys)
    order = list(range(len(keys)))
    rng.shuffle(order)
    again = split.held_out([keys[i] for i in order], labels[order], fraction, seed)
    assert again.tolist() == held[order].tolist()


def test_fraction_is_met_and_seeds_differ() -> None:
    keys = [split.prompt_key(row(f"question {number}"), 0) for number in range(1000)]
    alone = np.arange(1000)
    held = split.held_out(keys, alone, 0.1, 0)
    assert held.sum() == 100
    assert (held != split.held_out(keys, alone, 0.1, 1)).any()
    # In groups of seven 98 is the most that fits.
    assert split.held_out(keys, alone // 7 * 7, 0.1, 0).sum() in (98, 99, 100)
    assert split.held_out(keys[:2], alone[:2], 0.01, 0).sum() == 1
    assert not split.held_out(keys, alone, 0, 0).any()
    assert not split.held_out(keys[:1], alone[:1], 0.5, 0).any()


def test_large_groups_are_not_chosen_first() -> None:
    """A set's place in the order must not depend on its size, as a least key's own value would."""
    keys = [split.prompt_key(row(f"question {number}"), 0) for number in range(300)]
    labels = np.concatenate([np.repeat([0], 50), np.arange(50, 300)])
    chosen = sum(split.held_out(keys, labels, 0.5, seed)[0] for seed in range(40))
    assert (
        8 < chosen < 26
    )  # it fits while at most 100 of the 250 single rows stand before it: 16 of 40


def test_errors_of_the_split() -> None:
    alone = np.arange(3)
    with pytest.raises(errors.UserError, match="fraction is 1; it must be at least 0 and below 1"):
        split.held_out([b"a", b"b", b"c"], alone, 1, 0)
    with pytest.raises(errors.UserError, match="all 3 rows have the same prompt.*data.valid=FILE"):
        split.held_out([b"a"] * 3, alone, 0.1, 0)
    with pytest.raises(errors.UserError, match="all 3 rows are near duplicates.*data.valid=FILE"):
        split.held_out([b"a", b"b", b"c"], np.zeros(3, int), 0.1, 0)
