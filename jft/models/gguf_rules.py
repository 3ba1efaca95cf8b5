# SPDX-License-Identifier: Apache-2.0
"""The pre-tokenizers that GGUF names, as the rules they stand for.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`) and leaves the rule to the reader. The rules
here are those of the models' own tokenizer.json; a name without one is refused, because a near miss
gives other ids for numbers or blanks than in pretraining, and nothing else would show it.

Which name a model bears is what llama.cpp's converter gives it:
gpt-2: GPT-2. smollm: SmolLM and SmolLM2; starcoder, refact: StarCoder, Granite up to 3.
llama-bpe: Llama 3; smaug-bpe: SmolLM3 and Llama 3 without a beginning. dbrx: Phi-4, OLMo 2,
Granite 4. qwen2: Qwen 2, 2.5, 3. tekken: Mistral Nemo. gpt-4o: gpt-oss, Phi-4-mini.
"""

import dataclasses
from typing import Any

# Kinds of token, as ggml numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's space
PREFIX = "tokenizer.ggml.add_space_prefix"
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cased(after: str) -> str:
    """Words, cut where small letters turn to capitals; `after` may follow one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return rf"{start}{_UPPER}*{_LOWER}+{after}|{start}{_UPPER}+{_LOWER}*{after}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How byte-level BPE cuts text before merging.

    Attributes:
      regex: the pieces, which together are the whole text.
      digits: cut numbers into single digits first.
      nfc: compose characters first.
      whole_words: a piece that is a token is taken whole, whatever the merges say.
      add_bos: whether the beginning is marked where the file does not say.
    """

    regex: str = GPT2
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def apply(self, backend: Any) -> None:
        """Sets a tokenizers.Tokenizer's normaliser, pre-tokenizer and decoder."""
        from tokenizers import Regex, decoders, normalizers, pre_tokenizers

        cuts: list[Any] = []
        if self.digits:
            cuts.append(pre_tokenizers.Digits(individual_digits=True))
        if self.regex != GPT2:
            cuts.append(pre_tokenizers.Split(Regex(self.regex), behavior="isolated"))
        own = self.regex == GPT2  # written as everybody writes it
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
        backend.decoder = decoders.ByteLevel()
        if self.nfc:
            backend.normalizer = normalizers.NFC()


_GPT2 = Rule()
_DIGITS = Rule(digits=True)
_CL100K = Rule(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}")
_LLAMA3 = dataclasses.replace(_CL100K, whole_words=True, add_bos=True)

# Where several names have one rule, the first is the one that is written.
RULES: dict[str, Rule] = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    # llama.cpp merges here even where a piece is a token: 588 tokens of Llama 3 never come up.
    "smaug-bpe": dataclasses.replace(_LLAMA3, add_bos=False),
    "dbrx": _CL100K,
    "qwen2": Rule(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True),
    "tekken": Rule(rf"{_cased('')}|\p{{N}}|{_SLASHES}", whole_words=True, add_bos=True),
    "gpt-4o": Rule(rf"{_cased(_CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_SLASHES}"),
}
