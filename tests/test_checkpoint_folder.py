# SPDX-License-Identifier: Apache-2.0
"""A run's folder: who holds it, what is replaced in one instant, its growing files, signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from jft import claims, config, errors, lock, metrics, runs, swap


def test_the_second_process_is_refused_and_the_next_one_let_in(tmp_path: pathlib.Path) -> None:
    held = lock.Lock(tmp_path)
    with pytest.raises(errors.UserError, match=f"process {os.getpid()} on .* is training there"):
        lock.Lock(tmp_path)
    held.release()
    lock.Lock(tmp_path).release()


def test_a_lock_ends_with_its_process(tmp_path: pathlib.Path) -> None:
    code = f"import pathlib, time; from jft import lock; lock.Lock(pathlib.Path({str(tmp_path)!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(errors.UserError, match=f"process {child.pid} on"):
        lock.Lock(tmp_path)
    child.kill()
    child.wait()
    lock.Lock(tmp_path).release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_known_by_its_beat(
    alive: bool, tmp_path: pathlib.Path
) -> None:
    """There the operating system's lock says nothing: who does not write any more has gone."""
    path, stop = tmp_path / lock.FILE, threading.Event()

    def beat(count: int) -> None:
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "count": count}))

    def beats() -> None:
        count = 0
        while alive and not stop.wait(0.02):
            beat(count := count + 1)

    beat(0)
    thread = threading.Thread(target=beats)
    thread.start()
    try:
        if alive:
            with pytest.raises(errors.UserError, match="process 7 on elsewhere is training there"):
                lock.Lock(tmp_path, beat=0.1)
        else:
            lock.Lock(tmp_path, beat=0.1).release()
    finally:
        stop.set()
        thread.join()


def test_the_holder_beats(tmp_path: pathlib.Path) -> None:
    held = lock.Lock(tmp_path, beat=0.02)
    first = (tmp_path / lock.FILE).read_bytes()
    until = time.monotonic() + 10
    while (tmp_path / lock.FILE).read_bytes() == first and time.monotonic() < until:
        time.sleep(0.01)
    assert (tmp_path / lock.FILE).read_bytes() != first
    held.release()
    assert (tmp_path / lock.FILE).read_bytes() == b""


def write_pair(folder: pathlib.Path, value: int) -> None:
    folder.mkdir()
    (folder / "value").write_text(str(value))


def test_a_reader_finds_the_old_folder_or_the_new_one(tmp_path: pathlib.Path) -> None:
    place, done, seen = tmp_path / "best", threading.Event(), set()
    write_pair(place, 0)

    def read() -> None:
        while not done.is_set():
            seen.add((place / "value").read_text())

    def replace() -> None:
        for value in range(1, 200):
            part = swap.beside(place)
            write_pair(part, value)
            swap.replace(place, part)
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    read()  # raises where there is none for a moment
    thread.join()
    assert len(seen) > 1 and "" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_process_that_ends_while_it_replaces_leaves_the_old_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two names can't be exchanged at once, and the process ends between the two steps."""
    place = tmp_path / "best"
    write_pair(place, 1)
    part = swap.beside(place)
    write_pair(part, 2)
    rename, calls = os.rename, []

    def first_only(one: pathlib.Path, other: pathlib.Path) -> None:
        calls.append(one)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(one, other)

    monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", first_only)
    with pytest.raises(KeyboardInterrupt):
        swap.replace(place, part)
    assert not place.exists()
    monkeypatch.undo()
    swap.recover(place)
    assert (place / "value").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_lines_begin_with_what_was_before_and_lose_what_was_cut_off(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = metrics.Lines(path)
    first.write(step=0, valid_loss=2.5)
    first.write(step=1, loss=0.1)
    before = first.text
    first.write(step=2, loss=0.2)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 3, "lo')  # killed here
    assert metrics.up_to(path, 1) == before and metrics.up_to(path, 3) == first.text
    again = metrics.Lines(path, before)
    again.write(step=2, loss=0.3)
    assert path.read_text() == before + '{"step": 2, "loss": 0.3}\n' == again.text
    assert again.has(step=0, valid_loss=None) and not again.has(step=1, valid_loss=None)
    assert again.has(step=2, loss=0.3) and not again.has(step=2, loss=0.2)
    again.close()
    assert metrics.up_to(tmp_path / "none", 5) == ""


def test_settings_that_change_mathematics_are_named_one_by_one() -> None:
    one, other = config.base(), config.base()
    with other.unlocked():
        other.optim.learning_rate, other.seed, other.checkpoint.keep = 1e-3, 7, 5
        other.mesh.tensor, other.micro_batch, other.run_dir = 2, 3, "elsewhere"
    assert claims.changes(other.to_dict(), one.to_dict()) == [
        "optim.learning_rate is 0.001, was 0.0002",
        "seed is 7, was 0",
    ]


def test_leftovers_go_and_a_bucket_is_refused(tmp_path: pathlib.Path) -> None:
    for name in (".best.part", ".last.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".config.json.part").write_text("{")
    claims.Claim(tmp_path, config.base()).release()
    assert [path.name for path in tmp_path.iterdir() if path.name != lock.FILE] == [
        "last"  # there was no other
    ]
    with pytest.raises(errors.UserError, match="checkpoint.folder=gs://"):
        claims.Claim(pathlib.Path("gs://bucket/run"), config.base())


def test_a_fresh_run_moves_the_old_one_aside_but_not_one_that_trains(
    tmp_path: pathlib.Path,
) -> None:
    folder = tmp_path / "run"
    held = claims.Claim(folder, config.base())
    runs.write_json(folder / "config.json", {})
    with pytest.raises(errors.UserError, match="is training there"):
        claims.Claim(folder, config.base(), fresh=True)
    held.release()
    claims.Claim(folder, config.base(), fresh=True).release()
    assert (tmp_path / "run.1" / "config.json").exists()
    assert [path.name for path in folder.iterdir()] == [lock.FILE]


# The main thread is in one long instruction, as it is while it waits for a device.
BUSY = """
import hashlib
from jft import stopping
with stopping.Signals() as signals:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_signal_ends_the_process_whatever_it_waits_for() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    assert child.stderr.readline() == "\n"
    assert child.stderr.readline().startswith("finishing this step and saving")
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130 and told == "jft: stopped at once\n"
