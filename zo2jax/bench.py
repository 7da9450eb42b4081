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
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from pallas_kernels.specs import MODELS, Spec
from zo2jax.estimators import two_point
from zo2jax.mezo import mezo
from zo2jax.models.blocks import Batch, Block, Model
from zo2jax.models.layers import Linear, RMSNorm
from zo2jax.models.llama import Attention, LlamaConfig
from zo2jax.optimizers import sgd
from zo2jax.run import Run
from zo2jax.stream import forward

_CONTEXT = 2048


def _config(spec: Spec) -> LlamaConfig:
    return LlamaConfig(
        vocabulary=spec.vocabulary,
        size=spec.hidden,
        hidden=spec.ffn,
        layers=spec.layers,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_size=spec.head_size,
        context=_CONTEXT,
        attention_bias=spec.biases,
    )


SHAPES = {name: _config(MODELS[name]) for name in ("llama-7b", "opt-13b")}
SHAPES["tiny"] = replace(
    SHAPES["llama-7b"], vocabulary=256, size=64, hidden=128, layers=2, heads=2, kv_heads=2, head_size=32
)
SHAPES["opt-tiny"] = replace(SHAPES["tiny"], attention_bias=True)
"""Shapes by name; "opt-..." have biases, and two matrices in the MLP instead of three."""

WHAT = ("forward", "mezo", "run")
"""What is measured: two forward passes; the step of `zo2jax.mezo` in one jit; the step of `zo2jax.Run`."""


class _TwoMatrixLayer(nnx.Module):
    """x + attention(x), then x + W2 relu(W1 norm(x)): the matrices of an OPT layer."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        make = partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.attn, self.norm = Attention(config, dtype, rngs), RMSNorm(config.size, config.norm_eps)
        self.fc1, self.fc2 = make(config.size, config.hidden), make(config.hidden, config.size)

    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        x = x + self.attn(x, batch.get("lengths"))
        return x + self.fc2(jax.nn.relu(self.fc1(self.norm(x))), dtype=x.dtype)


def random_model(shape: str, layers: int | None = None, dtype: Any = jnp.bfloat16) -> Model:
    """A model of a shape of `SHAPES` with random weights, cut to ``layers`` layers.

    >>> random_model("tiny", 1).parameter_count
    73920
    """
    config = SHAPES[shape] if layers is None else replace(SHAPES[shape], layers=layers)
    if not config.attention_bias:
        return config.init(jax.random.key(0), dtype)
    dtype = jnp.dtype(dtype)
    ends = replace(config, layers=0).init(jax.random.key(0), dtype)
    layer = Block.define("layers.0", lambda rngs: _TwoMatrixLayer(config, dtype, rngs))

    @jax.jit
    def make(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(_TwoMatrixLayer(config, dtype, nnx.Rngs(params=key))))

    blocks = [Block(f"layers.{i}", layer.graphdef, layer.shapes) for i in range(config.layers)]
    params = ends.params | {block.name: make(jax.random.key(i)) for i, block in enumerate(blocks, 1)}
    return Model(config, (ends.blocks[0], *blocks, ends.blocks[-1]), params)


@contextmanager
def _steps(what: str, model: Model, batch: Any) -> Iterator[Callable[[], Any]]:
    """A function that does one step and returns what to wait for."""
    estimator, optimizer = two_point(1e-3), sgd(1e-6)
    with ExitStack() as stack:
        if what == "forward":
            yield lambda: [forward(model.blocks, model.params, batch) for _ in range(2)]
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


def measure(what: str, shape: str, layers: int | None, tokens: int, rows: int, steps: int) -> dict[str, Any]:
    """Times one of `WHAT`: seconds of the first call, median milliseconds of a step, peak device memory in GiB.

    >>> sorted(measure("forward", "tiny", 1, 8, 1, 2))
    ['first_call_s', 'layers', 'ms', 'parameters', 'peak_gib', 'shape', 'weights_gib', 'what']
    """
    model = random_model(shape, layers)
    model.check_tokens(tokens)
    ids = np.random.default_rng(0).integers(0, model.config.vocabulary, (rows, tokens)).astype(np.int32)
    batch = jax.device_put({"ids": ids, "targets": np.roll(ids, -1, 1)})
    result = {
        "what": what,
        "shape": shape,
        "layers": model.config.layers,
        "parameters": model.parameter_count,
        "weights_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 2**30,
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
            for _ in range(steps):
                last = step()
            jax.block_until_ready(last)
            times.append((time.perf_counter() - start) / steps * 1e3)
        result["ms"] = statistics.median(times)
    memory = jax.devices()[0].memory_stats() or {}
    result["peak_gib"] = memory.get("peak_bytes_in_use", float("nan")) / 2**30
    return result


def bench(
    shape: str, *, layers: int | None, tokens: int, rows: int, steps: int, what: Sequence[str] = WHAT
) -> list[dict[str, Any]]:
    """Measures each of ``what`` in a process of its own, so that peak memory is its own, and prints a table."""
    results = []
    for name in what:
        arguments = f"{name!r}, {shape!r}, {layers}, {tokens}, {rows}, {steps}"
        code = f"import json; from zo2jax.bench import measure; print(json.dumps(measure({arguments})))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the measurement of {name!r} failed:\n{done.stderr.strip()[-2000:]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    size = f"{results[0]['layers']} layers, {results[0]['parameters'] / 1e9:.2f} G parameters, {rows} x {tokens} tokens"
    table = Table(title=f"{shape}, {size}; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for column in ("", "ms", "first call s", "weights GiB", "peak GiB"):
        table.add_column(column, justify="right" if column else "left")
    for r in results:
        sizes = (f"{r[k]:.2f}" for k in ("first_call_s", "weights_gib", "peak_gib"))
        table.add_row(r["what"], f"{r['ms']:.1f}", *sizes)
    Console().print(table)
    return results
