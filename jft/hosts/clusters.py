# SPDX-License-Identifier: Apache-2.0
"""What the flags and the environment say about the processes of a run."""

import re
import urllib.error
import urllib.request
from collections.abc import Mapping

from jft import errors
from jft.hosts import meeting

# What launchers call the number of processes, and the number of this one.
RANKS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("SLURM_NTASKS", "SLURM_PROCID"))


def place(
    coordinator: str, processes: str, process: str, environ: Mapping[str, str]
) -> meeting.Place | None:
    """What the flags say, or JFT_COORDINATOR, JFT_PROCESSES, JFT_PROCESS; None where they say nothing.

    With a coordinator alone, the numbers are those of Open MPI or Slurm.

    Raises:
      UserError: a part is missing, or no number.
    """
    said = {
        "coordinator": coordinator or environ.get("JFT_COORDINATOR", ""),
        "processes": processes or environ.get("JFT_PROCESSES", ""),
        "process": process or environ.get("JFT_PROCESS", ""),
    }
    if not any(said.values()):
        return None
    if said["coordinator"] and not said["processes"] and not said["process"]:
        for size, rank in RANKS:
            if size in environ and rank in environ:
                said |= {"processes": environ[size], "process": environ[rank]}
                break
    missing = [f"--{name}" for name, value in said.items() if not value]
    if missing:
        given = ", ".join(f"--{name}={value}" for name, value in said.items() if value)
        raise errors.UserError(f"{given}: {' and '.join(missing)} missing")
    for name in ("processes", "process"):
        if not said[name].isdecimal():
            raise errors.UserError(f"--{name}={said[name]}: a number is wanted")
    return meeting.Place(said["coordinator"], int(said["processes"]), int(said["process"]))


def tasks_on_node(environ: Mapping[str, str]) -> int:
    """The number of this run's processes on one machine, as Open MPI or Slurm (as in "2(x3),1") tell; 0 = unknown."""
    if size := environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(size)
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return max((int(n) for n in re.findall(r"(?:^|,)(\d+)", listed)), default=0)


def detected(environ: Mapping[str, str]) -> str:
    """What has started several processes that jax.distributed can find by itself, or "".

    Raises:
      UserError: there are several, but nothing says where process 0 is.
    """
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return "Open MPI"
        raise errors.UserError(
            "Open MPI from version 5 on does not tell where its process 0 runs: add --coordinator=HOST:PORT,"
            " with the first host and a free port"
        )
    # Slurm sets the last one within `srun` only: a batch script by itself is one process.
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environ:
        return "Slurm"
    if (environ.get("JAX_PLATFORMS") or "tpu").split(",")[0] != "tpu":
        return ""
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in workers or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return "TPU"
    # jax sets this where it sees no TPU. On a TPU VM the names of the pod's hosts are in the machine's metadata.
    if "TPU_SKIP_MDS_QUERY" in environ or workers:
        return ""
    slices = re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"))
    several_slices = slices is not None and int(slices[1]) > 1
    return "TPU" if several_slices or "," in _metadata("worker-network-endpoints") else ""


def _metadata(key: str) -> str:
    """An attribute of this Google Cloud machine; "" elsewhere."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


def takes_all_devices(environ: Mapping[str, str]) -> bool:
    """Whether this process should have every GPU that it sees: it is alone on its machine, or was given one only."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return tasks_on_node(environ) == 1 or (bool(visible) and "," not in visible)
