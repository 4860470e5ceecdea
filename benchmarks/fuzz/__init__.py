"""Fuzzing of everything that is read from a stranger or from a disk: nothing but a sentence may come out.

    python -m benchmarks.fuzz                                # the names of the targets
    python -m benchmarks.fuzz messages ledger --seconds 60   # random mutations; the seed is printed
    python -m benchmarks.fuzz all --seconds 60 --coverage    # guided by coverage, where atheris is installed

Each target takes any bytes and either accepts them or raises a HeadwaterError of one sentence, within `MAX_SECONDS` and
`MAX_MIB`. A target may state more: a ledger that opens has spent what it had spent. Faults are written to a folder, one
file each, and are printed with where they were raised; the exit code is 1.

atheris is not among the project's dependencies: `pip install --target FOLDER atheris`, and FOLDER on PYTHONPATH.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from common.types import HeadwaterError

MAX_SECONDS = 10.0
MAX_MIB = 2048
MAX_SENTENCE = 2000
MAX_BYTES = 1 << 16
"""Most bytes that a mutation grows to."""
PART = b"\n\xff\xfe\n"
"""Separates the parts of an input that has several."""


class Broken(AssertionError):
    """A target's promise does not hold."""


@dataclass(frozen=True)
class Target:
    """One thing to fuzz.

    Attributes:
        name: its name on the command line.
        seeds: inputs that are accepted, from which mutations start.
        run: reads an input; returns, or raises a HeadwaterError.
        words: byte strings that the format knows.
    """

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes], object]
    words: Sequence[bytes] = ()


@dataclass
class Tally:
    """The result of fuzzing one target.

    Attributes:
        executions: number of inputs.
        accepted: number of inputs that raised nothing.
        faults: place of each fault -> an input that shows it.
    """

    executions: int = 0
    accepted: int = 0
    faults: dict[str, bytes] = field(default_factory=dict)


def check(target: Target, content: bytes) -> bool:
    """Runs a target on one input and returns whether it was accepted.

    Args:
        target: the target.
        content: the input.

    Raises:
        Broken: the error is not one printable sentence, or took too long.
        Exception: whatever the target should not have raised.
    """
    started = time.monotonic()
    try:
        with _within(MAX_SECONDS):
            target.run(content)
    except HeadwaterError as error:
        text = str(error)
        if not text or "\n" in text or len(text) > MAX_SENTENCE or "Traceback" in text:
            raise Broken(f"expected one sentence, got {text[:200]!r}") from error
        return False
    finally:
        if time.monotonic() - started > MAX_SECONDS:
            raise Broken(f"expected an answer within {MAX_SECONDS:g} s")
    return True


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Broken(f"expected an answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def record(target: Target, content: bytes, tally: Tally, folder: Path | None) -> None:
    """Runs a target on one input and keeps a fault of a new place.

    Args:
        target: the target.
        content: the input.
        tally: what was counted so far; changed.
        folder: where the inputs of faults are written; None writes none.
    """
    tally.executions += 1
    try:
        tally.accepted += check(target, content)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - every other error is what is looked for
        place = _locate(error)
        if place not in tally.faults:
            tally.faults[place] = content
            print(f"{target.name}: FAULT {place}: {str(error)[:200]!r}", flush=True)
            if folder is not None:
                name = hashlib.sha256(place.encode()).hexdigest()[:12]
                (folder / f"{target.name}-{name}").write_bytes(content)


def _locate(error: BaseException) -> str:
    """Returns the error's class and the deepest line of ours that it passed."""
    ours = [
        f"{Path(each.filename).name}:{each.lineno}"
        for each in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}site-packages{os.sep}" not in each.filename and "benchmarks" not in each.filename
    ]
    return f"{type(error).__name__} at {ours[-1] if ours else 'the target'}"


# --- mutations -------------------------------------------------------------------------------------------------------

_NASTY = (
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e400",
    b"NaN",
    b"1" * 5000,
    b"[" * 3000,
    b'{"a":' * 500,
    b"\x00",
    b"\xff\xfe",
    b'"\\ud800"',
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\x1b[2J",
    b"../" * 8,
    b"&a [*a, *a]",
    b"2026-99-99",
    b"!!python/object:os.system",
    b"${HOME}",
    b"\n",
)


def mutate(content: bytes, target: Target, rng: random.Random) -> bytes:
    """Returns an input that differs from another in a few places.

    Args:
        content: the input.
        target: what it is for: other seeds are spliced in, and its words.
        rng: source of the choices.
    """
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = rng.choice((*_NASTY, *target.words) if rng.random() < 0.7 else (rng.randbytes(4),))
        elif kind == 5:
            data[at:end] = rng.choice((*_NASTY, *target.words))
        elif kind == 6:
            other = rng.choice(target.seeds)
            data[at:] = other[rng.randint(0, len(other)) :]
        elif kind == 7:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
        elif data:
            _replace_value(data, rng, target)
    return bytes(data[:MAX_BYTES])


def _replace_value(data: bytearray, rng: random.Random, target: Target) -> None:
    """Replaces what stands between two marks of JSON or YAML."""
    marks = [index for index, byte in enumerate(data) if byte in b':,{}[]"\n ']
    if len(marks) > 1:
        at = rng.randrange(len(marks) - 1)
        data[marks[at] + 1 : marks[at + 1]] = rng.choice((*_NASTY, *target.words))


def fuzz_randomly(target: Target, seconds: float, seed: int, folder: Path | None = None) -> Tally:
    """Runs a target on mutations of its seeds.

    Args:
        target: the target.
        seconds: how long.
        seed: seed of the mutations.
        folder: where the inputs of faults are written.
    """
    rng, tally = random.Random(f"{target.name} {seed}"), Tally()
    pool = list(target.seeds)
    for content in target.seeds:
        record(target, content, tally, folder)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = mutate(rng.choice(pool), target, rng)
        before = tally.accepted
        record(target, content, tally, folder)
        if tally.accepted > before and len(pool) < 500:
            pool.append(content)  # What is accepted leads further than what is refused at once.
    return tally


def fuzz_with_coverage(open_target: Callable[[], Target], seconds: float, seed: int, folder: Path) -> None:
    """Runs a target in libFuzzer, which ends this process; figures go to standard output.

    Args:
        open_target: opens the target; its imports are instrumented.
        seconds: how long.
        seed: seed of libFuzzer.
        folder: where the inputs of faults are written.
    """
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["common", "client", "server"], enable_loader_override=False):
        target = open_target()
    tally = Tally()
    corpus = Path(tempfile.mkdtemp())
    for number, content in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(content)
    words = corpus.with_suffix(".words")
    words.write_text("".join(f'"{_escape(word)}"\n' for word in (*_NASTY, *target.words) if len(word) < 60))

    def run(content: bytes) -> None:
        record(target, content, tally, folder)

    arguments = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-dict={words}", f"-max_len={MAX_BYTES}"]
    atheris.Setup([sys.argv[0], *arguments, f"-rss_limit_mb={2 * MAX_MIB}", "-timeout=60", str(corpus)], run)
    atheris.Fuzz()


def _escape(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)
