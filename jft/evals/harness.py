# SPDX-License-Identifier: Apache-2.0
"""The LM evaluation harness's tasks on our models (`pip install lm-eval`, tested with 0.4.13).

    lm = harness.model(tokenizer, logprobs, answer, max_length=2048)
    lm_eval.simple_evaluate(model=lm, tasks=["piqa"], limit=100)

Texts become tokens as in its own Hugging Face model, so that scores can be compared with published ones: BOS where the
tokenizer puts it, control tokens of a rendered chat template as such, long contexts cut on the left.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jft import errors
from jft.evals import likelihood

# (prompts, most new tokens, temperature) -> the texts that follow, without the stop token
Answer = Callable[[list[list[int]], int, float], list[str]]
MOST_NEW_TOKENS = 256  # where a task does not say; the harness's own default


def model(
    tokenizer: Any,
    logprobs: likelihood.LogProbs,
    answer: Answer,
    *,
    max_length: int,
    batch_size: int = 0,
    length: int = 0,
    prompts_at_once: int = 8,
) -> Any:
    """An `lm_eval.api.model.LM`.

    Args:
      tokenizer: the model's.
      logprobs: see `jft.evals.likelihood`.
      answer: generates for a few prompts.
      max_length: positions of the model.
      batch_size, length: of batches, see `likelihood.measure`.
      prompts_at_once: given to `answer`; the last few may be fewer.

    Raises:
      UserError: lm-eval is not installed.
    """
    try:
        from lm_eval.api import model as api
    except ImportError as error:
        raise errors.UserError(
            f"the harness needs lm-eval: pip install lm-eval ({error})"
        ) from error

    class Model(api.TemplateLM):
        """Ours, as the harness asks it."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            first = tokenizer.bos_token_id
            return tokenizer.eos_token_id if first is None else first

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            begun = string.startswith(tokenizer.decode([self.prefix_token_id]))
            if add_special_tokens is None and begun:
                add_special_tokens = False
            how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer.encode(string, **how)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **_: Any
        ) -> list[tuple[float, bool]]:
            found = self._measure([pair(context, own) for _, context, own in requests])
            answers = [(f.logprob, f.greedy) for f in found]
            for (key, _, _), given in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", key, given)
            return answers

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [self.tok_encode(r.args[0], add_special_tokens=False) for r in requests]
            parts = [likelihood.windows([self.prefix_token_id, *t], max_length) for t in texts]
            found = iter(self._measure([one for part in parts for one in part]))
            return [sum(next(found).logprob for _ in part) for part in parts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [_asked(self.tok_encode(r.args[0]), r.args[1], max_length) for r in requests]
            texts = [""] * len(asked)
            for settings in dict.fromkeys(a[1] for a in asked):
                # Those of one length and temperature together, long prompts first: what does not fit fails at once.
                own = [i for i, a in enumerate(asked) if a[1] == settings]
                own.sort(key=lambda i: -len(asked[i][0]))
                for at in range(0, len(own), prompts_at_once):
                    some = own[at : at + prompts_at_once]
                    given = answer([asked[i][0] for i in some], *settings)
                    texts = _placed(texts, some, given)
            cut = [_until(text, a[2]) for text, a in zip(texts, asked, strict=True)]
            for request, text in zip(requests, cut, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return cut

        def _measure(self, wanted: Sequence[likelihood.Request]) -> list[likelihood.Likelihood]:
            return likelihood.measure(logprobs, wanted, batch_size=batch_size, length=length)

    def pair(context: Sequence[int], own: Sequence[int]) -> likelihood.Request:
        whole = [*context, *own][-(max_length + 1) :]
        return likelihood.Request(tuple(whole), max(1, len(whole) - len(own)))

    return Model()


def _asked(
    prompt: list[int], how: dict[str, Any], max_length: int
) -> tuple[list[int], tuple[int, float], list[str]]:
    """A prompt that leaves room for its answer, (most new tokens, temperature), and where the answer ends."""
    until = how.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    new = next((int(how[n]) for n in names if how.get(n)), MOST_NEW_TOKENS)
    if new >= max_length:
        raise errors.UserError(
            f"a task asks for {new} new tokens, the model has {max_length} positions; set max_gen_toks"
        )
    warm = float(how.get("temperature") or 0) if how.get("do_sample", True) else 0.0
    return prompt[-(max_length - new) :], (new, warm), [until] if isinstance(until, str) else until


def _placed(texts: list[str], at: Sequence[int], given: Sequence[str]) -> list[str]:
    new = dict(zip(at, given, strict=True))
    return [new.get(i, text) for i, text in enumerate(texts)]


def _until(text: str, ends: Sequence[str]) -> str:
    """The text before the first of the ends."""
    return min((text.split(end, 1)[0] for end in ends if end), key=len, default=text)
