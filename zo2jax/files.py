"""Stores whose pages lie in files: a run's own page files, or the files of the model."""

import mmap
import os
import queue
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zo2jax.link import Edit, Link, StoreError
from zo2jax.marks import mark
from zo2jax.models.tensors import Extent, Stamp
from zo2jax.pages import Layout

Pages = tuple[jax.Array, ...]


class _Staged(ABC):
    """Pages that come from files through host memory, which they share with others."""

    def __init__(self, link: Link, workers: ThreadPoolExecutor, staging: "queue.Queue[np.ndarray]", layout: Layout):
        self._link, self._workers, self._staging, self._layout = link, workers, staging, layout

    @abstractmethod
    def _read(self, memory: np.ndarray) -> None:
        """Reads the pages into uint8 [layout.nbytes]."""

    def upload(self) -> Future[Pages]:
        """Reads the pages, then copies to the device."""

        def work(memory: np.ndarray) -> Pages:
            with mark("disk read", len(memory)):
                self._read(memory)
            pages = tuple(self._link.up(page) for page in self._layout.views(memory))
            return jax.block_until_ready(pages)

        return self._workers.submit(self._with_memory, work)

    def read(self) -> list[np.ndarray]:
        """The pages, in memory of their own."""
        memory = np.frombuffer(mmap.mmap(-1, max(self._layout.nbytes, 1)), np.uint8)[: self._layout.nbytes]
        self._read(memory)
        return self._layout.views(memory)

    @contextmanager
    def _memory(self) -> Iterator[np.ndarray]:
        """Host memory for the pages, uint8 [layout.nbytes]; waits until some is free."""
        memory = self._staging.get()
        try:
            yield memory[: self._layout.nbytes]
        finally:
            self._staging.put(memory)

    def _with_memory(self, work: Callable[[np.ndarray], Any]) -> Any:
        with self._memory() as memory:
            return work(memory)


class OnDisk(_Staged):
    """Pages in a file, read and written past the page cache where the file system allows it.

    The file is a run's own: it is made anew when the run starts, from the model or a checkpoint, and its checksum lives
    in memory; so no page that was torn, by whatever, is ever taken for a good one.
    """

    def __init__(
        self, link: Link, workers: ThreadPoolExecutor, staging: "queue.Queue[np.ndarray]", path: Path, layout: Layout
    ):
        """Makes the file in its full size.

        Raises:
            StoreError: if there is no room for it, or it cannot be written.
        """
        super().__init__(link, workers, staging, layout)
        self._path = path
        self._checksum: int | None = None  # of what is in the file, if that is whole
        try:
            self._file = _open_direct(path)
            self.close = weakref.finalize(self, _remove, self._file, path)
            try:
                os.posix_fallocate(self._file, 0, max(layout.nbytes, 1))
            except OSError:
                self.close()
                raise
        except OSError as error:
            raise StoreError(
                error.errno,
                f"no page file of {layout.nbytes} bytes at {path} ({error.strerror}): it needs room, and a folder that "
                "can be written",
            ) from error

    def fill(self, pack: Callable[[list[np.ndarray]], None]) -> None:
        """Writes what ``pack`` puts into the pages."""

        def work(memory: np.ndarray) -> None:
            pack(self._layout.views(memory))
            self._write(memory)

        self._with_memory(work)

    def commit(self, pages: Pages) -> Future[None]:
        """Copies to host memory, then writes the file."""

        def work(memory: np.ndarray) -> None:
            for array, page in zip(pages, self._layout.views(memory), strict=True):
                self._link.down(array, page).result()
            with mark("disk write", len(memory)):
                self._write(memory)

        return self._workers.submit(self._with_memory, work)

    @contextmanager
    def edit(self) -> Iterator[Edit]:
        """Reads the file, and writes it at the end."""
        with self._memory() as memory:
            with mark("disk read", len(memory)):
                self._read(memory)
            edit = Edit(self._layout.views(memory), self._link)
            yield edit
            edit.finish()
            with mark("disk write", len(memory)):
                self._write(memory)

    def _read(self, memory: np.ndarray) -> None:
        if not self.close.alive:
            raise StoreError(f"the page file {self._path} is gone: its run is closed, and lives on in its directory")
        try:
            whole = _fill(memory, self._file, 0)
        except OSError as error:
            raise StoreError(
                error.errno, f"the page file {self._path} cannot be read ({error.strerror}){_ON_A_DISK}"
            ) from error
        if not whole or zlib.crc32(memory.data) != self._checksum:
            raise StoreError(f"the page file {self._path} is not what was written to it{_ON_A_DISK}")

    def _write(self, memory: np.ndarray) -> None:
        self._checksum = None
        try:
            done = 0
            while done < len(memory):
                done += os.pwritev(self._file, [memory[done:].data], done)
        except OSError as error:
            raise StoreError(
                error.errno, f"the page file {self._path} cannot be written ({error.strerror}){_ON_A_DISK}"
            ) from error
        self._checksum = zlib.crc32(memory.data)


class InFiles(_Staged):
    """Pages that are only read, from the model's own files, in which their matrices lie as they are in the pages.

    They are read through the page cache, by ``preadv`` into the memory that the link takes them from. A memory map is
    no faster, and would end the process where a file had become shorter. The files stay open, so that they may be
    removed or replaced by others of their names; one that is written to is an error.
    """

    def __init__(
        self,
        link: Link,
        workers: ThreadPoolExecutor,
        staging: "queue.Queue[np.ndarray]",
        layout: Layout,
        pieces: Sequence[tuple[int, Extent]],
    ):
        """Opens the files; ``pieces`` are those of `zo2jax.pages.Layout.pieces`.

        Raises:
            StoreError: if they cannot be read, or are no longer what they were when the model was loaded.
        """
        super().__init__(link, workers, staging, layout)
        self._pieces, self._files = pieces, dict[Path, int]()
        self._stamps = {extent.path: extent.stamp for _, extent in pieces}
        self.close = weakref.finalize(self, _close, self._files)
        for path in self._stamps:
            with _naming(path):
                self._files[path] = os.open(path, os.O_RDONLY)
        self._check()

    def commit(self, pages: Pages) -> None:
        """Is never called."""
        raise AssertionError("the model's own files are only read")

    def edit(self) -> Any:
        """Is never called."""
        raise AssertionError("the model's own files are only read")

    def _read(self, memory: np.ndarray) -> None:
        if not self.close.alive:
            raise StoreError(f"{', '.join(map(str, self._stamps))} are closed, as their run is: load the model again")
        for start, extent in self._pieces:
            with _naming(extent.path):
                _fill(memory[start : start + extent.nbytes], self._files[extent.path], extent.offset)
        self._check()  # afterwards: it sees what was written meanwhile

    def _check(self) -> None:
        for path, stamp in self._stamps.items():
            with _naming(path):
                now = Stamp.of(os.fstat(self._files[path]))
            if now != stamp:
                raise StoreError(
                    f"{path} has changed since the model was loaded ({stamp.nbytes} bytes then, {now.nbytes} now, or "
                    f"written to since){_GO_ON}"
                )


def _close(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the operating system says becomes a StoreError about one of the model's files."""
    try:
        yield
    except OSError as error:
        message = f"the model's file {path} cannot be read ({error.strerror}){_ON_A_DISK}"
        raise StoreError(error.errno, message) from error


def _fill(memory: np.ndarray, file: int, offset: int) -> bool:
    """Reads uint8 [nbytes] from a place in a file; whether it holds so many."""
    done = 0
    while done < len(memory) and (count := os.preadv(file, [memory[done:].data], offset + done)):
        done += count
    return done == len(memory)


_GO_ON = ": the run goes on from its last checkpoint and journal"
_ON_A_DISK = f"{_GO_ON}, once the disk is well"


def _remove(file: int, path: Path) -> None:
    """Closes and removes a page file; also at the end of the process, or when nobody has its store any more."""
    os.close(file)
    path.unlink(missing_ok=True)


def _open_direct(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:  # file systems in memory have no direct access
        return os.open(path, flags, 0o600)
