"""What is recorded of a run's steps: in its journal and its metrics, each step when the next one is under way."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from zo2jax.journal import Journal, Record
from zo2jax.marks import mark
from zo2jax.metrics import Metrics, memory_peaks, number, of_step
from zo2jax.mezo import Info
from zo2jax.plan.measure import measure_link
from zo2jax.updates import Update


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row had a loss that was not finite.

    >>> issubclass(NonFiniteLoss, RuntimeError)
    True
    """


@dataclass(frozen=True)
class StepInfo:
    """What `Run.step` reports. The arrays may still be on their way: reading one waits for it.

    >>> [field for field in StepInfo.__dataclass_fields__][:3]
    ['step', 'loss', 'projected_gradient']
    """

    step: int
    """Steps done, this one included."""
    loss: jax.Array
    """float32 []: the mean of the probes' losses, nats per token for language models; of `zo2jax.svrg` of the present
    weights' probes."""
    projected_gradient: jax.Array
    """float32 [K]."""
    losses: jax.Array
    """float32 [M]: of each probe."""
    skipped: jax.Array
    """bool []."""
    tokens_per_second: float
    """Throughput of the last step that is known to be done; NaN before there is one."""
    tokens: int
    """Tokens of the batch."""
    bytes_up: int
    """What went from host memory to the device for this step, and for the first block of the next."""
    bytes_down: int
    """What went back."""
    update: Update


class Recorder:
    """Records steps in the journal and the metrics of a run, one step late, so that the device never waits.

    Args:
        journal: of the run.
        metrics: of the run.
        max_skipped: so many steps in a row may have a loss that is not finite.

    >>> import tempfile, jax.numpy as jnp
    >>> from pathlib import Path
    >>> from zo2jax.header import Header
    >>> update = Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), jnp.zeros(()))
    >>> info = Info(jnp.zeros(()), jnp.zeros(1), jnp.zeros(2), jnp.zeros((), bool), update)
    >>> with tempfile.TemporaryDirectory() as folder, Journal.create(Path(folder) / "j", Header((0, 0))) as journal:
    ...     recorder = Recorder(journal, Metrics(Path(folder), -1), max_skipped=10)
    ...     tokens = recorder.take(1, info, np.ones((2, 8)), 0, 0).tokens
    ...     before = len(journal)
    ...     recorder.write()
    ...     tokens, before, len(journal)
    (16, 0, 1)
    """

    def __init__(self, journal: Journal, metrics: Metrics, max_skipped: int):
        """Has no step to write yet."""
        self._journal, self._metrics = journal, metrics
        self._pending: StepInfo | None = None
        self._finished: float | None = None  # when the last recorded step was done
        self._rate = float("nan")
        self._max_skipped, self._skipped_in_row = max_skipped, 0

    def complete(self, again: Callable[[int], Info]) -> None:
        """Writes the lines of steps that the journal has and the metrics lack, as when the run was killed between.

        ``again(step)`` is what a step of the journal found, counted from 0.
        """
        for step in sorted(set(range(1, len(self._journal) + 1)) - self._metrics.trained):
            info, skipped = again(step - 1), self._journal.record(step - 1).skipped
            self._metrics.write(of_step(step, info.loss, info.projected_gradient, skipped))

    def take(self, step: int, info: Info, batch: Any, up: int, down: int) -> StepInfo:
        """What is to be written of a step: its number, what it found in a batch, and the bytes that were moved for it.

        Raises:
            NonFiniteLoss: after ``max_skipped`` steps in a row, of those that are written, without a finite loss.
        """
        found = info.loss, info.projected_gradient, info.losses, info.skipped
        self._pending = StepInfo(step, *found, self._rate, _tokens(batch), up, down, info.update)
        if self._skipped_in_row >= self._max_skipped:
            raise NonFiniteLoss(
                f"the loss or its coefficients were not finite in {self._skipped_in_row} steps in a row, up to step "
                f"{step - 1}; these steps changed no weights. Try a smaller eps or learning_rate, or look at the data"
            )
        return self._pending

    def write(self) -> None:
        """Waits for the step that was taken last, and writes it; what fails is left to be written."""
        if (info := self._pending) is None:
            return
        update, parts = info.update, (info.loss, info.projected_gradient, info.losses)
        wanted = (*parts, update.coefs, update.decay, info.skipped)
        with mark("wait"):
            loss, gradient, losses, coefs, decay, skipped = jax.device_get(wanted)
        now = time.perf_counter()
        seconds = float("nan") if self._finished is None else now - self._finished
        self._rate = info.tokens / seconds
        if info.step > len(self._journal):  # or its metrics could not be written
            losses = np.pad(losses, (0, self._journal.header.members - len(losses)))  # records have one length
            self._journal.append(Record(losses, coefs, decay, bool(skipped)))
        line = of_step(info.step, loss, gradient, bool(skipped))
        line["tokens_per_second"] = number(self._rate)
        if moved := info.bytes_up + info.bytes_down:
            share = number(moved / seconds / measure_link().both)
            line |= {"link/bytes_up": info.bytes_up, "link/bytes_down": info.bytes_down, "link/share": share}
        self._metrics.write(line | memory_peaks())
        self._finished = now
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        self._pending = None

    def flush(self) -> None:
        """Writes the last step before somebody looks at the run: the time until the next one is no step's."""
        self.write()
        self._finished, self._rate = None, float("nan")


def _tokens(batch: Any) -> int:
    """How many tokens a batch, or a list of batches, holds: the size of ``ids``, or of its first array."""
    if isinstance(batch, list):
        return sum(map(_tokens, batch))
    leaves = [batch["ids"]] if isinstance(batch, Mapping) and "ids" in batch else jax.tree.leaves(batch)
    return int(np.size(leaves[0])) if leaves else 0
