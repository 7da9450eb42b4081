"""What zo2jax is compared with on the same shapes: MeZO in memory, and backpropagation."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import jax
import optax

from zo2jax.bench.backpropagation import Adapters, Learner, Offloaded, Whole, backpropagate
from zo2jax.bench.process import machine, memory
from zo2jax.bench.shapes import SHAPES, Work, random_model
from zo2jax.bench.step import stepping
from zo2jax.bench.throughput import WARM_UPS
from zo2jax.directions import lora
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.model import Model

METHODS = ("mezo", "lora", "adam", "adam-offload")
"""All weights bfloat16. mezo: the step of `zo2jax.mezo` in one jit, on the device. lora: Adam on adapters of queries
and values by backpropagation. adam: the same on all weights, its state float32, on the device. adam-offload: with
float32 masters, which are with the state in host memory; see `zo2jax.bench.backpropagation.Offloaded`."""

_RANK = 8
_TARGETS = ("*.attn.q.*", "*.attn.v.*")
_RATE = 1e-5
_GIB = 2**30


@dataclass(frozen=True)
class Baseline:
    """A step to compare with: a shape with random weights, its batch, and one of `METHODS`.

    Raises:
        ValueError: for an unknown shape or method, or a number that is too small.

    >>> Baseline("opt-1.3b", "adam").tokens
    2048
    """

    model: str
    method: str
    layers: int | None = None
    rows: int = 1
    tokens: int = 2048
    steps: int = 10
    """That are timed, each by itself."""
    warm_ups: int = WARM_UPS

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is measured."""
        for name, known in (("model", tuple(sorted(SHAPES))), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name, least in (("rows", 1), ("tokens", 2), ("steps", 1), ("warm_ups", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")

    @property
    def parts(self) -> list[int]:
        """Parameters of each block; reads nothing."""
        shapes = owned_shapes(random_model(self.model, self.layers).blocks)
        return [sum(leaf.size for leaf in jax.tree.leaves(leaves)) for leaves in shapes.values()]

    def needs(self) -> tuple[int, int]:
        """Bytes of (device memory, host memory) that weights, their state and gradients take; activations not counted.

        >>> Baseline("opt-tiny", "adam").needs()[0] > Baseline("opt-tiny", "lora").needs()[0]
        True
        """
        total, largest = sum(self.parts), max(self.parts)
        device = {
            "mezo": 2 * 2 * total,  # weights, and a probe
            "lora": 2 * total,
            "adam": (2 + 8) * total + 10 * largest,  # gradients and weights in float32 while a block moves
            "adam-offload": 2 * total + 3 * 12 * largest,
        }
        return device[self.method], self._pool * _GIB

    def environment(self) -> dict[str, str]:
        """What the process that measures needs: XLA's host memory has a limit, up to which it grows by doubling."""
        return {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(self._pool)} if self._pool else {}

    @property
    def _pool(self) -> int:
        """GiB of host memory for masters and state, and for what is made anew of some blocks before it is let go."""
        if self.method != "adam-offload":
            return 0
        return math.ceil((1.05 * 12 * sum(self.parts) + 3 * 12 * max(self.parts)) / _GIB)


@contextmanager
def taking(baseline: Baseline, model: Model, batch: Any) -> Iterator[Callable[[], Any]]:
    """A function that takes one step, and returns its loss.

    >>> with taking(Baseline("opt-tiny", "lora"), random_model("opt-tiny", 1), Work(tokens=8).batch(256)) as step:
    ...     callable(step)
    True
    """
    optimizer = optax.adam(_RATE)
    if baseline.method == "mezo":
        with stepping("mezo", model, batch) as once:
            del model
            yield once
        return
    learner: Learner
    if baseline.method == "lora":
        learner = Adapters(model, optimizer, lora(_RANK, 2 * _RANK, targets=_TARGETS))
    else:
        learner = Whole(model, optimizer) if baseline.method == "adam" else Offloaded(model, optimizer)
    blocks = model.blocks
    del model

    def step() -> jax.Array:
        loss = backpropagate(blocks, learner, batch)
        jax.block_until_ready([learner.leaves(block.name)[0] for block in blocks])
        return loss

    yield step


def measure_baseline(baseline: Baseline) -> dict[str, Any]:
    """Times a step, up to its loss in host memory and its new weights.

    Its figures have the names of `zo2jax.bench.throughput.measure`.

    Raises:
        ValueError: for more tokens than the shape's context.

    >>> measure_baseline(Baseline("opt-tiny", "lora", tokens=4096))
    Traceback (most recent call last):
    ValueError: 4096 tokens do not fit the model's context of 2048: shorten them
    """
    start = time.perf_counter()
    model = random_model(baseline.model, baseline.layers)
    model.check_tokens(baseline.tokens)
    batch = Work(tokens=baseline.tokens, rows=baseline.rows).batch(model.config.vocabulary)
    found: dict[str, Any] = machine() | {"setting": asdict(baseline), "parameters": model.parameter_count}
    with taking(baseline, model, batch) as step:
        del model
        found["load_s"] = time.perf_counter() - start

        def timed() -> float:
            began = time.perf_counter()
            float(step())
            return time.perf_counter() - began

        found["first_step_s"] = timed()
        for _ in range(baseline.warm_ups):
            timed()
        found["times_ms"] = [timed() * 1e3 for _ in range(baseline.steps)]
        found |= memory()
    found["ms"] = statistics.median(found["times_ms"])
    found["tokens_per_s"] = baseline.rows * baseline.tokens / found["ms"] * 1e3
    return found
