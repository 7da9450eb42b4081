"""Snapshots of a run's state through Orbax: the last one, and the one with the best held-out loss."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from zo2jax.directions import PyTree
from zo2jax.mezo import State


def _as_tree(state: State) -> dict[str, Any]:
    """The state as arrays that Orbax stores; a typed key becomes its words."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


class Snapshots:
    """The checkpoints of one run directory.

    A snapshot appears whole or not at all (Orbax commits by renaming).
    """

    def __init__(self, folder: Path):
        """Opens the folder, making it if it is not there."""

        def metric(metrics: Mapping[str, float]) -> float:
            return metrics.get("eval/loss", math.inf)

        best = preservation_policy.BestN(get_metric_fn=metric, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            create=True,
            best_fn=metric,
            best_mode="min",
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(1), best]),
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def last(self) -> int | None:
        """The step of the newest snapshot, or None."""
        return self._manager.latest_step()

    def save(self, state: State, metrics: Mapping[str, float]) -> None:
        """Saves the state under its step and waits until it is durable; a step already saved is left as it is."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_as_tree(state)), metrics=dict(metrics))
            self._manager.wait_until_finished()

    @property
    def best(self) -> int | None:
        """The step of the snapshot with the lowest ``eval/loss``, or None."""
        step = self._manager.best_step()
        return step if step is not None and "eval/loss" in self._manager.metrics(step) else None

    def restore(self, like: State, step: int) -> State:
        """The state saved at ``step``, with the structure, shapes and placement of ``like``."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _as_tree(like))
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        key = jax.random.wrap_key_data(jnp.asarray(tree.pop("key")), impl="threefry2x32")
        return State(key=key, **tree)

    def restore_params(self, like: PyTree, step: int) -> PyTree:
        """Only the parameters saved at ``step``, with the structure, shapes and placement of ``like``."""
        abstract = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, like)}
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed, partial_restore=True)
        return self._manager.restore(step, args=args)["params"]

    def close(self) -> None:
        """Waits for pending work and closes the manager."""
        self._manager.close()
