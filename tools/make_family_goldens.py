# SPDX-License-Identifier: Apache-2.0
"""Makes the tiny models of every family under tests/goldens/families and what they must compute.

For each case transformers builds a small model, every parameter is drawn anew so that it matters,
`save_pretrained` writes it, and transformers computes the logits, a greedy continuation and, for
some cases, gradients in float64. The casts to float32 inside transformers are redirected to float64;
a dispatch mode refuses any narrower tensor, so that none can slip through.

    pip install torch transformers
    python tools/make_family_goldens.py --out tests/goldens/families
    python tools/make_family_goldens.py --out /tmp/again --case gemma2

torch is needed by this script alone, never by the library or its tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import family_cases
import numpy as np
import safetensors
import torch
import torch.utils._python_dispatch
import transformers
import transformers.core_model_loading

FIRST_ID = 3
LENGTHS, SHORT_LENGTHS, PROMPT_LENGTHS, NEW_TOKENS = (18, 9, 3), (12, 7, 3), (9, 6, 3), 10
MARGIN = 1e-3  # between the last chosen expert, or token, and the first one not chosen
DISTINCT = 6  # generated tokens, at least: a continuation that repeats itself proves little
ROUNDING = 1e-5  # stock float32 may be this far off: the float32 tests of the library allow 1e-4
ATTEMPTS = 100
SINGLE, DOUBLE, HALF = torch.float32, torch.float64, (torch.float16, torch.bfloat16)

Arrays = dict[str, np.ndarray]
Batch = dict[str, torch.Tensor]


# ---- precision


class Wide(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where an operation gives a tensor of one of the `refused` types."""

    def __init__(self, refused: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.refused = refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in self.refused:
                raise TypeError(f"{func} gives {leaf.dtype} in a float64 computation")
        return out


@contextlib.contextmanager
def double_precision(refused: tuple[torch.dtype, ...] = (SINGLE, *HALF)) -> Iterator[None]:
    """What transformers casts to float32 becomes float64."""
    names = {"float32": DOUBLE, "float": DOUBLE}
    with (
        mock.patch.multiple(torch, **names),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        Wide(refused),
    ):
        torch.set_default_dtype(DOUBLE)
        try:
            yield
        finally:
            torch.set_default_dtype(SINGLE)


def load(folder: pathlib.Path, dtype: torch.dtype, config: Any = None) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def load_double(folder: pathlib.Path, changes: dict[str, Any] | None = None) -> Any:
    """The model in float64, its rotary tables too; `changes` replace keys of its config.json."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if changes:
        config = type(config).from_dict(json.loads((folder / "config.json").read_text()) | changes)
    with double_precision(refused=(SINGLE, torch.float16)):  # the file itself is bfloat16
        model = load(folder, DOUBLE, config)
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    assert kinds == {DOUBLE}, f"{folder}: {kinds}"
    return model


# ---- the model


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator, family: str) -> np.ndarray:
    """A random parameter, far from the usual start (zeros, ones, 0.02), so that the logits feel each."""
    noise, gemma = rng.standard_normal(shape), family.startswith("gemma")
    if name.endswith("bias"):
        return 0.3 * noise
    if re.search(r"norm|\.ln_", name):
        return 0.3 * noise + (0 if gemma else 1)  # Gemma's norms multiply by 1 + weight
    if name.endswith("sinks"):
        return noise
    if re.search(r"embed_tokens|\.wte|\.wpe", name):
        return noise * (1 / math.sqrt(shape[-1]) if gemma else 1)  # Gemma multiplies by sqrt(D)
    if re.search(r"(mlp\.gate|router)\.weight", name):
        return noise * 4 / math.sqrt(shape[-1])
    inputs_first = family == "gpt2" or (family == "gpt_oss" and ".experts." in name)
    return noise * 1.5 / math.sqrt(shape[-2] if inputs_first else shape[-1])


def make_model(folder: pathlib.Path, case: family_cases.Case, rng: np.random.Generator) -> None:
    config = getattr(transformers, case.config)(**family_cases.COMMON | case.keys)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = draw(name, tuple(parameter.shape), rng, config.model_type)
            parameter.copy_(torch.from_numpy(drawn))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


# ---- the results


class Unfit(Exception):
    """A draw too sensitive to rounding, or whose continuation repeats itself."""


def batch_of(rows: list[np.ndarray], side: str) -> Batch:
    """Rows padded to the longest; positions count from a row's first token and are 0 at padding."""
    width = max(len(row) for row in rows)
    tokens, mask = np.full((len(rows), width), family_cases.PAD), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(width - len(row), None)
        tokens[i, real], mask[i, real] = row, True
    positions = np.where(mask, mask.cumsum(1) - 1, 0)
    arrays = {"tokens": tokens, "positions": positions, "mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def margin(scores: torch.Tensor, k: int) -> float:
    top = scores.topk(k + 1, dim=-1).values
    return (top[..., k - 1] - top[..., k]).min().item()


def forward(model: Any, batch: Batch) -> Any:
    """transformers' outputs, with the logits at padding zeroed."""
    experts = getattr(model.config, "num_experts_per_tok", None)
    out = model(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"].long(),
        position_ids=batch["positions"],
        use_cache=False,
        **({"output_router_logits": True} if experts else {}),
    )
    for scores in (out.router_logits if experts else ()) or ():
        if margin(scores.detach()[batch["mask"].flatten()], experts) < MARGIN:
            raise Unfit("experts")
    out.logits = torch.where(batch["mask"][..., None], out.logits, 0.0)
    return out


def continue_greedily(model: Any, prompts: list[np.ndarray]) -> np.ndarray:
    """Without a cache: each token by a forward pass over everything before it."""
    rows = list(prompts)
    for _ in range(NEW_TOKENS):
        last = forward(model, batch_of(rows, "left")).logits[:, -1]
        if margin(last, 1) < MARGIN:
            raise Unfit("next token")
        rows = [np.append(row, t) for row, t in zip(rows, last.argmax(-1).tolist(), strict=True)]
    generated = np.stack([row[-NEW_TOKENS:] for row in rows])
    if len(np.unique(generated)) < DISTINCT:
        raise Unfit("repetitive")
    return generated


def generate_cached(model: Any, prompt: Batch) -> np.ndarray:
    """transformers' own generation, with its cache."""
    model.generation_config.eos_token_id = None  # as in the reference, nothing stops it
    out = model.generate(
        input_ids=prompt["tokens"],
        attention_mask=prompt["mask"].long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=family_cases.PAD,
    )
    return out[:, -NEW_TOKENS:].numpy()


def loss_and_gradients(model: Any, batch: Batch, pattern: str) -> Arrays:
    """Mean cross-entropy of the next token, and its gradients by the names in the checkpoint."""
    logits = forward(model, batch).logits
    targets = torch.where(batch["mask"], batch["tokens"], -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    by_file_name = transformers.core_model_loading.revert_weight_conversion(model, gradients)
    chosen = {f"grad:{n}": g.numpy() for n, g in by_file_name.items() if re.search(pattern, n)}
    assert all(np.abs(g).max() > 0 for g in chosen.values()), "a gradient is zero"
    return {"loss": np.float64(loss.item())} | chosen


def padded_results(model: Any, rows: list[np.ndarray], kind: str = "") -> tuple[Arrays, float]:
    """Logits of the rows padded on either side, and how much the two differ."""
    arrays: Arrays = {}
    for side in ("right", "left"):
        batch = batch_of(rows, side)
        out = forward(model, batch)
        arrays |= {f"{name}_{kind}{side}": t.numpy() for name, t in batch.items()}
        arrays[f"logits_{kind}{side}"] = out.logits.numpy()
        if out.get("aux_loss") is not None and side == "right":
            arrays[f"{kind}router_loss"] = np.float64(out.aux_loss.item())
    right, left = (
        arrays[f"logits_{kind}{s}"][arrays[f"mask_{kind}{s}"]] for s in ("right", "left")
    )
    return arrays, float(np.abs(right - left).max())


def results(
    folder: pathlib.Path, case: family_cases.Case, rng: np.random.Generator
) -> tuple[Arrays, str]:
    """Everything of golden.npz, and a line that says how it was checked."""
    groups = [LENGTHS, PROMPT_LENGTHS] + [SHORT_LENGTHS] * case.short_batch
    rows, prompts, *short = (
        [rng.integers(FIRST_ID, family_cases.VOCABULARY, n) for n in lengths] for lengths in groups
    )
    single = forward(load(folder, SINGLE), batch_of(rows, "right")).logits
    assert single.dtype == SINGLE
    model, prompt = load_double(folder), batch_of(prompts, "left")
    with torch.no_grad(), double_precision():
        arrays, sides = padded_results(model, rows)
        for kind in short:
            more, difference = padded_results(model, kind, "short_")
            arrays, sides = arrays | more, max(sides, difference)
        generated = continue_greedily(model, prompts)
        cached = generate_cached(model, prompt)
    assert (cached == generated).all(), f"{folder}: generation with a cache gives {cached}"
    assert sides < 1e-12, f"{folder}: {sides} between left and right padding"
    arrays |= {"prompt_tokens": prompt["tokens"].numpy(), "prompt_mask": prompt["mask"].numpy()}
    arrays["generated"] = generated
    if case.gradients:
        with double_precision():
            arrays |= loss_and_gradients(model, batch_of(rows, "right"), case.gradients)
    logits = arrays["logits_right"]
    off = np.abs(single.detach().double().numpy() - logits).max()
    assert 1e-9 < off < 1e-3, f"{folder}: {off} between float64 and stock float32"
    if off > ROUNDING:
        raise Unfit("ill-conditioned")
    line = f"std {logits[arrays['mask_right']].std():.2f}, float32 {off:.0e}, sides {sides:.0e}, "
    line += f"{len(np.unique(generated))} different tokens generated"
    return arrays, line


def check_switches(folder: pathlib.Path, case: family_cases.Case, arrays: Arrays) -> str:
    """The largest change of a logit that each change of config.json makes."""
    lines = []
    for changes in case.switches:
        model, change = load_double(folder, changes), 0.0
        for kind in ("", "short_")[: 1 + case.short_batch]:
            names = ("tokens", "positions", "mask", "logits")
            batch = {n: torch.from_numpy(arrays[f"{n}_{kind}right"]) for n in names}
            with torch.no_grad(), double_precision(), mock.patch(f"{__name__}.MARGIN", -math.inf):
                logits = forward(model, batch).logits
            change = max(change, (logits - batch["logits"]).abs().max().item())
        assert change > 1e-3, f"{folder}: {changes} changes the logits by {change} only"
        lines.append(f"    {change:7.3f}  {json.dumps(changes)}")
    return "\n".join(lines)


# ---- the files


def stored(array: np.ndarray) -> np.ndarray:
    """int32 for ids; reals lose their last 16 bits (7e-12 relative), which then compress to nothing."""
    array = np.asarray(array)
    if array.dtype == np.float64:
        bits = np.ascontiguousarray(array).reshape(-1).view(np.int64)
        return (((bits + 2**15) >> 16) << 16).view(np.float64).reshape(array.shape)
    return array if array.dtype == bool else array.astype(np.int32)


def make_case(folder: pathlib.Path, name: str, seed: int) -> str:
    case = family_cases.CASES[name]
    for attempt in range(ATTEMPTS):
        weights, tokens = np.random.default_rng([seed, zlib.crc32(name.encode()), attempt]).spawn(2)
        make_model(folder, case, weights)
        try:
            arrays, line = results(folder, case, tokens)
        except Unfit:
            continue
        switches = check_switches(folder, case, arrays)
        np.savez_compressed(folder / "golden.npz", **{n: stored(a) for n, a in arrays.items()})
        with safetensors.safe_open(folder / "model.safetensors", "np") as file:
            unknown = {n[5:] for n in arrays if n.startswith("grad:")} - set(file.keys())
        assert not unknown, f"{name}: gradients of {unknown}, which the checkpoint lacks"
        size = sum(path.stat().st_size for path in folder.iterdir())
        return f"{name}: draw {attempt}, {size} bytes, {line}\n{switches}"
    raise SystemExit(f"{name}: none of {ATTEMPTS} draws is fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the cases")
    parser.add_argument(
        "--case", action="append", choices=family_cases.CASES, help="this case only; repeatable"
    )
    parser.add_argument("--seed", type=int, default=1117)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that a second run gives the same bytes
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in args.case or family_cases.CASES:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        print(make_case(folder, name, args.seed), flush=True)


if __name__ == "__main__":
    main()
