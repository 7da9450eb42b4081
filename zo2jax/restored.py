"""The weights that a run begins or goes on with: its base, or a snapshot and what its journal has after it."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from zo2jax.checkpoint import Snapshots
from zo2jax.directory import Directory
from zo2jax.factored import merge
from zo2jax.header import digest
from zo2jax.journal import Recorded
from zo2jax.kept import BESIDE, Kept
from zo2jax.mezo import State
from zo2jax.models.blocks import Params, Source
from zo2jax.models.model import Model
from zo2jax.pages import on_host
from zo2jax.plan import Plan
from zo2jax.plan.measure import measure_link
from zo2jax.weights import Weights


class Restored:
    """The blocks of a run that a snapshot and the journal give; each is read when it is asked for.

    A snapshot that was written while the run went on has each block as the probes of another step were made of it
    (`zo2jax.saver`). Such a block takes the updates that it lacks by itself.

    Args:
        model: blocks and format.
        kept: how the run keeps them.
        snapshots: of the run.
        number: the step of the snapshot.
        journal: of the run; without one, what the snapshot has is all that can be had.

    Raises:
        ValueError: if there is no such snapshot, or it is damaged.
    """

    def __init__(self, model: Model, kept: Kept, snapshots: Snapshots, number: int, journal: Recorded | None = None):
        """Reads of which steps the blocks are."""
        self._model, self._kept = model, kept
        self._snapshots, self._number, self._journal = snapshots, number, journal
        self._steps = snapshots.steps(number)
        self.done = number if not self._steps.of else 0 if journal is None else len(journal)
        """Steps after which all blocks are had at once."""
        self.begun = self._steps.begun and not self._steps.of
        """Whether they are had as the next step begins; see `zo2jax.checkpoint.Steps`."""

    def sources(self) -> tuple[Source, Source]:
        """(leaves, what is beside them) after ``done`` steps, as `Stream.stored` and `Stream.beside` give them.

        What is beside a block is asked for after its leaves.
        """
        found: dict[str, Params] = {}

        def caught_up(name: str) -> Params:
            if not self._kept.moves(name):
                found[name] = self._beside(name)
                return self._leaves(name)
            with closing(self._weights(name, self.done)) as weights:
                found[name] = jax.tree.map(on_host, weights.stream.beside(name))
                return jax.tree.map(on_host, weights.stream.stored(name))

        leaves, beside = (caught_up, found.pop) if self._steps.of else (self._leaves, self._beside)
        names = self._kept.shapes
        return Source({n: partial(leaves, n) for n in names}), Source({n: partial(beside, n) for n in names})

    def arrays(self, name: str, step: int) -> Params:
        """The leaves of a block as arrays after so many steps, of which none is before the snapshot."""
        if self._is_saved(name, step):
            layout = self._kept.shapes[name], self._kept.layouts[name], self._kept.direction
            return merge(name, self._leaves(name), self._beside(name), *layout)
        with closing(self._weights(name, step)) as weights:
            return jax.tree.map(on_host, weights.stream[name])

    def beside(self, name: str, step: int) -> Params:
        """What is beside the matrices of a block after so many steps, of which none is before the snapshot."""
        if self._is_saved(name, step):
            return self._beside(name)
        with closing(self._weights(name, step)) as weights:
            return jax.tree.map(on_host, weights.stream.beside(name))

    def _is_saved(self, name: str, step: int) -> bool:
        """Whether the snapshot has a block as it is after so many steps."""
        return not self._kept.moves(name) or (not self._steps.of and step == self._number)

    def _weights(self, name: str, step: int) -> Weights:
        """Those of a block after so many steps."""
        assert self._journal is not None, "steps after a snapshot are in a journal"
        model = replace(self._model, source=Source({name: partial(self._leaves, name)}))
        beside = Source({name: partial(self._beside, name)})
        begin: dict[str, Any] = {"done": self._steps.of.get(name, self._number), "begun": self._steps.begun}
        return Weights.of_block(model, name, self._kept, self._journal, step, beside=beside, **begin)

    def _leaves(self, name: str) -> Params:
        return self._snapshots.block(self._number, name, self._kept.stored(name))

    def _beside(self, name: str) -> Params:
        if not self._kept.direction.read_only:
            return {}
        return self._snapshots.block(self._number, name + BESIDE, self._kept.beside(name))


def opened(files: Directory, model: Model, kept: Kept, state: State, plan: Plan | None) -> tuple[Weights, State]:
    """(weights, state) of the newest snapshot in a run's directory; or the model's and ``state``, with which it begins.

    The weights may be of later steps than the state, but of none that the journal lacks.

    Raises:
        ValueError: if the snapshot is of another model or optimizer, or damaged; if the model is not what the journal
            began with.
    """
    for left_behind in (files.path / "pages").glob("*.page"):  # by a run that was killed
        left_behind.unlink()
    if plan is not None and set(plan.tiers.values()) - {"device"}:
        measure_link()  # while no step waits
    where: dict[str, Any] = {"plan": plan, "pages": files.path / "pages"}
    if (last := files.snapshots.last) is None:
        return _begun(files, model, kept, state.key, where), state
    try:
        state = files.snapshots.restore(state, last)
        restored = Restored(model, kept, files.snapshots, last, files.journal)
        source, beside = restored.sources()
        model = replace(model, source=source)
        how = kept, state.key
        weights = Weights(model, *how, done=restored.done, begun=restored.begun, beside=beside, **where)
        return weights, state
    except ValueError as error:
        raise ValueError(
            f"the checkpoint of step {last} in {files.path} does not fit this model and optimizer ({error}): use those "
            "that it was made with, or another directory"
        ) from error


def _begun(files: Directory, model: Model, kept: Kept, key: jax.Array, where: dict[str, Any]) -> Weights:
    """The model's own weights, which the journal begins with."""
    base: dict[str, str] = {}
    source = Source.of(model.source).observed(lambda name, leaves: base.update({name: digest(leaves)}))
    weights = Weights(replace(model, source=source), kept, key, **where)
    try:
        for name in weights.stream.in_files:  # nobody has read them yet
            source.coded(name) if model.format is not None else source[name]
        files.begin(base)
    except BaseException:
        weights.close()
        raise
    return weights
