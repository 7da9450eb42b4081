"""What `pallas_kernels.bench` times: calls of the kernels, with the bytes that each must move."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import bits
from pallas_kernels.lowrank import add_lowrank
from pallas_kernels.perturb import perturb
from pallas_kernels.perturb_codes import perturb_codes
from pallas_kernels.quantized import decode, quantize, quantize_rows
from pallas_kernels.quantized_reference import Codes, Pending
from pallas_kernels.reference import Probes, Rounding, Terms

Step = Callable[..., tuple[jax.Array, ...]]

EPS, STEP = 2.0**-10, 2.0**-17  # the size of probes, and of updates, of weights of a standard deviation of 0.02


class Operation(Protocol):
    """A call of a kernel.

    >>> OPS["decode_int8"].in_place
    False
    """

    @property
    def in_place(self) -> bool:
        """Whether the first result takes the place of the input."""

    @property
    def noise(self) -> bool:
        """Whether z is drawn, without which it can be timed too."""

    def bytes(self, size: int, itemsize: int) -> int:
        """What must pass through memory, for ``size`` weights of a dtype of ``itemsize``."""

    def inputs(self, array: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        """What a step is given; first what stands for the weights."""

    def step(self, implementation: str, dtype: str) -> Step:
        """A function of the inputs, made by an implementation, or by "none": the first one without noise."""


class Op(NamedTuple):
    """A call of `perturb`: how many updates of how many directions, then how many probes; or one of `perturb_codes`.

    >>> OPS["update_dual"].bytes(1000, 2)
    8000
    """

    updates: int = 0
    directions: int = 1
    members: int = 0
    pair: bits.WordMap = bits.normal_pair
    rounding: Rounding = bits.round_to_nearest
    pending: int | None = None
    """Terms that int8 codes lack; None for weights that are arrays."""

    @property
    def in_place(self) -> bool:
        """Whether there is an update."""
        return self.updates > 0

    @property
    def noise(self) -> bool:
        """That of updates and probes."""
        return True

    def bytes(self, size: int, itemsize: int) -> int:
        """What must pass through memory: weights in; weights out if there is an update; each probe out.

        The scales of codes, one a row, are left out.

        >>> Op(members=1).bytes(1000, 2), Op(members=2, pending=3).bytes(1000, 2)
        (4000, 5000)
        """
        if self.pending is not None:
            return size * (1 + itemsize * self.members)
        return size * itemsize * (1 + bool(self.updates) + self.members)

    def inputs(self, array: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        """(weights, terms, probes).

        >>> Op(members=1).inputs(jnp.ones(2), jax.random.key(0))[1] is None
        True
        """
        count = self.updates if self.pending is None else self.pending
        draws = jax.random.bits(key, (count + 1, self.directions, 2), jnp.uint32)
        coefs = jnp.full((count, self.directions), STEP, jnp.float32)
        used = jnp.int32(count) if count > 1 else None  # in a replay a kernel is told how many there are
        terms: Terms | Pending | None = Terms(draws[:-1], coefs, None, used) if self.updates else None
        if self.pending is not None:  # with room for one term more than there are
            padded = jnp.pad(coefs[:, 0], (0, 1))
            terms = Pending(draws[:, 0], padded, jnp.int32(self.pending), jnp.float32(0))
        matrix = jnp.array([[EPS], [-EPS]], jnp.float32)[: self.members]
        weights = array if self.pending is None else _encoded(array, 8)
        return weights, terms, Probes(draws[-1, :1], matrix) if self.members else None

    def step(self, implementation: str, dtype: str) -> Step:
        """A function of weights, terms and probes; of codes, members of ``dtype``."""
        pair, rounding = self.pair, self.rounding
        if implementation == "none":
            # Stochastic rounding draws bits of its own.
            implementation, pair, rounding = "mosaic", no_noise, bits.round_to_nearest

        def step(w: Any, terms: Any, probes: Probes | None) -> tuple[jax.Array, ...]:
            if isinstance(w, Codes):
                return (perturb_codes(w, terms, probes, dtype, pair=pair, implementation=implementation),)
            moved, members = perturb(w, terms, probes, pair=pair, rounding=rounding, implementation=implementation)
            return tuple(x for x in (moved if self.updates else None, members) if x is not None)

        return step


class Decode(NamedTuple):
    """A call of `decode`.

    >>> Decode(4, 64).bytes(64, 2)
    164
    """

    bits: int
    group: int | None = None
    in_place: bool = False
    noise: bool = False

    def bytes(self, size: int, itemsize: int) -> int:
        """Codes in, with the scales of groups; the matrix out."""
        return size * self.bits // 8 + (4 * size // self.group if self.group else 0) + size * itemsize

    def inputs(self, array: jax.Array, key: jax.Array) -> tuple[Codes]:
        """The codes.

        >>> Decode(8).inputs(jnp.ones(2), jax.random.key(0))[0].shape
        (1, 2)
        """
        return (_encoded(array, self.bits, self.group),)

    def step(self, implementation: str, dtype: str) -> Step:
        """A function of codes."""
        return lambda codes: (decode(codes, jnp.dtype(dtype), implementation=implementation),)


class Rows(NamedTuple):
    """A call of `quantize_rows`: the weights stand for activations.

    >>> Rows(2).bytes(1000, 2)
    3000
    """

    members: int = 1
    in_place: bool = False
    noise: bool = False

    def bytes(self, size: int, itemsize: int) -> int:
        """Rows in, codes out; scales, and the second reading of a first member's rows, are left out."""
        return size * (itemsize + 1)

    def inputs(self, array: jax.Array, key: jax.Array) -> tuple[jax.Array]:
        """The rows."""
        return (jnp.atleast_2d(array),)

    def step(self, implementation: str, dtype: str) -> Step:
        """A function of rows."""
        return lambda x: tuple(quantize_rows(x, members=self.members, implementation=implementation))


class Lowrank(NamedTuple):
    """A call of `add_lowrank`: the weights stand for the activations of so many members, before and after a product.

    >>> Lowrank().bytes(1000, 2)
    6000
    """

    members: int = 8
    rank: int = 8
    in_place: bool = False
    noise: bool = False

    def bytes(self, size: int, itemsize: int) -> int:
        """x and y in, y out; the factors are left out."""
        return 3 * size * itemsize

    def inputs(self, array: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        """(y, x, v, f).

        >>> [a.shape for a in Lowrank(2).inputs(jnp.ones((4, 3)), jax.random.key(0))]
        [(2, 2, 3), (2, 2, 3), (2, 3, 8), (2, 3, 8)]
        """
        members = self.members if len(jnp.atleast_2d(array)) % self.members == 0 else 1
        x = array.reshape(members, -1, array.shape[-1] if array.ndim else 1)
        v, f = (EPS * jax.random.normal(k, (members, x.shape[2], self.rank)) for k in jax.random.split(key))
        return x + x, x, v, f

    def step(self, implementation: str, dtype: str) -> Step:
        """A function of y, x, v and f."""
        return lambda *given: (add_lowrank(*given, implementation=implementation),)


@partial(jax.jit, static_argnums=(1, 2))
def _encoded(array: jax.Array, bits: int, group: int | None = None) -> Codes:
    return quantize(jnp.atleast_2d(array), bits, group)


OPS: dict[str, Operation] = {
    "probe": Op(members=1),
    "dual": Op(members=2),
    "dual_rademacher": Op(members=2, pair=bits.rademacher_pair),
    "update": Op(updates=1),
    "update_dual": Op(updates=1, members=2),
    "update_dual_rademacher": Op(updates=1, members=2, pair=bits.rademacher_pair),
    "update_dual_stochastic": Op(updates=1, members=2, rounding=bits.round_stochastically),
    "replay64": Op(updates=64),
    "replay64_rademacher": Op(updates=64, pair=bits.rademacher_pair),
    "replay64_stochastic": Op(updates=64, rounding=bits.round_stochastically),
    "average8": Op(updates=1, directions=8),
    "codes_dual": Op(members=2, pending=0),
    "codes_dual_rademacher": Op(members=2, pending=0, pair=bits.rademacher_pair),
    "codes_1_dual": Op(members=2, pending=1),
    "codes_1_dual_rademacher": Op(members=2, pending=1, pair=bits.rademacher_pair),
    "codes_8_dual": Op(members=2, pending=8),
    "decode_int8": Decode(8),
    "decode_int4": Decode(4, 64),
    "rows": Rows(),
    "rows_2_members": Rows(2),
    "lowrank": Lowrank(),
}
"""By name. Probes have one direction, and a second one is the first with the other sign."""


def no_noise(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A word map that looks at no bits, so that a compiler drops the generator and only the memory traffic is left.

    >>> [float(z) for z in no_noise(jnp.uint32(7))]
    [1.0, 1.0]
    """
    one = jnp.ones(word.shape, jnp.float32)
    return one, one


def textbook(w: jax.Array, terms: None, probes: Probes) -> tuple[jax.Array, ...]:
    """Both probes of one direction by ``jax.random.normal``, as one would write them without this package.

    >>> up, down = textbook(jnp.ones(3), None, Probes(jnp.zeros((1, 2), jnp.uint32), jnp.array([[1.0], [-1.0]])))
    >>> [round(float(x), 3) for x in up + down]
    [2.0, 2.0, 2.0]
    """
    z = jax.random.normal(jax.random.wrap_key_data(probes.keys[0], impl="threefry2x32"), w.shape, jnp.float32)
    wide, eps = w.astype(jnp.float32), probes.matrix[0, 0]
    return (wide + eps * z).astype(w.dtype), (wide - eps * z).astype(w.dtype)
