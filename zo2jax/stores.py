"""Stores: where the pages of a block live. On the device, in page-locked host memory, or in files."""

import mmap
import os
import queue
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.link import Copy, Link, StoreError, check_host_memory
from zo2jax.models.blocks import Params
from zo2jax.models.tensors import Extent, Stamp
from zo2jax.pages import Layout

Pages = tuple[jax.Array, ...]


class Store(Protocol):
    """The pages of one block."""

    def upload(self) -> "Pages | Future[Pages]":
        """The pages on the device; begins now, and may end later."""

    def commit(self, pages: Pages) -> "Copy | Future[None] | None":
        """Keeps changed pages; begins now, and has ended when the result is there."""

    def read(self) -> list[np.ndarray] | Pages:
        """The pages as they are, for whoever copies them."""


class OnDevice:
    """Pages that stay on the device."""

    def __init__(self, pages: Pages):
        """Keeps them."""
        self._pages: Pages | None = pages

    def upload(self) -> Pages:
        """The pages, given away until the next `commit`."""
        assert self._pages is not None
        return self._pages

    def commit(self, pages: Pages) -> None:
        """Takes the place of the old pages."""
        self._pages = pages

    def read(self) -> Pages:
        """The pages."""
        return self.upload()


class OnHost:
    """Pages in page-locked host memory."""

    def __init__(self, link: Link, pages: list[np.ndarray]):
        """Keeps pages whose memory came from the link."""
        self._link, self._pages = link, pages

    def upload(self) -> Pages:
        """Copies to the device."""
        return tuple(self._link.up(page) for page in self._pages)

    def commit(self, pages: Pages) -> Copy:
        """Copies back to the same memory."""
        copies = [self._link.down(array, page) for array, page in zip(pages, self._pages, strict=True)]

        def finish() -> None:
            for copy in copies:
                copy.result()

        return Copy(finish)

    def read(self) -> list[np.ndarray]:
        """Views of the memory."""
        return self._pages


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
            self._read(memory)
            pages = tuple(self._link.up(page) for page in self._layout.views(memory))
            return jax.block_until_ready(pages)

        return self._workers.submit(self._with_memory, work)

    def read(self) -> list[np.ndarray]:
        """The pages, in memory of their own."""
        memory = np.frombuffer(mmap.mmap(-1, max(self._layout.nbytes, 1)), np.uint8)[: self._layout.nbytes]
        self._read(memory)
        return self._layout.views(memory)

    def _with_memory(self, work: Callable[[np.ndarray], Any]) -> Any:
        memory = self._staging.get()
        try:
            return work(memory[: self._layout.nbytes])
        finally:
            self._staging.put(memory)


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
            self._write(memory)

        return self._workers.submit(self._with_memory, work)

    def _read(self, memory: np.ndarray) -> None:
        if not self.close.alive:
            raise StoreError(f"the page file {self._path} is gone: its run is closed, and lives on in its checkpoint")
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


_GO_ON = ": the run goes on from its last checkpoint"
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


def result(pages: "Pages | Future[Pages]") -> Pages:
    """The pages, once they are under way to the device at least.

    >>> result((jnp.ones(1),))[0].shape
    (1,)
    """
    return pages.result() if isinstance(pages, Future) else pages


_STAGING = 4
"""Blocks of the disk tier that are in host memory at a time."""


class Tiers:
    """Makes the stores of a model, and lets go of them together.

    Args:
        host: bytes of the blocks in host memory.
        disk: of those on the disk.
        directory: for page files, if there are any.
        pinned: whether host memory is page-locked.

    Raises:
        StoreError: if there is too little host memory.

    >>> tiers = Tiers([64], [], None, pinned=True)
    >>> store = tiers.keep("host", "w", Layout.of({"w": np.ones((2, 2), np.float32)}), {"w": np.ones((2, 2))})
    >>> float(store.read()[0][3])
    1.0
    """

    def __init__(self, host: Sequence[int], disk: Sequence[int], directory: Path | None, *, pinned: bool):
        """Takes the memory that files go through."""
        staging = [max(disk)] * _STAGING if disk else []
        check_host_memory([*host, *staging])
        self._directory = directory
        self._link = Link(pinned=pinned)
        self.workers = ThreadPoolExecutor(_STAGING, "zo2jax-stores")
        """For files."""
        self._staging: queue.Queue[np.ndarray] = queue.Queue()
        self._files: list[OnDisk | InFiles] = []
        try:
            for nbytes in staging:
                self._staging.put(self._link.memory(nbytes))
        except BaseException:
            self.close()
            raise

    def keep(self, tier: str, name: str, layout: Layout, leaves: Params) -> Store:
        """The matrices among ``leaves`` in a store of their own.

        Raises:
            StoreError: if there is no room on the disk, or memory cannot be locked.
        """
        if tier == "disk":
            assert self._directory is not None
            self._directory.mkdir(parents=True, exist_ok=True)
            store = OnDisk(self._link, self.workers, self._staging, self._directory / f"{name}.page", layout)
            self._files.append(store)
            store.fill(partial(layout.pack, leaves))
            return store
        if tier == "host":
            held = self._link.memory(layout.nbytes, lambda m: layout.pack(leaves, layout.views(m)))
            return OnHost(self._link, layout.views(held))
        staged = layout.views(np.zeros(layout.nbytes, np.uint8))
        layout.pack(leaves, staged)
        return OnDevice(tuple(jnp.array(page) for page in staged))

    def find(self, layout: Layout, pieces: Sequence[tuple[int, Extent]]) -> Store:
        """The matrices where they lie in the model's own files, which are only read.

        Raises:
            StoreError: if a file cannot be read, or is no longer what it was when the model was loaded.
        """
        store = InFiles(self._link, self.workers, self._staging, layout, pieces)
        self._files.append(store)
        return store

    def close(self) -> None:
        """Lets go of host memory and removes page files; nothing may be on its way to the device any more."""
        self.workers.shutdown(cancel_futures=True)
        self._link.close()
        for store in self._files:
            store.close()
