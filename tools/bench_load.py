# SPDX-License-Identifier: Apache-2.0
"""Peak host memory of loading a model folder, against the parameters that are kept.

    python tools/bench_load.py            # 2 GB of bfloat16 in five files, about a minute
    python tools/bench_load.py --small    # 0.2 GB, seconds

Writes a folder of random weights, shard by shard, then loads it in a process of its own for each case: onto one device
and onto eight simulated ones, in bfloat16 and in float32. Exits with 1 where a peak, above what the process took before
(jax and this package imported, the devices touched), is more than 1.15 times the bytes of the parameters kept plus the
largest tensor of the files (quantised: and what XLA's compiler keeps). Parameters that share memory are counted once.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np

ALLOWED = 1.15
# For the programs that quantise, a few for each shape of a tensor, whatever the size of the model.
PROGRAMS = 130_000_000
FILES = 5
CASES = (
    *((8, "bfloat16", "none"), (1, "bfloat16", "none")),
    *((8, "float32", "none"), (1, "float32", "none")),
    *((8, "bfloat16", "nf4"), (1, "bfloat16", "nf4")),
)
SIZES: dict[str, dict[str, int]] = {
    "full": {"vocab_size": 32768, "d_model": 2048, "num_layers": 16, "d_ff": 8192},
    "small": {"vocab_size": 16384, "d_model": 1024, "num_layers": 4, "d_ff": 4096},
}


def make(folder: pathlib.Path, size: str) -> None:
    """Writes the model's folder, one tensor in memory at a time."""
    from jft.models import architecture, families

    heads = {"num_heads": 16, "num_kv_heads": 4, "head_dim": 64, "max_length": 2048}
    config = architecture.Config(**SIZES[size], **heads)
    shapes = {
        name: weight.stored_shape(config) for name, (weight, _) in families.tensors(config).items()
    }
    (folder / "config.json").write_text(json.dumps(families.to_hf(config)))
    names, placed = list(shapes), {}
    for i in range(FILES):
        file = f"model-{i + 1:05d}-of-{FILES:05d}.safetensors"
        part = names[i * len(names) // FILES : (i + 1) * len(names) // FILES]
        write_file(folder / file, {name: shapes[name] for name in part}, np.random.default_rng(i))
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_file(
    path: pathlib.Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.random(shape, np.float32) - 0.5
            stream.write(values.astype(ml_dtypes.bfloat16).tobytes())


def resident() -> dict[str, int]:
    """Bytes resident now and at the peak of this process."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"VmRSS": peak, "VmHWM": peak}
    # Not ru_maxrss: a child begins with its parent's.
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")}


def measure(folder: pathlib.Path, dtype: str, quantize: str) -> dict[str, Any]:
    """Loads the folder onto all devices of this process; the figures."""
    import jax

    from jft.models import hf, quantizing, safetensors

    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    jax.block_until_ready([jax.device_put(np.zeros(8), device) for device in jax.devices()])

    def one(path: str, leaf: Any) -> jax.sharding.Sharding:
        """Norms replicated; kernels split along their largest dimension that can be."""
        shape = leaf.shape
        spec: list[str | None] = [None] * len(shape)
        fit = [axis for axis, n in enumerate(shape) if n % mesh.size == 0]
        if "norm" not in path and fit:
            spec[max(fit, key=lambda axis: shape[axis])] = "x"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    def lay(path: str, leaf: Any) -> Any:
        return jax.tree.map(lambda x: one(path, x), leaf)

    settings = quantizing.Settings(quantize, "none" if quantize == "none" else "int8")
    if settings:
        warm(settings)
    before, began = resident()["VmRSS"], time.perf_counter()
    _, params, _ = hf.load(folder, dtype, lay if mesh.size > 1 else None, settings)
    seconds, after = time.perf_counter() - began, resident()
    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    kept = sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())
    largest = max(t.stop - t.start for t in safetensors.read_folder(folder).values())
    return {
        "kept": kept,
        "largest": largest,
        "peak": after["VmHWM"] - before,
        "after": after["VmRSS"] - before,
        "allowed": int(ALLOWED * kept) + largest + (PROGRAMS if settings else 0),
        "seconds": round(seconds, 1),
    }


def warm(settings: Any) -> None:
    """Quantises something small: XLA's compiler takes memory of its own, once, whatever it compiles."""
    from jft.models import architecture, families, hf

    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "max_length": 8}
    config = architecture.Config(vocab_size=8, d_model=64, num_layers=1, d_ff=64, **heads)
    rows = families.tensors(config)
    fetch = lambda name: np.ones(rows[name][0].stored_shape(config), np.float32)  # noqa: E731
    hf.assemble(config, "float32", fetch, str, None, settings)


def run(folder: pathlib.Path, devices: int, dtype: str, quantize: str = "none") -> dict[str, Any]:
    """`measure` in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            f"--folder={folder}",
            f"--dtype={dtype}",
            f"--quantize={quantize}",
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model of 0.2 GB")
    parser.add_argument("--folder", type=pathlib.Path, help="measure this one, in this process")
    parser.add_argument("--dtype", default="bfloat16", help="with --folder")
    parser.add_argument("--quantize", default="none", help="with --folder")
    flags = parser.parse_args()
    if flags.folder:
        print(json.dumps(measure(flags.folder, flags.dtype, flags.quantize)))
        return
    over = False
    with tempfile.TemporaryDirectory() as scratch:
        make(pathlib.Path(scratch), "small" if flags.small else "full")
        for devices, dtype, quantize in CASES:
            found = run(pathlib.Path(scratch), devices, dtype, quantize)
            over |= found["peak"] > found["allowed"]
            shown = [f"{key} {found[key] / 1e6:7.0f} MB" for key in ("kept", "peak", "allowed")]
            ratio = f"peak / kept {found['peak'] / found['kept']:.3f}"
            where = f"{devices} devices {quantize if quantize != 'none' else dtype:8}"
            print(where, *shown, ratio, f"{found['seconds']:6.1f} s", sep="  ", flush=True)
    sys.exit(int(over))


if __name__ == "__main__":
    main()
