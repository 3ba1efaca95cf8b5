# SPDX-License-Identifier: Apache-2.0
"""Models by name: `load` gives the parameters, the tokenizer and a pure function of them."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from jft import errors, tree
from jft.lora import peft, spec
from jft.models import architecture, decoder, families, gguf, hf, packed_folder, quantizing, resolve

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded base model.

    Attributes:
      name: what the user asked for.
      config: of the decoder.
      params: nested dict of arrays, each on the devices that it was loaded onto.
      tokenizer: a transformers tokenizer.
      fingerprint: of the tensors as stored; the same for every dtype that they are loaded in.
      revision: of a Hub name: the commit that was loaded; "" for other places.
      notes: what became of the stored numbers where it is not plain, for people.
    """

    name: str
    config: architecture.Config
    params: decoder.Params
    tokenizer: Any
    fingerprint: str
    revision: str = ""
    notes: tuple[str, ...] = ()

    def apply(
        self,
        params: decoder.Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits_BTV; a pure function of `params`, so `lora.transform(model.apply)` works."""
        return decoder.apply(self.config, params, tokens_BT, positions_BT, segments_BT)

    @functools.cached_property
    def module_names(self) -> peft.Names:
        """Torch module names, and for each its leaf and its place in the stacked layers (and experts)."""
        return families.modules(self.config)

    def load_adapter(self, folder: str | pathlib.Path) -> spec.Adapters:
        """An adapter in PEFT's format, strictly; raises UserError where it does not fit this base."""
        return peft.load(folder, self.module_names, self.params, architecture.LAYOUTS)


def check_dtype(dtype: str) -> None:
    """Raises UserError for a dtype that models are not computed in."""
    if dtype not in DTYPES:
        raise errors.UserError(f"model.dtype={dtype!r}: one of {', '.join(DTYPES)}")


def load(
    path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    shardings: hf.Shardings | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
) -> Model:
    """Loads a model.

    Args:
      path: a folder (config.json, safetensors, tokenizer) of a model or of a quantised base, a .gguf file, a Hub name, or the name of an
        embedded model (`smollm2-135m-instruct`).
      dtype: of the parameters: "float32" or "bfloat16".
      revision: of a Hub name.
      shardings: the sharding of each parameter by path and shape, see `hf.Shardings`; None for the default device.
      quantize: which parameters are quantised while they are loaded, and how; of a quantised base, what it holds.

    Raises:
      UserError: it cannot be had, is damaged, or needs something that is not implemented.
    """
    check_dtype(dtype)
    quantize.check()
    place = pathlib.Path(resolve.resolve(path, revision))
    room = _room(place)
    config, params, fingerprint = room.load(place, dtype, shardings, quantize)
    pinned = resolve.commit(place) or revision or ""
    notes = room.notes(place, quantize) if quantize else ()
    return Model(path, config, params, room.tokenizer(place), fingerprint, pinned, notes)


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a model that `load` would load, without its weights: of a Hub name they are not fetched.

    Raises:
      UserError: it cannot be had or is damaged.
    """
    place = resolve.resolve(path, revision, without_weights=True)
    return _room(place).tokenizer(place)


def shapes(
    path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
) -> decoder.Params:
    """Shapes of the parameters that `load` would give, without reading weights: of a Hub name they are not fetched.

    Where blocks of a .gguf file are kept, or a folder holds a quantised base, they are not those of `quantizing.shapes`.

    Raises:
      UserError: it cannot be had or is damaged, or a shape does not allow the quantisation.
    """
    place = resolve.resolve(path, revision, without_weights=True)
    return tree.unflatten(_room(place).shapes(place, dtype, quantize))


def _room(place: pathlib.Path) -> Any:
    """The module that reads what is there."""
    if place.suffix == ".gguf":
        return gguf
    return packed_folder if packed_folder.is_one(place) else hf
