#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine's CPU, each with simulated devices: what a pod does, at home.

    python launch/local.py --processes=2 --devices=4 --retries=3 jft train --config=configs/sft.py ...

Lines are marked with the process they came from. When one process dies, the others are ended. Exit codes: 0 done; 75 a
process was killed, and the same line goes on from the last checkpoint (--retries does it); otherwise the run's own.
"""

import argparse
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

RETRY = 75  # as jft.hosts.RETRY
GRACE = 5.0  # seconds in which the others end by themselves


def environment(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
        "PYTHONUNBUFFERED": "1",
        "JFT_COORDINATOR": f"localhost:{port}",
        "JFT_PROCESSES": str(processes),
        "JFT_PROCESS": str(index),
    }


def run(command: list[str], processes: int, devices: int) -> int:
    """One attempt; the exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ends: queue.Queue[tuple[int, int]] = queue.Queue()
    children: list[subprocess.Popen[str]] = []

    def follow(index: int, child: subprocess.Popen[str]) -> None:
        for line in child.stdout or ():
            print(f"[{index}] {line}", end="", flush=True)
        ends.put((index, child.wait()))

    def forward(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for index in range(processes):
        settings = os.environ | environment(index, processes, devices, port)
        # In sessions of their own Ctrl-C reaches them once, through `forward`.
        child = subprocess.Popen(
            command,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        children.append(child)
        threading.Thread(target=follow, args=(index, child), daemon=True).start()
    ended = [ends.get()]
    while len(ended) < processes and not ended[-1][1]:
        ended.append(ends.get())
    until = time.monotonic() + GRACE
    while len(ended) < processes:
        try:
            ended.append(ends.get(timeout=max(until - time.monotonic(), 0.1)))
        except queue.Empty:
            forward(signal.SIGKILL, None)
    return verdict(ended)


def verdict(ended: list[tuple[int, int]]) -> int:
    """The exit code; says which process ended the run."""
    failed = [(index, code) for index, code in ended if code]
    # jax aborts a process that has lost another: that one is the cause.
    killed = sorted((f for f in failed if f[1] < 0), key=lambda f: f[1] == -signal.SIGABRT)
    if killed:
        index, code = killed[0]
        told = f"process {index} was killed by {signal.Signals(-code).name}; the others were ended"
        say(f"{told}; the same command goes on from the last checkpoint")
        return RETRY
    if failed:
        say(f"ended with exit code {failed[0][1]}; the lines above say why")
        return failed[0][1]
    return 0


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument("--retries", type=int, default=0, help="after a process was killed")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="jft train --config=...")
    flags = parser.parse_args()
    if not flags.command or flags.processes < 1 or flags.devices < 1:
        parser.error("a command is needed, and 1 or more --processes and --devices")
    if flags.dry_run:
        for index in range(flags.processes):
            settings = environment(index, flags.processes, flags.devices, 0)
            print(shlex.join(["env", *(f"{k}={v}" for k, v in settings.items()), *flags.command]))
        return 0
    # The command may stand beside this Python without being on the PATH.
    beside = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which(flags.command[0], path=beside)
    if program is None:
        parser.error(f"{flags.command[0]}: no such command; is jft's environment active?")
    for attempt in range(flags.retries + 1):
        code = run([program, *flags.command[1:]], flags.processes, flags.devices)
        if code != RETRY or attempt == flags.retries:
            return code
        say(f"retry {attempt + 1} of {flags.retries}")
    return RETRY


if __name__ == "__main__":
    sys.exit(main())
