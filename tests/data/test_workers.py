# SPDX-License-Identifier: Apache-2.0
"""Several processes give what one gives, faults and counts included, and leave nothing behind."""

import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jft import errors, models
from jft.data import encoding, examples, formats, store, tokenised, workers

SAID = "the user says <|im_end|> and é\u2028 asks for  red"


@pytest.fixture
def tokenizer(tiny_model: pathlib.Path) -> Any:
    return models.load_tokenizer(str(tiny_model))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 0.0)
    monkeypatch.setattr(workers, "_cores", lambda: 2)


def example(at: int, answer: str = "red") -> examples.Example:
    turns = examples.pair(f"{SAID} {at}", f"{answer} {at}")
    more = examples.pair("again", "and <|im_start|>") if at % 3 == 0 else ()
    weight = ({"role": "assistant", "content": "x", "weight": 0},) if at % 5 == 0 else ()
    text = f"{SAID} {at}" if at % 7 == 0 else ""
    turns = () if text else (*turns, *more, *weight)
    return examples.Example(turns, f"f:row {at}", "f", at, text=text)


def chunks(count: int, size: int = 4) -> Iterator[list[examples.Example]]:
    items = iter(example(at) for at in range(count))
    return iter(lambda: list(itertools.islice(items, size)), [])


def waiting(chunks: Iterator[Any], until: Any) -> Iterator[Any]:
    """The chunks, of which none but the first comes before processes are there."""
    yield next(chunks)
    for some in chunks:
        while not until():
            time.sleep(0.01)
        yield some


class Pools:
    """Notes the pools that are made, and lets chunks come once their processes are ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        pool = workers._Pool

        def noted(encoder: encoding.Encoder) -> Any:
            self.made.append(pool(encoder))
            return self.made[-1]

        monkeypatch.setattr(workers, "_Pool", noted)

    def started(self) -> bool:
        return bool(self.made) and self.made[0].started

    def codes(self) -> list[int | None]:
        return [each._process.poll() for each in self.made[0]._processes]


class Inside:
    """A process that is none, for what does not depend on it."""

    def __init__(self) -> None:
        self._service = workers._Service()

    def ask(self, request: bytes) -> Any:
        good, found = pickle.loads(self._service.answer(request))
        if not good:
            raise found
        return found

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Process", Inside)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    return Pools(monkeypatch)


def plain(found: encoding.Encoded) -> Any:
    if isinstance(found, examples.Fault):
        return found
    return [
        (row.tokens.tolist(), row.tokens.dtype, row.trained.tolist(), row.trained.dtype, row.source)
        for row in found
    ]


def test_rows_and_counts_are_those_of_one_process(tokenizer: Any, pools: Pools) -> None:
    encoder = encoding.Encoder(tokenizer, system="be brief")
    found = list(workers.encoded(encoder, waiting(chunks(200), pools.started)))
    assert [some for some, _ in found] == list(chunks(200))
    one = encoding.Encoder(tokenizer, system="be brief")
    expected = [plain(made) for made in one.encode([example(at) for at in range(200)])]
    assert [plain(made) for _, all_made in found for made in all_made] == expected
    assert encoder.counts == one.counts and one.counts.untrained_turns
    # The processes have made them, and are gone.
    assert len(pools.made) == 1 and pools.codes() == [-signal.SIGKILL] * 2


def test_an_encoder_comes_back_from_its_pickle(tokenizer: Any) -> None:
    encoder = encoding.Encoder(tokenizer, train_on="everything", system="be brief")
    encoder.encode([example(1)])
    again = pickle.loads(pickle.dumps(encoder))
    assert plain(again.one(example(2))) == plain(encoder.one(example(2)))
    ours, theirs = (each.tokenizer.backend_tokenizer.to_str() for each in (encoder, again))
    assert ours == theirs and again.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("where", ["read", "encoded"])
def test_nothing_is_encoded_from_the_first_fault_on(
    tokenizer: Any, pools: Pools, where: str
) -> None:
    given: list[list[Any]] = [list(some) for some in chunks(80)]
    if where == "read":
        given[10][2] = examples.Fault("malformed", "f:row 42: x", "f", 42)
    else:  # ChatML's tiny template writes no tools
        given[10][2] = dataclasses.replace(example(1), tools=({"name": "f"},), source="f:row 42")
    given[15][0] = examples.Fault("malformed", "f:row 60: y", "f", 60)
    encoder = encoding.Encoder(tokenizer)
    found = list(workers.encoded(encoder, waiting(iter(given), pools.started)))
    assert [some for some, _ in found] == given
    made = [len(all_made) for _, all_made in found]
    assert made == [4] * 10 + [0 if where == "read" else 4] + [0] * 9
    faults = [
        each for _, all_made in found for each in all_made if isinstance(each, examples.Fault)
    ]
    assert len(faults) == (where == "encoded")
    assert all("f:row 42: " in fault.message for fault in faults)


@pytest.mark.usefixtures("inside")
def test_stored_rows_are_those_of_one_process(
    tmp_path: pathlib.Path, tokenizer: Any, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    made = [{"prompt": f"{SAID} {at}", "response": "red " * (at % 9 + 1)} for at in range(1200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setattr(tokenised, "CHUNK", 16)
    found = []
    for patience in (0.0, float("inf")):
        monkeypatch.setattr(workers, "_PATIENCE", patience)
        encoder = encoding.Encoder(tokenizer)
        tokenised._make(tmp_path / str(patience), formats.Table(str(path)), encoder)
        found.append(store.Stored(tmp_path / str(patience), [str(path)]))
    several, one = found
    assert len(pools.made) == 1 and several.meta == one.meta and len(several) == 1200
    assert list(several.read_examples()) == list(one.read_examples())
    for ours, theirs in ((several[at], one[at]) for at in range(1200)):
        assert np.array_equal(ours.tokens, theirs.tokens) and ours.source == theirs.source
        assert np.array_equal(ours.trained, theirs.trained)


@pytest.mark.usefixtures("inside")
def test_chunks_ahead_are_few(tokenizer: Any) -> None:
    read = 0

    def counted() -> Iterator[Any]:
        nonlocal read
        for some in chunks(400):
            read += 1
            yield some

    for at, _ in enumerate(workers.encoded(encoding.Encoder(tokenizer), counted()), start=1):
        assert read - at <= 2 + 2
    assert at == 100


def test_errors_come_back_as_themselves(tokenizer: Any) -> None:
    process = workers._Process()
    try:
        encoder = encoding.Encoder(tokenizer)
        encoder.tokenizer.chat_template = None
        process.ask(pickle.dumps(encoder))
        with pytest.raises(errors.UserError, match="^the tokenizer has no chat template; "):
            process.ask(pickle.dumps([example(1)]))
        with pytest.raises(AttributeError, match="messages") as caught:
            process.ask(pickle.dumps(["no example"]))
        assert "encoding.py" in caught.value.__notes__[0]
        # It goes on.
        (packed, _) = process.ask(pickle.dumps([example(7)]))
        assert workers._unpacked(packed, [example(7)])[0][0].source == "f:row 7"
    finally:
        process.kill()


def test_a_process_that_ends_is_one_clear_error(tokenizer: Any, pools: Pools) -> None:
    encoded = workers.encoded(encoding.Encoder(tokenizer), waiting(chunks(400), pools.started))
    with pytest.raises(errors.UserError, match=r"^tokenising: .* ended by itself \(exit code -9\)"):
        for at, _ in enumerate(encoded):
            if at == 20:
                for process in pools.made[0]._processes:
                    os.kill(process._process.pid, signal.SIGKILL)
    assert pools.codes() == [-signal.SIGKILL] * 2


def test_an_iterator_that_is_closed_leaves_no_process(tokenizer: Any, pools: Pools) -> None:
    encoded = workers.encoded(encoding.Encoder(tokenizer), waiting(chunks(400), pools.started))
    for _ in range(10):
        next(encoded)
    assert pools.codes() == [None, None]
    encoded.close()
    assert pools.codes() == [-signal.SIGKILL] * 2


SCRIPT = """
import itertools, pathlib, signal, sys, time
from jft import models
from jft.data import encoding, examples, workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
workers._PATIENCE, workers._cores = 0.0, lambda: 2
made = workers._Pool.__init__
def noted(pool, encoder):
    made(pool, encoder)
    print(*(each._process.pid for each in pool._processes), flush=True)
workers._Pool.__init__ = noted
one = examples.Example(examples.pair("a", "b"), "f:row 1", "f", 1)
chunks = ([one] * 10 for _ in itertools.count())
for _ in workers.encoded(encoding.Encoder(models.load_tokenizer(sys.argv[1])), chunks):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_leaves_no_process(
    tmp_path: pathlib.Path, tiny_model: pathlib.Path, how: signal.Signals
) -> None:
    # A script without a guard, started as users do; it would start itself again under multiprocessing.
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tiny_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert script.stdout is not None
        pids = [int(pid) for pid in script.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(1.0 if how == signal.SIGINT else 3.0)
        script.send_signal(how)
        _, told = script.communicate(timeout=20)
    finally:
        script.kill()  # a failed test must not leave it running either
    assert told.count("Traceback") == (how == signal.SIGINT), told  # of the script alone
    end = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Without a parent that asks for it, a process that has ended keeps its number.
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_jax_in_a_process(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    (tmp_path / "encoder").write_bytes(pickle.dumps(encoding.Encoder(tokenizer)))
    code = (
        "import pickle, sys; from jft.data import examples, workers\n"
        f"encoder = pickle.load(open({str(tmp_path / 'encoder')!r}, 'rb'))\n"
        "encoder.one(examples.Example(examples.pair('a', 'b'), 'f:row 1'))\n"
        "print([name for name in ('jax', 'torch', 'datasets') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_small_sources_start_none(
    tokenizer: Any, pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 60.0)
    list(workers.encoded(encoding.Encoder(tokenizer), chunks(40)))
    assert not pools.made


def test_a_class_of_the_users_own_is_not_handed_over(tokenizer: Any, pools: Pools) -> None:
    class Own(type(tokenizer)):
        pass

    tokenizer.__class__ = Own
    list(workers.encoded(encoding.Encoder(tokenizer), chunks(40)))
    assert not pools.made
