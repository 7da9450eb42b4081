"""What backpropagation through the last blocks takes of the device's memory, for the shapes of real models.

    python examples/hybrid_memory.py --model opt-1.3b --tokens 2048 --blocks 3

By XLA's analysis of the compiled tail, which needs no weights. With ``--steps 3`` it also makes steps with random
weights, all other blocks in host memory, and says what the device counted: without the hybrid part first, then with it.
"""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import zo2jax as zo
from zo2jax import visits
from zo2jax.bench.shapes import Work, random_model
from zo2jax.first_order import Learner, Split, split
from zo2jax.metrics import memory_peaks
from zo2jax.models.blocks import block_of, owned_shapes
from zo2jax.models.layers import Batch
from zo2jax.pages import flat, layouts_of
from zo2jax.updates import nearest

ESTIMATOR, OPTIMIZER = zo.two_point(1e-3), optax.adamw(1e-4)


def compile_tail(parts: Split, batch: Batch) -> Any:
    """The program of a tail, from shapes alone; with dense directions."""
    model, direction, shape = parts.model, parts.estimator.direction, jax.ShapeDtypeStruct
    owned, layouts = owned_shapes(model.blocks), layouts_of(model.blocks)
    stages = visits.stages_of(model.blocks, tuple(layouts.items()), direction)[-len(parts.blocks) :]
    blocks = model.blocks[-len(parts.blocks) :]
    pages = {name: tuple(shape((n,), dtype) for dtype, n in layout.pages) for name, layout in layouts.items()}
    held = []
    for block in blocks:
        layout, tied = layouts[block.name], tuple(pages[block_of(owner, owned)] for owner in block.aliases.values())
        rest = {name: leaf for name, leaf in flat(owned[block.name]).items() if name in layout.rest}
        ids = tuple(shape((len(part),), jnp.uint32) for part in (layout.matrices, rest, tied))
        held.append((pages[block.name], rest, tied, None, ids))
    leaves = tuple(parts.shapes.get(block.name, {}) for block in blocks)
    members, directions = parts.estimator.probes.shape
    probes = jax.random.split(jax.random.key(0), directions), shape((members, directions), jnp.float32)
    carry = shape((members, *batch["ids"].shape, model.config.size), jnp.float32)
    given = stages, held, leaves, probes, carry, batch, leaves
    return visits.backpropagate.lower(*given, direction=direction.everywhere, rounding=nearest).compile()


def bytes_of(tree: Any) -> int:
    """Of all arrays, or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def peak(model: zo.Model, batch: Batch, steps: int, how: Any) -> int:
    """The most that the device has held so far, after steps with blocks in host memory; 0 if it does not say."""
    plan = zo.Plan({block.name: "host" for block in model.blocks})
    options = {"key": jax.random.key(0), "plan": plan, "hybrid": how, "replay_within": float("inf")}
    with (
        tempfile.TemporaryDirectory() as folder,
        zo.Run(model, ESTIMATOR, zo.sgd(1e-6), directory=folder, **options) as run,
    ):
        for _ in range(steps):
            run.step(batch)
    return memory_peaks().get("memory/device_peak", 0)


def main(
    model: str = "opt-1.3b", tokens: int = 2048, rows: int = 1, blocks: int = 3, layers: int = 0, steps: int = 0
) -> dict[str, int]:
    """Prints bytes by what they are for, and gives them."""
    made = random_model(model, layers or None)
    batch = Work(tokens=tokens, rows=rows).batch(made.config.vocabulary)
    how = zo.hybrid(first_order=zo.last_blocks(blocks), optimizer=OPTIMIZER)
    parts = split(made, ESTIMATOR, how)
    analysis, kept = compile_tail(parts, batch).memory_analysis(), Learner(parts).state
    found = {
        "first-order leaves, float32": bytes_of(kept.leaves),
        "state of AdamW": bytes_of(kept.opt_state),
        "gradient": bytes_of(kept.leaves),
        "the tail's arguments, of which leaves and gradient are a part": analysis.argument_size_in_bytes,
        "activations and what else the tail makes": analysis.temp_size_in_bytes,
    }
    if steps:
        found["the device's peak, zeroth order"] = peak(made, batch, steps, None)
        found["the device's peak, hybrid"] = peak(made, batch, steps, how)
    print(f"{model}, {rows} x {tokens} tokens, {how}, on {jax.devices()[0].device_kind}")
    for name, count in found.items():
        print(f"{count / 2**20:10.1f} MiB  {name}")
    return found


if __name__ == "__main__":
    tyro.cli(main)
