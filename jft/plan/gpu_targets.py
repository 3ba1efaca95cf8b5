# SPDX-License-Identifier: Apache-2.0
"""What XLA must know of a GPU to compile for it without one.

Facts of the hardware (https://docs.nvidia.com/cuda/cuda-c-programming-guide, compute capabilities; NVIDIA's data sheets),
the same as XLA's own descriptions in https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs.
"""

import dataclasses

from jft.plan import chips


@dataclasses.dataclass(frozen=True)
class _Target:
    description: str
    capability: int  # major
    accelerated: bool  # instructions of exactly this capability, as Hopper's wgmma
    cores: int  # streaming multiprocessors
    fpus: int  # of each
    shared: int  # bytes of shared memory of each
    cache: int  # bytes of level 2
    clock: float  # GHz


_TARGETS = {
    "h100": _Target("NVIDIA H100 80GB HBM3", 9, True, 132, 128, 228 * 1024, 50 * 2**20, 1.98),
    "h200": _Target("NVIDIA H200 141GB HBM3e", 9, True, 132, 128, 228 * 1024, 50 * 2**20, 1.98),
    "a100-80": _Target("NVIDIA A100-SXM4-80GB", 8, False, 108, 64, 164 * 1024, 40 * 2**20, 1.41),
}


def text(name: str) -> str:
    """A `GpuTargetConfigProto` as text."""
    own, chip = _TARGETS[name], chips.CHIPS[name]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": own.shared
        - 1024,  # the driver keeps one KiB of each block
        "shared_memory_per_core": own.shared,
        "threads_per_core_limit": 2048,
        "core_count": own.cores,
        "fpus_per_core": own.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "l2_cache_size": own.cache,
        "clock_rate_ghz": own.clock,
        "device_memory_size": chip.hbm_bytes,
    }
    extension = "ACCELERATED_FEATURES" if own.accelerated else "NONE"
    lines = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    return f"""gpu_device_info {{
{lines}
  cuda_compute_capability {{ major: {own.capability} feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{own.description}"
"""
