# SPDX-License-Identifier: Apache-2.0
"""What to put into a prompt: the training examples, or passages of documents, that are nearest to a question.

Nearness is BM25 over words (bm25s, https://arxiv.org/abs/2407.03618, with Lucene's formula), or the cosine of embeddings
where a function that makes them is given.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jft import errors

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> [N, D]
Count = Callable[[str], int]  # tokens of a text

KINDS = (".txt", ".md", ".markdown", ".rst")
# One letter is a word too, as "5" and "X" may be what is asked for. No list of stop words: a word in every text weighs little.
_WORD = r"(?u)\b\w+\b"
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


@dataclasses.dataclass(frozen=True)
class Passage:
    """A part of a document, and where it is from: the file below the folder, and the number of its first paragraph."""

    text: str
    source: str
    paragraph: int


@dataclasses.dataclass(frozen=True)
class Index:
    """Finds the nearest of `texts`; made by `index`."""

    texts: tuple[str, ...]
    scores: Callable[
        [str], np.ndarray
    ]  # of a question: each text's nearness, 0 or less where there is none

    def nearest(self, question: str, count: int) -> list[int]:
        """Places of at most `count` texts, the nearest first; only those that have anything to do with the question."""
        scores = self.scores(question)
        order = np.argsort(-scores, kind="stable")[:count]
        return [int(i) for i in order if scores[i] > 0]


def index(texts: Iterable[str], embed: Embed | None = None) -> Index:
    """An index of texts: by words, or by embeddings.

    Raises:
      UserError: there is no text, or no word in any, or the embeddings are no numbers for each text.
    """
    held = tuple(texts)
    if not held:
        raise errors.UserError("retrieval: there is no text to search in")
    return Index(held, _by_embedding(held, embed) if embed else _by_words(held))


def _by_words(texts: tuple[str, ...]) -> Callable[[str], np.ndarray]:
    import bm25s

    words = [_words(text) for text in texts]
    if not any(words):
        raise errors.UserError(f"retrieval: no word in any of the {len(texts)} texts")
    found = bm25s.BM25(method="lucene")
    found.index(words, show_progress=False)

    def scores(question: str) -> np.ndarray:
        known = [word for word in _words(question) if word in found.vocab_dict]
        return found.get_scores(known) if known else np.zeros(len(texts))

    return scores


def _words(text: str) -> list[str]:
    return re.findall(_WORD, text.lower())


def _by_embedding(texts: tuple[str, ...], embed: Embed) -> Callable[[str], np.ndarray]:
    held = _unit(embed(texts), len(texts))
    return lambda question: held @ _unit(embed([question]), 1)[0]


def _unit(vectors: np.ndarray, count: int) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
        raise errors.UserError(
            f"retrieval: embeddings of {count} texts have shape {vectors.shape}; [{count}, D] finite numbers wanted"
        )
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def passages(folder: str | pathlib.Path, count: Count, size: int) -> list[Passage]:
    """The passages of a folder's text files: paragraphs, joined while they have at most `size` tokens together.

    A longer paragraph is cut between sentences, a longer sentence between words.

    Args:
      folder: of .txt, .md, .markdown and .rst files in UTF-8, also in folders inside it; or one such file.
      count: tokens of a text, by the model's tokenizer.
      size: of a passage, at most.

    Raises:
      UserError: there is no such folder, no text in it, or a file that is not UTF-8.
    """
    if size < 1:
        raise errors.UserError(f"passages of {size} tokens: 1 or more")
    root = pathlib.Path(folder)
    if not root.exists():
        raise errors.UserError(f"documents {folder}: no such folder")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in files if p.suffix.lower() in KINDS]
    found = []
    for path in files:
        source = path.name if root.is_file() else path.relative_to(root).as_posix()
        found += _of_document(_read(path), source, count, size)
    if not found:
        raise errors.UserError(f"documents {folder}: no text; files of {', '.join(KINDS)} are read")
    return found


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.UserError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise errors.UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _of_document(text: str, source: str, count: Count, size: int) -> list[Passage]:
    paragraphs = [p.strip() for p in re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))]
    found, held, first = [], "", 0
    for number, paragraph in enumerate(filter(None, paragraphs), 1):
        for piece in _pieces(paragraph, count, size):
            joined = f"{held}\n\n{piece}" if held else piece
            if held and count(joined) > size:
                found.append(Passage(held, source, first))
                held = ""
            held, first = (joined, first) if held else (piece, number)
    return [*found, Passage(held, source, first)] if held else found


def _pieces(paragraph: str, count: Count, size: int) -> list[str]:
    """A paragraph in pieces of at most `size` tokens; one word alone may have more."""
    if count(paragraph) <= size:
        return [paragraph]
    sentences = _SENTENCE_END.split(paragraph)
    found = []
    for sentence in sentences:
        parts = [sentence] if count(sentence) <= size else sentence.split()
        for part in parts:
            joined = f"{found[-1]} {part}" if found else part
            if found and count(joined) <= size:
                found[-1] = joined
            else:
                found.append(part)
    return found
