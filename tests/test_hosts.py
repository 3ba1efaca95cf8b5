# SPDX-License-Identifier: Apache-2.0
"""Several processes: who they are, their meeting, what they agree on, and how they end. Real processes, over gloo."""

import concurrent.futures
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

from jft import errors, hosts
from jft.hosts import clusters, meeting

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "hosts_script.py"
SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What launch/local.py makes of hosts_script.py in processes of two devices each."""
    own, case = (
        [a for a in arguments if a.startswith("--")],
        [a for a in arguments if a[:2] != "--"],
    )
    command = [sys.executable, ROOT / "launch" / "local.py", "--devices=2", *own]
    return subprocess.run(
        [*command, sys.executable, SCRIPT, *case],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines_of(output: str, process: int) -> list[str]:
    """What a process printed; jax's gloo prints as well, also in the middle of lines."""
    mark = f"[{process}] "
    found = [line.removeprefix(mark) for line in output.splitlines() if line.startswith(mark)]
    return [line for line in found if "peer ranks" not in line]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_one_process_alone_answers_at_once() -> None:
    with hosts.joined("localhost:1", "1", "0"):
        assert not hosts.several()
        assert hosts.any(True) and not hosts.any(False) and hosts.Flag().up(True)
        hosts.agree("anything", object())
        hosts.barrier("nobody else")
    assert hosts.lead()


def test_flags_are_before_the_environment() -> None:
    environ = {"JFT_COORDINATOR": "a:1", "JFT_PROCESSES": "4", "JFT_PROCESS": "2"}
    assert clusters.place("", "", "", {}) is None
    assert clusters.place("", "", "", environ) == meeting.Place("a:1", 4, 2)
    assert clusters.place("b:2", "", "3", environ) == meeting.Place("b:2", 4, 3)
    assert clusters.place("b:2", "", "", SLURM) == meeting.Place("b:2", 4, 3)
    assert clusters.place("b:2", "", "", MPI) == meeting.Place("b:2", 2, 1)
    assert meeting.Place("[::1]:80", 1, 0).host == "::1"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("a:1", "2", ""), "--process missing"),
        (("", "", "1"), "--coordinator and --processes missing"),
        (("a:1", "two", "1"), "--processes=two: a number"),
        (("a:1", "2", "2"), "--process=2 with --processes=2: it must be 0 to 1"),
        (("a", "2", "1"), "--coordinator=a: HOST:PORT"),
        (("a:99999", "2", "1"), "HOST:PORT"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags: tuple[str, str, str], told: str) -> None:
    with pytest.raises(errors.UserError, match=told):
        clusters.place(*flags, {})


METADATA = {"tpu-env": "A: '1'\nMEGASCALE_NUM_SLICES: '2'\n", "worker-network-endpoints": "one"}


@pytest.mark.parametrize(
    ("environ", "metadata", "kind"),
    [
        ({}, {}, ""),
        (SLURM, {}, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, ""),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}, ""),  # a batch script without srun
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, {}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, {}, ""),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, METADATA, ""),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, "TPU"),
        ({}, METADATA, "TPU"),
        ({}, {"worker-network-endpoints": "a,b,c"}, "TPU"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, METADATA, ""),  # no TPU here
    ],
)
def test_what_started_several_processes(
    environ: dict[str, str], metadata: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_metadata", lambda key: metadata.get(key, ""))
    assert clusters.detected(environ) == kind


def test_open_mpi_5_is_asked_for_its_coordinator() -> None:
    with pytest.raises(errors.UserError, match="--coordinator=HOST:PORT"):
        clusters.detected(MPI)


def test_a_process_alone_on_its_machine_takes_all_gpus() -> None:
    two = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x2)"}
    assert clusters.takes_all_devices(SLURM)
    assert not clusters.takes_all_devices(two)
    assert clusters.takes_all_devices(two | {"CUDA_VISIBLE_DEVICES": "3"})
    assert not clusters.takes_all_devices(two | {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert clusters.takes_all_devices({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def meetings(*sides: tuple[int, int, str], timeout: float = 10) -> list[str]:
    """What `meet` says to each (processes, process, versions), all at one port."""
    address = f"localhost:{free_port()}"

    def meet(processes: int, process: int, versions: str) -> str:
        try:
            meeting.meet(meeting.Place(address, processes, process), versions, timeout)
        except errors.UserError as error:
            return f"{type(error).__name__}: {error}"
        return "met"

    with concurrent.futures.ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(lambda side: meet(*side), sides))


def test_processes_meet_or_all_say_what_is_wrong() -> None:
    assert meetings(*[(4, i, "1.0") for i in range(4)]) == ["met"] * 4
    for wrong, told in {
        (3, 1, "1.0"): "process 1 .* --processes=3, process 0 .* --processes=2",
        (2, 1, "1.1"): "process 1 .* has 1.1, process 0 .* has 1.0: install the same",
    }.items():
        said = meetings((2, 0, "1.0"), wrong)
        assert said[0] == said[1]
        assert re.search(told, said[0])
    twice = meetings((3, 0, "1.0"), (3, 1, "1.0"), (3, 1, "1.0"))
    assert len(set(twice)) == 1 and "two processes say --process=1" in twice[0]


def test_who_did_not_come_is_named() -> None:
    began = time.monotonic()
    said = meetings((4, 0, "1.0"), (4, 2, "1.0"), timeout=1)
    assert said[0] == said[1]
    assert "Unreachable: 2 of 4 processes (1, 3) did not come" in said[0]
    assert time.monotonic() - began < 5


def test_a_port_in_use_and_strangers_at_it() -> None:
    port = free_port()
    with socket.create_server(("", port)):
        with pytest.raises(errors.UserError, match=f"can't listen on port {port} .Address already"):
            meeting.meet(meeting.Place(f"localhost:{port}", 2, 0), "1.0", 5)

    def stranger() -> None:
        for _ in range(50):
            try:
                with socket.create_connection(("localhost", port)) as peer:
                    peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(meeting.meet, meeting.Place(f"localhost:{port}", 2, 0), "1.0", 10)
        pool.submit(stranger).result()
        meeting.meet(meeting.Place(f"localhost:{port}", 2, 1), "1.0", 10)
        first.result()


def test_an_unreachable_coordinator_is_one_line() -> None:
    port = free_port()
    place = {"JFT_COORDINATOR": f"localhost:{port}", "JFT_PROCESSES": "2", "JFT_PROCESS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "agreement"],
        env=os.environ | place | {"PYTHONPATH": str(ROOT), "TEST_TIMEOUT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == hosts.RETRY
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"jft: process 1 of 2: process 0 was not reached at localhost:{port}")
    assert "Connection refused" in line and "--coordinator" in line


def test_processes_agree_or_all_say_who_differs() -> None:
    done = launch("agreement")
    assert done.returncode == 0, done.stdout + done.stderr
    for process in (0, 1):
        said = lines_of(done.stdout, process)
        assert f"lead {process == 0} several True 4" in said
        assert (
            "sum 18.0" in said
        )  # two devices of process 0 hold 1, 1, 1, two of process 1 hold 2, 2, 2
        assert "any True False" in said
        # Raised on process 1 at step 2; known on both at step 3, and no longer.
        assert "flag [False, False, True, False, False]" in said
        assert any("process 0 has 7, process 1 has 8" in line for line in said)
        assert any("optim, rate, process 0 has 0.1, process 1 has 0.2" in line for line in said)
    assert "waited True" in lines_of(done.stdout, 0)  # for process 1, which came later


def test_a_killed_process_ends_the_run_which_then_goes_on(tmp_path: pathlib.Path) -> None:
    """The first attempt: a line that says who, within seconds; the retry ends as if nothing had been."""
    began = time.monotonic()
    done = launch("--retries=1", "until_killed", str(tmp_path / "was_killed"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 60  # jax alone: 100 s, then a stack trace
    survivor = lines_of(done.stdout, 0)
    assert any("process 1 on" in line and "gone without a word" in line for line in survivor)
    assert "*** Check failure" not in done.stdout
    assert "launch: process 1 was killed by SIGKILL; the others were ended" in done.stderr
    assert "launch: retry 1 of 1" in done.stderr
    assert [lines_of(done.stdout, i).count("done") for i in (0, 1)] == [1, 1]


@pytest.mark.slow
def test_the_exit_code_says_that_a_retry_goes_on(tmp_path: pathlib.Path) -> None:
    done = launch("until_killed", str(tmp_path / "was_killed"))
    assert done.returncode == hosts.RETRY


@pytest.mark.slow
def test_bad_input_on_one_process_is_told_by_all() -> None:
    done = launch("--processes=3", "one_fails")
    assert done.returncode == 2
    for process in range(3):
        assert any(
            line.startswith("jft: process 1 on") and "train.jsonl: no such file" in line
            for line in lines_of(done.stdout, process)
        )


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step() -> None:
    done = launch("--processes=3", "until_told")
    assert done.returncode == 0, done.stdout + done.stderr
    ends = [[x for x in lines_of(done.stdout, i) if "stopped" in x] for i in range(3)]
    assert ends[0] == ends[1] == ends[2] and len(ends[0]) == 1
