"""From projected gradients to coefficients: SGD, and the optax transformations that are faithful to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


class Optimizer(NamedTuple):
    """A pair of pure functions, as in optax, on the K projected gradients of a step.

    ``init(K)`` gives the state; ``update(g, state)`` gives (coefs float32 [K], decay float32 [], state). The
    coefficients are added to the weights: they carry the minus sign and the learning rate.

    >>> optimizer = sgd(0.5)
    >>> optimizer.update(jnp.array([2.0]), optimizer.init(1))[0].tolist()
    [-1.0]
    """

    init: Callable[[int], Any]
    update: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array, Any]]
    name: str = "optimizer"
    """What it is, for the config of a run."""
    momentum: float = 0.0
    """How much of the last step's momentum stays, in [0, 1). `zo2jax.Run` keeps it in the factors of matrices, with
    low-rank directions."""


class Faithful(NamedTuple):
    """A transformation that its user declares to be faithful on the weights; see `faithful`.

    >>> isinstance(faithful(optax.identity()), Faithful)
    True
    """

    transformation: optax.GradientTransformation


def faithful(transformation: optax.GradientTransformation) -> Faithful:
    """Accepts a transformation of the projected gradients whose state holds floats.

    You state that applying it to the K numbers g_k is what you want. Learning rates held in the state
    (`optax.inject_hyperparams`) and running scales of |g| are such; momentum and Adam are not, since their
    averages would mix the g_k of different directions z.

    >>> optimizer = as_optimizer(faithful(optax.inject_hyperparams(optax.scale)(-0.5)))
    >>> optimizer.update(jnp.ones(1), optimizer.init(1))[0].tolist()
    [-0.5]
    """
    return Faithful(transformation)


class SGDState(NamedTuple):
    """Steps done, and the state of the inner transformation.

    >>> sgd(0.1).init(1).step.dtype
    dtype('int32')
    """

    step: jax.Array
    inner: Any


def _zeros(count: int) -> jax.Array:
    return jnp.zeros(count, jnp.float32)


def check_faithful(transformation: Any) -> optax.GradientTransformation:
    """Returns the optax transformation if it commutes with z, else raises with the reason.

    Raises:
        TypeError: if it is no optax transformation.
        ValueError: if its state holds floats, or if it needs the parameters.

    >>> check_faithful(optax.clip(1.0)) is not None
    True
    """
    if isinstance(transformation, Faithful):
        return transformation.transformation
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        raise TypeError(f"optimizer is {transformation!r}, expected zo.sgd(...) or an optax transformation")
    state = transformation.init(_zeros(1))
    floats = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    ]
    if floats:
        raise ValueError(
            f"the optimizer keeps floats in its state ({', '.join(floats)}), as momentum and Adam do. It sees only the "
            "projected gradients g_k, whose directions z_k change at every step, so averages over steps are not "
            "averages of gradients. Use zo.sgd (whose momentum is of weights), schedules, clip or sign; or wrap it in "
            "zo.faithful(...) if the numbers are meant for g_k alone"
        )
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            transformation.update(_zeros(1), state, None)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the optimizer needs the parameters ({error}), as added weight decay does; it sees only the projected "
            "gradients. Use zo.sgd(learning_rate, weight_decay=...)"
        ) from error
    return transformation


def sgd(
    learning_rate: float | Schedule,
    weight_decay: float = 0.0,
    *,
    momentum: float = 0.0,
    transform: optax.GradientTransformation | Faithful | None = None,
) -> Optimizer:
    """SGD on the weights: coefs = -lr_t g, decay = lr_t weight_decay (MeZO, arXiv 2305.17333, algorithm 1).

    With momentum beta a matrix moves by an average of updates, N <- beta N + (1 - beta) sum_k coefs_k U_k, in the
    factors of low-rank directions, which share V until it changes (LOZO-M, arXiv 2410.07698, algorithm 2). The updates
    carry the learning rate of their own step. Vectors move as without it. It needs `zo2jax.Run`, which keeps N.

    Args:
        learning_rate: a number, or an optax schedule of the step (0, 1, ...).
        weight_decay: decoupled, of leaves with two or more dimensions.
        momentum: beta, in [0, 1); 0 for none.
        transform: applied to g before the learning rate, for example ``optax.clip(10.0)``.

    Raises:
        ValueError: for a number out of range, or a transform that `check_faithful` refuses.

    >>> optimizer = sgd(optax.linear_schedule(1.0, 0.0, 2), weight_decay=0.5)
    >>> state = optimizer.init(1)
    >>> coefs, decay, state = optimizer.update(jnp.ones(1), state)
    >>> coefs, decay, state = optimizer.update(jnp.ones(1), state)
    >>> float(coefs[0]), float(decay)
    (-0.5, 0.25)
    """
    if not callable(learning_rate) and not 0 <= learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}, expected a finite number >= 0, such as 1e-6")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}, expected a finite number >= 0, such as 0.1")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}, expected a number in [0, 1), such as 0.9")
    inner = check_faithful(transform if transform is not None else optax.identity())

    def init(count: int) -> SGDState:
        return SGDState(jnp.zeros((), jnp.int32), inner.init(_zeros(count)))

    def update(g: jax.Array, state: SGDState) -> tuple[jax.Array, jax.Array, SGDState]:
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            rate = jnp.asarray(learning_rate(state.step) if callable(learning_rate) else learning_rate, jnp.float32)
            scaled, inner_state = inner.update(g, state.inner, None)
        return -rate * scaled, rate * jnp.float32(weight_decay), SGDState(state.step + 1, inner_state)

    rate = "schedule" if callable(learning_rate) else learning_rate
    more = f", momentum={momentum}" if momentum else ""
    return Optimizer(init, update, f"sgd({rate}, weight_decay={weight_decay}{more})", momentum)


def _with(second: jax.Array, steps: jax.Array, beta: float, square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A running mean of squares, and how many are in it, with another one; a square of 0 is left out."""
    there = square > 0
    return jnp.where(there, beta * second + (1 - beta) * square, second), steps + there.astype(jnp.int32)


def _corrected(second: jax.Array, steps: jax.Array, beta: float) -> jax.Array:
    """The running mean, without the zero that it began with."""
    return second / jnp.where(steps > 0, 1 - jnp.float32(beta) ** steps.astype(jnp.float32), 1)


class ClipState(NamedTuple):
    """The state of `clip_by_running_scale`: the running mean of |g|^2, and how many steps are in it.

    >>> clip_by_running_scale().transformation.init(jnp.zeros(1)).steps.dtype
    dtype('int32')
    """

    second: jax.Array
    """float32 []."""
    steps: jax.Array


def clip_by_running_scale(factor: float = 3.0, beta: float = 0.99) -> Faithful:
    """Bounds |g| by a multiple of its running root mean square; for the ``transform`` of `sgd`.

    g_t <- g_t min(1, b_t / |g_t|) with b_t = factor sqrt(v_(t-1) / (1 - beta^(t-1))), where v_t = beta v_(t-1) +
    (1 - beta) |g_t|^2 is the running mean of the bounded |g|^2, and |g| the norm of a step's K projected gradients. A
    bound that follows the run, in place of `optax.clip`'s, which has to be known before. It scales whole estimates, so
    it is faithful. Steps whose g is 0, skipped ones among them, say nothing of the scale; the first one has no bound.

    Args:
        factor: above 1; g of one direction is nearly normal, and 3 bounds one step in 370 of a quiet run.
        beta: of the running mean; it looks back about 1 / (1 - beta) steps.

    Raises:
        ValueError: for a factor that is not above 1, or a beta outside [0, 1).

    >>> optimizer = sgd(1.0, transform=clip_by_running_scale(2.0))
    >>> state = optimizer.init(1)
    >>> for g in (1.0, -1.0, 50.0):
    ...     coefs, decay, state = optimizer.update(jnp.array([g]), state)
    >>> round(float(coefs[0]), 4)
    -2.0
    """
    if not 1 < factor < float("inf"):
        raise ValueError(f"factor is {factor}, expected a number above 1, such as 3")
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}, expected a number in [0, 1), such as 0.99")

    def init(params: Any) -> ClipState:
        return ClipState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def update(g: Any, state: ClipState, params: Any = None) -> tuple[Any, ClipState]:
        square = jnp.sum(jnp.square(g))
        bound = jnp.where(state.steps > 0, factor**2 * _corrected(*state, beta), jnp.inf)
        scale = jnp.where(square > bound, jnp.sqrt(bound / jnp.where(square > 0, square, 1)), 1)
        return g * scale, ClipState(*_with(*state, beta, jnp.minimum(square, bound)))

    return Faithful(optax.GradientTransformation(init, update))


class MEAZOState(NamedTuple):
    """The state of `meazo`: the running mean of |g|^2, how many steps are in it, and the state of its SGD.

    >>> meazo(0.1).init(1).steps.dtype
    dtype('int32')
    """

    second: jax.Array
    """float32 []."""
    steps: jax.Array
    sgd: SGDState


def meazo(
    learning_rate: float | Schedule, weight_decay: float = 0.0, *, beta: float = 0.99, epsilon: float = 1e-8
) -> Optimizer:
    """SGD whose step is divided by the running root mean square of the projected gradient: one number of state.

    coefs = -lr_t g / (sqrt(v_t / (1 - beta^t)) + epsilon), with v_t = beta v_(t-1) + (1 - beta) |g_t|^2 and |g_t|^2 the
    sum of the squared projected gradients of a step (MEAZO, Dbouk et al., arXiv 2605.03869, has one of them, or their
    mean, whose square is the same on average; but for `leave_one_out` it is 0). It scales whole updates, so it
    commutes with z and is faithful. The learning rate is the size of an update of a weight, in units of z. Steps whose
    g is 0 (skipped ones among them) say nothing of its size, and are left out of the mean.

    Args:
        learning_rate: a number, or an optax schedule of the step.
        weight_decay: decoupled, of leaves with two or more dimensions.
        beta: of the running mean; it looks back about 1 / (1 - beta) steps.
        epsilon: added to the root.

    Raises:
        ValueError: for a beta outside [0, 1), an epsilon that is not positive, or what `sgd` refuses.

    >>> optimizer = meazo(0.1)
    >>> coefs, decay, state = optimizer.update(jnp.array([-20.0]), optimizer.init(1))
    >>> round(float(coefs[0]), 4)
    0.1
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}, expected a number in [0, 1), such as 0.99")
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon is {epsilon}, expected a positive number, such as 1e-8")
    plain = sgd(learning_rate, weight_decay)

    def init(count: int) -> MEAZOState:
        return MEAZOState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), plain.init(count))

    def update(g: jax.Array, state: MEAZOState) -> tuple[jax.Array, jax.Array, MEAZOState]:
        # Each g_k carries the weight 1 / K.
        running = _with(state.second, state.steps, beta, jnp.sum(jnp.square(g)))
        coefs, decay, inner = plain.update(g / (jnp.sqrt(_corrected(*running, beta)) + epsilon), state.sgd)
        return coefs, decay, MEAZOState(*running, inner)

    return Optimizer(init, update, f"meazo over {plain.name}, beta={beta}, epsilon={epsilon}")


def as_optimizer(optimizer: Any) -> Optimizer:
    """An `Optimizer` as it is; an optax transformation (or `Faithful`) as one without decay. See `check_faithful`.

    >>> optimizer = as_optimizer(optax.chain(optax.clip(1.0), optax.scale(-0.1)))
    >>> round(float(optimizer.update(jnp.array([5.0]), optimizer.init(1))[0][0]), 3)
    -0.1
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    inner = check_faithful(optimizer)

    def update(g: jax.Array, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            coefs, state = inner.update(g, state, None)
        return jnp.asarray(coefs, jnp.float32), _zeros(1)[0], state

    return Optimizer(lambda count: inner.init(_zeros(count)), update, "optax")
