"""How long it takes until a held-out loss has fallen so far: zeroth-order steps of a run, beside Adam's."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import optax

from zo2jax.bench.process import machine, memory
from zo2jax.demo import load_text_or, model_folder
from zo2jax.directions import lowrank
from zo2jax.estimators import Estimator, one_sided, two_point
from zo2jax.models.hub import load
from zo2jax.models.model import Model
from zo2jax.optimizers import sgd
from zo2jax.run import Run
from zo2jax.tasks.stdlib import source_code
from zo2jax.tasks.text import HeldOut, TextBatches, TextData

_EPS = 1e-3
_REFRESH = 50
_CHARACTERS = 300_000
_HELD_OUT = 128  # rows, one batch

ZEROTH: dict[str, tuple[Callable[[], Estimator], float]] = {
    "dense": (lambda: two_point(_EPS), 1e-4),
    "factored": (lambda: two_point(_EPS, direction=lowrank(2, refresh=_REFRESH)), 1e-4),
    "one_sided": (lambda: one_sided(8, _EPS), 3e-3),
}
"""Estimators and their learning rates, those of docs/LOG.md for stories260K on Shakespeare's plays."""
METHODS = (*ZEROTH, "adam")
"""The same, and Adam on all weights by backpropagation."""
_ADAM = optax.adam(1e-3)


@dataclass(frozen=True)
class Goal:
    """A small model that is adapted to a text until its held-out loss is ``fall`` nats a token lower than at first.

    Raises:
        ValueError: for an unknown method, or a number out of range.

    >>> Goal("dense", fall=0.2).model
    ''
    """

    method: str
    """One of `METHODS`."""
    model: str = ""
    """A Hugging Face folder; the model that comes with the package if empty."""
    text: str = ""
    """A file; the code of Python's library if empty."""
    fall: float = 0.3
    most: int = 3000
    """Steps after which it is given up."""
    every: int = 20
    """Steps from one evaluation to the next."""
    rows: int = 16
    tokens: int = 64

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is measured."""
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if not self.fall > 0:
            raise ValueError(f"fall is {self.fall}, expected more than 0 nats a token")
        for name in ("most", "every", "rows", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")

    def data(self, model: Model) -> TextData:
        """The text, packed for a model."""
        code = partial(source_code, _CHARACTERS)
        return load_text_or(code, model, self.text, tokens=self.tokens, batch=self.rows)


Trained = tuple[Callable[[int, int], None], Callable[[], float]]
"""(takes the steps from one to another and waits for them, gives the held-out loss)."""


@contextmanager
def _by_run(goal: Goal, model: Model, batches: TextBatches, held_out: Any) -> Iterator[Trained]:
    make, rate = ZEROTH[goal.method]
    options: dict[str, Any] = {"key": jax.random.key(0), "replay_within": math.inf}
    with (
        tempfile.TemporaryDirectory() as directory,
        Run(model, make(), sgd(rate), directory=directory, **options) as run,
    ):

        def train(start: int, stop: int) -> None:
            for i in range(start, stop):
                run.step(batches[i])
            run.flush()

        yield train, lambda: run.evaluate(held_out)


@contextmanager
def _by_adam(goal: Goal, model: Model, batches: TextBatches, held_out: Any) -> Iterator[Trained]:
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        state = [model.params, _ADAM.init(model.params)]

    def train(start: int, stop: int) -> None:
        for i in range(start, stop):
            state[:] = _moved(model, *state, batches[i])
        jax.block_until_ready(state)

    yield train, lambda: float(_loss(model, state[0], next(iter(held_out))))


@partial(jax.jit, static_argnums=0)
def _loss(model: Model, params: Any, batch: Any) -> jax.Array:
    return model.loss(params, batch)


@partial(jax.jit, static_argnums=0)
def _moved(model: Model, params: Any, opt_state: Any, batch: Any) -> Any:
    gradient = jax.grad(model.loss)(params, batch)
    with jax.numpy_dtype_promotion("standard"):
        change, opt_state = _ADAM.update(gradient, opt_state, params)
    return optax.apply_updates(params, change), opt_state


def measure_goal(goal: Goal) -> dict[str, Any]:
    """Trains until the loss has fallen: ``steps`` and ``seconds`` of training, None if it does not within ``most``.

    Evaluations are not in the time, nor what is compiled in the first steps, which are taken once before. ``curve`` has
    (steps, seconds, held-out loss) of each evaluation.

    Raises:
        FileNotFoundError, ValueError: for a model or a text that cannot be read.

    >>> measure_goal(Goal("adam", text="no/such/file.txt"))
    Traceback (most recent call last):
    FileNotFoundError: data: no file at no/such/file.txt
    """
    model = load(goal.model or model_folder(), dtype="float32")
    data = goal.data(model)
    held_out = HeldOut(data.held_out[:: max(1, len(data.held_out) // _HELD_OUT)][:_HELD_OUT], _HELD_OUT)
    batches = TextBatches(data.train, goal.rows, goal.most, 0)
    begun = partial(_by_adam if goal.method == "adam" else _by_run, goal, model, batches, held_out)
    with begun() as (train, look):
        train(0, min(goal.most, _REFRESH + 2 if goal.method == "factored" else 2))
        look()
    with begun() as (train, look):
        curve = [(0, 0.0, look())]
        target = curve[0][2] - goal.fall
        while curve[-1][2] > target and curve[-1][0] < goal.most:
            done, seconds, _ = curve[-1]
            stop, start = min(done + goal.every, goal.most), time.perf_counter()
            train(done, stop)
            seconds += time.perf_counter() - start
            curve.append((stop, seconds, look()))
    steps, seconds, loss = curve[-1]
    found = machine() | {"setting": asdict(goal), "parameters": model.parameter_count, "curve": curve}
    found |= {"first_loss": curve[0][2], "target": target, "loss": loss, "ms": seconds / steps * 1e3}
    reached = loss <= target
    return found | {"steps": steps if reached else None, "seconds": seconds if reached else None} | memory()
