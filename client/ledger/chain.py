"""An append-only file of facts that tells when it was edited, cut, reordered, emptied or replaced by an older copy.

One folder holds `ledger.jsonl` (one JSON object a line; each ends in an HMAC-SHA256 over the line before and itself),
`ledger.key` (32 random bytes, owner-only), `anchor.json` (how many lines there are and the last one's HMAC) and `lock`.

Order of an append, under the lock: line, fsync, anchor, fsync. A note that something durable is done (`append` with
`durable=False`) is a line without either: a power cut may lose it, the next append anchors it. So after a crash at any
moment

* half a line beyond the anchor was never acknowledged to anyone: it is removed, and a "sealed" fact says so;
* one whole, valid line beyond the anchor counts, and the anchor follows;
* fewer valid lines than the anchor says is never a crash: the chain is damaged.

A folder is created whole, under another name, and renamed: a missing file in it is damage too.

A process verifies a chain's lines once and keeps them. It reads the files again when they are not as it left them, by
their stamps (inode, size, times; it sets a time of its own at each append, so that a later write shows even where the
clock of the file system is coarse). An edit that forges all stamps is found by the next process that opens the chain;
until then this one goes on from what it verified, so no charge is ever forgotten.

A chain alone cannot tell that all of it, its anchor too, is an older copy of itself. Whoever keeps a witness of it can
(`LedgerWitness`): how many lines there were and the HMAC of the last one, with an HMAC over both that tells the chain's
own witnesses from invented ones. `client/ledger/older_copy.py` says who keeps what.

Limit, stated: who can write the whole folder and read its key can write any history into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.files import flush, flush_folder, flush_surely, private_folder, stamp_file, write_atomic
from common.recent import Recent
from common.types import BadInput, HeadwaterError, LedgerDamaged, LedgerWitness

_CHAIN, _KEY, _ANCHOR, _LOCK = "ledger.jsonl", "ledger.key", "anchor.json", "lock"
_KEY_BYTES = 32
_START = "0" * 64
_NOTE = "committed"
"""The one event that is written without being flushed and anchored by itself."""


Stamp = tuple[int, ...]
"""Numbers of a file, as `stamp_file` returns them."""
Standing = Literal["held", "behind", "unknown"]
"""A chain has the line that a witness names; or lacks it, or has another there; or the witness was not made with its
key."""


@dataclass(frozen=True)
class Seen:
    """The last state of a chain that this process has seen or written.

    Attributes:
        key: the chain's key.
        length: number of its anchored lines.
        mac: HMAC of the last of them.
        times_behind: how often such lines were found gone.
    """

    key: bytes
    length: int
    mac: str
    times_behind: int


@dataclass
class OpenChain:
    """The verified facts of a chain whose lock is held, and the one way to add to them."""

    _folder: Path
    _key: bytes
    _macs: list[str]
    _num_anchored: int
    bodies: list[str]
    """JSON text of each line without its HMAC. It grows with the chain: not to be read without its lock."""
    _data: bytearray
    _stamps: tuple[Stamp, ...] = ()

    def is_as_left(self) -> bool:
        """Returns true where nobody has touched the files since this process verified or wrote them."""
        return bool(self._stamps) and self._stamps == _stamp_files(self._folder)

    def append(self, event: str, facts: Mapping[str, Any], *, durable: bool = True) -> int:
        """Add one fact; it is on disk and anchored when this returns its number (from 0).

        Args:
            event: what happened.
            facts: about it.
            durable: false for a note whose loss would only make the site assume worse; the file has it at once.
        """
        number = len(self.bodies)
        line = {"n": number, "time": round(time.time(), 3), "event": event, **facts}
        body = json.dumps(line, separators=(",", ":"), allow_nan=False)
        mac = _mac(self._key, self._macs[-1] if self._macs else _START, body)
        row = f'{body[:-1]},"mac":"{mac}"}}\n'.encode()
        # Where a write fails, or somebody else wrote without the lock, the chain is read again.
        known, self._stamps = self._stamps, ()
        before, after = _write_through(self._folder, row, durable)
        anchor = _write_anchor(self._folder, self._key, number + 1, mac) if durable else None
        self._data += row
        self.bodies.append(body)
        self._macs.append(mac)
        if durable:
            self._num_anchored = number + 1
        if known and before == known[0]:
            self._stamps = after, anchor or known[1], known[2]
        return number

    @property
    def num_bytes(self) -> int:
        """Bytes of all lines."""
        return len(self._data)

    def list_lines(self, key: bytes, data: bytes) -> tuple[list[str], list[str], int] | None:
        """Returns bodies and HMACs of the lines, and their size; None where a chain's file has another key or start."""
        size = len(self._data)
        return (self.bodies, self._macs, size) if key == self._key and data[:size] == self._data else None

    def anchor(self) -> None:
        """Writes the anchor of all lines."""
        stamp = _write_anchor(self._folder, self._key, len(self._macs), self._macs[-1])
        self._stamps = (self._stamps[0], stamp, self._stamps[2]) if self._stamps else ()
        self._num_anchored = len(self._macs)

    def get_mac(self, number: int) -> str:
        """Returns the HMAC of a line, which stands for it and every line before."""
        return self._macs[number]

    def make_witness(self) -> LedgerWitness:
        """Returns a witness of the lines that are surely on disk: no power cut leaves the chain behind it."""
        chain, length, mac = self._macs[0], self._num_anchored, self._macs[self._num_anchored - 1]
        return LedgerWitness(chain, length, mac, self._tag(chain, length, mac))

    def compare(self, witness: LedgerWitness) -> Standing:
        """Returns how the chain stands to a witness that somebody shows."""
        tag = self._tag(witness.chain, witness.length, witness.mac)
        if witness.chain != self._macs[0] or not hmac.compare_digest(tag, witness.tag):
            return "unknown"
        held = witness.length <= len(self._macs) and self._macs[witness.length - 1] == witness.mac
        return "held" if held else "behind"

    def lacks(self, seen: Seen) -> bool:
        """Returns True where lines that this process has seen are not there, under the key that they had."""
        return seen.key == self._key and self._macs[seen.length - 1 : seen.length] != [seen.mac]

    def note_seen(self, times_behind: int) -> Seen:
        """Returns what is seen now: only lines that no power cut takes away."""
        return Seen(self._key, self._num_anchored, self._macs[self._num_anchored - 1], times_behind)

    def _tag(self, chain: str, length: int, mac: str) -> str:
        key = hmac.new(self._key, b"witness", hashlib.sha256).digest()
        return _mac(key, chain, f"{length} {mac}")


def create(folder: Path, event: str, facts: Mapping[str, Any]) -> None:
    """Creates a chain with its first fact, unless there is one already or another process is faster.

    Args:
        folder: folder of the chain.
        event: name of the first event.
        facts: its facts.
    """
    if folder.exists():
        return
    private_folder(folder.parent)
    draft = _draft(folder, [(event, facts)])
    try:
        os.rename(draft, folder)  # Fails on a folder that is not empty: then the other process created it.
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            raise
    flush_folder(folder.parent)


def identify_files(folder: Path) -> tuple[int, ...]:
    """Returns numbers that change where a chain's folder is replaced or restored; appending does not change them.

    Where the key's file stays as it is, they change if lines are gone that this process has seen or written.
    """
    with exclusive(folder):
        return *stamp_file(folder / _KEY), _SEEN[str(folder)].times_behind


@contextmanager
def exclusive(folder: Path) -> Iterator[OpenChain]:
    """The chain, verified as a whole and healed from a crash, while no other process or thread has it.

    A thread that has it already gets the same chain again, which nobody else can have changed meanwhile.

    Raises:
        LedgerDamaged: a file is missing, or a line or the anchor does not verify; says what was seen.
    """
    place = str(folder)
    held = _HELD.chains.get(place)
    if held is not None:
        yield held
        return
    with _locked(folder):
        chain = _KNOWN.take(place)
        if chain is None or not chain.is_as_left():
            chain = _verified(folder, chain)
        seen = _SEEN.get(place)
        times = 0 if seen is None else seen.times_behind + chain.lacks(seen)
        try:
            _SEEN[place] = chain.note_seen(times)
            _HELD.chains[place] = chain
            yield chain
            # Not after an error, which may have come between two changes of it: the next one reads all lines.
            _KNOWN.keep(place, chain, chain.num_bytes)
        finally:
            _HELD.chains.pop(place, None)
            _SEEN[place] = chain.note_seen(times)


def make_durable(folder: Path) -> None:
    """Puts all lines on the disk, where a simulation leaves its other files to the operating system.

    The anchor follows when it may: behind more lines than it counts, a chain is sound.
    """
    flush_surely(folder / _CHAIN)


def read_verifiable(folder: Path) -> list[str]:
    """Returns the bodies from the start of a damaged chain that still verify with its key; none without key or file."""
    try:
        bodies, _, _ = _whole_lines(_read(folder, _CHAIN), _read(folder, _KEY))
    except LedgerDamaged:
        return []
    return bodies


def read_legible(folder: Path) -> list[dict[str, Any]]:
    """Returns the JSON objects of a damaged chain, verified or not. Only ever to be used to assume worse."""
    try:
        lines = _read(folder, _CHAIN).splitlines()
    except LedgerDamaged:
        return []
    objects = []
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            objects.append(values)
    return objects


def replace(folder: Path, aside: Path, facts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Put a new chain, with a new key, in a damaged one's place; the damaged files are kept under another name.

    A crash leaves the old chain, or none at all; the caller must take a missing chain for a damaged one.

    Args:
        folder: the chain's.
        aside: where its old files go; nothing may be there.
        facts: of the new chain, as (event, facts).
    """
    draft = _draft(folder, facts)
    if folder.exists():
        os.rename(folder, aside)
    os.rename(draft, folder)
    flush_folder(folder.parent)


def _draft(folder: Path, facts: Sequence[tuple[str, Mapping[str, Any]]]) -> Path:
    """A whole new chain under another name beside `folder`."""
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        key = os.urandom(_KEY_BYTES)
        write_atomic(draft / _KEY, key)
        write_atomic(draft / _LOCK, b"")
        write_atomic(draft / _CHAIN, b"")
        chain = OpenChain(draft, key, [], 0, [], bytearray())
        for event, about in facts:
            chain.append(event, about)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return draft


# --- verification ----------------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError as error:
        raise _describe_unreadable(folder, _LOCK, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # Released by the operating system if the process dies.
        try:
            current = os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK))
        except FileNotFoundError:
            current = False
        if not current:
            raise LedgerDamaged(f"ledger {folder.name}: it was replaced by a recovery meanwhile; ask again")
        yield
    finally:
        os.close(descriptor)


def _verified(folder: Path, known: OpenChain | None) -> OpenChain:
    """Returns a chain as its files have it, healed from a crash.

    All bytes are compared with those that verified before in this process, so that an edit anywhere is seen; HMACs are
    computed over new ones only. That takes a thousandth of all HMACs' time.

    Args:
        folder: folder of the chain.
        known: the chain as this process had it last; None where it had not.
    """
    stamps = _stamp_files(folder)  # Before anything is read: who writes meanwhile changes them.
    key = _read(folder, _KEY)
    if len(key) != _KEY_BYTES:
        raise LedgerDamaged(f"ledger {folder.name}: its key does not have {_KEY_BYTES} bytes")
    length, anchored_mac = _read_anchor(folder, key)
    data = _read(folder, _CHAIN)
    bodies, macs, end = _whole_lines_after(known, data, key)
    _check_against_anchor(folder.name, macs, data[end:], length, anchored_mac)
    chain = OpenChain(folder, key, macs, length, bodies, bytearray(data[:end]), stamps)
    if end < len(data):
        _cut(folder / _CHAIN, end)
        chain.append("sealed", {"bytes": len(data) - end})
    elif any(json.loads(body)["event"] != _NOTE for body in bodies[length:]):
        chain.anchor()
    return chain


def _whole_lines_after(known: OpenChain | None, data: bytes, key: bytes) -> tuple[list[str], list[str], int]:
    """Returns what `_whole_lines` does, without computing HMACs over lines that a chain has already."""
    lines = None if known is None else known.list_lines(key, data)
    if lines is None:
        return _whole_lines(data, key)
    bodies, macs, start = lines
    new_bodies, new_macs, length = _whole_lines(data[start:], key, macs[-1] if macs else _START)
    return bodies + new_bodies, macs + new_macs, start + length


_SEEN: dict[str, Seen] = {}
"""Folder -> what was seen; used and changed under the chain's lock only."""


class _Held(threading.local):
    """The chains whose lock a thread has, by folder."""

    def __init__(self) -> None:
        self.chains: dict[str, OpenChain] = {}


_HELD = _Held()

_KNOWN = Recent[OpenChain](64 << 20)
"""Folder -> the chain as this process left it, up to so many bytes of lines; used and changed under its lock only."""


def _whole_lines(data: bytes, key: bytes, previous: str = _START) -> tuple[list[str], list[str], int]:
    """Returns bodies and HMACs of the valid lines from the start, and the offset of their end.

    Args:
        data: the lines.
        key: the chain's key.
        previous: HMAC of the line before them.
    """
    bodies: list[str] = []
    macs: list[str] = []
    end = 0
    for line in data.splitlines(keepends=True):
        body, mac = _split(line)
        if mac is None or not hmac.compare_digest(mac, _mac(key, previous, body)):
            break
        bodies.append(body)
        macs.append(mac)
        previous = mac
        end += len(line)
    return bodies, macs, end


def _check_against_anchor(name: str, macs: list[str], rest: bytes, length: int, anchored_mac: str) -> None:
    found = len(macs)
    # A newline inside the rest means that a whole line, or more than one, does not verify.
    if found < length and b"\n" in rest:
        raise LedgerDamaged(f"ledger {name}: line {found + 1} of {length} was edited, moved or removed")
    if found < length:
        raise LedgerDamaged(
            f"ledger {name}: it holds {found} whole lines where its anchor says {length}; it was cut or replaced "
            "by an older copy"
        )
    if b"\n" in rest[:-1]:
        raise LedgerDamaged(f"ledger {name}: after line {found} stands more than a torn line")
    if length and macs[length - 1] != anchored_mac:
        raise LedgerDamaged(f"ledger {name}: line {length} is not the one its anchor names")


def _split(line: bytes) -> tuple[str, str | None]:
    """The authenticated part of a line and its HMAC; None where the line has no such form."""
    head, separator, tail = line.rpartition(b',"mac":"')
    if not separator or len(tail) != 67 or not tail.endswith(b'"}\n') or not tail.isascii():
        return "", None
    return head.decode(errors="replace") + "}", tail[:64].decode()


def _mac(key: bytes, previous: str, body: str) -> str:
    return hmac.new(key, f"{previous}\n{body}".encode(), hashlib.sha256).hexdigest()


# --- anchor and bytes ------------------------------------------------------------------------------------------------


def _write_anchor(folder: Path, key: bytes, length: int, mac: str) -> Stamp:
    """Writes the anchor and returns its stamp."""
    anchor = {"length": length, "last": mac, "mac": _mac(key, "anchor", f"{length} {mac}")}
    path = folder / _ANCHOR
    write_atomic(path, json.dumps(anchor).encode())
    _set_own_time(path)
    return stamp_file(path)


def _read_anchor(folder: Path, key: bytes) -> tuple[int, str]:
    try:
        anchor = json.loads(_read(folder, _ANCHOR))
        length, last, mac = int(anchor["length"]), str(anchor["last"]), str(anchor["mac"])
        verified = hmac.compare_digest(mac.encode(), _mac(key, "anchor", f"{length} {last}").encode())
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise LedgerDamaged(f"ledger {folder.name}: its anchor cannot be read") from error
    if not verified:
        raise LedgerDamaged(f"ledger {folder.name}: its anchor does not verify with its key")
    return length, last


def _read(folder: Path, name: str) -> bytes:
    try:
        with open(f"{folder}/{name}", "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise _describe_unreadable(folder, name, error) from error


def _describe_unreadable(folder: Path, name: str, error: OSError) -> HeadwaterError:
    """Returns the damage that explains why a file cannot be opened; bad input where the file may be sound."""
    if isinstance(error, FileNotFoundError):
        return LedgerDamaged(f"ledger {folder.name}: its file {name!r} is missing")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return LedgerDamaged(f"ledger {folder.name}: its file {name!r} is no file in a folder")
    return BadInput(f"ledger {folder.name}: its file {name!r} cannot be opened: {error.strerror}")


def _stamp_files(folder: Path) -> tuple[Stamp, ...]:
    """Returns the stamps of chain, anchor and key; none where one of them cannot be opened."""
    try:
        # Opened first: a network file system may answer for a closed file from what it remembers.
        descriptor = os.open(f"{folder}/{_CHAIN}", os.O_RDONLY)
        try:
            chain = stamp_file(descriptor)
        finally:
            os.close(descriptor)
        return chain, stamp_file(f"{folder}/{_ANCHOR}"), stamp_file(f"{folder}/{_KEY}")
    except OSError:
        return ()


def _set_own_time(file: int | Path) -> None:
    """Gives a file that was just written a time of its own: a later write has another, however coarse the clock is."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _write_through(folder: Path, data: bytes, durable: bool) -> tuple[Stamp, Stamp]:
    """Appends to a chain's file and returns its stamps before and after."""
    descriptor = os.open(f"{folder}/{_CHAIN}", os.O_WRONLY | os.O_APPEND)
    try:
        before = stamp_file(descriptor)
        while data:
            data = data[os.write(descriptor, data) :]
        _set_own_time(descriptor)
        if durable:
            flush(descriptor)
        return before, stamp_file(descriptor)
    finally:
        os.close(descriptor)


def _cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)
        flush(file.fileno())
