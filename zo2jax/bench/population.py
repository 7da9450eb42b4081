"""``zo2jax bench population``: adapters along many directions at once, beside one after the other, and backpropagation.

All in one process, so that rates are those of one machine in one state.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from zo2jax.bench.backpropagation import Adapters, backpropagate
from zo2jax.bench.process import machine, measured, memory, new_file
from zo2jax.bench.report import figures_table, save
from zo2jax.bench.shapes import SHAPES, Work, random_model
from zo2jax.bench.throughput import NO_PREALLOCATION, WARM_UPS, timed_step
from zo2jax.directions import Direction, lora
from zo2jax.estimators import Estimator, averaged, two_point
from zo2jax.models.blocks import Source
from zo2jax.models.layers import product
from zo2jax.models.model import Model
from zo2jax.optimizers import sgd
from zo2jax.pages import flat
from zo2jax.plan import Plan, Tier
from zo2jax.plan.measure import sustained
from zo2jax.run import Run

LINES = (
    ("one step of all directions, ms", ("ms",), 2),
    ("  in pairs, one after the other in each block, ms", ("pairs_ms",), 2),
    ("steps of one direction each, one after the other, ms", ("apart_ms",), 2),
    ("  / all at once", ("speedup",), 2),
    ("products with all matrices alone, ms / in them TFLOP/s", ("products_ms", "products_tflops"), 2),
    ("  / one step of all directions", ("share_of_ceiling",), 3),
    ("losses, all at once and in pairs: largest difference / their mean", ("loss_error",), 6),
    ("backpropagation into the adapters, with Adam, ms / all directions in it", ("backward_ms", "backward_ratio"), 2),
    ("peak device memory: of one direction, GiB", ("apart_peak_gib",), 2),
    ("  after backpropagation", ("backward_peak_gib",), 2),
    ("  after all directions", ("peak_gib",), 2),
)
"""The lines of the table, see `zo2jax.bench.report.figures_table`."""

_EPS = 1e-2
_SUSTAINED = 0.5  # seconds
_LOGITS = 8192  # rows of a head's matrix that are multiplied at once, as they are in a step


@dataclass(frozen=True)
class Population:
    """What is measured: adapters of a model with random weights, along so many directions, both ways.

    >>> Population("llama-7b").members
    40
    """

    model: str
    layers: int | None = None
    """Cuts the model to so many."""
    rows: int = 1
    tokens: int = 256
    rank: int = 8
    directions: int = 20
    targets: tuple[str, ...] = ("*.attn.q.*", "*.attn.v.*")
    """Of the adapters: queries and values, as in MeZO (arXiv 2305.17333, appendix E.3); all matrices if empty."""
    tier: Tier = "device"
    steps: int = 5
    """That are timed, each by itself."""

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is measured."""
        if self.model not in SHAPES:
            raise ValueError(f"model is {self.model!r}, expected one of {', '.join(SHAPES)}")
        for name, least in (("rows", 1), ("tokens", 2), ("rank", 1), ("directions", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")

    @property
    def members(self) -> int:
        """Forward passes of a step."""
        return 2 * self.directions

    @property
    def direction(self) -> Direction:
        """The adapters."""
        return lora(self.rank, 2 * self.rank, targets=self.targets)

    def estimator(self, directions: int) -> Estimator:
        """Two-point, along so many directions."""
        return averaged(two_point(_EPS, direction=self.direction), directions)


def population(setting: Population, json: str | None = None) -> dict[str, Any]:
    """Measures a setting in a process of its own, prints a table, and writes all numbers to ``json``.

    Raises:
        ValueError: for a file that cannot be written, before anything is run.
        RuntimeError: if the measurement fails.
    """
    path = new_file(json)
    found: dict[str, Any] = measured("population", measure_population, setting, env=NO_PREALLOCATION)
    of = f"{setting.model}, {setting.rows} x {setting.tokens} tokens, rank {setting.rank}, {setting.directions} "
    of += f"directions both ways, tier {setting.tier}; {found['device']}"
    Console().print(figures_table(found, LINES, of))
    save(found, path)
    return found


def measure_population(setting: Population) -> dict[str, Any]:
    """Times a step of all directions at once, and what it is compared with; times end in _ms.

    >>> found = measure_population(Population("tiny", layers=1, tokens=8, directions=2, steps=1))
    >>> found["loss_error"] < 1e-6, found["ms"] > 0, found["share_of_ceiling"] > 0
    (True, True, True)
    """
    model = random_model(setting.model, setting.layers)
    blocks = dict(model.source)  # made once, not for each run
    model = model.replace(Source({name: partial(blocks.__getitem__, name) for name in blocks}, concurrent=True))
    batch = Work(tokens=setting.tokens, rows=setting.rows).batch(model.config.vocabulary)
    found: dict[str, Any] = machine() | {"setting": asdict(setting), "parameters": model.parameter_count}
    found |= _products(model, setting)
    one, _ = _timed(setting, model, batch, 1)
    found["apart_ms"] = setting.directions * one
    found["apart_peak_gib"] = memory()["peak_device_gib"]
    if setting.tier == "device":
        found["backward_ms"] = _backward(model, setting, batch)
        found["backward_peak_gib"] = memory()["peak_device_gib"]
    first = {}
    for name, at_once in (("pairs_ms", 2), ("ms", None)):
        found[name], first[name] = _timed(setting, model, batch, setting.directions, at_once)
    found["loss_error"] = float(np.abs(first["ms"] - first["pairs_ms"]).max() / first["ms"].mean())
    found["speedup"] = found["apart_ms"] / found["ms"]
    found["share_of_ceiling"] = found["products_ms"] / found["ms"]
    found["backward_ratio"] = found["ms"] / found["backward_ms"] if "backward_ms" in found else None
    peaks = memory()
    return found | peaks | {"peak_gib": peaks["peak_device_gib"]}


def _median(step: Callable[[], float], count: int) -> float:
    """Milliseconds of a step that gives seconds."""
    for _ in range(WARM_UPS):
        step()
    return statistics.median(step() for _ in range(count)) * 1e3


def _timed(
    setting: Population, model: Model, batch: Any, directions: int, at_once: int | None = None
) -> tuple[float, np.ndarray]:
    """(milliseconds of a step of a run of its own, losses of its first step)."""
    tiers = {block.name: setting.tier for block in model.blocks}
    options: dict[str, Any] = {"key": jax.random.key(0), "replay_within": math.inf}
    with tempfile.TemporaryDirectory() as directory:
        plan = Plan(tiers, probe_batch=at_once)
        estimator = setting.estimator(directions)
        with Run(model, estimator, sgd(1e-6), directory=directory, plan=plan, **options) as run:
            losses = np.asarray(run.step(batch).losses)
            return _median(partial(timed_step, run, batch), setting.steps), losses


def _products(model: Model, setting: Population) -> dict[str, float]:
    """Milliseconds of the products of all members with all matrices, and nothing else, each as a step makes it."""
    rows = setting.members * setting.rows * setting.tokens
    counts: dict[tuple[int, int], float] = {}
    dtype = model.dtype
    for block in model.blocks:
        for leaf in flat(block.shapes).values():
            if leaf.ndim == 2 and block.name != "embed":
                head = block.name == "head" and leaf.shape[0] > _LOGITS
                shape, share = ((_LOGITS, leaf.shape[1]), leaf.shape[0] / _LOGITS) if head else (leaf.shape, 1)
                counts[shape] = counts.get(shape, 0) + share
    total = 0.0
    for (n_out, n_in), count in counts.items():
        x = jax.random.normal(jax.random.key(0), (rows, n_in)).astype(dtype)
        w = (0.02 * jax.random.normal(jax.random.key(1), (n_out, n_in))).astype(dtype)
        total += count * sustained(jax.jit(partial(product, dtype=dtype)), x, w, least=_SUSTAINED) * 1e3
    flops = sum(2.0 * rows * n_out * n_in * count for (n_out, n_in), count in counts.items())
    return {"products_ms": total, "products_tflops": flops / total / 1e9}


def _backward(model: Model, setting: Population, batch: Any) -> float:
    """Milliseconds of a step of Adam on the same adapters by backpropagation, each block's activations made again."""
    learner = Adapters(model, optax.adam(1e-4), setting.direction)

    def step() -> float:
        start = time.perf_counter()
        float(backpropagate(model.blocks, learner, batch))
        jax.block_until_ready(learner.adapters)
        return time.perf_counter() - start

    return _median(step, setting.steps)
