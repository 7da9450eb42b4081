"""The journal of a run: what each step found, in a few bytes. Base weights and journal are the weights at any step.

A step of zeroth-order training is known from its addresses, which follow from the key and the number of the step, and
from the coefficients of its update (MeZO, arXiv 2305.17333, section 2.1: "storage-efficient"). The file begins with
three lines of text, of which the second is the `Header` as JSON and the third the CRC-32 of the first two; then comes a
record of ``13 + 4 M + 4 K`` bytes for each step, little-endian, for M members and K directions:

    flags uint8 | losses float32 [M] | coefs float32 [K] | decay float32 | crc uint32

Where a step has fewer losses (`zo2jax.svrg`), zeros follow. The CRC-32 of a record is also that of the header and of
the number of the step, so that no record can stand in another place or in another journal. What follows from these is
not written: g and the loss from the losses, the state of the optimizer from the same, folds and the place in the data
from the number of the step.
"""

import dataclasses
import errno
import hashlib
import json
import os
import time
import weakref
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bits
from zo2jax.directions import Direction, from_json, step_keys
from zo2jax.header import Header
from zo2jax.metrics import write_atomically
from zo2jax.updates import Update

_MAGIC = b"zo2jax journal 1\n"
_HEADER_LIMIT = 2**20
_SKIPPED = 1


class JournalError(ValueError):
    """A journal that cannot be read, or belongs to something else; the message says what to do.

    >>> issubclass(JournalError, ValueError)
    True
    """


class Record(NamedTuple):
    """A step, as the journal has it.

    >>> Record(np.float32([2.5, 2.4]), np.float32([1e-3]), np.float32(0)).skipped
    False
    """

    losses: np.ndarray
    """float32 [M]."""
    coefs: np.ndarray
    """float32 [K], of 12 significant bits."""
    decay: np.ndarray
    """float32 []."""
    skipped: bool = False
    """A loss or a coefficient was not finite: nothing moved."""

    @property
    def bytes(self) -> bytes:
        """What two equal records have in common, NaNs included.

        >>> len(Record(np.float32([2.5, 2.4]), np.float32([1e-3]), np.float32(0)).bytes)
        17
        """
        return b"".join([*(np.asarray(x, "<f4").tobytes() for x in self[:3]), bytes([self.skipped])])


def _dtype(header: Header) -> np.dtype:
    losses, coefs = ("<f4", (header.members,)), ("<f4", (header.directions,))
    return np.dtype([("flags", "u1"), ("losses", *losses), ("coefs", *coefs), ("decay", "<f4"), ("crc", "<u4")])


def _crc(start: int, step: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(step.to_bytes(8, "little"), start))


def _packed(header: Header) -> tuple[bytes, int]:
    """(the lines before the records, their CRC-32)."""
    head = _MAGIC + json.dumps(header.as_json(), sort_keys=True).encode() + b"\n"
    crc = zlib.crc32(head)
    return head + b"%08x\n" % crc, crc


class Recorded:
    """The journal in a file, to read; what another process writes meanwhile is not seen.

    Args:
        path: of the file. It is not changed.

    Raises:
        FileNotFoundError: if there is none.
        JournalError: if it is no journal, of a version or a generator that this zo2jax does not know, or damaged
            otherwise than at its end; with the number of the step.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Journal.create(Path(folder) / "journal", Header(key=(0, 7))) as journal:
    ...         journal.append(Record(np.float32([2.5, 2.4]), np.float32([1e-3]), np.float32(0)))
    ...     found = Recorded(Path(folder) / "journal")
    ...     len(found), found.record(0).losses.tolist()
    (1, [2.5, 2.4000000953674316])
    """

    def __init__(self, path: Path):
        """Reads and checks all of it."""
        self.path = path
        data = path.read_bytes()
        self.header, self._crc, begin = _read_header(path, data)
        self._updates: dict[tuple[int, int, int], Update] = {}
        self._rows, self.whole = self._read_rows(data[begin:])
        self.whole += begin
        """Bytes of the file up to its last whole record; what follows was torn off while it was written."""

    def check(self, header: Header) -> None:
        """Raises JournalError if a header says something else than this one's; see `Header.differences`.

        How many members are evaluated at once is not asked: a run keeps to this one's.
        """
        if differences := self.header.differences(dataclasses.replace(header, probe_batch=self.header.probe_batch)):
            raise JournalError(
                f"{self.path} is of another run ({'; '.join(differences)}): use what it was begun with, or another "
                "directory"
            )

    def __len__(self) -> int:
        """How many steps it has."""
        return len(self._rows)

    def record(self, step: int) -> Record:
        """The record of a step, counted from 0."""
        row = self._rows[step]
        return Record(row["losses"], row["coefs"], row["decay"], bool(row["flags"] & _SKIPPED))

    def __str__(self) -> str:
        """What people want to know of it, in a few lines."""
        header = self.header
        losses = self._rows["losses"][:, : header.present].mean(axis=1)
        skipped = int((self._rows["flags"] & _SKIPPED).sum())
        tenth = max(len(losses) // 10, 1)
        lines = {
            "steps": f"{len(self)}" + (f", {skipped} of them skipped" if skipped else ""),
            "loss": f"{losses[:tenth].mean():.4f} to {losses[-tenth:].mean():.4f} (first and last tenth)"
            if len(self)
            else "",
            "estimator": header.estimator + (f", {header.probe_batch} members at once" if header.probe_batch else ""),
            "optimizer": header.optimizer,
            "hybrid": header.hybrid,
            "matrices": f"{header.dtype}, {header.rounding} rounding" + (f", {header.format}" if header.format else ""),
            "base": hashlib.sha256(json.dumps(header.base, sort_keys=True).encode()).hexdigest()[:16],
            "key": f"{header.key[0]}, {header.key[1]}",
            "size": f"{self.whole:,} bytes",
        }
        return "\n".join([str(self.path), *(f"  {name:9s} {value}" for name, value in lines.items() if value)])

    def differs(self, other: "Recorded") -> str:
        """In what another journal differs, in a sentence or two.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal.create(Path(folder) / "journal", Header(key=(0, 7))) as journal:
        ...         journal.differs(journal)
        'the same 0 steps'
        """
        both = min(len(self._rows), len(other._rows))
        said = self.header.differences(other.header, "{} and {}")
        if self._rows.dtype != other._rows.dtype:
            return "; ".join(said)
        common = next((i for i in range(both) if self.record(i).bytes != other.record(i).bytes), both)
        lengths = (
            f", of {len(self._rows)} and {len(other._rows)}" if max(len(self._rows), len(other._rows)) > common else ""
        )
        return "; ".join([*said, f"the same {common} steps{lengths}"])

    def copy(self, path: Path, steps: int | None = None, config: Mapping[str, Any] | None = None) -> None:
        """Writes a new journal with the first ``steps`` of these (all if None), and perhaps another config.

        Raises:
            ValueError: if there are fewer steps.
            FileExistsError: if there is something.
        """
        steps = len(self._rows) if steps is None else steps
        if not 0 <= steps <= len(self._rows):
            raise ValueError(f"{self.path} has {len(self._rows)} steps: expected at most as many, not {steps}")
        if path.exists():
            raise FileExistsError(f"{path} exists: expected the name of a new file")
        header = self.header if config is None else dataclasses.replace(self.header, config=config)
        head, crc = _packed(header)
        rows = self._rows[:steps].copy()
        for step, row in enumerate(rows):
            row["crc"] = _crc(crc, step, row.tobytes()[:-4])
        write_atomically(path, head + rows.tobytes())

    def updates(self, start: int, stop: int, length: int) -> Update:
        """The updates of steps ``start`` to ``stop`` - 1, with another axis in front, of ``length`` >= stop - start.

        What lies beyond ``stop`` is of no meaning. They are kept: every block of a replay asks for the same ones.
        """
        if (asked := (start, stop, length)) in self._updates:
            return self._updates[asked]
        rows, header = self._rows[start:stop], self.header
        rows = np.concatenate([rows, np.zeros(length - len(rows), rows.dtype)])
        steps = start + np.arange(length, dtype=np.uint32)
        counts, direction = (header.directions, header.anchor_directions), from_json(header.direction)
        keys = _keys(header.typed_key, steps, *counts, direction)
        part = bits.cut12(jnp.float32(1 - header.momentum))
        fresh = jnp.where(rows["flags"] & _SKIPPED, 0, part) if header.momentum else None
        found = Update(keys, jnp.asarray(rows["coefs"]), jnp.asarray(rows["decay"]), fresh)
        self._updates[asked] = found
        return found

    def _read_rows(self, data: bytes) -> tuple[np.ndarray, int]:
        """(records, their bytes). An end that is torn is left out; other damage is an error."""
        dtype = _dtype(self.header)
        rows = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        for step, row in enumerate(rows):
            body = row.tobytes()[:-4]
            if int(row["crc"]) == _crc(self._crc, step, body):
                continue
            if len(data[step * dtype.itemsize :].rstrip(b"\0")) <= len(body):
                return rows[:step], step * dtype.itemsize  # the file had grown, but was not written: the power failed
            raise JournalError(
                f"{self.path} is damaged at step {step + 1} of {len(rows)}: its checksum does not fit. Put the file "
                "back from a copy"
            )
        return rows, len(rows) * dtype.itemsize


def _read_header(path: Path, data: bytes) -> tuple[Header, int, int]:
    """(header, its CRC-32, where the records begin)."""
    if not data.startswith(_MAGIC):
        known = data.startswith(_MAGIC.split(b" 1")[0])
        what = f"a journal of another version ({data[:40]!r})" if known else f"no journal ({data[:20]!r})"
        raise JournalError(f"{path} is {what}: expected a file that begins with {_MAGIC.decode().strip()!r}")
    lines = data[:_HEADER_LIMIT].split(b"\n", 3)
    try:
        crc = zlib.crc32(b"\n".join(lines[:2]) + b"\n")
        if len(lines) < 4 or lines[2] != b"%08x" % crc:
            raise ValueError("its checksum does not fit")
        header = Header.from_json(json.loads(lines[1]))
    except (ValueError, TypeError, KeyError) as error:
        raise JournalError(f"{path} is damaged in its header ({error}): put the file back from a copy") from error
    if header.generator != bits.GENERATOR:
        raise JournalError(
            f"{path} was written with version {header.generator} of the generator, here it is {bits.GENERATOR}: the "
            "same addresses have other values. Use the zo2jax that wrote it"
        )
    return header, crc, sum(len(line) + 1 for line in lines[:3])


@partial(jax.jit, static_argnames=("count", "anchor", "direction"))
def _keys(key: jax.Array, steps: jax.Array, count: int, anchor: int, direction: Direction) -> jax.Array:
    return jax.vmap(lambda step: step_keys(key, step, count, direction, anchor))(steps)


class Journal(Recorded):
    """The journal of a run that goes on: records are appended. A new one is made by `create`.

    Args:
        path: of the file, which is there. A torn end is cut off.
        sync_every: seconds after which a record is on the disk, should the power fail; 0: each at once. A process that
            is killed loses none.
        like: what the header has to say; anything if None.

    Raises:
        JournalError: if its header says something else, or as `Recorded` does. The file has not changed then.
    """

    def __init__(self, path: Path, sync_every: float = 1.0, like: Header | None = None):
        """Reads all of it."""
        super().__init__(path)
        if like is not None:
            self.check(like)
        self._file = os.open(path, os.O_RDWR)
        self._close = weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, self.whole)
        self._count, self._every, self._synced = len(self._rows), sync_every, time.monotonic()
        self.sync()

    @classmethod
    def create(cls, path: Path, header: Header, sync_every: float = 1.0) -> "Journal":
        """A new journal; it is there with its header, or not at all.

        Raises:
            OSError: if the file cannot be written.
        """
        write_atomically(path, _packed(header)[0])
        return cls(path, sync_every)

    def __enter__(self) -> "Journal":
        """The journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def __len__(self) -> int:
        """How many steps it has, appended ones included."""
        return self._count

    def append(self, record: Record) -> None:
        """Adds the record of the next step; it survives the end of the process.

        Raises:
            OSError: if it cannot be written; the journal is as it was before.
        """
        row = np.zeros((), _dtype(self.header))
        row["flags"] = _SKIPPED if record.skipped else 0
        row["losses"], row["coefs"], row["decay"] = record.losses, record.coefs, record.decay
        body = row.tobytes()[:-4]
        row["crc"] = _crc(self._crc, self._count, body)
        try:
            if os.pwrite(self._file, row.tobytes(), self.whole) != row.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._synced >= self._every:
                self.sync()
        except OSError as error:
            os.ftruncate(self._file, self.whole)
            raise OSError(
                f"step {self._count + 1} could not be written to {self.path} ({error}): free some space, or make the "
                f"folder writable. The {self._count} steps before it are whole"
            ) from error
        self._count += 1
        self.whole += row.nbytes

    def cut(self, steps: int) -> None:
        """Forgets all steps but the first ones, of those that it had when it was opened."""
        assert steps <= self._count == len(self._rows), "steps that were appended are not forgotten"
        self.whole -= (self._count - steps) * self._rows.dtype.itemsize
        os.ftruncate(self._file, self.whole)
        self._rows, self._count = self._rows[:steps], steps
        self.sync()

    def sync(self) -> None:
        """Returns when all records are on the disk.

        Raises:
            OSError: if they cannot be put there.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise type(error)(error.errno, f"{self.path} could not be put on the disk ({error.strerror})") from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Puts all records on the disk and closes the file. Closing twice does nothing more."""
        if self._close.alive:
            self.sync()
            self._close()
