"""Snapshots of a run through Orbax, block by block: the last one, and the one with the best held-out loss."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from zo2jax.mezo import State
from zo2jax.models.blocks import Params
from zo2jax.pages import flat, on_host

_SCRATCH = "unfinished"
_STEPS = "steps.json"
_CHUNK_BYTES = 2**26  # of a leaf: several threads read a large one, and its copies on the way to the disk stay small
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what Orbax raises on files that are not its own


@dataclasses.dataclass
class _Written(ocp.args.CheckpointArgs):
    """A folder that is on disk already."""

    folder: Path


class _Move(ocp.CheckpointHandler):
    """Moves what is on disk already into the snapshot that the manager is about to commit.

    The blocks are written before the manager is asked to save, and in the caller's thread: so what their maker raises
    is no failure of the manager's, and thread-local settings of JAX hold for it.
    """

    def save(self, directory: Any, args: _Written) -> None:
        for path in args.folder.iterdir():
            path.rename(Path(directory) / path.name)

    def restore(self, directory: Any, args: Any = None) -> Any:
        raise NotImplementedError("blocks are restored one by one")


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """The array where ``like`` is; not bound to a device if that is not, or programs would be compiled once more."""
    return jax.device_put(array, like.sharding) if getattr(like, "committed", False) else jnp.array(array)


class Steps(NamedTuple):
    """Of which steps the blocks of a snapshot are.

    >>> Steps(False, {"head": 7}).needs(5)
    8
    """

    begun: bool = False
    """Whether a block is what the step after those makes its probes of, or what its own step ended with."""
    of: Mapping[str, int] = {}
    """Steps done, by block; those that are not named are of the snapshot's."""

    def needs(self, step: int) -> int:
        """How many steps of the journal the snapshot, which is of ``step``, is of no use without."""
        return max([step, *(done + 1 for done in self.of.values())])


class Snapshots:
    """The snapshots of one run directory: ``<step>/state``, ``<step>/metrics``, and ``<step>/blocks/<name>`` per block.

    A snapshot appears whole or not at all (Orbax commits by renaming). The last one is kept, and the one with the
    lowest ``eval/loss``. Every block is an Orbax checkpoint of its own, so one can be written or read while no other is
    in memory. Blocks may be of later steps than the state: ``blocks/steps.json`` says so (`Steps`).

    >>> import tempfile
    >>> state = State({}, (), np.uint32(7), jax.random.key(0), np.zeros(1, np.uint32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     snapshots = Snapshots(Path(folder))
    ...     snapshots.save(state, [("embed", {"weight": np.arange(3.0)})], {"eval/loss": 2.5})
    ...     block = snapshots.block(7, "embed", {"weight": jax.ShapeDtypeStruct((3,), np.float64)})
    ...     snapshots.last, snapshots.best, int(snapshots.restore(state, 7).step), block["weight"].tolist()
    (7, 7, 7, [0.0, 1.0, 2.0])
    """

    def __init__(self, folder: Path):
        """Opens the folder, making it if it is not there; changes nothing in it, as another process may be saving."""
        self._folder = folder.absolute()
        self._arrays = ocp.Checkpointer(_array_handler())
        registry = ocp.DefaultCheckpointHandlerRegistry()
        for item in ("blocks", "state"):
            registry.add(item, _Written, _Move())

        def metric(metrics: Mapping[str, float]) -> float:
            return metrics.get("eval/loss", math.inf)

        # Without metrics: what an older version was killed while it deleted.
        best = preservation_policy.BestN(
            get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            create=True,
            best_fn=metric,
            best_mode="min",
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(1), best]),
            enable_async_checkpointing=False,
            todelete_subdir=_SCRATCH,  # by one rename: no snapshot is seen half deleted
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, handler_registry=registry)

    @property
    def last(self) -> int | None:
        """The step of the newest snapshot, or None."""
        return max(self._steps(), default=None)

    @property
    def best(self) -> int | None:
        """The step of the snapshot with the lowest ``eval/loss``, or None."""
        step = self._manager.best_step()
        return step if step is not None and "eval/loss" in self._manager.metrics(step) else None

    def save(
        self,
        state: State,
        blocks: Iterable[tuple[str, Params]],
        metrics: Mapping[str, float],
        steps: Steps | None = None,
    ) -> None:
        """Saves a snapshot under the state's step; durable on return. A step that is saved already is left as it is.

        Args:
            state: with empty ``params``.
            blocks: (name, nested dict of NumPy or jax arrays), asked for one at a time: each is durable, and not held
                any more, before the next is asked for. Their memory may be reused then.
            metrics: what is known of this step; ``eval/loss`` decides which snapshot is the best.
            steps: of the blocks, read when all were given; that of the state if None.

        Raises:
            ValueError: if a block's name cannot be a folder's.
            OSError: if the folder cannot be written, for example because the disk is full.
        """
        step = int(state.step)
        if step in self._steps():
            return
        scratch = self._folder / _SCRATCH
        self._clear()
        try:
            with _naming(self._folder):
                (scratch / "blocks").mkdir(parents=True)
                self._write(scratch / "state", flat(_as_tree(state)))
            for name, leaves in blocks:
                if not name or Path(name).name != name or name.startswith("."):
                    raise ValueError(f"{name!r} is no name of a block: expected one that can be a folder's name")
                with _naming(self._folder):
                    self._write(scratch / "blocks" / name, leaves)
                del leaves  # or it would be in memory together with the next
            with _naming(self._folder):
                text = json.dumps((Steps() if steps is None else steps)._asdict())
                (scratch / "blocks" / _STEPS).write_text(text)
                _sync(scratch / "blocks" / _STEPS)
            items = ocp.args.Composite(**{item: _Written(scratch / item) for item in ("blocks", "state")})
            with _naming(self._folder):
                # Forced: after a save that failed, the manager takes it to be under way, and would skip this one.
                self._manager.save(step, args=items, metrics=dict(metrics), force=True)
                _sync(self._folder)
        finally:
            self._clear()

    def restore(self, like: State, step: int) -> State:
        """The state saved at ``step``, with the structure, shapes and placement of ``like``; both without ``params``.

        Raises:
            ValueError: if there is no such snapshot, or its state is damaged or of another optimizer or model.
        """
        tree = _as_tree(like)
        expected = flat(tree)
        found = self._read(self._snapshot(step) / "state", "state", expected)
        # By name, for ``found`` is in alphabetical order.
        placed = [_placed(found[name], leaf) for name, leaf in expected.items()]
        tree = jax.tree.unflatten(jax.tree.structure(tree), placed)
        key = jax.random.wrap_key_data(tree.pop("key"), impl="threefry2x32")
        return State(params={}, key=key, **tree)

    def steps(self, step: int) -> Steps:
        """Of which steps the blocks of the snapshot of ``step`` are.

        Raises:
            ValueError: if there is no such snapshot, or its file of steps is missing or damaged.
        """
        path = self._snapshot(step) / "blocks" / _STEPS
        try:
            found = json.loads(path.read_text())
            return Steps(bool(found["begun"]), {str(name): int(done) for name, done in found["of"].items()})
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: the checkpoint was saved by an older zo2jax, or is damaged. Put it back from a "
                f"copy, or move {self._folder} away: the run goes on from its journal alone"
            ) from error
        except _DAMAGE as error:
            raise _damaged(path, error) from error

    def block(self, step: int, name: str, like: Params) -> Params:
        """The block ``name`` of the snapshot of ``step``, as NumPy arrays; no file of another block is read.

        Args:
            step: of a snapshot that is there.
            name: of the block.
            like: what is expected: a nested dict of leaves that have a shape and a dtype.

        Raises:
            ValueError: if there is no such snapshot or block, if a leaf of it is missing or has another shape or dtype
                than in ``like``, or if its files are damaged.
        """
        folder = self._snapshot(step) / "blocks" / name
        if not jax.tree.leaves(like):
            return like
        if not folder.is_dir():
            known = sorted(path.parent.name for path in folder.parent.glob("*/_METADATA"))
            raise ValueError(
                f"{folder.parent} has no block {name!r}, only {', '.join(known) or 'none'}: it was saved by a run of "
                "another model. Use that model, or another directory"
            )
        return self._read(folder, name, like)

    def dtype(self, step: int) -> str:
        """The dtype of the matrices of a snapshot, from its metadata; "float32" if it has none.

        Raises:
            ValueError: if there is no such snapshot.
        """
        for path in sorted((self._snapshot(step) / "blocks").glob("*/_METADATA")):
            found = self._arrays.metadata(path.parent).item_metadata.tree
            leaves = jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "dtype"))
            for leaf in leaves:
                if len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
                    return str(leaf.dtype)
        return "float32"

    def close(self) -> None:
        """Closes what Orbax holds open."""
        self._manager.close()
        self._arrays.close()

    def _steps(self) -> list[int]:
        """The steps of whole snapshots, and of those of an older format; a folder that only has the name is neither."""
        folders = {step: self._folder / str(step) for step in self._manager.all_steps()}
        return [
            step for step, f in folders.items() if (f / "state" / "_METADATA").is_file() or (f / "default").is_dir()
        ]

    def _snapshot(self, step: int) -> Path:
        """The folder of a snapshot that is there and of this format."""
        folder = self._folder / str(step)
        if step not in self._steps():
            known = ", ".join(map(str, sorted(self._steps())))
            raise ValueError(f"{self._folder} has no whole snapshot of step {step}, only of: {known or 'none'}")
        if (folder / "default").is_dir():
            raise ValueError(
                f"{folder} was saved by an older zo2jax, all blocks in one: expected a folder per block in "
                f"{folder / 'blocks'}. Export it with the version that saved it, or train in another directory"
            )
        return folder

    def _read(self, folder: Path, name: str, like: Params) -> Params:
        """The arrays in a folder, of the same names, shapes and dtypes as ``like``."""
        try:
            found = self._arrays.restore(folder)
        except _DAMAGE as error:
            raise _damaged(folder, error) from error
        if problems := _differences(name, like, found):
            raise ValueError(
                f"{folder} does not fit: {'; '.join(problems)}. Use the model and optimizer that it was saved with, or "
                "another directory"
            )
        return found

    def _write(self, folder: Path, leaves: Params) -> None:
        """Writes one block; durable on return."""
        if not jax.tree.leaves(leaves):
            return  # Orbax has no empty checkpoints
        arrays = jax.tree.map(on_host, leaves)
        chunked = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), arrays)
        self._arrays.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=chunked))
        for path in [*folder.rglob("*"), folder]:
            _sync(path)

    def _clear(self) -> None:
        """Removes what saves that failed or were killed left behind."""
        for step in set(self._manager.all_steps()) - set(self._steps()):
            self._manager.delete(step)  # or it would be the last one, which is kept
        for path in [self._folder / _SCRATCH, *self._folder.glob("*.orbax-checkpoint-tmp*")]:
            shutil.rmtree(path, ignore_errors=True)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({error}): expected the files as they were saved. Put them back from a copy, or train in "
        "another directory"
    )


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """What is raised while writing becomes an OSError that names the folder."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError
        raise OSError(
            f"no snapshot could be written in {folder} ({error}): free some space, or make the folder writable. The "
            "snapshots that are there are whole"
        ) from error


def _as_tree(state: State) -> dict[str, Any]:
    """The state as arrays that Orbax stores, without parameters; a typed key becomes its words."""
    assert not state.params, "the parameters go by blocks"
    tree = state._replace(key=jax.random.key_data(state.key))._asdict()
    del tree["params"]
    return tree


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Stores NumPy arrays as they are: weights do not compress, and nobody writes to them before they are saved."""
    handler = ocp.type_handlers.NumpyHandler
    uncopied = {"deepcopy_host_arrays": False}
    known = uncopied.keys() <= inspect.signature(handler).parameters.keys()  # older versions of Orbax always copy
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, handler(**uncopied) if known else handler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # unused; Orbax warns if it is missing
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False, type_handler_registry=registry)


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(block: str, like: Params, found: Params) -> list[str]:
    """What of ``found`` differs from ``like``, leaf by leaf."""

    def described(tree: Params) -> dict[str, str]:
        return {f"{block}.{name}": f"{np.dtype(x.dtype)}{list(x.shape)}" for name, x in flat(tree).items()}

    there, expected = described(found), described(like)
    return [
        f"{leaf} is {there.get(leaf, 'missing')} there, expected {expected.get(leaf, 'no such leaf')}"
        for leaf in sorted(there.keys() | expected.keys())
        if there.get(leaf) != expected.get(leaf)
    ]
