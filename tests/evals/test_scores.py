# SPDX-License-Identifier: Apache-2.0
"""Scores of answers: against the reference libraries on their own examples, and what each counts."""

import fractions
import json
import pathlib

import numpy as np
import pytest

from jft import errors
from jft.evals import intervals, labels, matching, numbers, result, scores, structured

# sacrebleu's README, its system and its second set of references.
SACREBLEU = [
    ("The dog bit the man.", "The dog had bit the man."),
    ("It wasn't surprising.", "No one was surprised."),
    ("The man had just bitten him.", "The man had bitten the dog."),
]
# rouge-score's README, and two more.
ROUGE = [
    ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"),
    ("testing one", "testing one two"),
    ("", "something"),
]


def pairs(*texts: tuple[str, str]) -> list[result.Answer]:
    """Answers of (text, reference)."""
    return [result.Answer("", reference, text) for text, reference in texts]


def value(score: str, *texts: tuple[str, str]) -> float:
    return scores.measure(score, pairs(*texts)).value


def test_bleu_and_chrf_are_sacrebleus() -> None:
    import sacrebleu

    for some in (SACREBLEU, SACREBLEU[1:2], [("", "a b"), *SACREBLEU], [("a", "a")], [("x", "y")]):
        texts, references = (list(x) for x in zip(*some, strict=True))
        want = sacrebleu.corpus_bleu(texts, [references]).score
        assert value("bleu", *some) == pytest.approx(want, abs=1e-9)
        want = sacrebleu.corpus_chrf(texts, [references]).score
        assert value("chrf", *some) == pytest.approx(want, abs=1e-9)
    got = scores.measure("chrf", pairs(*SACREBLEU)).values
    each = [sacrebleu.sentence_chrf(text, [reference]).score for text, reference in SACREBLEU]
    np.testing.assert_allclose(got, each, rtol=1e-12)
    got = scores.measure("bleu", pairs(*SACREBLEU)).values
    each = [sacrebleu.sentence_bleu(text, [reference]).score for text, reference in SACREBLEU]
    np.testing.assert_allclose(got, each, rtol=1e-12)


def test_bleu_and_chrf_of_random_corpora_are_sacrebleus() -> None:
    """Short sentences of few words: orders without a match and without an n-gram occur."""
    import sacrebleu

    rng = np.random.default_rng(0)
    words = np.array(["a", "b", "cat", "dog,", "é", "run"])
    for _ in range(30):
        some = [
            tuple(" ".join(rng.choice(words, rng.integers(0, 7))) for _ in range(2))
            for _ in range(rng.integers(1, 5))
        ]
        texts, references = (list(x) for x in zip(*some, strict=True))
        want = sacrebleu.corpus_bleu(texts, [references]).score
        assert value("bleu", *some) == pytest.approx(want, abs=1e-9), some
        want = sacrebleu.corpus_chrf(texts, [references]).score
        assert value("chrf", *some) == pytest.approx(want, abs=1e-9), some


def test_rouge_is_rouge_scores() -> None:
    from rouge_score import rouge_scorer

    for kind, name in (("rouge1", "rouge_1"), ("rouge2", "rouge_2"), ("rougeL", "rouge_l")):
        scorer = rouge_scorer.RougeScorer([kind])
        want = [scorer.score(reference, text)[kind].fmeasure for text, reference in ROUGE]
        got = scores.measure(name, pairs(*ROUGE))
        np.testing.assert_array_equal(got.values, want)
        assert got.value == pytest.approx(sum(want) / 3)
    # Its README's example by hand: 6 words of the 8 given and the 9 wanted are shared.
    assert value("rouge_1", ROUGE[0]) == pytest.approx(2 * 6 / (8 + 9))
    with pytest.raises(errors.UserError, match="use chrf"):
        value("rouge_1", ("привет", "привет мир"))


def test_normalising_is_squads() -> None:
    """Cases of SQuAD's evaluate-v1.1.py: case, punctuation, articles, spaces."""
    assert matching.normalise("The  U.S.A., an Answer ") == "usa answer"
    assert value("normalised_match", ("the Cat!", "A cat")) == 1
    assert value("exact_match", ("the Cat!", "A cat")) == 0
    assert value("exact_match", (" SELECT 1\n", "SELECT 1")) == 1
    # 2 * 2 / (3 + 2) words
    assert value("token_f1", ("Denver Broncos won", "the Denver Broncos")) == pytest.approx(0.8)
    assert value("token_f1", ("the", "a")) == 1  # nothing is left of either
    assert value("token_f1", ("x", "the")) == 0


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("So she has $1,234.50 left.", "1234.5"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("it fell to \u22127 degrees", "-7"),
        ("7 apples and 2\u00bd pears", "5/2"),
        ("1 1/2 cups", "3/2"),
        (r"\frac{3}{4}", "3/4"),
        ("1e3 m", "1000"),
        ("1.000.000", "1000000"),
        ("12\u202f500 km", "12500"),
        ("48/2=24 so\n#### 72", "72"),
        ("a 3/0", "3"),
        ("the 2 of us, none", "2"),
    ],
)
def test_the_last_number(text: str, want: str) -> None:
    found = numbers.last(text)
    assert found is not None and found.value == fractions.Fraction(want)


def test_numbers_are_equal_as_numbers() -> None:
    assert numbers.last("none at all") is None
    assert numbers.last("9" * 5000) is None  # more digits than Python reads: no crash
    for text, reference, want in (
        ("it is 50 %", "0.5", 1),
        ("50%", "50", 1),
        ("50%", "5", 0),
        ("0.5", "50 percent", 1),
        ("1000000", "1000001", 0),
        ("0.50", "1/2", 1),
        ("0.333", "1/3", 0),
        ("no idea", "3", 0),
    ):
        assert value("number", (text, reference)) == want, (text, reference)
    assert value("number:0.01", ("0.333", "1/3")) == 1
    assert value("number:0.01", ("0.32", "1/3")) == 0
    with pytest.raises(errors.UserError, match="holds no number"):
        value("number", ("3", "three"))
    with pytest.raises(errors.UserError, match="tolerance"):
        scores.named("number:much")


def test_json_and_its_keys() -> None:
    assert value("json", ('{"a": [1, null]}', ""), ("```json\n{}\n```", ""), ("NaN", "")) == 1 / 3
    assert value("json", ("[" * 100_000, "")) == 0
    reference = '{"a": 1, "b": 2}'
    assert value("json_keys", ('{"b": 0, "a": []}', reference), ('{"a": 1}', reference)) == 0.5
    assert scores.valid_format('{"b": 0, "a": 1}', reference, "json")
    with pytest.raises(errors.UserError, match="reference is not JSON"):
        value("json_keys", ("{}", "{"))


def test_json_schema(tmp_path: pathlib.Path) -> None:
    """The first example of jsonschema's documentation."""
    file = tmp_path / "schema.json"
    schema = {
        "type": "object",
        "properties": {"price": {"type": "number"}, "name": {"type": "string"}},
    }
    file.write_text(json.dumps(schema))
    texts = ['{"name": "Eggs", "price": 34.99}', '{"name": "Eggs", "price": "Invalid"}', "{"]
    got = scores.measure(f"json_schema:{file}", pairs(*((text, "") for text in texts)))
    assert got.values.tolist() == [1, 0, 0]
    for content, told in (
        ("{", "not JSON"),
        ("[]", "a schema is an object"),
        ('{"type": "objekt"}', "no JSON Schema"),
        ('{"$ref": "https://example.com/x.json"}', "not in the file"),
    ):
        file.write_text(content)
        with pytest.raises(errors.UserError, match=told):
            value(f"json_schema:{file}", ("{}", ""))
    with pytest.raises(errors.UserError, match="No such file"):
        scores.named(f"json_schema:{tmp_path / 'none.json'}")
    with pytest.raises(errors.UserError, match="write json_schema:FILE"):
        scores.named("json_schema")


def test_field_f1_counts_fields_of_all_examples() -> None:
    reference = '{"name": "Ann", "tags": ["x", "y"], "age": 3, "ok": true}'
    some = pairs(
        ('{"tags": ["y", "x"], "name": " Ann", "age": 3.0, "ok": true}', reference),
        ('{"name": "Bob", "tags": ["x"], "ok": 1}', reference),
        ("I do not know", reference),
    )
    got = scores.measure("field_f1", some)
    # Right, given and wanted: 5 5 5, then 1 3 5, then 0 0 5.
    np.testing.assert_allclose(got.values, [1, 2 / 8, 0])
    assert got.value == pytest.approx(2 * 6 / (8 + 15))
    assert got.details["precision"] == 6 / 8 and got.details["recall"] == 6 / 15
    assert got.details["fields"]["tags[]"] == pytest.approx(2 * 3 / (3 + 6))
    assert structured.field_f1(pairs(("{}", "{}"))).value == 1
    assert structured.field_f1(pairs(("[]", "{}"))).value == 0


def test_labels_against_scikit_learns_documentation() -> None:
    """f1_score's and confusion_matrix's examples there: 4/15 for the macro average; the matrix of three animals."""
    some = pairs(*zip("021001", "012012", strict=True))
    got = scores.measure("macro_f1", some)
    assert got.value == pytest.approx(4 / 15)
    assert scores.measure("label", some).value == pytest.approx(2 / 6)
    wanted = ["cat", "ant", "cat", "cat", "ant", "bird"]
    given = ["ant", "ant", "cat", "cat", "ant", "cat"]
    names, table = labels.confusion(pairs(*zip(given, wanted, strict=True)))
    assert names == ["ant", "bird", "cat"]
    assert table.tolist() == [[2, 0, 0, 0], [0, 0, 1, 0], [1, 0, 2, 0]]


def test_which_label_an_answer_gives() -> None:
    known = ["card", "card arrival", "top_up failed", "no"]
    for text, want in (
        ("Card arrival.", "card arrival"),
        ("The category is: card arrival", "card arrival"),
        ("card or no?", labels.OTHER),
        ("I know nothing", labels.OTHER),  # "no" is no word of it
        ("top_up failed", "top_up failed"),
        ("", labels.OTHER),
    ):
        assert labels.chosen(text, known) == want, text


def test_a_pattern_and_its_group() -> None:
    assert value("regex:^yes", ("yes, sir", ""), ("oh yes", "")) == 0.5
    gsm = r"regex:#### (\S+)"
    assert value(gsm, ("#### 1 and #### 7", "so #### 7"), ("#### 7", "7"), ("7", "7")) == 2 / 3
    for wrong, told in ((r"regex:(", "regex"), (r"regex:(a)(b)", "2 groups"), ("regex", "PATTERN")):
        with pytest.raises(errors.UserError, match=told):
            scores.named(wrong)


def test_refusals_length_and_stopping() -> None:
    assert matching.is_refusal("I’m sorry, but I can’t help with that.")
    assert matching.is_refusal("As an AI language model, I have no opinion.")
    assert not matching.is_refusal("The capital of France is Paris.")
    assert not matching.is_refusal("Water boils at 100 degrees. " * 8 + "I cannot say more.")
    some = [result.Answer("", "", "x", 4, True), result.Answer("", "", "x", 8, False)]
    assert scores.measure("length", some).value == 6
    assert scores.measure("never_stopping", some).value == 0.5


def test_a_score_of_ones_own(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\nword = 'x'\n"
        "def same(prompt, reference, answer): return np.bool_(prompt + reference == answer)\n"
        "def long(prompt, reference, answer): return len(answer)\n"
        "def two(a, b): return 1\n"
        "def late(a, b, c):\n    return 1 / 0\n"
        "def text(a, b, c): return 'good'\n"
        "def nan(a, b, c): return float('nan')\n"
        "async def wait(a, b, c): return 1\n"
    )
    some = [result.Answer("a", "b", "ab"), result.Answer("a", "b", "abc")]
    got = scores.measure(f"{file}:same", some)
    assert got.values.tolist() == [1, 0] and got.unit == "share"
    assert scores.measure(f"{file}:long", some).value == 2.5
    for spec, told in (
        (f"{file}:none", "has no none; it has same, long"),
        (f"{file}:word", "word is str"),
        (f"{file}:two", "cannot be called as"),
        (f"{file}:late", r"answer 1: line 7: ZeroDivisionError"),
        (f"{file}:text", "gives 'good'"),
        (f"{file}:nan", "gives nan"),
        (f"{file}:wait", "async"),
        (f"{file}", "write FILE.py:FUNCTION"),
        ("none.py:f", "no such file"),
    ):
        with pytest.raises(errors.UserError, match=told) as error:
            scores.measure(spec, some)
        assert "\n" not in str(error.value)
    file.write_text("def f(:\n")
    with pytest.raises(errors.UserError, match="line 1: SyntaxError"):
        scores.named(f"{file}:f")


def test_unknown_names_and_nothing_to_judge() -> None:
    with pytest.raises(errors.UserError, match="did you mean rouge_l"):
        scores.named("rougel")
    with pytest.raises(errors.UserError, match="takes nothing"):
        scores.named("bleu:4")
    with pytest.raises(errors.UserError, match="no answer"):
        scores.measure("bleu", [])


def test_how_well_text_was_predicted() -> None:
    """Two bytes of one bit each, and three nats over four tokens."""
    nats = np.array([np.log(2) * 2, 3.0])
    entropy, perplexity, bits = result.of_text(nats, np.array([1, 4]), np.array([2, 6]))
    assert perplexity.values == pytest.approx([4, np.exp(0.75)])
    assert perplexity.value == pytest.approx(np.exp(nats.sum() / 5))
    assert np.exp(entropy.value) == pytest.approx(perplexity.value)
    assert bits.values[0] == pytest.approx(1)
    assert bits.value == pytest.approx(nats.sum() / np.log(2) / 8)
    assert intervals.interval(entropy).low <= entropy.value <= intervals.interval(entropy).high
