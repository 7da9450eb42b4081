"""``zo2jax bench step``: a step in its several forms beside two forward passes, all weights on the device."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from zo2jax.bench.process import machine, measured
from zo2jax.bench.shapes import DEFAULT, Work, random_model
from zo2jax.estimators import two_point
from zo2jax.mezo import mezo
from zo2jax.models.blocks import forward, owned_shapes
from zo2jax.models.generation import continuations
from zo2jax.models.model import Model
from zo2jax.optimizers import sgd
from zo2jax.run import Run

WHAT = ("forward", "mezo", "run", "generate")
"""What is measured: two forward passes; the step of `zo2jax.mezo` in one jit; the step of `zo2jax.Run`; a new token of
each row by a cache. The last one is not measured unless it is asked for."""

_NEW_TOKENS = 32


@contextmanager
def stepping(what: str, model: Model, batch: Any) -> Iterator[Callable[[], Any]]:
    """A function that does one step of `WHAT`, and returns what to wait for.

    >>> model = random_model("tiny", 1)
    >>> with stepping("forward", model, Work(tokens=8).batch(256)) as step:
    ...     len(step())
    2
    """
    estimator, optimizer = two_point(1e-3), sgd(1e-6)
    with ExitStack() as stack:
        if what == "forward":
            yield lambda: [forward(model.visits(), model.blocks, batch) for _ in range(2)]
        elif what == "generate":
            ids = np.asarray(batch["ids"])
            prompts = (ids, np.full(len(ids), ids.shape[1], np.int32))
            visit = model.visits()
            yield lambda: continuations(visit, model.blocks, prompts, _NEW_TOKENS, lambda row, written: False)
        elif what == "run":
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            run = stack.enter_context(Run(model, estimator, optimizer, directory=directory, key=jax.random.key(0)))
            del model  # what the run does not hold is let go in the first step
            yield lambda: run.step(batch).loss
        else:
            algorithm = mezo(model.replace({}).loss, estimator, optimizer)
            step = jax.jit(algorithm.step, donate_argnums=0)
            state = [algorithm.init(model.params, jax.random.key(0))]
            del model

            def once() -> Any:
                state[0], info = step(state[0], batch)
                return info.loss

            yield once


def measure(what: str, shape: str, layers: int | None, work: Work) -> dict[str, Any]:
    """Times one of `WHAT`: seconds of the first call, median milliseconds of a step, peak device memory in GiB.

    >>> result = measure("forward", "tiny", 1, Work(tokens=8, steps=2))
    >>> sorted(result.keys() - machine().keys())
    ['first_call_s', 'layers', 'ms', 'parameters', 'peak_gib', 'shape', 'weights_gib', 'what']
    """
    model = random_model(shape, layers)
    model.check_tokens(work.tokens + _NEW_TOKENS * (what == "generate"))
    batch = work.batch(model.config.vocabulary)
    result: dict[str, Any] = machine() | {
        "what": what,
        "shape": shape,
        "layers": model.config.layers,
        "parameters": model.parameter_count,
        "weights_gib": sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(owned_shapes(model.blocks))) / 2**30,
    }
    with stepping(what, model, batch) as step:
        del model
        start = time.perf_counter()
        jax.block_until_ready(step())
        result["first_call_s"] = time.perf_counter() - start
        jax.block_until_ready(step())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(work.steps):
                last = step()
            jax.block_until_ready(last)
            times.append((time.perf_counter() - start) / work.steps * 1e3)
        result["ms"] = statistics.median(times) / (_NEW_TOKENS if what == "generate" else 1)
    memory = jax.devices()[0].memory_stats() or {}
    result["peak_gib"] = memory.get("peak_bytes_in_use", float("nan")) / 2**30
    return result


def step(
    shape: str, *, layers: int | None = None, work: Work = DEFAULT, what: Sequence[str] = WHAT[:3]
) -> list[dict[str, Any]]:
    """Measures each of ``what`` in a process of its own, so that peak memory is its own, and prints a table.

    >>> step("tiny", what=())
    []
    """
    results = [measured(name, measure, name, shape, layers, work) for name in what]
    if results:
        Console().print(_table(results, work))
    return results


def _table(results: Sequence[dict[str, Any]], work: Work) -> Table:
    first = results[0]
    size = f"{first['layers']} layers, {first['parameters'] / 1e9:.2f} G parameters, "
    size += f"{work.rows} x {work.tokens} tokens" + f", {work.candidates} candidates" * bool(work.candidates)
    table = Table(title=f"{first['shape']}, {size}; {first['device']}, jax {first['versions']['jax']}")
    for column in ("", "ms", "first call s", "weights GiB", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for r in results:
        sizes = (f"{r[k]:.2f}" for k in ("first_call_s", "weights_gib", "peak_gib"))
        table.add_row(r["what"], f"{r['ms']:.1f}", *sizes)
    return table
