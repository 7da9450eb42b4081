"""Which blocks a run trains, where its config leaves that to be measured: before step 1, and never again."""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from zo2jax.config import Config
from zo2jax.metrics import write_atomically
from zo2jax.models.model import Model
from zo2jax.objectives import Generated
from zo2jax.plan import Plan
from zo2jax.replay import read_journal
from zo2jax.sensitivity import Sensitivity, sensitivity
from zo2jax.tasks.prepare import Prepared

_FILE = "sensitivity.json"


def selected(config: Config) -> Config:
    """The config with the targets that its run was begun with; as it is if ``train_blocks`` is 0, or there is no run.

    >>> selected(Config(targets="head.*", train_blocks=0.5, directory="no/such/run")).targets
    'head.*'
    """
    folder = Path(config.directory).expanduser()
    if not config.train_blocks or not (folder / "journal").is_file():
        return config
    return _with_targets(config, read_journal(folder).header.direction["targets"])


def select(
    config: Config, model: Model, data: Prepared, plan: Plan, console: Console
) -> tuple[Config, Sensitivity | None]:
    """(the config with targets, what was measured for them): of a run that has begun those that it has, and None."""
    folder = Path(config.directory).expanduser()
    if not config.train_blocks or (folder / "journal").is_file():
        return selected(config), None
    console.print(f"measuring on which blocks the loss depends, with {config.sensitivity_steps} batches")
    count = len(data.batches)
    batches = [data.batches[i % count] for i in range(config.sensitivity_steps)]
    if data.loss is not None:
        assert not isinstance(data.loss, Generated), "configs refuse it"
        model = model.with_loss(data.loss)
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 2))  # the steps of the run have others
    with ExitStack() as stack:
        pages = None
        if "disk" in plan.tiers.values():
            beside = next(there for there in (folder, *folder.absolute().parents) if there.is_dir())
            pages = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pages-", dir=beside)))
        direction = config.make_direction()
        found = sensitivity(model, batches, key=key, eps=config.eps, direction=direction, plan=plan, pages=pages)
    chosen = found.choose(config.train_blocks)
    console.print(str(chosen), highlight=False)
    return _with_targets(config, chosen.targets or direction.targets), chosen


def keep(found: Sensitivity, directory: Path) -> None:
    """Writes what was measured beside the config of a run.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keep(Sensitivity((), 8), Path(folder))
    ...     (Path(folder) / "sensitivity.json").read_text().startswith('{')
    True
    """
    write_atomically(directory / _FILE, json.dumps(found.as_json(), indent=1) + "\n")


def _with_targets(config: Config, targets: list[str] | tuple[str, ...]) -> Config:
    return replace(config, targets=",".join(targets), train_blocks=0.0)
