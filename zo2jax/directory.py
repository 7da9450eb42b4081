"""The directory of a run: its lock, its config, its journal and its checkpoints."""

import fcntl
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from zo2jax.checkpoint import Snapshots
from zo2jax.header import Header
from zo2jax.journal import Journal, JournalError
from zo2jax.metrics import write_atomically

_config: Any = jax.config  # untyped: the oldest jax supported says nothing of its flags


class Directory:
    """What a run keeps on the disk, in one folder that no other process trains in.

    ``config.json``; ``journal`` (`zo2jax.journal`), which says how far the run is; ``checkpoints``, of steps at most as
    far; ``lock``, an empty file that is locked while the run is open; on a GPU ``compiled``, JAX's cache of compiled
    programs, which are what XLA chose by timing kernels, so that a process that resumes computes with the same ones.
    Not where a cache is configured already (``jax_compilation_cache_dir``).

    Args:
        path: of the folder, made if it is not there.
        header: of the journal, without the hash of the weights.
        config: of the run.
        may_grow: keys of ``config`` that may be larger than when the run was begun.
        sync_every: see `zo2jax.journal.Journal`.

    Raises:
        BlockingIOError: if another process trains in it.
        ValueError: if it holds another run, or one that is damaged. Nothing in it has changed then.
        OSError: if it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     directory = Directory(Path(folder) / "run", Header(key=(0, 7)), {"steps": 5})
    ...     directory.begin({"embed": "ab"})
    ...     found = directory.steps, directory.journal.header.base
    ...     directory.close()
    >>> found
    (0, {'embed': 'ab'})
    """

    def __init__(
        self,
        path: str | Path,
        header: Header,
        config: Mapping[str, Any],
        may_grow: Sequence[str] = (),
        *,
        sync_every: float = 1.0,
    ):
        """Locks the folder, and checks what is in it."""
        self.path = Path(path).expanduser()
        self._header = replace(header, config=config)
        self._open = ExitStack()
        self._journal: Journal | None = None
        self._sync_every = sync_every
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()
                text = grown(self.path / "config.json", config, may_grow)
            except BlockingIOError:
                raise
            except OSError as error:
                raise type(error)(f"the run directory {self.path} cannot be written ({error})") from error
            self.snapshots = Snapshots(self.path / "checkpoints")
            self._open.callback(self.snapshots.close)
            self._open_journal()
            write_atomically(self.path / "config.json", text)
            self._keep_compiled()
        except BaseException:
            self.close()
            raise

    @property
    def journal(self) -> Journal:
        """The journal, once the run has begun."""
        assert self._journal is not None, "a run begins before its first step"
        return self._journal

    @property
    def header(self) -> Header:
        """What the run was begun with."""
        return self._header if self._journal is None else self._journal.header

    @property
    def steps(self) -> int:
        """Steps that were done."""
        return 0 if self._journal is None else len(self._journal)

    def begin(self, base: Mapping[str, str]) -> None:
        """Says which weights the run is of: they go into the journal's header, or have to be those of the one there.

        Raises:
            ValueError: if they are others.
        """
        header, path = replace(self._header, base=base), self.path / "journal"
        if self._journal is None:
            self._journal = self._open.enter_context(Journal.create(path, header, self._sync_every))
        else:
            self._journal.check(header)

    def close(self) -> None:
        """Closes everything, and lets another process train in the folder."""
        self._open.close()

    def _lock(self) -> None:
        file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        self._open.callback(weakref.finalize(self, os.close, file))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process trains in {self.path}: wait until it is done, or use another directory"
            ) from None

    def _keep_compiled(self) -> None:
        """Programs of a GPU go to a cache in the folder while the run is open, if they go nowhere else."""
        if jax.default_backend() == "gpu" and not _config.jax_compilation_cache_dir:
            _cache_programs(str(self.path / "compiled"))
            self._open.callback(_cache_programs, None)

    def _open_journal(self) -> None:
        """Opens the journal if there is one, and checks that it is this run's."""
        path, last = self.path / "journal", self.snapshots.last
        if path.is_file():
            self._journal = self._open.enter_context(Journal(path, self._sync_every, self._header))
        if last is not None and self.snapshots.steps(last).needs(last) > self.steps:
            what = f"its journal ends at step {self.steps}" if path.is_file() else "it has no journal"
            raise JournalError(
                f"{self.path} has a checkpoint of step {last}, but {what}: put {path} back from a copy, or use another "
                "directory"
            )


def _cache_programs(folder: str | None) -> None:
    """What is compiled from now on goes there; JAX looks at its configuration when it compiles for the first time."""
    _config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def grown(path: Path, config: Mapping[str, Any], may_grow: Sequence[str]) -> str:
    r"""The text of a run's config.json; compared with the one that is there.

    Raises:
        ValueError: if they differ, naming the keys; those in ``may_grow`` may become larger.

    >>> grown(Path("no/such/file"), {"steps": 9}, ["steps"])
    '{\n "steps": 9\n}\n'
    """
    config = json.loads(json.dumps(config))
    if path.is_file():
        try:
            known = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not JSON ({error}): the run cannot be continued") from error
        keys = sorted(known.keys() | config.keys())
        differing = [k for k in keys if known.get(k) != config.get(k) and k not in may_grow]
        differing += [k for k in may_grow if k in known and k in config and config[k] < known[k]]
        if differing:
            lines = "; ".join(f"{k}: {known.get(k)!r} there, {config.get(k)!r} now" for k in differing)
            raise ValueError(
                f"{path.parent} holds a run with another config ({lines}). Only {' and '.join(may_grow) or 'nothing'} "
                "may grow: use the old values, or another directory"
            )
    return json.dumps(config, indent=1) + "\n"
