"""Programs of another machine's: blocks that are traced to be looked at, and not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.extend.core import Primitive

from pallas_kernels.implementations import choose

_TRACED_FOR: ContextVar[str | None] = ContextVar("traced_for", default=None)
_KERNELS: ContextVar[bool | None] = ContextVar("kernels", default=None)


@contextmanager
def traced_for(backend: str | None, kernels: bool | None = None) -> Iterator[None]:
    """Within it programs are traced as for "gpu" or "cpu", wherever they are traced; None changes nothing.

    What is traced as for GPUs has `fused_attention` in it, and cannot be run. ``kernels`` says whether updates and
    probes are made by the fused kernels.

    >>> with traced_for("gpu", kernels=True):
    ...     backend(), has_kernels()
    ('gpu', True)
    """
    tokens = _TRACED_FOR.set(backend or _TRACED_FOR.get()), _KERNELS.set(_KERNELS.get() if kernels is None else kernels)
    try:
        yield
    finally:
        _TRACED_FOR.reset(tokens[0])
        _KERNELS.reset(tokens[1])


def has_kernels() -> bool:
    """Whether updates and probes are made by the fused kernels; outside `traced_for`, whether they are here.

    >>> has_kernels() == (choose("perturb", None) != "xla")
    True
    """
    said = _KERNELS.get()
    return choose("perturb", None) != "xla" if said is None else said


def backend() -> str:
    """The backend that programs are traced for: JAX's default one outside `traced_for`.

    >>> backend() == jax.default_backend()
    True
    """
    return _TRACED_FOR.get() or jax.default_backend()


def is_traced() -> bool:
    """Whether programs are only looked at, within `traced_for`.

    >>> is_traced()
    False
    """
    return _TRACED_FOR.get() is not None


fused_attention = Primitive("fused_attention")
"""Stands for cuDNN's attention in programs that are looked at, and not run: q, k, v as in `attention` -> like q."""
fused_attention.def_abstract_eval(lambda query, key, value: query)
