"""Estimators of the gradient from a few losses: a probe matrix and a map from losses to coefficients."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bits import cut12
from zo2jax.directions import Direction, normal, rademacher
from zo2jax.optimizers import Schedule


@dataclass(frozen=True, eq=False)
class Estimator:
    """sum_k g_k z_k estimates the gradient, with g = coefficients(losses of the M probes).

    Member m of the population is theta + sum_k probes[m, k] z_k. The losses [M] and the coefficients [K] are
    float32; the probe matrix has 12 significant bits an entry.

    Raises:
        ValueError: if ``probes`` is not a finite matrix [M, K].

    >>> two_point(0.5).probes.tolist()
    [[0.5], [-0.5]]
    """

    name: str
    probes: np.ndarray
    coefficients: Callable[[jax.Array], jax.Array]
    direction: Direction = normal
    eps: Schedule | None = None
    """Of the step (0, 1, ..), if it changes: the perturbation scale, by which ``probes`` and ``coefficients``, made for
    a scale of 1, are multiplied and divided."""
    power: int = 1
    """Of the scale, by which coefficients are divided."""
    full: "Estimator | None" = None
    """Of `svrg`: what looks at the anchor, in the first step of each period."""

    def __post_init__(self) -> None:
        """Cuts the probe matrix to 12 significant bits and checks it."""
        probes = np.asarray(self.probes, np.float32)
        if probes.ndim != 2 or 0 in probes.shape or not np.isfinite(probes).all():
            raise ValueError(f"probes is {probes!r}, expected a finite matrix [members, directions]")
        object.__setattr__(self, "probes", (probes.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32))

    def __repr__(self) -> str:
        return self.name

    @property
    def directions(self) -> int:
        """K, the number of directions of a step's update; of `svrg` the anchor's are the last ones."""
        return self.probes.shape[1] + (0 if self.full is None else self.full.directions)

    @property
    def members(self) -> int:
        """M, the most members that a step evaluates.

        >>> two_point(0.5).members, averaged(two_point(0.5), 3).members
        (2, 6)
        """
        return len(self.probes) if self.full is None else self.full.members

    def scaled(self, probes: jax.Array, step: jax.Array) -> jax.Array:
        """Entries of the probe matrix as they are at a step.

        >>> two_point(lambda step: 0.5**step).scaled(np.float32([1.0, -1.0]), np.uint32(2)).tolist()
        [0.25, -0.25]
        """
        return probes if self.eps is None else probes * self._scale(step)

    def projected_gradient(self, losses: jax.Array, step: jax.Array, anchor: jax.Array | None = None) -> jax.Array:
        """The coefficients g, float32 [K], of a step with these losses.

        Of `svrg` with the losses of the anchor's probes after those of the present weights, and ``anchor``, what the
        step that the period began with gave; that step itself has none. If it is not finite (the step was skipped),
        what is left is the estimate without an anchor.

        >>> two_point(lambda step: 0.5**step).projected_gradient(np.float32([3.0, 1.0]), np.uint32(2)).tolist()
        [4.0]
        """
        if self.full is None or anchor is None:
            g = (self if self.full is None else self.full).coefficients(losses)
            g = g if self.eps is None else g / self._scale(step) ** self.power
            return g if self.full is None else jnp.pad(g, (self.probes.shape[1], 0))
        there, plain = jnp.isfinite(anchor).all(), replace(self, full=None)
        now, then = (plain.projected_gradient(half, step) for half in jnp.split(losses, 2))
        return jnp.where(there, anchor, 0).at[: plain.directions].set(now - jnp.where(there, then, 0))

    def _scale(self, step: jax.Array) -> jax.Array:
        assert self.eps is not None
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            return cut12(jnp.asarray(self.eps(jnp.asarray(step, jnp.int32)), jnp.float32))

    def sparse_probes(self) -> tuple[np.ndarray, np.ndarray]:
        """The probe matrix by rows: (indices, values), both [M, n], n the most non-zeros of a row (at least 1).

        >>> averaged(two_point(0.5), 2).sparse_probes()[0].tolist()
        [[0], [0], [1], [1]]
        """
        width = max(1, int((self.probes != 0).sum(axis=1).max()))
        order = np.sort(np.argsort(self.probes == 0, axis=1, kind="stable")[:, :width], axis=1)
        return order.astype(np.int32), np.take_along_axis(self.probes, order, axis=1)

    def chunks(self, size: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """The population in parts of at most ``size`` members, which are evaluated one part after the other.

        Of each part the directions that its members move along, int32 [k], and its rows of the probe matrix, [m, k]: z
        is drawn for these alone. One part of all members if ``size`` is None.

        Raises:
            ValueError: if ``size`` is not positive.

        >>> [(k.tolist(), rows.tolist()) for k, rows in averaged(two_point(0.5), 2).chunks(2)]
        [([0], [[0.5], [-0.5]]), ([1], [[0.5], [-0.5]])]
        """
        if size is None or size >= len(self.probes):
            return [(np.arange(self.probes.shape[1], dtype=np.int32), self.probes)]
        if size < 1:
            raise ValueError(f"probe_batch is {size}, expected at least 1 member")
        parts = [self.probes[start : start + size] for start in range(0, len(self.probes), size)]
        width = max(1, max(int((part != 0).any(axis=0).sum()) for part in parts))  # of all: equal parts share programs
        order = [np.sort(np.argsort(~(part != 0).any(axis=0), kind="stable")[:width]) for part in parts]
        return [(k.astype(np.int32), part[:, k]) for k, part in zip(order, parts, strict=True)]

    def parts(self, size: int) -> dict[bool, list[tuple[np.ndarray, np.ndarray]]]:
        """The `chunks` of a step; under True those of steps that take each once more, of an anchor.

        Of `svrg` they have at most as many members as the estimator in it; its other steps, which periods begin with,
        look along the last directions.

        >>> from zo2jax.directions import lowrank
        >>> parts = svrg(two_point(0.5, direction=lowrank(2)), 2).parts(8)
        >>> [k.tolist() for k, _ in parts[False]], [k.tolist() for k, _ in parts[True]]
        ([[1], [2]], [[0]])
        """
        if self.full is None:
            return {False: self.chunks(size)}
        members, own = self.probes.shape
        size = min(size, members)
        return {False: [(k + np.int32(own), rows) for k, rows in self.full.chunks(size)], True: self.chunks(size)}


def two_point(eps: float | Schedule, *, direction: Direction = normal) -> Estimator:
    """SPSA: g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps). Unbiased up to O(eps^2).

    Spall (1992); MeZO, arXiv 2305.17333, definition 1.

    Args:
        eps: the perturbation scale, positive (1e-3 in MeZO); cut to 12 significant bits. Or an optax schedule of it.
        direction: `normal`, `rademacher`, or one of `zo2jax.lowrank`.

    >>> float(two_point(0.5).coefficients(np.array([3.0, 1.0]))[0])
    2.0
    """
    probes, cut = _scaled(np.array([[1], [-1]]), eps)

    def coefficients(losses: jax.Array) -> jax.Array:
        return ((losses[0] - losses[1]) / (np.float32(2) * cut))[None]

    return _named("two_point(", eps, direction, probes, coefficients)


def one_sided(n: int, eps: float | Schedule, *, direction: Direction = rademacher) -> Estimator:
    """FZOO: g_k = (loss(theta + eps z_k) - loss(theta)) / (n sigma), sigma the standard deviation of the n losses.

    n + 1 forward passes. sigma has n - 1 in its denominator. For a small eps it is eps |gradient|, so that eps cancels
    and the sum of g_k z_k estimates the gradient divided by its norm: the learning rate is the length of a step, and
    not that of `two_point`. Dang et al., arXiv 2506.09034, algorithm 1. Losses that are all equal have no sigma, and
    the step is skipped.

    Args:
        n: directions, at least 2.
        eps: the perturbation scale, positive; cut to 12 significant bits. Or an optax schedule.
        direction: as in `two_point`; `rademacher` in FZOO.

    >>> [round(float(g), 4) for g in one_sided(2, 0.5).coefficients(np.float32([1.0, 2.0, 4.0]))]
    [0.3536, 1.0607]
    """
    _check_directions(n)
    probes, _ = _scaled(np.eye(n + 1)[:, 1:], eps)

    def coefficients(losses: jax.Array) -> jax.Array:
        return (losses[1:] - losses[0]) / (np.float32(n) * jnp.std(losses[1:], ddof=1))

    return _named(f"one_sided({n}, ", eps, direction, probes, coefficients, power=0)


def leave_one_out(n: int, eps: float | Schedule, *, direction: Direction = normal) -> Estimator:
    """g_k = (loss(theta + eps z_k) - mean of the n losses) / ((n - 1) eps): n forward passes.

    Each loss is compared with the mean of the others, which knows nothing of z_k: unbiased up to O(eps^2), as
    `two_point`. (A baseline of REINFORCE: Kool, van Hoof and Welling, "Buy 4 REINFORCE samples, get a baseline for
    free!", 2019, equation 8.)

    Args:
        n: directions, at least 2.
        eps: the perturbation scale, positive; cut to 12 significant bits. Or an optax schedule.
        direction: as in `two_point`.

    >>> leave_one_out(3, 0.5).coefficients(np.float32([1.0, 2.0, 6.0])).tolist()
    [-2.0, -1.0, 3.0]
    """
    _check_directions(n)
    probes, cut = _scaled(np.eye(n), eps)

    def coefficients(losses: jax.Array) -> jax.Array:
        return (losses - jnp.mean(losses)) / (np.float32(n - 1) * cut)

    return _named(f"leave_one_out({n}, ", eps, direction, probes, coefficients)


def _check_directions(n: int) -> None:
    if n < 2:
        raise ValueError(f"n is {n}, expected at least 2 directions, which are compared with each other")


def _named(
    name: str, eps: float | Schedule, direction: Direction, probes: np.ndarray, coefficients: Any, power: int = 1
) -> Estimator:
    """The estimator, called ``name``, eps and the direction."""
    schedule = eps if callable(eps) else None
    shown = "schedule" if callable(eps) else eps
    return Estimator(f"{name}{shown}, direction={direction})", probes, coefficients, direction, schedule, power)


def _scaled(pattern: np.ndarray, eps: float | Schedule) -> tuple[np.ndarray, np.float32]:
    """A matrix of zeros and ones times eps, and eps as the probes have it, of 12 significant bits; 1 for a schedule.

    Raises:
        ValueError: if eps is not a positive number.
    """
    if callable(eps):
        return pattern.astype(np.float32), np.float32(1)
    if not (math.isfinite(eps) and eps > 1e-30):
        raise ValueError(f"eps is {eps}, expected a positive number such as 1e-3")
    cut = Estimator("", np.array([[eps]], np.float32), lambda losses: losses).probes[0, 0]
    return pattern.astype(np.float32) * cut, cut


def averaged(estimator: Estimator, n: int) -> Estimator:
    """The mean of ``n`` independent copies of an estimator (n-SPSA, arXiv 2305.17333, section 2).

    The directions of all copies move the weights, each weighted 1/n: g = concat_i(g_i) / n. The variance falls
    by n, the forward passes grow by n.

    >>> averaged(two_point(0.5), 3).probes.shape
    (6, 3)
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 copy")
    if estimator.full is not None:
        raise ValueError(f"the estimator is {estimator}: expected svrg around averaged(..), not in it")
    members = estimator.probes.shape[0]

    def coefficients(losses: jax.Array) -> jax.Array:
        copies = jax.vmap(estimator.coefficients)(losses.reshape(n, members))
        return copies.reshape(-1) / np.float32(n)

    probes = np.kron(np.eye(n, dtype=np.float32), estimator.probes)
    name = f"averaged({estimator.name}, {n})"
    return Estimator(name, probes, coefficients, estimator.direction, estimator.eps, estimator.power)


def svrg(estimator: Estimator, directions: int) -> Estimator:
    """Probes of the present weights against the same ones of an anchor, whose gradient is known better.

    The anchor theta_0 is the weights as a period of `zo2jax.lowrank` begins, just after a fold. The first step of a
    period looks at it along J = ``directions`` directions z_j, with its batch, and moves by their mean, sum_j g_j z_j.
    Each later one takes every probe twice, of its weights theta and of theta_0, with the same z_k and the same batch:

        sum_k (g_k(theta) - g_k(theta_0)) z_k + sum_j g_j z_j

    What both have in common, of the batch and of z, drops out; what is left of the noise is that of J directions, and
    of the first step's batch, for the whole period (so give that one more: a list of batches). The mean is that of
    ``estimator``. (SVRG: Johnson and Zhang, NIPS 2013; MeZO-SVRG, arXiv 2404.08080, which keeps a second model.)

    For `zo2jax.Run`, whose matrices are the anchor's, but for what is beside them. Twice the forward passes of
    ``estimator``, and J / K times in the first step; no part of a population is larger than that of ``estimator``.

    Args:
        estimator: of K directions, with a `zo2jax.lowrank` direction that has a refresh.
        directions: J, a multiple of K, at least two of them.

    Raises:
        ValueError: for another direction, J, or estimator.

    >>> from zo2jax.directions import lowrank
    >>> estimator = svrg(two_point(0.5, direction=lowrank(2)), 2)
    >>> losses = np.float32([3.0, 1.0, 2.0, 1.0])
    >>> first = estimator.projected_gradient(losses, np.uint32(0))
    >>> first.tolist(), estimator.projected_gradient(losses, np.uint32(1), first).tolist()
    ([0.0, 1.0, 0.5], [1.0, 1.0, 0.5])
    """
    direction, own = estimator.direction, estimator.directions
    if estimator.full is not None:
        raise ValueError(f"the estimator is {estimator}, which has an anchor already")
    if not direction.rank or direction.refresh is None:
        raise ValueError(f"the direction is {direction}: expected zo2jax.lowrank with a refresh, which anchors begin")
    if directions % own or directions < 2 * own:
        raise ValueError(f"directions is {directions}, expected a multiple of {own}, at least {2 * own}")
    name = f"svrg({estimator.name}, {directions})"
    return replace(estimator, name=name, full=averaged(estimator, directions // own))
