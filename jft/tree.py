# SPDX-License-Identifier: Apache-2.0
"""Path names of pytree leaves, and ordered (regex, value) rules over them.

A path is what a person would say: keys joined by "/", as in `layers/attention/query/kernel`. Rules are lists of
(pattern, value): a pattern must match the whole path, the first match wins, and a pattern that matches nothing is
an error, because it is nearly always a typo.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jft import errors

Rules = Sequence[tuple[str, Any]]


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a quantised array (`jft.quant.QArray` and the like): one leaf, whatever it is made of."""
    return hasattr(leaf, "dequantize")


def dense(leaf: Any) -> Any:
    """The values of a leaf, dequantised if need be."""
    return leaf.dequantize() if is_quantized(leaf) else leaf


def name(path: Sequence[Any]) -> str:
    """The path of one leaf as `jax.tree_util` gives it, as a name."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """{path name: leaf}, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {name(path): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` gives these names for."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def replace(tree: Any, leaves: dict[str, Any]) -> Any:
    """The tree with the named leaves replaced."""
    new = lambda path, x: leaves.get(name(path), x)  # noqa: E731
    return jax.tree_util.tree_map_with_path(new, tree, is_leaf=is_quantized)


def match(pattern: str, paths: Iterable[str], what: str) -> list[str]:
    """The paths that the whole pattern matches; none is an error that names near ones."""
    paths = list(paths)
    try:
        found = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise errors.UserError(
            f"{what}={pattern!r} is not a regular expression: {error}"
        ) from error
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        raise errors.UserError(
            f"{what}={pattern!r} matches no parameter; some are {', '.join(near)}"
        )
    return found


def lookup(rules: Rules, path: str) -> Any | None:
    """The value of the first rule whose pattern matches the whole path, or None."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    return None


def size(tree: Any) -> int:
    """Number of elements in all leaves; of a quantised one, of the array it stands for."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))


def nbytes(tree: Any) -> int:
    """Number of bytes of all leaves; works on shapes too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
