"""Rates of this machine, as far as a step of a run depends on them: transfers, products, memory, page files."""

import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Queue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.pages import Layout
from zo2jax.stores import Link, OnDisk, StoreError


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


@lru_cache(maxsize=1)
def measure_machine() -> Machine:
    """Measures the rates, once in a process, in about a second: large transfers, a product, and a copy.

    >>> measure_machine().products > 0
    True
    """
    gpu = jax.default_backend() == "gpu"
    nbytes = 2**28 if gpu else 2**25
    link = Link()
    try:
        source, target = link.memory(nbytes), link.memory(nbytes)
        source[:], target[:] = 1, 1  # memory that was never written to is not there yet
        array = jax.block_until_ready(link.up(source))

        def both() -> None:
            copy = link.down(array, target)
            jax.block_until_ready(link.up(source))
            copy.result()

        up = _best(lambda: jax.block_until_ready(link.up(source)))
        down = _best(lambda: link.down(array, target).result())
        together = _best(both)
        copied = jax.jit(lambda x: x + jnp.uint8(1))
        memory = _best(lambda: jax.block_until_ready(copied(array)))
    finally:
        link.close()
    size, dtype = (8192, jnp.bfloat16) if gpu else (1024, jnp.float32)
    square = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    products = _best(lambda: jax.block_until_ready(product(square, square)))
    return Machine(nbytes / up, nbytes / down, 2 * nbytes / together, 2 * size**3 / products, 2 * nbytes / memory)


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

            return 2 * layout.nbytes / _best(both)
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
