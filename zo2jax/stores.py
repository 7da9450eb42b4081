"""Stores: where the pages of a block live. On the device, in page-locked host memory, or in a file."""

import mmap
import os
import queue
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zo2jax.link import Copy, Link, StoreError, check_host_memory
from zo2jax.models.blocks import Params
from zo2jax.pages import Layout

Pages = tuple[jax.Array, ...]


_LEAVING = 4
"""Pieces of pages that are on their way to host memory at a time."""


class Edit:
    """Pages of which pieces are read and replaced, without ever being on the device as a whole.

    Args:
        pages: in host memory, or on the device.
        link: to host memory, if they are there.

    >>> edit = Edit([jnp.arange(4.0)])
    >>> edit.write(0, 1, -edit.read(0, 1, 2))
    >>> edit.pages[0].tolist()
    [0.0, -1.0, -2.0, 3.0]
    """

    def __init__(self, pages: Sequence[Any] = (), link: Link | None = None):
        """Moves nothing yet."""
        self.pages, self._link = list(pages), link
        self._leaving: list[Copy] = []
        self.up = self.down = 0  # bytes over the link

    def read(self, page: int, start: int, count: int) -> jax.Array:
        """``count`` elements of a page, on the device; it may still be under way."""
        if self._link is None:
            return _piece(self.pages[page], start, count)
        piece = self.pages[page][start : start + count]
        self.up += piece.nbytes
        return self._link.up(piece)

    def write(self, page: int, start: int, array: jax.Array) -> None:
        """Replaces elements by those of a flat array."""
        if self._link is None:
            self.pages[page] = _replaced(self.pages[page], array, start)
            return
        self.down += array.nbytes
        self._leaving.append(self._link.down(array, self.pages[page][start : start + array.size]))
        self._left(_LEAVING)

    def finish(self) -> None:
        """Returns when everything is where it belongs."""
        self._left(0)

    def _left(self, most: int) -> None:
        while len(self._leaving) > most:
            self._leaving.pop(0).result()


@partial(jax.jit, static_argnums=2)
def _piece(page: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return lax.dynamic_slice(page, (start,), (count,))


@partial(jax.jit, donate_argnums=0)
def _replaced(page: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(page, piece, (start,))


class Store(Protocol):
    """The pages of one block."""

    def upload(self) -> "Pages | Future[Pages]":
        """The pages on the device; begins now, and may end later."""

    def commit(self, pages: Pages) -> "Copy | Future[None] | None":
        """Keeps changed pages; begins now, and has ended when the result is there."""

    def read(self) -> list[np.ndarray] | Pages:
        """The pages as they are, for whoever copies them."""

    def edit(self) -> AbstractContextManager[Edit]:
        """The pages, to change pieces of them; kept when the context ends."""


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

    @contextmanager
    def edit(self) -> Iterator[Edit]:
        """The pages themselves."""
        edit = Edit(self.upload())
        self._pages = None  # they are given away
        yield edit
        self.commit(tuple(edit.pages))


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

    @contextmanager
    def edit(self) -> Iterator[Edit]:
        """The memory."""
        edit = Edit(self._pages, self._link)
        yield edit
        edit.finish()


class OnDisk:
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
        self._link, self._workers, self._staging = link, workers, staging
        self._path, self._layout = path, layout
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

    def upload(self) -> Future[Pages]:
        """Reads the file, then copies to the device."""

        def work(memory: np.ndarray) -> Pages:
            self._read(memory)
            pages = tuple(self._link.up(page) for page in self._layout.views(memory))
            return jax.block_until_ready(pages)

        return self._workers.submit(self._with_memory, work)

    def commit(self, pages: Pages) -> Future[None]:
        """Copies to host memory, then writes the file."""

        def work(memory: np.ndarray) -> None:
            for array, page in zip(pages, self._layout.views(memory), strict=True):
                self._link.down(array, page).result()
            self._write(memory)

        return self._workers.submit(self._with_memory, work)

    def read(self) -> list[np.ndarray]:
        """The pages, in memory of their own."""
        memory = np.frombuffer(mmap.mmap(-1, max(self._layout.nbytes, 1)), np.uint8)[: self._layout.nbytes]
        self._read(memory)
        return self._layout.views(memory)

    @contextmanager
    def edit(self) -> Iterator[Edit]:
        """Reads the file, and writes it at the end."""
        memory = self._staging.get()
        try:
            here = memory[: self._layout.nbytes]
            self._read(here)
            edit = Edit(self._layout.views(here), self._link)
            yield edit
            edit.finish()
            self._write(here)
        finally:
            self._staging.put(memory)

    def _with_memory(self, work: Callable[[np.ndarray], Any]) -> Any:
        memory = self._staging.get()
        try:
            return work(memory[: self._layout.nbytes])
        finally:
            self._staging.put(memory)

    def _read(self, memory: np.ndarray) -> None:
        if not self.close.alive:
            raise StoreError(f"the page file {self._path} is gone: its run is closed, and lives on in its checkpoint")
        try:
            done = 0
            while done < len(memory) and (count := os.preadv(self._file, [memory[done:].data], done)):
                done += count
        except OSError as error:
            raise StoreError(
                error.errno, f"the page file {self._path} cannot be read ({error.strerror}){_GO_ON}"
            ) from error
        if done < len(memory) or zlib.crc32(memory.data) != self._checksum:
            raise StoreError(f"the page file {self._path} is not what was written to it{_GO_ON}")

    def _write(self, memory: np.ndarray) -> None:
        self._checksum = None
        try:
            done = 0
            while done < len(memory):
                done += os.pwritev(self._file, [memory[done:].data], done)
        except OSError as error:
            raise StoreError(
                error.errno, f"the page file {self._path} cannot be written ({error.strerror}){_GO_ON}"
            ) from error
        self._checksum = zlib.crc32(memory.data)


_GO_ON = ": the run goes on from its last checkpoint, once the disk is well"


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
FOLDS_OF_FILES = _STAGING // 2
"""Of those that take a fold at a time: each holds its own pages and its masters'."""


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
        """Takes the memory that page files go through."""
        staging = [max(disk)] * _STAGING if disk else []
        check_host_memory([*host, *staging])
        self._directory = directory
        self._link = Link(pinned=pinned)
        self.workers = ThreadPoolExecutor(_STAGING, "zo2jax-stores")
        """For files."""
        self._staging: queue.Queue[np.ndarray] = queue.Queue()
        self._files: list[OnDisk] = []
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

    def close(self) -> None:
        """Lets go of host memory and removes page files; nothing may be on its way to the device any more."""
        self.workers.shutdown(cancel_futures=True)
        self._link.close()
        for store in self._files:
            store.close()
