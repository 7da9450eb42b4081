"""Estimators of the gradient from a few losses: a probe matrix and a map from losses to coefficients."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from zo2jax.directions import Direction, normal


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
        """K, the number of directions of a step."""
        return self.probes.shape[1]

    def sparse_probes(self) -> tuple[np.ndarray, np.ndarray]:
        """The probe matrix by rows: (indices, values), both [M, n], n the most non-zeros of a row (at least 1).

        >>> averaged(two_point(0.5), 2).sparse_probes()[0].tolist()
        [[0], [0], [1], [1]]
        """
        width = max(1, int((self.probes != 0).sum(axis=1).max()))
        order = np.sort(np.argsort(self.probes == 0, axis=1, kind="stable")[:, :width], axis=1)
        return order.astype(np.int32), np.take_along_axis(self.probes, order, axis=1)


def two_point(eps: float, *, direction: Direction = normal) -> Estimator:
    """SPSA: g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps). Unbiased up to O(eps^2).

    Spall (1992); MeZO, arXiv 2305.17333, definition 1.

    Args:
        eps: the perturbation scale, positive (1e-3 in MeZO); cut to 12 significant bits.
        direction: `normal`, `rademacher`, or one of `zo2jax.lowrank`.

    >>> float(two_point(0.5).coefficients(np.array([3.0, 1.0]))[0])
    2.0
    """
    if not (math.isfinite(eps) and eps > 1e-30):
        raise ValueError(f"eps is {eps}, expected a positive number such as 1e-3")
    probes = np.array([[eps], [-eps]], np.float32)
    cut = Estimator("", probes, lambda losses: losses).probes[0, 0]

    def coefficients(losses: jax.Array) -> jax.Array:
        return ((losses[0] - losses[1]) / (np.float32(2) * cut))[None]

    return Estimator(f"two_point({eps}, direction={direction})", probes, coefficients, direction)


def averaged(estimator: Estimator, n: int) -> Estimator:
    """The mean of ``n`` independent copies of an estimator (n-SPSA, arXiv 2305.17333, section 2).

    The directions of all copies move the weights, each weighted 1/n: g = concat_i(g_i) / n. The variance falls
    by n, the forward passes grow by n.

    >>> averaged(two_point(0.5), 3).probes.shape
    (6, 3)
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1 copy")
    members = estimator.probes.shape[0]

    def coefficients(losses: jax.Array) -> jax.Array:
        copies = jax.vmap(estimator.coefficients)(losses.reshape(n, members))
        return copies.reshape(-1) / np.float32(n)

    probes = np.kron(np.eye(n, dtype=np.float32), estimator.probes)
    return Estimator(f"averaged({estimator.name}, {n})", probes, coefficients, estimator.direction)
