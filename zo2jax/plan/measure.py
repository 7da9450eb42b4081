"""Measures this machine, as far as a step of a run depends on it: transfers, products, draws, memory, page files."""

import contextlib
import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.perturb import perturb
from pallas_kernels.reference import Probes, Terms
from zo2jax.files import OnDisk
from zo2jax.link import Copy, Link, StoreError, available_memory
from zo2jax.models.layers import attention
from zo2jax.models.traced import has_kernels
from zo2jax.pages import Layout
from zo2jax.plan.machine import Machine, cache_file

_PAGES, _PAGE = 16, 2**25
_COUNT, _LARGE = 6, 2**28
"""Pages as large as blocks of a model of 13 G parameters, by which the link is measured for good."""
_MOVES = 48
"""Pages, at least, that go both ways to measure the link."""
_SLOW = 2.0**27
"""Bytes a second of files, where there was no room to measure it."""
_SUSTAINED = 0.2
"""Seconds."""
_CALLS = 2.5
"""Calls that issuing a block's work takes as long as: so it was on an H200's host and on two CPU cores."""
_WINDOW = 3  # blocks at a time, as with one that is uploaded ahead


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
    moved, window = sum(page.nbytes for page in pages), min(_WINDOW, len(pages))
    rounds = -(-_MOVES // len(pages))  # so many that the first upload and the last write-back, alone, do not count
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
        for page in pages * rounds:
            if len(leaving) == window:
                leaving.popleft().result()
            leaving.append(link.down(link.up(page), page))
        finish(leaving)

    try:
        alone = _best(up), _best(lambda: finish([link.down(arrays[page.nbytes], page) for page in pages]))
        return Rates(moved / alone[0], moved / alone[1], 2 * moved * rounds / _best(both))
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


def this_machine(folder: str | Path | None = None) -> Machine:
    """The machine that this is: as it was measured before, by `zo2jax machine` or here, or else measured now.

    Memory and disk space are those that are free now, the latter where ``folder`` is, or temporary files.

    >>> this_machine().kind == jax.devices()[0].device_kind
    True
    """
    return replace(_rates(), **_sizes(folder))


@lru_cache(maxsize=1)
def _rates() -> Machine:
    path = cache_file(jax.devices()[0].device_kind)
    with contextlib.suppress(OSError, ValueError):  # there is none, or one of another version
        return Machine.read(path)
    machine = measure_machine()
    with contextlib.suppress(OSError):  # a home that cannot be written keeps nobody from planning
        machine.save(path)
    return machine


def forget() -> None:
    """Removes what is kept of this machine, so that it is measured anew.

    >>> forget.__module__
    'zo2jax.plan.measure'
    """
    cache_file(jax.devices()[0].device_kind).unlink(missing_ok=True)
    _rates.cache_clear()


def measure_machine() -> Machine:
    """Measures everything, in some ten seconds on a GPU and two on a CPU; see `Machine`.

    >>> measure_machine().products > 0
    True
    """
    gpu, device = jax.default_backend() == "gpu", jax.devices()[0]
    link = link_rates([Layout((), (("uint8", _LARGE if gpu else _LARGE // 64),), ())] * _COUNT)
    size, dtype = (8192, jnp.bfloat16) if gpu else (512, jnp.float32)
    wide, codes = random_numbers((size, size), dtype), random_numbers((size, size), jnp.int8)
    array = jnp.ones(2**26 if gpu else 2**22, jnp.uint32)
    both = measure_disk()
    return Machine(
        *link,
        products=2 * size**3 / _sustained(jax.jit(partial(_transposed, dtype=dtype)), wide, wide),
        memory=2 * array.nbytes / _sustained(jax.jit(lambda x: x + jnp.uint32(1)), array),
        int8_products=2 * size**3 / _sustained(jax.jit(partial(_transposed, dtype=jnp.int32)), codes, codes),
        attention=_attention() if gpu else 0.0,
        draws=_draws(2**26 if gpu else 2**20),
        launch=_launch(),
        disk=_SLOW if math.isnan(both) else both,
        disk_read=_SLOW if math.isnan(both) else measure_reads(),
        kind=device.device_kind,
        backend=jax.default_backend(),
        kernels=has_kernels(),
        **_sizes(),
    )


def _sizes(folder: str | Path | None = None) -> dict[str, Any]:
    """Bytes that are there now; 1 for none, as 0 says that nobody knows."""
    there = Path(folder or tempfile.gettempdir()).expanduser().absolute()
    there = next(parent for parent in (there, *there.parents) if parent.is_dir())
    device = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    sizes = {"host_memory": available_memory(), "disk_space": shutil.disk_usage(there).free}
    return {"device_memory": device} | {name: max(1, size) for name, size in sizes.items()}


def random_numbers(shape: Sequence[int], dtype: Any) -> jax.Array:
    """Normal ones, or of int8 all: a GPU multiplies zeros and ones with less power, and so at a higher clock.

    >>> random_numbers((2, 3), jnp.int8).shape
    (2, 3)
    """
    key = jax.random.key(0)
    if dtype == jnp.int8:
        return jax.random.bits(key, tuple(shape), jnp.uint8).astype(dtype)
    return jax.random.normal(key, tuple(shape), dtype)


def _transposed(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def sustained(f: Callable[..., Any], *arguments: Any, least: float) -> float:
    """Seconds of a call, once the device has been at work for ``least`` seconds, so that its clock is that of a step.

    >>> sustained(jnp.exp, jnp.ones(3), least=1e-4) > 0
    True
    """
    jax.block_until_ready(f(*arguments))
    calls, seconds = 1, 0.0
    while seconds < least:
        calls *= 2
        start = time.perf_counter()
        for _ in range(calls):
            out = f(*arguments)
        jax.block_until_ready(out)
        seconds = time.perf_counter() - start
    return seconds / calls


def _sustained(f: Callable[..., Any], *arguments: Any) -> float:
    return sustained(f, *arguments, least=_SUSTAINED if jax.default_backend() == "gpu" else _SUSTAINED / 10)


def _attention(tokens: int = 2048, heads: int = 32, size: int = 128) -> float:
    """Operations a second, of which a causal kernel makes half."""
    x = random_numbers((2, tokens, heads, size), jnp.bfloat16)
    return 2.0 * x.size * tokens / _sustained(jax.jit(lambda q: attention(q, q, q, None)), x)


def _draws(count: int) -> float:
    """Numbers a second, in a kernel that moves weights in their place and makes two probes of them."""
    keys = jnp.zeros((1, 1, 2), jnp.uint32)
    terms, probes = Terms(keys, jnp.zeros((1, 1))), Probes(keys[0], jnp.array([[1e-3], [-1e-3]], jnp.float32))
    moved = jax.jit(lambda w: perturb(w, terms, probes), donate_argnums=0)
    held = [jnp.zeros((count // 4096, 4096), jnp.bfloat16)]

    def move() -> Any:
        held[0], members = moved(held[0])
        return members

    return 2 * count / _sustained(move)


def _launch() -> float:
    """Seconds in which the host issues a block's work: some calls of a program with as many arrays as a block has."""
    arrays = [jnp.ones(8) for _ in range(24)]
    call = jax.jit(lambda arrays, x: ([a + x[0] for a in arrays], x))
    seconds = _sustained(lambda: call(arrays, arrays[0])[1])
    return _CALLS * seconds


@lru_cache(maxsize=1)
def measure_disk() -> float:
    """Bytes a second of page files, read and written at once, in the folder for temporary files; NaN without room.

    >>> measure_disk() > 0
    True
    """
    return _files(True)


def measure_reads() -> float:
    """Bytes a second of page files that are read; NaN without room.

    >>> measure_reads() > 0
    True
    """
    return _files(False)


def _files(written: bool) -> float:
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

            def moved() -> None:
                other = stores[1].commit(pages) if written else stores[1].upload()
                stores[0].upload().result()
                other.result()

            try:
                return 2 * layout.nbytes / _best(moved)
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
