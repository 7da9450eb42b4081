"""The link between host memory and the device, and what host memory there is.

Host memory is ordinary memory that is locked in place and registered with the CUDA driver, one buffer a block for the
whole run. So uploads run at the link's speed and write-backs go to where the block came from. (The pool behind JAX's
memory kind ``pinned_host`` grows by powers of two and is capped; docs/LOG.md has what it took.)
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zo2jax.marks import mark

_HUGE = 1 << 21


class StoreError(OSError):
    """A page that cannot be kept or read; the message says which, why, and what to do.

    >>> issubclass(StoreError, OSError)
    True
    """


class Copy:
    """A copy to host memory that is under way."""

    def __init__(self, finish: Callable[[], None]):
        """``finish()`` waits for it."""
        self._finish: Callable[[], None] | None = finish

    def result(self) -> None:
        """Returns when it is there."""
        if self._finish is not None:
            self._finish()
        self._finish = None  # with the array, whose memory is free from here on


class Link:
    """Moves pages between host memory and the device.

    Args:
        pinned: whether host memory is page-locked; without it transfers are several times slower.

    >>> link = Link()
    >>> memory = link.memory(4096)
    >>> link.down(jnp.arange(4, dtype=jnp.uint8), memory[:4]).result()
    >>> link.up(memory[:4]).tolist()
    [0, 1, 2, 3]
    """

    def __init__(self, *, pinned: bool = True):
        """Finds the driver."""
        (device,) = jnp.zeros(1).devices()  # the default one, which has a context now
        self._cuda = ctypes.CDLL("libcuda.so.1") if device.platform == "gpu" else None
        self._pinned = pinned and self._cuda is not None
        self._registered: dict[int, mmap.mmap] = {}  # by address
        self._thread = local()
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        if self._cuda is not None:
            number = ctypes.c_int(device.local_hardware_id or 0)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)
            self._enter()
            self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(1))  # waits for no other stream
            held = self._cuda, self._context, self._stream, self._registered
            weakref.finalize(self, _let_go, *held).atexit = False

    def memory(self, nbytes: int, fill: Callable[[np.ndarray], None] = lambda memory: None) -> np.ndarray:
        """Host memory, uint8 [nbytes], aligned to a page of the operating system.

        ``fill`` writes to it before it is locked, which is faster than to touch it first and then write.

        Raises:
            StoreError: if the driver refuses to lock it.
        """
        buffer = mmap.mmap(-1, max(nbytes, 1))
        if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # not in every kernel; it makes touching and locking several times faster
                buffer.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(buffer, np.uint8)[:nbytes]
        fill(memory)
        if self._pinned:
            self._enter()
            address = memory.ctypes.data
            hint = ": is there enough memory to lock?"
            size = ctypes.c_size_t(len(buffer))
            self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), size, ctypes.c_uint(1), hint=hint)
            self._registered[address] = buffer
        return memory

    @contextmanager
    def lent(self, nbytes: int, fill: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
        """The same until the context ends, when nothing may be on its way from there any more."""
        memory = self.memory(nbytes, fill)
        try:
            yield memory
        finally:
            if self._registered.pop(memory.ctypes.data, None) is not None:
                self._call("cuMemHostUnregister", ctypes.c_void_p(memory.ctypes.data))

    def up(self, page: np.ndarray) -> jax.Array:
        """A copy on the device, which may still be under way; the page must not change until it is there."""
        if self._cuda is None:
            with mark("upload", page.nbytes):
                return jnp.array(page)  # a transfer would keep to the memory itself
        return jax.device_put(page)

    def down(self, array: jax.Array, page: np.ndarray) -> Copy:
        """Copies an array into host memory, as soon as it is computed; no thread waits for that."""
        if self._cuda is None:
            return Copy(partial(_copy, array, page))
        self._enter()
        exported: Any = array
        held = exported.__dlpack__(stream=self._stream.value)  # the stream waits for the array; its memory is kept
        source = ctypes.c_uint64(array.unsafe_buffer_pointer())
        target, count = ctypes.c_void_p(page.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", target, source, count, self._stream)
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(2))  # without times
        self._call("cuEventRecord", event, self._stream)

        def finish() -> None:
            nonlocal held
            self._enter()
            self._call("cuEventSynchronize", event)
            self._call("cuEventDestroy_v2", event)
            held = None

        return Copy(finish)

    def close(self) -> None:
        """Lets go of all host memory; nothing may be on its way to the device any more."""
        if self._cuda is not None:
            _let_go(self._cuda, self._context, self._stream, self._registered)

    def _enter(self) -> None:
        """Gives the calling thread the device's context."""
        if not getattr(self._thread, "entered", False):
            self._call("cuCtxSetCurrent", self._context)
            self._thread.entered = True

    def _call(self, name: str, *arguments: Any, hint: str = "") -> None:
        if status := getattr(self._cuda, name)(*arguments):
            raise StoreError(f"the CUDA driver's {name} failed with status {status}{hint}")


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


def _copy(array: jax.Array, page: np.ndarray) -> None:
    array.block_until_ready()
    with mark("write-back", page.nbytes):
        np.copyto(page, np.asarray(array))


@partial(jax.jit, static_argnums=2)
def _piece(page: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return lax.dynamic_slice(page, (start,), (count,))


@partial(jax.jit, donate_argnums=0)
def _replaced(page: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(page, piece, (start,))


def _let_go(cuda: Any, context: ctypes.c_void_p, stream: ctypes.c_void_p, registered: dict[int, mmap.mmap]) -> None:
    """Unlocks memory, once what the stream copies to it is there; also for a link that nobody closed."""
    cuda.cuCtxSetCurrent(context)
    cuda.cuStreamSynchronize(stream)
    for address in list(registered):
        cuda.cuMemHostUnregister(ctypes.c_void_p(address))
        del registered[address]


def available_memory() -> int:
    """Bytes of host memory that can still be had.

    >>> available_memory() > 0
    True
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")), free)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # a container's limit; ValueError for "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached.get("inactive_file", 0)))
    return free


def check_host_memory(needed: Sequence[int]) -> None:
    """Raises StoreError if host memory does not hold blocks of these sizes, in bytes.

    >>> check_host_memory([1])
    """
    if (total := sum(needed)) > (there := available_memory()):
        raise StoreError(
            f"{len(needed)} blocks need {total / 2**30:.1f} GiB of host memory, and {there / 2**30:.1f} GiB are free: "
            "put some on the disk, or use a machine with more"
        )
