"""What link, disk and products can do: the pages of a step moved as the stream moves them, with nothing computed.

So the rates have the sizes of a step's transfers, and its mix of both ways, and are the floor of a step's time.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zo2jax.files import OnDisk, Pages
from zo2jax.link import Link
from zo2jax.models.layers import compute_dtype
from zo2jax.pages import Layout
from zo2jax.plan.measure import random_numbers, randomize
from zo2jax.stores import result

_TOTAL = 2 * 2**30
_ROUNDS = 3
_WORKERS = 4  # as many as a stream has
_WINDOW = 3  # blocks at a time, as with one that is uploaded ahead
_PRODUCTS = 10  # in a row, so that the device waits for nobody


def floor_ms(moved: float, rate: float) -> float:
    """Milliseconds in which ``moved`` bytes pass at ``rate`` bytes a second.

    >>> floor_ms(3 * 2**30, 2**30)
    3000.0
    """
    return moved / rate * 1e3


def sample(layouts: Sequence[Layout], total: int = _TOTAL) -> list[Layout]:
    """The first layouts that make up ``total`` bytes, a window of them at least; those without pages are left out.

    >>> page = Layout((), (("float32", 2048),), ())
    >>> len(sample([page] * 9, total=4 * page.nbytes)), len(sample([page] * 9, total=1)), len(sample([page], total=1))
    (4, 3, 1)
    """
    full = [layout for layout in layouts if layout.nbytes]
    before = np.cumsum([0, *(layout.nbytes for layout in full)])
    return [layout for i, layout in enumerate(full) if i < _WINDOW or before[i] < total]


def disk_rate(layouts: Sequence[Layout], directory: Path, *, read_only: bool = False) -> float:
    """Bytes per second of page files, those read and those written together, in the stream's mix of both.

    The pages pass through the stores of a run, to the device and back, with their checksums.

    Args:
        layouts: of the blocks that are moved, one at least; each has a file.
        directory: where the files are made, and removed again.
        read_only: whether they are read alone, as where weights never change.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     disk_rate([Layout((), (("float32", 2048),), ())], Path(folder)) > 0
    True
    """
    link, staging = Link(), Queue[np.ndarray]()
    for _ in range(_WORKERS):
        staging.put(link.memory(max(layout.nbytes for layout in layouts)))
    paths = [directory / f"rate{i}.page" for i in range(len(layouts))]
    with ExitStack() as stack:
        stack.callback(link.close)
        workers = stack.enter_context(ThreadPoolExecutor(_WORKERS))
        stores = []
        for path, layout in zip(paths, layouts, strict=True):
            stores.append(store := OnDisk(link, workers, staging, path, layout))
            stack.callback(store.close)
            store.fill(_randomize_all)
        ways, sweep = (1, _read) if read_only else (2, _sweep)
        return ways * sum(layout.nbytes for layout in layouts) / _seconds(lambda: sweep(stores))


def product_rate(compute: str = "bf16") -> float:
    """Operations per second of a large product x W^T, two for each pair of numbers that is multiplied.

    Args:
        compute: "bf16" for products of the dtype that bfloat16 weights are multiplied in; "int8" for those of codes.

    >>> product_rate("bf16") > 0 and product_rate("int8") > 0
    True
    """
    size = 8192 if jax.default_backend() == "gpu" else 512
    given, out = (jnp.int8, jnp.int32) if compute == "int8" else [compute_dtype(jnp.dtype(jnp.bfloat16))] * 2
    square = random_numbers((size, size), given)
    product = jax.jit(partial(lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=out))
    work = lambda: jax.block_until_ready([product(square, square) for _ in range(_PRODUCTS)])  # noqa: E731
    return _PRODUCTS * 2 * size**3 / _seconds(work)


def _read(stores: Sequence[OnDisk]) -> None:
    """Each is read, the next one ahead of it."""
    coming = deque(store.upload() for store in stores[:_WINDOW])
    for store in stores[_WINDOW:]:
        coming.popleft().result()
        coming.append(store.upload())
    for one in coming:
        one.result()


def _sweep(stores: Sequence[OnDisk]) -> None:
    """Each is read, the next one ahead of it, and written back."""
    leaving: deque[Future[None]] = deque()

    def write_back(pages: Pages | Future[Pages], store: OnDisk) -> None:
        held = result(pages)
        if len(leaving) == _WINDOW:
            leaving.popleft().result()
        leaving.append(store.commit(held))

    coming: Pages | Future[Pages] = stores[0].upload()
    for store, following in pairwise(stores):
        ahead = following.upload()
        write_back(coming, store)
        coming = ahead
    write_back(coming, stores[-1])
    _finish(leaving)


def _finish(copies: Iterable[Future[None]]) -> None:
    for copy in copies:
        copy.result()


def _randomize_all(pages: list[np.ndarray]) -> None:
    for page in pages:
        randomize(page.view(np.uint8))


def _seconds(move: Callable[[], Any]) -> float:
    """The median time of a call, after one that warms up."""
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        move()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
