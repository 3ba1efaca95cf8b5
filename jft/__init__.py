# SPDX-License-Identifier: Apache-2.0
"""jft: fine-tuning of large language models in JAX.

`from jft import lora` needs jax, numpy and safetensors only; everything else is imported where it is used.
"""

from typing import Any

__version__ = "0.1.0"


def load(
    path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    shardings: Any = None,
    quantize: str = "none",
    quantize_embeddings: str = "none",
) -> Any:
    """A model by folder, Hub name or .gguf; see `jft.models.load`."""
    from jft import models
    from jft.models import quantizing

    settings = quantizing.Settings(quantize, quantize_embeddings)
    return models.load(path, dtype=dtype, revision=revision, shardings=shardings, quantize=settings)


def train(config: Any, *, fresh: bool = False) -> dict[str, Any]:
    """Runs or resumes the training that a configuration describes; see `jft.loop.train`."""
    from jft import loop

    return loop.train(config, fresh=fresh)
