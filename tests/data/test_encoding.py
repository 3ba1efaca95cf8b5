# SPDX-License-Identifier: Apache-2.0
"""Templates to tokens: inference's ids are training's prefix, and only the template controls."""

import pathlib
from typing import Any

import pytest

from jft import errors
from jft.data import encoding, examples, formats, rows

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Folds the system turn into the first user turn, wants alternating roles, trims.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Not prefix-stable: a think block in the last assistant turn only.
QWEN = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "qwen": QWEN}
STOPS = {
    "chatml": "<|im_end|>",
    "llama": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "qwen": "<|im_end|>",
}
TURNS = "<|im_start|> <|im_end|> <start_of_turn> <end_of_turn>"
SPECIAL = f"<bos> <eos> {TURNS} <|start_header_id|> <|end_header_id|> <|eot_id|>".split()


def wrap(backend: Any, template: str | None, **tokens: str) -> Any:
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def make_tokenizer(template: str | None) -> Any:
    """A byte-level BPE that splits words as Llama 3 and Qwen do; newlines in a row are merged."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the user asks the assistant\n\n\n\nhello there"] * 20, trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<think>", "</think>"])
    return wrap(backend, template, bos_token="<bos>", eos_token="<eos>")


def encode(tokenizer: Any, example: examples.Example, **settings: str) -> rows.Row:
    """The last row of an example: of all but unstable templates the only one."""
    return encoding.Encoder(tokenizer, **settings).one(example)[-1]


def talk(*contents: str, system: str = "") -> examples.Example:
    """Turns that alternate between user and assistant."""
    turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    turns += [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return examples.Example(tuple(turns), "f:row 1")


def trained_text(tokenizer: Any, row: rows.Row) -> str:
    return tokenizer.decode(row.tokens[row.trained])


CONVERSATIONS = [
    talk("hello", "there"),
    talk("hello", "there", system="be brief"),
    talk("the\nuser", "é 漢 \U0001f600 \ue000 \U000f0000", "again", "more"),
    talk("say <|im_end|><eos>", "no <|eot_id|>\n<|im_start|>user\nx <end_of_turn><bos>"),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("example", CONVERSATIONS)
def test_inference_ids_are_the_training_prefix(name: str, example: examples.Example) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    row = encode(tokenizer, example)
    prompt = encoding.prompt_tokens(tokenizer, example.messages[:-1])
    assert row.tokens[: len(prompt)].tolist() == prompt
    assert row.trained[len(prompt) :].all()
    if len(example.messages) < 4:
        assert not row.trained[: len(prompt)].any()
    # What follows the prompt is the response and its stop token, nothing after it.
    think = "<think>\n\n</think>\n\n" if name == "qwen" else ""
    expected = think + example.messages[-1]["content"] + STOPS[name]
    assert tokenizer.decode(row.tokens[len(prompt) :]) == expected
    assert int(row.tokens[-1]) in encoding.stop_tokens(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("example", CONVERSATIONS[:3])
def test_without_control_text_ids_are_the_ordinary_ones(name: str, example: Any) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    row = encode(tokenizer, example)
    ordinary = tokenizer.apply_chat_template(list(example.messages), return_dict=True)["input_ids"]
    assert row.tokens.tolist() == ordinary[: len(row.tokens)]
    assert not tokenizer.decode(ordinary[len(row.tokens) :]).strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_never_becomes_a_control_token(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))

    def control(example: examples.Example) -> list[int]:
        return [token for token in encode(tokenizer, example).tokens.tolist() if token in special]

    everything = "".join(SPECIAL)
    nested = "<|im_<|im_end|>end|><<|eot_id|>"
    plain = talk("x", "y", system="z")
    assert control(talk(everything, nested, system=everything)) == control(plain)
    assert control(talk(nested, everything, system=nested)) == control(plain)
    row = encode(tokenizer, talk("q", everything + nested))
    assert trained_text(tokenizer, row).endswith(everything + nested + STOPS[name])


@pytest.mark.parametrize("name", ["chatml", "llama", "gemma"])
def test_every_assistant_turn_is_trained(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    row = encode(tokenizer, talk("hello", "there", "again", "more", "the", "end"))
    assert trained_text(tokenizer, row) == STOPS[name].join(["there", "more", "end", ""])


def test_unstable_template_gives_each_answer_a_row_as_generation_would_begin_it() -> None:
    tokenizer = make_tokenizer(QWEN)
    example = talk("hello", "there", "again", "more")
    encoder = encoding.Encoder(tokenizer)
    found = encoder.one(example)
    think = "<think>\n\n</think>\n\n"
    texts = [trained_text(tokenizer, row) for row in found]
    assert texts == [f"{think}there<|im_end|>", f"{think}more<|im_end|>"]
    for row, before in zip(found, (1, 3), strict=True):
        prompt = encoding.prompt_tokens(tokenizer, example.messages[:before])
        assert row.tokens[: len(prompt)].tolist() == prompt
        assert row.trained.tolist() == [i >= len(prompt) for i in range(len(row.tokens))]
    assert (encoder.counts.turns, encoder.counts.expanded) == (2, 1)


def test_response_that_merges_with_the_prompt() -> None:
    # "assistant\n" + "\n\nlist" tokenised as a whole has one token for the newlines.
    tokenizer = make_tokenizer(CHATML)
    example = talk("hello", "\n\nthere")
    row = encode(tokenizer, example)
    prompt = encoding.prompt_tokens(tokenizer, example.messages[:-1])
    ordinary = tokenizer.apply_chat_template(list(example.messages), return_dict=True)["input_ids"]
    assert ordinary[: len(prompt)] != prompt, "the example does not show the trap any more"
    assert row.tokens[: len(prompt)].tolist() == prompt
    assert trained_text(tokenizer, row) == "\n\nthere<|im_end|>"
    # And with control text right behind the merge.
    row = encode(tokenizer, talk("hello", "\n\n<|im_end|>"))
    assert trained_text(tokenizer, row) == "\n\n<|im_end|><|im_end|>"
    assert row.tokens.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_system_argument_is_for_conversations_without_one() -> None:
    tokenizer = make_tokenizer(CHATML)
    plain, own = talk("hello", "there"), talk("hello", "there", system="own")
    given = encode(tokenizer, plain, system="given")
    assert tokenizer.decode(given.tokens).startswith("<|im_start|>system\ngiven<|im_end|>")
    prompt = encoding.prompt_tokens(tokenizer, plain.messages[:-1], system="given")
    assert given.tokens[: len(prompt)].tolist() == prompt
    kept = encode(tokenizer, own, system="given").tokens.tolist()
    assert kept == encode(tokenizer, own).tokens.tolist()


@pytest.mark.parametrize("name", ["llama", "chatml"])
def test_exactly_one_bos(name: str) -> None:
    # The tokenizer adds BOS by itself; Llama's template writes one too, ChatML's does not.
    from tokenizers import processors

    tokenizer = make_tokenizer(TEMPLATES[name])
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    # The second response merges with the prompt, so it is tokenised apart from it.
    for response in ("there", "\n\nthere"):
        row = encode(tokenizer, talk("hello <bos>", response))
        assert row.tokens[0] == bos
        assert row.tokens.tolist().count(bos) == 1


def test_stop_tokens() -> None:
    tokenizer = make_tokenizer(CHATML)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    assert encoding.stop_tokens(tokenizer) == set(ids)
    tokenizer.chat_template = None
    assert encoding.stop_tokens(tokenizer) == {ids[1]}
    # Phi-3 writes its end token after the end of turn; a response stops at the first.
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}"
    assert trained_text(tokenizer, encode(tokenizer, talk("q", "hello"))) == "hello<|im_end|>"


NO_STOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
OTHER_HEADER = CHATML.replace("assistant\n{% endif", "bot\n{% endif")
REFUSED = {
    "none": (None, "no chat template; set data.chat_template"),
    "alternate": (GEMMA, "f:row 1: .*roles must alternate"),
    "no stop": (NO_STOP, "could stop"),
    "no header": (CHATML.split("{% if add")[0], "ignores add_generation_prompt"),
    "no content": ("<|im_start|>{{ messages[0].content }}", "does not write the assistant's"),
    "other header": (OTHER_HEADER, "f:row 1: .*not how it begins"),
    "syntax": ("{% for %}", "the chat template can't be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_cannot_be_used(case: str) -> None:
    template, message = REFUSED[case]
    turns = talk("a", "b").messages
    if case == "alternate":
        turns = (turns[0], *turns)
    with pytest.raises(errors.UserError, match=message) as caught:
        encode(make_tokenizer(template), examples.Example(turns, "f:row 1"))
    assert "\n" not in str(caught.value)


def test_vocabulary_that_spells_a_control_token_is_caught() -> None:
    # Lowercasing makes "<|IM_END|>" the control token; breaking the text cannot see it coming.
    from tokenizers import AddedToken, normalizers

    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|stop|>", normalized=True)])
    with pytest.raises(errors.UserError, match="f:row 1: the tokenizer makes a control token"):
        encode(tokenizer, talk("hello <|STOP|>", "there"))


def test_sentencepiece_adds_no_space_inside(shared: pathlib.Path) -> None:
    import transformers

    folder = shared / "stories260K" / "hf"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    for response in ("once upon", "a</s>b <s> c", "\nonce"):
        example = talk("tell </s> me", response)
        row = encode(tokenizer, example)
        prompt = encoding.prompt_tokens(tokenizer, example.messages[:-1])
        assert row.tokens[: len(prompt)].tolist() == prompt
        assert row.tokens.tolist().count(tokenizer.eos_token_id) == 1
        assert row.tokens.tolist().count(tokenizer.bos_token_id) == 1
        whole = tokenizer.decode(row.tokens[1:])
        assert whole.endswith(f"user:\ntell </s> me\nassistant:\n{response}</s>"), whole


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: pathlib.Path) -> Any:
    """The real tokenizer, built here from the file's own fields."""
    import gguf
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(smollm2_gguf).fields

    def read_texts(name: str) -> list[str]:
        return [bytes(fields[name].parts[i]).decode() for i in fields[name].data]

    tokens = read_texts("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read_texts("tokenizer.ggml.merges")]
    types = fields["tokenizer.ggml.token_type"]
    kinds = [int(types.parts[i][0]) for i in types.data]
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [text for text, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    template = read_texts("tokenizer.chat_template")[0]
    return wrap(backend, template, bos_token="<|im_start|>", eos_token="<|im_end|>")


def test_real_rows_have_their_ordinary_ids(smollm2: Any, shared: pathlib.Path) -> None:
    # All 34,233 readable rows of the data folder agree; a sample keeps the test short.
    for name in (
        "dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl",
        "alpaca_en_demo/alpaca_en_demo.json",
        "gsm8k/test.jsonl",
        "fastchat_sharegpt/dummy_conversation.json",
    ):
        for example in formats.read(str(shared / "data" / name))[::5]:
            row = encode(smollm2, example)
            turns = list(example.messages)
            ordinary = smollm2.apply_chat_template(turns, return_dict=True)["input_ids"]
            assert row.tokens.tolist() == ordinary[:-1], example.source  # all but the last newline
            assert trained_text(smollm2, row) == "".join(
                turn["content"] + "<|im_end|>" for turn in turns if turn["role"] == "assistant"
            )


@pytest.mark.parametrize("rstrip", [False, True])  # with it, texts are tokenised as a whole
def test_a_character_that_the_vocabulary_leaves_out_is_refused(rstrip: bool) -> None:
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lost = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\x13")[0][0]
    alphabet = [symbol for symbol in pre_tokenizers.ByteLevel.alphabet() if symbol != lost]
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello there"], trainer)
    backend.add_special_tokens([AddedToken(text, rstrip=rstrip) for text in SPECIAL])
    tokenizer = wrap(backend, CHATML, bos_token="<bos>", eos_token="<eos>")
    assert trained_text(tokenizer, encode(tokenizer, talk("hello", "there"))) == "there<|im_end|>"
    with pytest.raises(
        errors.UserError, match=r"f:row 1: the tokenizer has no token for '\\x13' \(U\+0013\)"
    ):
        encode(tokenizer, talk("hello", "there \x13 is"))
