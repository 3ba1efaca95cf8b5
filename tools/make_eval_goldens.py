# SPDX-License-Identifier: Apache-2.0
"""Makes tests/goldens/evals: likelihoods of multiple choice and of last words by torch and transformers.

Each choice is one forward pass of the stock float32 model over context and choice, without padding or packing. The items
are public evaluation sets that are not copied: each stands in the golden by a hash of its content, with what was computed.

    pip install torch transformers accelerate gguf
    python tools/make_eval_goldens.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data FOLDER --out tests/goldens/evals

FOLDER holds piqa.jsonl, arc_easy.jsonl and lambada_openai.jsonl of llm-foundry's evaluation sets
(scripts/eval/local_data). torch is needed by this script alone, never by the library or its tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from typing import Any

import tokenizers
import torch
import transformers

SETS = {"piqa": 25, "arc_easy": 25, "lambada_openai": 10}  # the first so many of each


def pairs(row: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """(context, continuation) of each choice and the right one, with the prompts of lm-eval's tasks of the same names."""
    if "choices" not in row:
        return [(row["context"], " " + row["continuation"])], 0
    context = row["query"].rstrip() + "\nAnswer:"
    return [(context, " " + choice) for choice in row["choices"]], row["gold"]


def digest(some: list[tuple[str, str]], gold: int) -> str:
    text = json.dumps([some, gold], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(gguf: pathlib.Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer with digits apart, which transformers' conversion of a GGUF loses."""
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return model, tokenizer


def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> dict[str, Any]:
    """The continuation's log-probability after the context, split as lm-eval splits a pair."""
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    start = len(tokenizer.encode(context, add_special_tokens=False))
    with torch.no_grad():
        kept = len(whole) - start + 1
        logits = model(input_ids=torch.tensor([whole]), logits_to_keep=kept).logits[0, :-1]
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    own = torch.tensor(whole[start:])
    return {
        "logprob": round(logprobs.gather(-1, own[:, None]).sum().item(), 6),
        "greedy": bool((logprobs.argmax(-1) == own).all()),
        "tokens": len(own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=pathlib.Path, required=True, help="the model's file")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that a second run gives the same numbers
    model, tokenizer = load(args.gguf)
    found: dict[str, Any] = {m.__name__: str(m.__version__) for m in (torch, transformers)}
    found["model"] = args.gguf.name
    for name, count in SETS.items():
        lines = (args.data / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:count]
        found[name] = {}
        for line in lines:
            some, gold = pairs(json.loads(line))
            each = [likelihood(model, tokenizer, *pair) for pair in some]
            found[name][digest(some, gold)] = {k: [e[k] for e in each] for k in each[0]}
    args.out.mkdir(parents=True, exist_ok=True)
    # One item a line.
    text = json.dumps(found).replace('}, "', '},\n"').replace(': {"', ':\n{"', 1)
    (args.out / "smollm2.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
