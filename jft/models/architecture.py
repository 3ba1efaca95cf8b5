# SPDX-License-Identifier: Apache-2.0
"""What a decoder is, as data: one frozen `Config` for every family.

Letters in names, here and in the decoder: B batch, T query time, S key time, D model, N heads, K key/value heads,
G = N / K, H head dim, F feed-forward, V vocabulary, L layers, E experts, X = N + 2 K (fused heads), Z = 2 (gate and
up, fused), P learned positions.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Linear:
    """Every frequency divided by `factor` (https://arxiv.org/abs/2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's piecewise rule: long wavelengths divided, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over dimensions, and hotter attention.

    Attributes:
      factor: of the stretch.
      original_max_length: of pretraining.
      attention_factor: multiplies the rotated queries and keys.
      beta_fast, beta_slow: turns within the original length where the ramp begins and ends.
      truncate: whether the ramp's ends are whole dimensions.
    """

    factor: float
    original_max_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (https://arxiv.org/abs/2402.13753): a divisor per frequency, one set per range of lengths.

    Attributes:
      short: divisors for sequences of up to `original_max_length` tokens.
      long: divisors for longer ones.
      original_max_length: of pretraining.
      attention_factor: multiplies the rotated queries and keys.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_length: int
    attention_factor: float


Scaling = Linear | Llama3 | Yarn | LongRope


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (https://arxiv.org/abs/2104.09864): base of the frequencies and their stretching."""

    theta: float = 10000.0
    scaling: Scaling | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one model.

    Attributes:
      rope: None for a layer without rotary positions.
      window: a token sees this many tokens, itself included; None for all.
    """

    rope: Rope | None = Rope()
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts (https://arxiv.org/abs/2101.03961).

    Attributes:
      count: of experts.
      top_k: experts that each token goes to.
      normalise: whether the chosen experts' probabilities are scaled to sum to one.
      router_bias: whether the router has a bias.
      fused: gate and up are one kernel, their outputs by turns.
    """

    count: int
    top_k: int
    normalise: bool = True
    router_bias: bool = False
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class ClampedSwiglu:
    """gpt-oss's activation: (up + 1) * gate * sigmoid(alpha * gate), both clamped at `limit`."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder. Sizes are counts, not bytes.

    Attributes:
      family: whose names its tensors have in files; a key of `families.FAMILIES`.
      vocab_size: rows of the embedding.
      d_ff: inner size of the MLP, or of one expert.
      max_length: positions that the model was made for.
      pattern: layer i is pattern[i % len(pattern)].
      rotary_dim: dimensions of each head that turn; None for all.
      norm: "rms", "rms_plus_one" (scales are stored less one) or "layer" (with mean and bias).
      norms: where they stand: "pre" (before attention and MLP), "post" (after) or "both".
      qk_norm: "head" (over each head's dimensions), "all" (over those of all heads) or None.
      fused: query, key and value are one kernel, and so are the MLP's gate and up.
      qkv_bias, out_bias, mlp_bias: whether the projections have biases.
      attention_scale: of the scores; None for head_dim ** -0.5.
      attention_softcap, logits_softcap: c in c * tanh(x / c); None for none.
      sinks: a logit per head that takes attention to nowhere.
      activation: "silu", "gelu", "gelu_tanh" or "relu", or a `ClampedSwiglu`.
      gated: whether the MLP has a gate.
      experts: None for one MLP per layer.
      embedding_scale, residual_scale: multiply the embeddings, and what each part of a layer adds.
      logits_divisor: divides the logits.
      learned_positions: an embedding of positions is added to that of tokens.
      tie_embeddings: the head is the embedding.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int
    family: str = "llama"
    pattern: tuple[Layer, ...] = (Layer(),)
    rotary_dim: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    norms: str = "pre"
    qk_norm: str | None = None
    fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    sinks: bool = False
    activation: str | ClampedSwiglu = "silu"
    gated: bool = True
    experts: Experts | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    learned_positions: bool = False
    tie_embeddings: bool = False

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """The different layers there are, in order of appearance."""
        return tuple(dict.fromkeys(self.pattern))

    def layer(self, index: int) -> Layer:
        return self.pattern[index % len(self.pattern)]

    def kind(self, index: int) -> int:
        """The place in `kinds` of a layer."""
        return self.kinds.index(self.layer(index))

    @property
    def rope(self) -> Rope | None:
        """That of the layers that see everything, or of any that turn; None where none does."""
        turning = [layer for layer in self.pattern if layer.rope]
        whole = [layer for layer in turning if layer.window is None]
        return (whole or turning)[0].rope if turning else None


# Which dimensions of each kernel are stacked layers and experts (b), inputs (i) and outputs (o): what `jft.lora` needs
# to know.
LAYOUTS: tuple[tuple[str, str], ...] = (
    (r"embed/embedding", "io"),
    (r"layers/attention/(query|key|value|qkv)/kernel", "bioo"),
    (r"layers/attention/out/kernel", "biio"),
    (r"layers/mlp/(gate|up|down)/kernel", "bio"),
    (r"layers/mlp/gate_up/kernel", "bioo"),
    (r"layers/experts/(gate|up|down)/kernel", "bbio"),
    (r"layers/experts/gate_up/kernel", "bbioo"),
    (r"layers/router/kernel", "bio"),
    (r"head/kernel", "io"),
)


def sizes(c: Config) -> dict[str, int]:
    """The size of each letter."""
    heads = {"N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
    fused = {"X": c.num_heads + 2 * c.num_kv_heads, "Z": 2}
    rest = {"V": c.vocab_size, "D": c.d_model, "F": c.d_ff, "L": c.num_layers, "P": c.max_length}
    return heads | fused | rest | {"E": c.experts.count if c.experts else 0}


def describe(c: Config) -> dict[str, Any]:
    """The fields that are not the defaults, nested, for people and for JSON."""
    defaults = {f.name: f.default for f in dataclasses.fields(c)}
    return {k: v for k, v in dataclasses.asdict(c).items() if getattr(c, k) != defaults[k]}
