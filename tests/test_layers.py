# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the source."""

import ast
import pathlib
import subprocess
import sys

import jft

ROOT = pathlib.Path(jft.__file__).parent
# A module imports from rows above its own, or from its own package.
ROWS = (
    ("errors", "matmul"),
    ("json_text", "secrets"),
    ("tree", "lock", "metrics", "swap"),
    ("quant",),
    ("lora",),
    ("config", "optim", "hosts", "measure", "sandbox", "sidecars"),
    ("sharding", "stopping", "divergence", "origins"),
    ("losses", "transfer"),
    ("models",),
    ("data",),
    ("step", "evals", "terminal"),
    ("program", "checkpoints", "debugging", "generate", "outliers"),
    ("plan",),
    ("runs", "answers", "jobs"),
    ("summary", "sources", "claims", "journal"),
    ("loop", "talk", "convert", "check"),
    ("verify",),
    ("verbs",),
    ("cli",),
)
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}


def imports(path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports from jft, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("jft.")}


def test_modules_import_from_above_only() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imports(path):
            room = name.split(".")[1]
            if room != parts[0] and ROW[room] >= ROW[parts[0]]:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong, wrong


def test_no_room_reaches_into_anothers_private_names() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and isinstance(node.value, ast.Name)
                and node.value.id not in ("self", "cls")
                and f"{node.value.id}.{node.attr}" != "os._exit"  # public, for all its name
            ):
                wrong.append(f"{path.name}:{node.lineno} {node.value.id}.{node.attr}")
    assert not wrong, wrong


def test_lora_and_quant_need_jax_and_numpy_only() -> None:
    heavy = "flax optax orbax transformers datasets absl ml_collections safetensors".split()
    code = (
        f"import sys; from jft import lora, quant; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
