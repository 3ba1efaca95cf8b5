# SPDX-License-Identifier: Apache-2.0
"""Examples encoded on all cores: once it has taken a while, in processes of their own, with the same result.

A process is a new interpreter that runs this module and speaks length-prefixed pickles over its pipes. It is no fork,
which a process with jax's threads must not do, and does not import the user's script, as multiprocessing's would. It
imports no jax. It ends when its pipe does, so with its parent, however that ends.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pickle
import queue
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from jft import errors
from jft.data import encoding, examples, rows

Items = list[Any]  # of examples.Example and examples.Fault

# Seconds of encoding in this process before others are started: about what their start takes.
_PATIENCE = 4.0
# This process reads and writes 20,000 rows in a second or so: more than that many could not be kept busy.
_MOST = 8


def encoded(
    encoder: encoding.Encoder, chunks: Iterable[Items]
) -> Generator[tuple[Items, list[encoding.Encoded]], None, None]:
    """Each chunk and what becomes of its examples, in order; nothing is encoded from the first fault on.

    The encoder's counts are of all that was encoded. Close the iterator: it may have processes.

    Raises:
        errors.UserError: there is no template, it can't be used, or a process has ended.
    """
    chunks = iter(chunks)
    sound = True
    patience = time.monotonic() + (_PATIENCE if _can_share(encoder) else float("inf"))
    pool: _Pool | None = None
    try:
        while pool is None or not pool.started:
            some = next(chunks, None)
            if some is None:
                return
            made = encoder.encode(some) if sound and _all_good(some) else []
            sound = sound and _all_good([*some, *made])
            yield some, made
            if pool is None and sound and time.monotonic() > patience:
                pool = _Pool(encoder)
        for some, future in _in_flight(pool, chunks):
            made = _taken(encoder, some, future) if sound and future else []
            sound = sound and _all_good([*some, *made])
            pool.wanted = sound
            yield some, made
    finally:
        if pool:
            pool.close()


def _all_good(some: Sequence[Any]) -> bool:
    return not any(isinstance(item, examples.Fault) for item in some)


def _can_share(encoder: encoding.Encoder) -> bool:
    # A class of the user's own script could not be found by another process.
    known = type(encoder.tokenizer).__module__.startswith("transformers.")
    return known and _cores() > 1 and bool(sys.executable)


def _cores() -> int:
    """That this process may use: fewer than there are, in a container or a batch system."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_Future = concurrent.futures.Future[Any]


def _in_flight(pool: "_Pool", chunks: Iterator[Items]) -> Iterator[tuple[Items, _Future | None]]:
    """Chunks in order, a few of them handed out ahead."""
    ahead: collections.deque[tuple[Items, _Future | None]] = collections.deque()
    for some in chunks:
        ahead.append((some, pool.submit(some) if pool.wanted and _all_good(some) else None))
        if len(ahead) > pool.size + 1:
            yield ahead.popleft()
    yield from ahead


def _taken(
    encoder: encoding.Encoder, some: Sequence[examples.Example], future: _Future
) -> list[encoding.Encoded]:
    packed, counts = future.result()
    for field in dataclasses.fields(counts):
        total = getattr(encoder.counts, field.name) + getattr(counts, field.name)
        setattr(encoder.counts, field.name, total)
    return _unpacked(packed, some)


class _Pool:
    """Processes that encode, each served by a thread of this one.

    Attributes:
        size: how many there are.
        wanted: whether chunks are still to be encoded.
    """

    def __init__(self, encoder: encoding.Encoder) -> None:
        self.size, self.wanted = min(_cores(), _MOST), True
        set_up = pickle.dumps(encoder)
        self._threads = concurrent.futures.ThreadPoolExecutor(self.size, "encoding")
        self._processes = [_Process() for _ in range(self.size)]
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._starting = [
            self._threads.submit(self._start, process, set_up) for process in self._processes
        ]

    def _start(self, process: "_Process", set_up: bytes) -> None:
        try:
            process.ask(set_up)
        finally:
            self._idle.put(process)

    @property
    def started(self) -> bool:
        """Whether all are ready; raises what went wrong with one."""
        return all(each.done() and each.result() is None for each in self._starting)

    def submit(self, some: Sequence[examples.Example]) -> _Future:
        return self._threads.submit(self._encode, some)

    def _encode(self, some: Sequence[examples.Example]) -> Any:
        process = self._idle.get()
        try:
            return process.ask(pickle.dumps(some, pickle.HIGHEST_PROTOCOL))
        finally:
            self._idle.put(process)  # one that has ended says so each time it is asked

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)  # its threads read from pipes that have ended
        for process in self._processes:
            process.close()


class _Process:
    def __init__(self) -> None:
        settings = {
            # All that this process imports from, in the same order.
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # this process has given them
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jft.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | settings,
            process_group=0 if os.name == "posix" else None,  # Ctrl-C is this process's to handle
        )

    def ask(self, request: bytes) -> Any:
        """The answer to a request; raises the error that it led to."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _write(self._process.stdin, request)
            answer = _read(self._process.stdout)
        except OSError:  # the pipe is broken
            answer = b""
        if not answer:
            code = self._process.wait()
            raise errors.UserError(
                f"tokenising: one of the processes ended by itself (exit code {code}); "
                "-9 means that memory ran out: free some and run it again"
            )
        good, found = pickle.loads(answer)
        if not good:
            raise found
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that was not read
                pipe.close()


def _write(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "little"))
    pipe.write(message)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """A message; none where the pipe ends."""
    size = int.from_bytes(pipe.read(8), "little")
    message = pipe.read(size)
    return message if len(message) == size else b""


_Packed = tuple[list[int | examples.Fault], np.ndarray, np.ndarray, np.ndarray]


def _packed(made: Sequence[encoding.Encoded]) -> _Packed:
    """How many rows each example has, or its fault; the rows' lengths, tokens and what is trained."""
    counts = [each if isinstance(each, examples.Fault) else len(each) for each in made]
    some = [row for each in made if isinstance(each, list) for row in each]
    lengths = np.array([len(row.tokens) for row in some], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *(row.tokens for row in some)])
    trained = np.concatenate([np.zeros(0, bool), *(row.trained for row in some)])
    return counts, lengths, tokens, trained


def _unpacked(packed: _Packed, some: Sequence[examples.Example]) -> list[encoding.Encoded]:
    counts, lengths, tokens, trained = packed
    ends = np.cumsum(lengths).tolist()
    places = map(slice, [0, *ends], ends)
    return [
        count
        if isinstance(count, examples.Fault)
        else [
            rows.Row(tokens[place], trained[place], example.source)
            for place in (next(places) for _ in range(count))
        ]
        for count, example in zip(counts, some, strict=True)
    ]


class _Service:
    """What a process does: it is set up with the first request's encoder, and encodes what each further one holds."""

    def __init__(self) -> None:
        self._encoder: encoding.Encoder | None = None

    def answer(self, request: bytes) -> bytes:
        try:
            held, found = pickle.loads(request), None
            if self._encoder is None:
                self._encoder = held
            else:
                self._encoder.counts = encoding.Counts()
                found = _packed(self._encoder.encode(held)), self._encoder.counts
            return pickle.dumps((True, found), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            return _error(error)


def _error(error: Exception) -> bytes:
    """The error as its parent can raise it."""
    told = "".join(traceback.format_exception(error))
    if not isinstance(error, errors.UserError):
        error.add_note(told)
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:  # an exception class need not come back from its pickle
        return pickle.dumps((False, RuntimeError(told)))
    return answer


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    service = _Service()
    try:
        while request := _read(sys.stdin.buffer):
            _write(answers, service.answer(request))
    except BrokenPipeError:
        # The parent has ended, which is nothing to tell; closing the pipe would fail again.
        os._exit(1)


if __name__ == "__main__":
    _serve()
