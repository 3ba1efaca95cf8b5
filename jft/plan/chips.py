# SPDX-License-Identifier: Apache-2.0
"""What each chip can do, per device as JAX shows it, with the sources.

Figures are the makers' for dense bfloat16. Memory is what the compiler lets a program use, read from its own "exceeds
available HBM" (libtpu 0.0.42): a little less than what is sold. Bandwidths are bytes a second, one way.
"""

import dataclasses

from jft import errors

GIB = 2**30
CLOUD = "https://cloud.google.com/tpu/docs/"
# One-way bandwidth of a link as collectives reach it, a tenth below the makers' figure; and the data-centre network.
BOOK = "https://jax-ml.github.io/scaling-book/tpus"
H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
H200 = "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"
A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
DGX_H100 = "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"
DGX_A100 = "https://docs.nvidia.com/dgx/dgxa100-user-guide/introduction-to-dgxa100.html"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per device (a TPU7x chip shows two; a v4 or v5p chip's two cores are one)."""

    name: str
    platform: str  # tpu, cuda
    flops: float  # a second, dense bfloat16
    hbm_bytes: int  # that a program may use
    hbm_bandwidth: float
    link_bandwidth: float  # one ICI link, one way; for NVLink all of a GPU's links, one way
    dimensions: int  # of the torus that the links make; 1 for NVLink, whose switch reaches all
    wraps_at: int  # chips along a dimension from which its ends are joined into a ring
    network_bandwidth: float  # to other slices or nodes
    devices_per_chip: int
    chips_per_host: int
    sources: tuple[str, ...]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            "tpu",
            275e12,
            int(30.75 * GIB),
            1200e9,
            45e9,
            3,
            4,
            6.25e9,
            1,
            4,
            (CLOUD + "v4", BOOK),
        ),
        # The compiler's default hosts of four chips; machines of eight are one host each.
        Chip(
            "v5e",
            "tpu",
            197e12,
            int(15.75 * GIB),
            819e9,
            45e9,
            2,
            16,
            3.125e9,
            1,
            4,
            (CLOUD + "v5e", BOOK),
        ),
        Chip(
            "v5p",
            "tpu",
            459e12,
            int(95.74 * GIB),
            2765e9,
            90e9,
            3,
            4,
            6.25e9,
            1,
            4,
            (CLOUD + "v5p", BOOK),
        ),
        Chip(
            "v6e",
            "tpu",
            918e12,
            int(31.25 * GIB),
            1638e9,
            90e9,
            2,
            16,
            12.5e9,
            1,
            4,
            (CLOUD + "v6e", BOOK),
        ),
        # Of a chip: 2,307 Tflop/s, 7,380 GB/s, 192 GiB, 100 Gbit/s; its two devices share the links too.
        Chip(
            "tpu7x",
            "tpu",
            1153.5e12,
            int(94.75 * GIB),
            3690e9,
            45e9,
            3,
            4,
            6.25e9,
            2,
            4,
            (CLOUD + "tpu7x", BOOK),
        ),
        # 900 GB/s of NVLink both ways; eight network cards of 400 Gbit/s for eight GPUs. A process may use 75 % of the
        # memory unless told otherwise (XLA_PYTHON_CLIENT_MEM_FRACTION); here it is all of it.
        Chip(
            "h100", "cuda", 989e12, 84942979072, 3350e9, 450e9, 1, 1, 50e9, 1, 8, (H100, DGX_H100)
        ),
        Chip(
            "h200", "cuda", 989e12, 151397597184, 4800e9, 450e9, 1, 1, 50e9, 1, 8, (H200, DGX_H100)
        ),
        Chip(
            "a100-80",
            "cuda",
            312e12,
            85100068864,
            2039e9,
            300e9,
            1,
            1,
            25e9,
            1,
            8,
            (A100, DGX_A100),
        ),
    )
}


def chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
      UserError: there is none.
    """
    if name not in CHIPS:
        raise errors.UserError(f"{name!r} is no chip that is known: {', '.join(CHIPS)}")
    return CHIPS[name]


# What JAX calls a device of each chip. Others with a like name (H100 PCIe, H200 NVL) are slower.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80",
}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device's `device_kind`; None for one that is not known."""
    return CHIPS.get(_KINDS.get(device_kind, ""))
