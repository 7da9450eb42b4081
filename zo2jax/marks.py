"""Marks of the host in a trace of `jax.profiler`: what it waits for, and what it moves itself.

They cost less than a microsecond each while nothing is traced. What the device does has its own place there, and
``jax.named_scope`` says what it is a part of: "perturb" or "update" (see `zo2jax.bench.planes`).
"""

import jax

STEP = "zo2jax.step"
"""A step of a run, in traces of `zo2jax profile`."""

DISK = ("disk read", "disk write")
MARKS = ("wait", "upload", "write-back", *DISK)
"""What there are: the host waits for the device or a transfer; it copies where there is no link; it moves a file."""


def mark(name: str, nbytes: int = 0) -> jax.profiler.TraceAnnotation:
    """A context that a trace shows as one of `MARKS`.

    >>> with mark("disk read", 4096):
    ...     pass
    """
    assert name in MARKS, name
    return jax.profiler.TraceAnnotation(name, nbytes=nbytes)
