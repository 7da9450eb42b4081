"""What a run in a directory trained, after its last step or by its best checkpoint, without going on with it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from zo2jax.adapters import export_for_peft
from zo2jax.checkpoint import Snapshots
from zo2jax.config import Config
from zo2jax.config_files import load_config
from zo2jax.estimators import Estimator
from zo2jax.first_order import split
from zo2jax.journal import JournalError, Recorded
from zo2jax.kept import Kept
from zo2jax.models.blocks import Params, Source
from zo2jax.models.hub import load
from zo2jax.models.model import Model
from zo2jax.models.prefix import prefixed
from zo2jax.replay import read_journal, replay
from zo2jax.restored import Restored
from zo2jax.selected import selected
from zo2jax.shapes import shaped
from zo2jax.tasks.prepare import first_tokens


@dataclass(frozen=True)
class _Found:
    """A run's directory, and the checkpoint that its weights are read from, if there is one."""

    folder: Path
    config: Config
    model: Model
    estimator: Estimator
    number: int | None
    journal: Recorded | None
    """None for the weights of the checkpoint itself."""
    first_order: tuple[str, ...] = ()
    """Names of leaves that backpropagation trained."""

    @property
    def step(self) -> int:
        """After which the weights are asked for."""
        if self.journal is not None:
            return len(self.journal)
        assert self.number is not None
        return self.number

    @cached_property
    def kept(self) -> Kept:
        """How the run keeps its model."""
        config = self.config
        return Kept.of(self.model, self.estimator, config.make_optimizer(), config.make_rounding())

    def read(self, what: Callable[[Restored, str, int], Params], name: str) -> Params:
        """Of a block; the checkpoint's files are open no longer than that takes."""
        assert self.number is not None
        snapshots = Snapshots(self.folder / "checkpoints")
        try:
            return what(Restored(self.model, self.kept, snapshots, self.number, self.journal), name, self.step)
        finally:
            snapshots.close()


def load_model(config: Config) -> Model:
    """The model of a config. Once its run has a checkpoint, the files of the weights need not be there any more."""
    model = _load_base(config)
    return begun(config, model.with_format(config.make_format(model.format)))


def begun(config: Config, model: Model) -> Model:
    """The model with the prefix that a config has it begin with, whose tokens are read when it is asked for."""
    return prefixed(model, config.prefix, partial(first_tokens, config, model)) if config.prefix else model


def _load_base(config: Config) -> Model:
    dtype = config.dtype or None
    if (random := shaped(config.model, config.dtype)) is not None:
        return random
    try:
        return load(config.model, dtype=dtype)
    except FileNotFoundError:
        folder = Path(config.directory).expanduser() / "checkpoints"
        if not folder.is_dir():
            raise
        snapshots = Snapshots(folder)
        try:
            if (step := snapshots.last) is None:
                raise
            return load(config.model, dtype=dtype or snapshots.dtype(step), weights=False)
        finally:
            snapshots.close()


def _find(directory: str | Path, best: bool) -> _Found:
    folder = Path(directory).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: expected the directory of a run")
    config = selected(load_config(str(folder)))
    model, estimator = load_model(config), config.make_estimator()
    first_order: tuple[str, ...] = ()
    if (hybrid := config.make_hybrid()) is not None:
        parts = split(model, estimator, hybrid)
        model, estimator, first_order = parts.model, parts.estimator, parts.names
    snapshots = Snapshots(folder / "checkpoints")
    try:
        number = snapshots.best if best else snapshots.last
    finally:
        snapshots.close()
    if best and number is None:
        raise FileNotFoundError(f"{directory} has no checkpoint with a held-out loss yet")
    journal = None if best else read_journal(folder)
    if journal is not None and journal.header.hybrid and len(journal) != number:
        raise JournalError(
            f"{directory} is a hybrid run, {journal.header.hybrid}, and its journal ends at step {len(journal)}, but "
            f"what backpropagation did is in checkpoints alone, the last of step {number or 0}: go on with the run, "
            "which begins again there, or take its best checkpoint (--best)"
        )
    return _Found(folder, config, model, estimator, number, journal, first_order)


def trained_model(directory: str | Path, *, best: bool = False) -> tuple[int, Model]:
    """(step, model) after the last step of a run's journal, or of the checkpoint with the best held-out loss.

    The weights are read when they are asked for, block by block, as those of `zo2jax.load` are.

    Raises:
        FileNotFoundError: if the directory holds no run, no journal, or no such checkpoint.
        ValueError: of a hybrid run whose last steps no checkpoint has.
    """
    return _model_of(_find(directory, best))


def _model_of(found: _Found) -> tuple[int, Model]:
    if found.number is None:
        assert found.journal is not None
        return found.step, replay(found.model, found.journal)
    readers = {name: partial(found.read, Restored.arrays, name) for name in found.kept.shapes}
    return found.step, found.model.replace(Source(readers)).with_format(None)  # arrays, whatever the run kept


def export_trained_adapter(directory: str | Path, folder: str | Path, *, best: bool = False) -> Path:
    """Writes the adapters or the prefix that a run trained; see `zo2jax.adapters`.

    Raises:
        FileNotFoundError: if the directory holds no run, or no such checkpoint.
        FileExistsError, ValueError: as `export_adapter` and `export_prefix` do.
    """
    found = _find(directory, best)
    if found.number is None and not found.config.prefix:
        raise FileNotFoundError(f"{directory} has no checkpoint yet, from which adapters are read")
    of_run = found.estimator.direction, partial(found.read, Restored.beside), folder, found.first_order
    return export_for_peft(found.model, lambda: _model_of(found)[1], *of_run)
