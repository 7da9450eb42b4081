"""Stores: where the pages of a block live. On the device, in page-locked host memory, or in files."""

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from zo2jax.files import InFiles, OnDisk, Pages
from zo2jax.link import Copy, Edit, Link, check_host_memory
from zo2jax.marks import mark
from zo2jax.models.blocks import Params
from zo2jax.models.tensors import Extent
from zo2jax.pages import Layout


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


Keep = Callable[[str, Layout, Params], Store]
"""Puts the matrices among leaves into a store of their own: (name, layout, leaves) -> store."""


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


def result(pages: "Pages | Future[Pages]") -> Pages:
    """The pages, once they are under way to the device at least.

    >>> result((jax.numpy.ones(1),))[0].shape
    (1,)
    """
    if not isinstance(pages, Future):
        return pages
    with mark("wait"):
        return pages.result()


STAGING = 4
"""Blocks of the disk tier that are in host memory at a time."""
FOLDS_OF_FILES = STAGING // 2
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
        """Takes the memory that files go through."""
        staging = [max(disk)] * STAGING if disk else []
        check_host_memory([*host, *staging])
        self._directory = directory
        self._link = Link(pinned=pinned)
        self.workers = ThreadPoolExecutor(STAGING, "zo2jax-stores")
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
        # Of memory that is not locked the runtime makes a copy in a pool that only grows.
        with self._link.lent(layout.nbytes, lambda m: layout.pack(leaves, layout.views(m))) as held:
            return OnDevice(jax.block_until_ready(tuple(self._link.up(page) for page in layout.views(held))))

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
