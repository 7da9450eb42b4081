"""Rates of this machine, as far as a step of a run depends on them: transfers, products, memory, page files."""

import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.files import OnDisk
from zo2jax.link import Copy, Link, StoreError
from zo2jax.pages import Layout

_PAGES, _PAGE = 16, 2**25
_WINDOW = 3  # blocks at a time, as with one that is uploaded ahead


@dataclass(frozen=True)
class Machine:
    """Rates of a machine: of transfers and of device memory in bytes a second, of products in operations a second.

    >>> Machine(1.0, 1.0, 1.5, 10.0, 4.0).both
    1.5
    """

    up: float
    down: float
    both: float
    """Both directions at once, together."""
    products: float
    memory: float


class Rates(NamedTuple):
    """Bytes a second between host memory and the device; ``both`` counts those of both ways at once.

    >>> Rates(1.0, 1.0, 1.5).both
    1.5
    """

    up: float
    down: float
    both: float


@lru_cache(maxsize=1)
def measure_link() -> Rates:
    """Measures the link, once in a process, in a tenth of a second: 16 pages of 32 MiB, three at a time on the device.

    >>> measure_link().both > 0
    True
    """
    gpu = jax.default_backend() == "gpu"
    return link_rates([Layout((), (("uint8", _PAGE if gpu else _PAGE // 16),), ())] * (_PAGES if gpu else 2))


def link_rates(layouts: Sequence[Layout], *, pinned: bool = True) -> Rates:
    """The rates at which pages are moved as the stream moves them, with nothing computed.

    Args:
        layouts: of the blocks that are moved, one after the other; one at least.
        pinned: whether host memory is page-locked.

    >>> link_rates([Layout((), (("float32", 2048),), ())]).up > 0
    True
    """
    link = Link(pinned=pinned)
    pages = [link.memory(layout.nbytes, randomize) for layout in layouts]
    moved = sum(page.nbytes for page in pages)
    arrays = {page.nbytes: link.up(page) for page in pages}

    def up() -> None:
        arriving: deque[jax.Array] = deque()
        for page in pages:
            if len(arriving) == _WINDOW:
                arriving.popleft().block_until_ready()
            arriving.append(link.up(page))
        jax.block_until_ready(list(arriving))

    def finish(copies: Iterable[Copy]) -> None:
        for copy in copies:
            copy.result()

    def both() -> None:
        leaving: deque[Copy] = deque()
        for page in pages:
            if len(leaving) == _WINDOW:
                leaving.popleft().result()
            leaving.append(link.down(link.up(page), page))
        finish(leaving)

    try:
        alone = _best(up), _best(lambda: finish([link.down(arrays[page.nbytes], page) for page in pages]))
        return Rates(moved / alone[0], moved / alone[1], 2 * moved / _best(both))
    finally:
        link.close()


def randomize(memory: np.ndarray) -> None:
    """Fills memory, uint8 [n], with random bytes, which nothing on the way can compress.

    >>> memory = np.zeros(64, np.uint8)
    >>> randomize(memory)
    >>> bool(memory.any())
    True
    """
    block = np.frombuffer(np.random.default_rng(0).bytes(min(memory.nbytes, 2**20)), np.uint8)
    np.copyto(memory, np.resize(block, memory.nbytes))


@lru_cache(maxsize=1)
def measure_machine() -> Machine:
    """Measures the rates, once in a process, in about a second: transfers, a product, and a copy.

    >>> measure_machine().products > 0
    True
    """
    gpu, link = jax.default_backend() == "gpu", measure_link()
    array = jnp.ones(2**28 if gpu else 2**25, jnp.uint8)
    copied = jax.jit(lambda x: x + jnp.uint8(1))
    memory = _best(lambda: jax.block_until_ready(copied(array)))
    size, dtype = (8192, jnp.bfloat16) if gpu else (1024, jnp.float32)
    square = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    products = _best(lambda: jax.block_until_ready(product(square, square)))
    return Machine(*link, 2 * size**3 / products, 2 * array.nbytes / memory)


@lru_cache(maxsize=1)
def measure_disk() -> float:
    """Bytes a second of page files, read and written at once, in the folder for temporary files; NaN without room.

    >>> measure_disk() > 0
    True
    """
    layout = Layout.of({"w": jax.ShapeDtypeStruct((2**12, 2**12), np.float32)})
    link, staging = Link(), Queue[np.ndarray]()
    try:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as workers:
            for _ in range(2):
                staging.put(link.memory(layout.nbytes))
            stores = [OnDisk(link, workers, staging, Path(folder) / name, layout) for name in "ab"]
            for store in stores:
                store.fill(lambda pages: None)
            pages = stores[0].upload().result()

            def both() -> None:
                written = stores[1].commit(pages)
                stores[0].upload().result()
                written.result()

            try:
                return 2 * layout.nbytes / _best(both)
            finally:
                for store in stores:
                    store.close()
    except StoreError:
        return math.nan
    finally:
        link.close()


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the quickest of three, after one more."""
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
