"""The definition of a zeroth-order step, in its plainest form. Everything faster is compared with this."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bits import cut12
from zo2jax.directions import check_key, check_of_weights, check_targets, step_keys
from zo2jax.estimators import Estimator
from zo2jax.leaves import PyTree, leaf_ids
from zo2jax.optimizers import Optimizer, as_optimizer
from zo2jax.updates import Rounding, Update, apply_update, perturb, residual, stochastic

LossFn = Callable[[PyTree, Any], jax.Array]


class State(NamedTuple):
    """What a step carries on; a pytree of arrays.

    >>> State._fields
    ('params', 'opt_state', 'step', 'key', 'leaf_ids')
    """

    params: PyTree
    opt_state: Any
    step: jax.Array
    """uint32 []: steps done."""
    key: jax.Array
    """The run's key (typed, threefry); it never changes."""
    leaf_ids: jax.Array
    """uint32 [leaves]: the addresses of the leaves of ``params``, in pytree order."""


class Info(NamedTuple):
    """What a step reports.

    >>> Info._fields
    ('loss', 'projected_gradient', 'losses', 'skipped', 'update')
    """

    loss: jax.Array
    """float32 []: the mean of the probes' losses."""
    projected_gradient: jax.Array
    """float32 [K]: the coefficients g_k of z_k in the estimate of the gradient."""
    losses: jax.Array
    """float32 [M]: the loss of each probe."""
    skipped: jax.Array
    """bool []: a loss or a coefficient was not finite, so the weights were left as they are."""
    update: Update
    """What was applied to the weights."""


class Mezo(NamedTuple):
    """The pair (init, step) made by `mezo`, as in optax.

    >>> Mezo._fields
    ('init', 'step')
    """

    init: Callable[[PyTree, jax.Array], State]
    step: Callable[[State, Any], tuple[State, Info]]


def _check_loss(loss: jax.Array) -> jax.Array:
    if getattr(loss, "shape", None) != () or loss.dtype != jnp.float32:
        what = f"{loss.dtype}{list(loss.shape)}" if hasattr(loss, "dtype") else repr(loss)
        raise TypeError(
            f"loss_fn returned {what}, expected a float32 scalar. In 16 bits the difference of two losses vanishes "
            "(at a loss of 8 and eps 1e-3, g would be a multiple of 31): cast the logits to float32 before the loss"
        )
    return loss


def conclude(
    estimator: Estimator,
    optimizer: Optimizer,
    keys: jax.Array,
    losses: jax.Array,
    opt_state: Any,
    step: jax.Array,
    anchor: jax.Array | None = None,
) -> tuple[Info, Any]:
    """From the M losses of step ``step`` (0, 1, ..) to the update that it makes, and the optimizer's next state.

    ``anchor`` is that of `Estimator.projected_gradient`; losses of its probes are no part of the mean. Losses
    or coefficients that are not finite make an update that changes nothing.

    >>> from zo2jax import sgd, two_point
    >>> estimator, optimizer = two_point(0.5), sgd(1.0)
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> info, _ = conclude(estimator, optimizer, keys, jnp.array([3.0, 1.0]), optimizer.init(1), jnp.uint32(0))
    >>> float(info.update.coefs[0]), bool(info.skipped)
    (-2.0, False)
    """
    g = estimator.projected_gradient(losses, step, anchor)
    finite = jnp.isfinite(losses).all() & jnp.isfinite(g).all()
    coefs, decay, opt_state = optimizer.update(jnp.where(finite, g, 0), opt_state)
    good = finite & jnp.isfinite(coefs).all() & jnp.isfinite(decay)
    fresh = cut12(jnp.where(good, 1 - optimizer.momentum, 0)) if optimizer.momentum else None
    update = Update(keys, cut12(jnp.where(good, coefs, 0)), cut12(jnp.where(good, decay, 0)), fresh)
    present = losses if anchor is None else losses[: len(estimator.probes)]
    return Info(present.mean(), g, losses, ~good, update), opt_state


def begin(params: PyTree, key: jax.Array, estimator: Estimator, optimizer: Optimizer) -> State:
    """The state before the first step; ``params`` may be shapes.

    Raises:
        TypeError, ValueError: see `leaf_ids`, `check_key` and `check_targets` of `zo2jax.directions`.

    >>> from zo2jax import sgd, two_point
    >>> int(begin(jnp.zeros(3), jax.random.key(0), two_point(1e-3), sgd(0.1)).step)
    0
    """
    opt_state, step = optimizer.init(estimator.directions), jnp.zeros((), jnp.uint32)
    ids = jnp.asarray(leaf_ids(params))
    check_targets(params, estimator.direction)
    return State(params, opt_state, step, check_key(key), ids)


def mezo(loss_fn: LossFn, estimator: Estimator, optimizer: Any, *, rounding: Rounding = stochastic) -> Mezo:
    """A zeroth-order step for any pytree of parameters and any loss (MeZO, arXiv 2305.17333, algorithm 1).

    ``init(params, key)`` gives a `State`; ``step(state, batch)`` gives (state, `Info`). One step evaluates the
    M probes theta + sum_k C[m, k] z_k one after the other, turns their losses into g (K numbers), g into
    coefficients, and moves the weights once. Both functions are pure, for use inside your own ``jax.jit``,
    ``lax.scan`` and with donation. A step whose losses are not all finite leaves the weights as they are.

    Parameters may be in host memory (shardings of the memory kind "pinned_host"): a leaf comes to the device where a
    probe is made of it and where it is moved, and goes back, so that the new state is where the old one was. But
    ``loss_fn`` is given a probe all of whose leaves are in device memory at once. A model larger than that is for
    `zo2jax.Run`, which has one block there at a time, and moves the next one while it computes.

    Args:
        loss_fn: ``(params, batch) -> float32 []``.
        estimator: for example ``zo.two_point(eps=1e-3)``.
        optimizer: ``zo.sgd(...)``, or an optax transformation of the K projected gradients.
        rounding: how updates of 16-bit leaves are rounded, `stochastic` or `nearest`.

    Raises:
        ValueError: at construction for an optimizer that does not commute with z, or has momentum, for `residual`
            rounding, for `zo2jax.lora`, and for `zo2jax.svrg`; by ``init`` for a key that is not threefry, for two
            leaves that would share noise, and for targets of the direction that name no leaf.
        TypeError: by ``init`` for leaves of another dtype than float32, bfloat16, float16; by ``step`` for a
            loss that is not a float32 scalar.

    >>> from zo2jax import sgd, two_point
    >>> algorithm = mezo(lambda w, x: jnp.sum((w - x) ** 2), two_point(1e-2), sgd(0.02))
    >>> state = algorithm.init(jnp.zeros(4), jax.random.key(0))
    >>> for _ in range(300):
    ...     state, info = jax.jit(algorithm.step)(state, jnp.ones(4))
    >>> bool(info.loss < 1e-2)
    True
    """
    transform = as_optimizer(optimizer)
    if transform.momentum:
        raise ValueError(f"the optimizer is {transform.name}: momentum is for zo2jax.Run with zo2jax.lowrank")
    if rounding == residual:
        raise ValueError(f"rounding is {rounding}, which zo2jax.Run keeps: expected stochastic or nearest")
    check_of_weights(estimator.direction)
    if estimator.full is not None:
        raise ValueError(f"the estimator is {estimator}: its anchor is for zo2jax.Run, which keeps it")
    indices, values = estimator.sparse_probes()

    def init(params: PyTree, key: jax.Array) -> State:
        return begin(params, key, estimator, transform)

    def step(state: State, batch: Any) -> tuple[State, Info]:
        keys = step_keys(state.key, state.step, estimator.directions, estimator.direction)

        def member(row: tuple[jax.Array, jax.Array]) -> jax.Array:
            probe = perturb(state.params, keys[row[0]], row[1], state.leaf_ids, direction=estimator.direction)
            return _check_loss(loss_fn(probe, batch))

        losses = lax.map(member, (jnp.asarray(indices), estimator.scaled(jnp.asarray(values), state.step)))
        info, opt_state = conclude(estimator, transform, keys, losses, state.opt_state, state.step)
        moved = apply_update(
            state.params, info.update, state.leaf_ids, direction=estimator.direction, rounding=rounding
        )
        return state._replace(params=moved, opt_state=opt_state, step=state.step + 1), info

    return Mezo(init, step)
