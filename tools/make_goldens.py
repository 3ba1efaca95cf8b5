# SPDX-License-Identifier: Apache-2.0
"""Makes the tiny reference results under tests/goldens with torch, transformers and PEFT.

An independent implementation, in double precision, says what a forward pass, a LoRA run and a full
fine-tuning run must give. Everything follows from one seed; an existing model, batches and initial
adapters can be given instead, and `--compare` then measures the agreement with results made from
them elsewhere.

    pip install torch transformers peft
    python tools/make_goldens.py --out tests/goldens/tiny --seed 1117
    python tools/make_goldens.py --out /tmp/again --model G/model --batches G --init G --compare G

torch is needed by this script alone, never by the library or its tests.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import types
from typing import Any

import numpy as np
import peft
import safetensors.torch
import torch
import transformers

RANK, ALPHA, LORA_RATE, LORA_STEPS = 4, 8, 5e-3, 20
FULL_RATE, FULL_STEPS = 2e-3, 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = ("lora_B0", "lora_AB", "rslora_AB")
BASE_NAME = "tiny/model"
PRECISIONS = ("fp64", "fp32")
IGNORED, PAD, FIRST_ID, VOCABULARY, MODEL_T = -100, 0, 3, 256, 20

Batch = dict[str, torch.Tensor]


# ---- the model


def make_model(folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Writes a random Llama; large weights (0.12) and uneven norm scales make every part matter."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        initializer_range=0.12,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw = rng.standard_normal(tuple(parameter.shape))
            scaled = 1 + 0.1 * draw if "norm" in name else 0.12 * draw
            parameter.copy_(torch.from_numpy(scaled.astype(np.float32)))
    model.save_pretrained(folder)


def _norm_double(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))


def _rope_double(
    self: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    angles = position_ids[..., None].double() * self.inv_freq_double
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def load_model(folder: pathlib.Path, precision: str) -> Any:
    """Loads the base in fp32 or fp64."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model if precision == "fp32" else to_double(model)


def to_double(model: Any) -> Any:
    """A Llama in float64, its norms and RoPE too, which transformers computes in float32 whatever the dtype."""
    model.double()
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(_norm_double, module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.inv_freq_double = config.rope_parameters["rope_theta"] ** -exponents
            module.forward = types.MethodType(_rope_double, module)
    return model


# ---- batches


def make_model_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Four rows padded on the right, then the same four padded on the left."""
    lengths = [MODEL_T, 13, 7, 16]
    ids, mask = np.full((8, MODEL_T), PAD, np.int32), np.zeros((8, MODEL_T), np.int32)
    positions = np.tile(np.arange(MODEL_T, dtype=np.int32), (8, 1))
    for row, n in enumerate(lengths):
        tokens = rng.integers(FIRST_ID, VOCABULARY, n)
        ids[row, :n], mask[row, :n] = tokens, 1
        left = slice(MODEL_T - n, None)
        ids[row + 4, left], mask[row + 4, left] = tokens, 1
        positions[row + 4] = np.maximum(np.arange(MODEL_T) - (MODEL_T - n), 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def make_sft_batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of 10 to 24 tokens, right-padded; the loss ignores a prompt of two or more tokens."""
    shape = (LORA_STEPS, 4, 24)
    ids, mask = np.full(shape, PAD, np.int32), np.zeros(shape, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    for step, row in np.ndindex(shape[:2]):
        n = int(rng.integers(10, shape[2] + 1))
        prompt = int(rng.integers(2, n - 4))
        ids[step, row, :n], mask[step, row, :n] = rng.integers(FIRST_ID, VOCABULARY, n), 1
        labels[step, row, prompt:n] = ids[step, row, prompt:n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tensors(arrays: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


# ---- forward pass


def model_outputs(model: Any, batch: Batch, columns: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True, use_cache=False)
    logits = out.logits.double()
    mask = batch["attention_mask"].bool()
    valid = mask[:, :-1] & mask[:, 1:]
    lse = torch.logsumexp(logits, -1)
    nll = lse[:, :-1] - logits[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    top, top_ids = logits.topk(16, dim=-1)
    return {
        "per_token_nll": torch.where(valid, nll, 0.0).numpy(),
        "nll_valid": valid.numpy(),
        "lse": lse.numpy(),
        "top16_ids": top_ids.int().numpy(),
        "top16": top.numpy(),
        "cols": columns,
        "logits_cols": logits[..., torch.from_numpy(columns).long()].numpy(),
        "hidden_row0": torch.stack([h[0].double() for h in out.hidden_states]).numpy(),
    }


# ---- training


def make_adapter(
    folder: pathlib.Path, base: pathlib.Path, variant: str, rng: np.random.Generator
) -> None:
    """Writes an initial adapter in PEFT's format: A ~ N(0, 1/in); B zero, or small for `AB`."""
    adapted = peft.get_peft_model(load_model(base, "fp32"), lora_config(variant))
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            draw = rng.standard_normal(tuple(parameter.shape)) if "lora_" in name else None
            if "lora_A" in name:
                parameter.copy_(torch.from_numpy(draw / np.sqrt(draw.shape[1])))
            if "lora_B" in name and variant.endswith("_AB"):
                parameter.copy_(torch.from_numpy(0.02 * draw))
    save_adapter(adapted, folder)


def lora_config(variant: str) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=TARGETS,
        use_rslora=variant.startswith("rslora"),
        task_type="CAUSAL_LM",
    )


def save_adapter(adapted: Any, folder: pathlib.Path) -> None:
    """PEFT's own save in float32; then what varies between runs is fixed: order, path, card."""
    adapted.float().save_pretrained(folder, save_embedding_layers=False)  # or it asks the Hub
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = BASE_NAME
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Mean over all label tokens of the batch, in the model's precision.

    transformers' own loss casts the logits to float32, so it is not used.
    """
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )


def train(model: Any, batches: Batch, steps: int, rate: float) -> dict[str, Any]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    losses, norms, by_param = [], [], {}
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, {n: t[step] for n, t in batches.items()})
        loss.backward()
        by_name = {n: p.grad.norm().item() for n, p in trained.items()}
        by_param = by_param or by_name
        losses.append(loss.item())
        norms.append(float(np.linalg.norm(list(by_name.values()))))
        optimizer.step()
    with torch.no_grad():
        after = loss_of(model, {n: t[0] for n, t in batches.items()}).item()
    return {
        "losses": losses,
        "grad_norms": norms,
        "grad_norm_by_param_step0": by_param,
        "loss_batch0_after": after,
        "trainable": sum(p.numel() for p in trained.values()),
    }


def run_lora(out: pathlib.Path, base: pathlib.Path, init: pathlib.Path, batches: Batch) -> None:
    for variant in VARIANTS:
        for precision in PRECISIONS:
            model = load_model(base, precision)
            adapted = peft.PeftModel.from_pretrained(
                model, init / variant / "init", is_trainable=True
            )
            dtype = torch.float64 if precision == "fp64" else torch.float32
            assert {p.dtype for p in adapted.parameters()} == {dtype}
            curve = train(adapted, batches, LORA_STEPS, LORA_RATE)
            kind, _, start = variant.partition("_")
            scale = ALPHA / (RANK**0.5 if kind == "rslora" else RANK)
            about = {"variant": kind, "init": start, "r": RANK, "alpha": ALPHA, "scale": scale}
            write_json(
                out / variant / f"curve_{precision}.json",
                curve | about | stamp(precision, LORA_RATE),
            )
            if precision == "fp64":
                save_adapter(adapted, out / variant / "final")


def run_full(out: pathlib.Path, base: pathlib.Path, batches: Batch) -> None:
    for precision in PRECISIONS:
        model = load_model(base, precision)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        curve = train(model, batches, FULL_STEPS, FULL_RATE)
        curve["delta_norm_by_param"] = {
            n: (p.detach() - before[n]).norm().item() for n, p in model.named_parameters()
        }
        write_json(
            out / f"full_{precision}.json",
            curve | {"variant": "full"} | stamp(precision, FULL_RATE),
        )
        if precision == "fp64":
            final = {n: p.detach().float().contiguous() for n, p in model.named_parameters()}
            safetensors.torch.save_file(final, out / "full_final.safetensors")


def stamp(precision: str, rate: float) -> dict[str, Any]:
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, peft)}
    return versions | {"dtype": precision, "lr": rate, "model": "tiny"}


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


# ---- agreement with results made elsewhere


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest entry of the reference."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def compare(out: pathlib.Path, reference: pathlib.Path) -> None:
    for precision in PRECISIONS:
        name = f"model_out_{precision}.npz"
        if (reference / name).exists():
            with np.load(out / name) as ours, np.load(reference / name) as theirs:
                for key in ("per_token_nll", "hidden_row0", "logits_cols"):
                    print(f"{name} {key} {difference(ours[key], theirs[key]):.1e}")
        curves = [f"{v}/curve_{precision}.json" for v in VARIANTS] + [f"full_{precision}.json"]
        for name in curves:
            ours, theirs = (json.loads((f / name).read_text()) for f in (out, reference))
            keys = [k for k in theirs if isinstance(theirs[k], list) or k == "loss_batch0_after"]
            for key in [k for k in theirs if isinstance(theirs[k], dict)]:
                ours[key] = [ours[key][n] for n in theirs[key]]
                theirs[key] = list(theirs[key].values())
                keys.append(key)
            print(name, " ".join(f"{k} {difference(ours[k], theirs[k]):.1e}" for k in keys))
    finals = [f"{v}/final/adapter_model.safetensors" for v in VARIANTS] + ["full_final.safetensors"]
    for name in finals:
        ours, theirs = (safetensors.torch.load_file(f / name) for f in (out, reference))
        assert ours.keys() == theirs.keys(), f"{name}: other tensors than the reference"
        print(name, f"{max(difference(ours[k], theirs[k]) for k in theirs):.1e}")


# ---- the command


def prepare(args: argparse.Namespace) -> pathlib.Path:
    """Makes or copies what the runs start from; returns the base model's folder."""
    streams = np.random.default_rng(args.seed).spawn(4 + len(VARIANTS))
    base = args.model or args.out / "model"
    if args.model is None:
        make_model(base, streams[0])
    for name, make, rng in (
        ("model_batch", make_model_batch, streams[1]),
        ("sft_batches", make_sft_batches, streams[2]),
    ):
        arrays = dict(np.load(args.batches / f"{name}.npz")) if args.batches else make(rng)
        np.savez_compressed(args.out / f"{name}.npz", **arrays)
    for variant, rng in zip(VARIANTS, streams[4:], strict=True):
        if args.init is None:
            make_adapter(args.out / variant / "init", base, variant, rng)
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=1117)
    parser.add_argument("--model", type=pathlib.Path, help="start from this model folder")
    parser.add_argument("--batches", type=pathlib.Path, help="folder with model_batch, sft_batches")
    parser.add_argument("--init", type=pathlib.Path, help="folder with lora_B0/init and so on")
    parser.add_argument(
        "--compare", type=pathlib.Path, help="print the differences from this folder"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # one order of summation, so that a second run gives the same bytes
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    base = prepare(args)
    model_batch, sft = (
        tensors(dict(np.load(args.out / f"{n}.npz"))) for n in ("model_batch", "sft_batches")
    )
    columns = np.arange(VOCABULARY, dtype=np.int32)
    if args.compare:
        columns = np.load(args.compare / "model_out_fp64.npz")["cols"]
    for precision in PRECISIONS:
        outputs = model_outputs(load_model(base, precision), model_batch, columns)
        np.savez_compressed(args.out / f"model_out_{precision}.npz", **outputs)
    run_lora(args.out, base, args.init or args.out, sft)
    run_full(args.out, base, sft)
    if args.compare:
        compare(args.out, args.compare)


if __name__ == "__main__":
    main()
