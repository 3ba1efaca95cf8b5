# SPDX-License-Identifier: Apache-2.0
"""The nearest texts, and documents cut into passages."""

import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jft import errors
from jft.evals import retrieval

# The corpus of bm25s's README.
CORPUS = [
    "a cat is a feline and likes to purr",
    "a dog is the human's best friend and loves to play",
    "a bird is a beautiful animal that can fly",
    "a fish is a creature that lives in water and swims",
]


def lucene(texts: list[str], question: str) -> list[float]:
    """BM25 as Lucene has it, k1 = 1.5 and b = 0.75, written down."""
    words = [re.findall(r"\w+", t.lower()) for t in texts]
    mean = sum(map(len, words)) / len(words)
    found = []
    for own in words:
        total = 0.0
        for word in re.findall(r"\w+", question.lower()):
            n = sum(word in w for w in words)
            idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
            times = own.count(word)
            total += idf * times / (times + 1.5 * (0.25 + 0.75 * len(own) / mean))
        found.append(total)
    return found


def test_the_nearest_by_words_is_bm25s() -> None:
    question = "does the fish purr like a cat?"
    found = retrieval.index(CORPUS)
    assert found.nearest(question, 2) == [0, 3], "the answer of bm25s's README"
    # bm25s keeps float32.
    np.testing.assert_allclose(found.scores(question), lucene(CORPUS, question), rtol=1e-5)


def test_what_has_nothing_to_do_with_the_question_stays_away() -> None:
    found = retrieval.index(["part 5", "part 6", "x"])
    assert found.nearest("where is number 6", 3) == [1]
    assert found.nearest("quite other words", 3) == []
    with pytest.raises(errors.UserError, match="no text"):
        retrieval.index([])
    with pytest.raises(errors.UserError, match="no word"):
        retrieval.index(["--", ""])


def test_the_nearest_by_embeddings() -> None:
    vectors = {"east": [1, 0], "north": [0, 3], "north-east": [1, 1], "west": [-1, 0], "q": [2, 1]}
    texts = list(vectors)[:4]
    found = retrieval.index(texts, lambda some: np.array([vectors[t] for t in some]))
    assert found.nearest("q", 4) == [2, 0, 1], "by angle; the opposite is not near"
    with pytest.raises(errors.UserError, match=r"shape \(2,\)"):
        retrieval.index(["a", "b"], lambda some: np.zeros(len(some)))


def words(text: str) -> int:
    return len(text.split())


def test_passages_are_paragraphs_of_a_size(tmp_path: pathlib.Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# Title\n\nOne two.\n \nThree four five six. Seven eight!\n")
    (tmp_path / "deep" / "b.txt").write_text("\ufeffalone", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    found = retrieval.passages(tmp_path, words, 4)
    assert [(p.text, p.source, p.paragraph) for p in found] == [
        ("# Title\n\nOne two.", "a.md", 1),
        ("Three four five six.", "a.md", 3),
        ("Seven eight!", "a.md", 3),
        ("alone", "deep/b.txt", 1),
    ]
    assert [p.text for p in retrieval.passages(tmp_path / "deep" / "b.txt", words, 4)] == ["alone"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "bb", "c.", "d!"]), max_size=12), max_size=6),
    st.integers(1, 5),
)
def test_passages_hold_every_word_once(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[list[str]], size: int
) -> None:
    text = "\n\n".join(" ".join(p) for p in paragraphs)
    file = tmp_path_factory.mktemp("documents") / "x.txt"
    file.write_text(text)
    if not text.split():
        with pytest.raises(errors.UserError, match="no text"):
            retrieval.passages(file, words, size)
        return
    found = retrieval.passages(file, words, size)
    assert " ".join(p.text for p in found).split() == text.split()
    assert all(words(p.text) <= size for p in found)
    # None could have been joined with the next without being cut by the end of a sentence or by the size.
    for before, after in zip(found, found[1:], strict=False):
        assert words(before.text) + words(after.text) > size or before.paragraph == after.paragraph


def test_documents_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="no such folder"):
        retrieval.passages(tmp_path / "none", words, 4)
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(errors.UserError, match="not UTF-8 .* at byte 3"):
        retrieval.passages(tmp_path, words, 4)
