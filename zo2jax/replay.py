"""Replay: the weights of any step of a run, from its base weights and its journal."""

import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from zo2jax.directions import from_json
from zo2jax.factored import merge
from zo2jax.formats import from_json as format_of
from zo2jax.header import digest, structure
from zo2jax.journal import JournalError, Recorded
from zo2jax.kept import Kept
from zo2jax.models.blocks import Params, Source, owned_shapes
from zo2jax.models.hub import load
from zo2jax.models.model import Model
from zo2jax.pages import layouts_of
from zo2jax.updates import ROUNDINGS
from zo2jax.weights import Weights


def read_journal(path: str | Path) -> Recorded:
    """The journal in a file, or in the directory of a run.

    Raises:
        FileNotFoundError, JournalError: see `zo2jax.journal.Recorded`.

    >>> read_journal("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no/such/run: expected a journal, a .zo file, or the directory of a run
    """
    found = Path(path).expanduser()
    found = found / "journal" if found.is_dir() else found
    if not found.is_file():
        raise FileNotFoundError(f"{path}: expected a journal, a .zo file, or the directory of a run")
    return Recorded(found)


def base_of(folder: str | Path, journal: Recorded) -> Model:
    """The model of a Hugging Face folder, in the dtype and format that a journal is about.

    Raises:
        FileNotFoundError, ValueError: see `zo2jax.load`.
        JournalError: for a run of `zo2jax.train` with a prefix, which no folder holds.
    """
    header = journal.header
    if prefix := header.config.get("prefix"):
        raise JournalError(
            f"{journal.path} is of a run with a prefix of {prefix} tokens, which a folder has no place for: export "
            "what was trained by zo2jax export RUN --adapter, or give zo2jax.replay the model with its first prefix"
        )
    return load(folder, dtype=header.dtype).with_format(None if header.format is None else format_of(header.format))


def replay(model: Model, journal: str | Path | Recorded, *, step: int | None = None) -> Model:
    """The model after the steps of a journal: the same bits as the run's, on any backend.

    Nothing is computed before it is asked for: a block is read, takes the updates of all steps while it is there, and
    is let go, so that it does not matter how large the model is. Its matrices take up to 64 updates in one program.
    Each block is compared with what the run began with when it is read. The weights are known from coefficients and
    addresses alone (MeZO, arXiv 2305.17333, section 2.1); no data are needed.

    Args:
        model: the one that the run began with, in its dtype and format.
        journal: a file, the directory of a run, or what `read_journal` gives.
        step: after so many steps; all if None.

    Raises:
        ValueError: for a journal of another model or of a hybrid run, a step that it does not have, and, when a block
            is read, for other weights than those that the run began with.

    >>> import tempfile, jax, jax.numpy as jnp, numpy as np, zo2jax as zo
    >>> start, target = {"w": np.zeros((2, 2), np.float32)}, {"t": np.ones((2, 2), np.float32)}
    >>> model = zo.blocks([(lambda p, _: p["w"], start)], loss=lambda w, batch: jnp.sum((w - batch["t"]) ** 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     how = {"directory": folder, "key": jax.random.key(0)}
    ...     with zo.Run(model, zo.two_point(1e-3), zo.sgd(0.1), **how) as run:
    ...         for _ in range(3):
    ...             info = run.step(target)
    ...         trained = dict(run.model.source)
    ...     found = dict(replay(model, folder).source)
    >>> jax.tree.map(lambda x, y: bool((x == y).all() and (x != 0).all()), trained, found)
    {'0': {'w': True}}
    """
    journal = journal if isinstance(journal, Recorded) else read_journal(journal)
    header, steps = journal.header, len(journal) if step is None else step
    if not 0 <= steps <= len(journal):
        raise ValueError(f"{journal.path} has {len(journal)} steps: step {steps} is not among them")
    format = None if model.format is None else model.format.as_json()
    _check_whole(journal)
    mine = replace(header, model=structure(model), dtype=str(model.dtype), format=format)
    journal.check(mine)
    readers = {block.name: partial(_replayed, model, journal, steps, block.name) for block in model.blocks}
    return replace(model, source=Source(readers), format=None)


def pack(run: str | Path, file: str | Path, *, step: int | None = None) -> Path:
    """Writes a run, or its first ``step`` steps, as one small file: its journal, with its present config.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: if there is no such run, something of this name, no such step;
            for a hybrid run.
    """
    journal, path = read_journal(run), Path(file).expanduser()
    _check_whole(journal)
    config = journal.path.parent / "config.json"
    journal.copy(path, step, json.loads(config.read_text()) if config.is_file() else None)
    return path


def _check_whole(journal: Recorded) -> None:
    """Raises if base and journal are not all that weights are made of."""
    if journal.header.hybrid:
        raise JournalError(
            f"{journal.path} is of a hybrid run, {journal.header.hybrid}: no journal has what backpropagation did. The "
            "weights are in the run's checkpoints, expected zo2jax export RUN"
        )


def _replayed(model: Model, journal: Recorded, steps: int, name: str) -> Params:
    """The leaves of a block after so many steps."""
    header = journal.header

    def check(name: str, leaves: Params) -> None:
        if (found := digest(leaves)) != header.base[name]:
            raise JournalError(
                f"block {name} of the model is not what the run of {journal.path} began with (its hash is {found}, "
                f"expected {header.base[name]}): use that model"
            )

    of_run = from_json(header.direction), header.directions, ROUNDINGS[header.rounding], header.momentum > 0
    kept = Kept(owned_shapes(model.blocks), layouts_of(model.blocks, model.format), *of_run)
    source = Source.of(model.source).observed(check)
    if not kept.moves(name):
        if model.format is None:
            return source[name]
        return merge(name, source.coded(name), {}, kept.shapes[name], kept.layouts[name], kept.direction)
    with closing(Weights.of_block(replace(model, source=source), name, kept, journal, steps)) as weights:
        return weights.stream[name]
