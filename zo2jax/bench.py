"""``zo2jax bench``: what a step costs, on random weights of the shape of real models.

Kernels alone are measured by ``python -m pallas_kernels.bench``.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels.specs import MODELS, Spec
from zo2jax.estimators import two_point
from zo2jax.mezo import mezo
from zo2jax.models.blocks import forward, owned_shapes
from zo2jax.models.decoder import Decoder
from zo2jax.models.generation import continuations
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.model import Model
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.optimizers import sgd
from zo2jax.run import Run

_CONTEXT = 2048


def _config(spec: Spec) -> Decoder:
    shape: dict[str, Any] = {"vocabulary": spec.vocabulary, "size": spec.hidden, "hidden": spec.ffn}
    shape |= {"layers": spec.layers, "heads": spec.heads, "context": _CONTEXT}
    if spec.biases:
        return OptConfig(**shape, token_size=spec.hidden, tied=False)
    family = Qwen3Config if spec.qk_norm else LlamaConfig
    return family(**shape, kv_heads=spec.kv_heads, head_size=spec.head_size)


_TINY: dict[str, Any] = {
    "vocabulary": 256,
    "hidden": 64,
    "ffn": 128,
    "layers": 2,
    "heads": 2,
    "kv_heads": 2,
    "head_size": 32,
}
SHAPES: dict[str, Decoder] = {name: _config(spec) for name, spec in MODELS.items()}
SHAPES["tiny"] = _config(MODELS["llama-7b"]._replace(**_TINY))
SHAPES["opt-tiny"] = _config(MODELS["opt-1.3b"]._replace(**_TINY))
"""Shapes by name, those of `pallas_kernels.specs` and two small ones. OPT's head is untied, as in ZO2's benchmark."""

WHAT = ("forward", "mezo", "run", "generate")
"""What is measured: two forward passes; the step of `zo2jax.mezo` in one jit; the step of `zo2jax.Run`; a new token of
each row by a cache. The last one is not measured unless it is asked for."""

_NEW_TOKENS = 32


@dataclass(frozen=True)
class Work:
    """What a step is given.

    >>> sorted(Work(tokens=8, rows=4, candidates=2).batch(100))
    ['ids', 'labels', 'positions', 'targets', 'weights']
    """

    tokens: int = 2048
    rows: int = 1
    candidates: int = 0
    """0: each token of each row is a target. Otherwise each row is an example of so many candidates of one token, as in
    a task of classification, and only they are scored."""
    steps: int = 10
    """In each of three timed rounds."""

    def batch(self, vocabulary: int) -> dict[str, jax.Array]:
        """Random rows, as the batch of a step."""
        ids = np.random.default_rng(0).integers(0, vocabulary, (self.rows, self.tokens)).astype(np.int32)
        if not self.candidates:
            return jax.device_put({"ids": ids, "targets": np.roll(ids, -1, 1)})
        shape = (self.rows, self.candidates)
        targets = np.broadcast_to(np.arange(self.candidates, dtype=np.int32), shape)
        batch = {"ids": ids, "positions": np.full(shape, self.tokens - 1, np.int32), "targets": targets}
        weights = np.ones((*shape, 1), np.float32)
        return jax.device_put(batch | {"weights": weights, "labels": np.zeros(self.rows, np.int32)})


def random_model(shape: str, layers: int | None = None, dtype: Any = jnp.bfloat16) -> Model:
    """A model of a shape of `SHAPES` with random weights, cut to ``layers`` layers.

    >>> random_model("tiny", 1).parameter_count
    73920
    """
    config = SHAPES[shape] if layers is None else replace(SHAPES[shape], layers=layers)
    return config.init(jax.random.key(0), dtype)


DEFAULT = Work()
"""One row of 2048 tokens."""


@contextmanager
def _steps(what: str, model: Model, batch: Any) -> Iterator[Callable[[], Any]]:
    """A function that does one step and returns what to wait for."""
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

    >>> sorted(measure("forward", "tiny", 1, Work(tokens=8, steps=2)))
    ['first_call_s', 'layers', 'ms', 'parameters', 'peak_gib', 'shape', 'weights_gib', 'what']
    """
    model = random_model(shape, layers)
    model.check_tokens(work.tokens + _NEW_TOKENS * (what == "generate"))
    batch = work.batch(model.config.vocabulary)
    result: dict[str, Any] = {
        "what": what,
        "shape": shape,
        "layers": model.config.layers,
        "parameters": model.parameter_count,
        "weights_gib": sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(owned_shapes(model.blocks))) / 2**30,
    }
    with _steps(what, model, batch) as step:
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


def bench(
    shape: str, *, layers: int | None = None, work: Work = DEFAULT, what: Sequence[str] = WHAT[:3]
) -> list[dict[str, Any]]:
    """Measures each of ``what`` in a process of its own, so that peak memory is its own, and prints a table."""
    results = []
    for name in what:
        arguments = f"{name!r}, {shape!r}, {layers}, {work!r}"
        code = f"import json; from zo2jax.bench import Work, measure; print(json.dumps(measure({arguments})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the measurement of {name!r} failed:\n{done.stderr.strip()[-2000:]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    size = f"{results[0]['layers']} layers, {results[0]['parameters'] / 1e9:.2f} G parameters, "
    size += f"{work.rows} x {work.tokens} tokens" + f", {work.candidates} candidates" * bool(work.candidates)
    table = Table(title=f"{shape}, {size}; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for column in ("", "ms", "first call s", "weights GiB", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for r in results:
        sizes = (f"{r[k]:.2f}" for k in ("first_call_s", "weights_gib", "peak_gib"))
        table.add_row(r["what"], f"{r['ms']:.1f}", *sizes)
    Console().print(table)
    return results
