"""A run: the step of `zo2jax.mezo` with checkpoints, metrics and resume around it."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.checkpoint import Snapshots, write_once
from zo2jax.directions import period_key, step_keys
from zo2jax.estimators import Estimator
from zo2jax.kept import Kept
from zo2jax.metrics import Metrics, memory_peaks
from zo2jax.mezo import Info, State, begin, conclude
from zo2jax.models.blocks import forward, owned_shapes
from zo2jax.models.hub import export
from zo2jax.models.layers import Batch
from zo2jax.models.model import Model
from zo2jax.objectives import Generated, mean_loss, ratio
from zo2jax.optimizers import Optimizer, as_optimizer
from zo2jax.plan import Plan
from zo2jax.plan.machine import measure_link
from zo2jax.stream import Stream
from zo2jax.updates import Rounding, Update, stochastic

Loss = Callable[[Any, Batch], jax.Array] | Generated


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
    """float32 []: the mean of the probes' losses, nats per token for language models."""
    projected_gradient: jax.Array
    """float32 [K]."""
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


def _number(value: Any) -> float | None:
    """A finite float, or None: JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


class Run:
    """Trains a model in a directory, and goes on where an earlier run in the same directory stopped.

    The directory holds ``config.json``, ``metrics.jsonl`` (one JSON object a line) and ``checkpoints``. The model's
    source (`zo2jax.load` reads nothing before it is asked) is read block by block into the tiers of the plan, so that
    there is never a second model in memory; `model` gives the trained one at any time. The same calls with the same
    directory resume, to the same weights as if nothing had happened.

    With low-rank directions, or dense ones that have a refresh, matrices are only read, and the updates of a period
    stay beside them; see `zo2jax.factored` and `zo2jax.pending`. A model with a format (`zo2jax.Model.with_format`)
    keeps its matrices as codes then.

    Args:
        model: from `zo2jax.load`.
        estimator: for example ``zo.two_point(1e-3)``.
        optimizer: ``zo.sgd(...)``, or an optax transformation of the projected gradients.
        directory: where the run lives; made if it is not there.
        key: ``jax.random.key(seed)``.
        plan: where the model's blocks live; on the device if None. It changes no weights, and may be another on resume.
        rounding: how updates of 16-bit matrices are rounded.
        config: what describes the run; compared with config.json on resume. A description of the arguments if None.
        loss: what is trained on instead of the model's own loss: ``fn(what the head gives, batch) -> float32
            [examples]`` (see `zo2jax.Model.with_loss`), or a `zo2jax.Generated` score of what the model writes.
        may_grow: keys of ``config`` that may be larger on resume.
        max_skipped: so many steps in a row may have a loss that is not finite, before `NonFiniteLoss` is raised.
        tensorboard: whether the metrics go to ``tensorboard`` in the directory as well.

    Raises:
        ValueError: if the directory holds a run with another config, naming the keys; for a format or `residual`
            rounding with directions for which matrices are not only read; for momentum without low-rank ones.
        PermissionError: if the directory cannot be written.

    >>> import tempfile, zo2jax as zo
    >>> from zo2jax.demo import model_folder
    >>> batch = {"ids": np.ones((2, 8), np.int32), "targets": np.ones((2, 8), np.int32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Run(zo.load(model_folder()), zo.two_point(1e-3), zo.sgd(1e-6), directory=folder,
    ...              key=jax.random.key(0)) as run:
    ...         for b in run.remaining([batch, batch]):
    ...             info = run.step(b)
    ...         run.save()
    >>> info.step
    2
    """

    def __init__(
        self,
        model: Model,
        estimator: Estimator,
        optimizer: Any,
        *,
        directory: str | Path,
        key: jax.Array,
        plan: Plan | None = None,
        rounding: Rounding = stochastic,
        loss: Loss | None = None,
        config: Mapping[str, Any] | None = None,
        may_grow: Sequence[str] = (),
        max_skipped: int = 10,
        tensorboard: bool = False,
    ):
        """Opens the directory; restores the newest checkpoint if there is one."""
        optimizer = as_optimizer(optimizer)
        bare = model.replace({})  # what is kept, without the untrained weights
        shapes = owned_shapes(model.blocks)
        self._kept = Kept.of(model, estimator, optimizer, rounding)
        self._generated = loss if isinstance(loss, Generated) else None
        trained = bare if loss is None or isinstance(loss, Generated) else bare.with_loss(loss)
        state = begin(shapes, key, estimator, optimizer)._replace(params={})
        if config is None:
            config = _described(model, estimator, optimizer, rounding, loss, state.key)
        self.directory = Path(directory).expanduser()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_once(self.directory / "config.json", config, may_grow)
        except OSError as error:
            raise type(error)(f"the run directory {self.directory} cannot be written ({error})") from error
        self._model = bare.with_format(None)  # what is looked at is arrays
        self._snapshots = Snapshots(self.directory / "checkpoints")
        source: Mapping[str, Any] = model.source
        if (last := self._snapshots.last) is not None:
            state = self._restored(state, last)
            source = self._kept.source(self._snapshots, last)
        self._state = state
        self._matrix = jnp.asarray(estimator.probes)
        self._estimator, self._optimizer = estimator, optimizer
        self._nothing = Update(
            _step_keys(state.key, state.step, estimator.directions, estimator.direction),
            jnp.zeros(estimator.directions),
            jnp.zeros(()),
            jnp.zeros(()) if optimizer.momentum else None,
        )
        self._update = self._nothing  # what the weights still lack: a step applies the update of the one before it
        self._done = int(self._state.step)
        self._metrics = Metrics(self.directory, -1 if last is None else last, tensorboard=tensorboard)
        self._pending: StepInfo | None = None
        self._finished: float | None = None  # when the last recorded step was done
        self._rate = float("nan")
        self._eval_loss: dict[int, float] = {}
        self._max_skipped, self._skipped_in_row = max_skipped, 0
        pages, self._closed = self.directory / "pages", False
        for left_behind in pages.glob("*.page"):  # by a run that was killed
            left_behind.unlink()
        plan = Plan() if plan is None else plan
        if set(plan.tiers.values()) - {"device"}:
            measure_link()  # while no step waits
        try:
            self._folded = self._period(max(self._done - 1, 0))  # how often the matrices were
            basis = self._basis(self._folded)
            kept = None
            if last is not None and basis is not None:
                kept = self._kept.source_beside(self._snapshots, last)
            how = estimator.direction, rounding, plan, pages, basis, kept, model.format, estimator.directions
            self._stream = Stream(trained.blocks, source, *how, momentum=optimizer.momentum > 0)
        except BaseException as error:
            self._snapshots.close()
            self._metrics.close()
            if last is not None and isinstance(error, ValueError):
                raise self._misfit(last, error) from error
            raise

    def __enter__(self) -> "Run":
        """The run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the run; saving is up to the caller."""
        self.close()

    @property
    def steps_done(self) -> int:
        """Steps done so far, those before a resume included."""
        return self._done

    @property
    def in_files(self) -> list[str]:
        """Blocks of the disk tier that are read from the model's own files; see `zo2jax.stream.Stream`."""
        return sorted(self._stream.in_files)

    @property
    def state(self) -> State:
        """The state of `zo2jax.mezo`, with every update applied; a copy, of the whole model."""
        self._catch_up()
        return self._state._replace(params=dict(self._stream))

    @property
    def model(self) -> Model:
        """The model with its present weights, every update applied; the run's own, read when asked for.

        After further steps ask again: those weights lack the last one's update.
        """
        self._catch_up()
        return self._model.replace(self._stream)

    def remaining(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that were not trained on yet; a sequence is indexed, anything else is skipped through."""
        if isinstance(batches, Sequence):
            return (batches[i] for i in range(self._done, len(batches)))
        return itertools.islice(batches, self._done, None)

    def step(self, batch: Any) -> StepInfo:
        """One step: the last step's update and this one's probes, block by block, from one read of the weights.

        Metrics of a step are written when the next one is under way, so that the device never waits.

        Raises:
            ValueError: for a batch without targets. It, and any batch that the model cannot take, changes no weights.
            NonFiniteLoss: after ``max_skipped`` steps in a row without a finite loss; they changed no weights.
        """
        keys = _step_keys(self._state.key, self._state.step, self._estimator.directions, self._estimator.direction)
        self._fold()
        up, down = self._stream.bytes_up, self._stream.bytes_down
        sums = self._losses(keys, batch)
        up, down = self._stream.bytes_up - up, self._stream.bytes_down - down
        how, state = (self._estimator, self._optimizer), self._state
        info, opt_state, step = _conclude(*how, keys, sums, state.opt_state, state.step)
        self._record(self._pending)  # the one before; if that fails, this one was not done
        self._update, self._state = info.update, state._replace(opt_state=opt_state, step=step)
        self._done += 1
        loss, gradient = info.loss, info.projected_gradient
        self._pending = StepInfo(
            self._done, loss, gradient, info.skipped, self._rate, _tokens(batch), up, down, info.update
        )
        if self._skipped_in_row >= self._max_skipped:
            raise NonFiniteLoss(
                f"the loss or its coefficients were not finite in {self._skipped_in_row} steps in a row, up to step "
                f"{self._done - 1}; these steps changed no weights. Try a smaller eps or learning_rate, or look at the "
                "data"
            )
        return self._pending

    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss over all batches, with every update applied; written as ``eval/loss``.

        In nats per token for language models; else what the loss of the run is, per example.
        """
        self.flush()
        if self._generated is None:
            loss = mean_loss(partial(forward, self._stream.visits(), self._stream.blocks), batches)
        else:
            visit = self._stream.visits(self._model.blocks)
            sums = [self._generated.sums(self._model, visit, batch) for batch in batches]
            loss = ratio([(total[0], count[0]) for total, count in sums])
        self._eval_loss = {self._done: loss}
        self._metrics.write({"step": self._done, "eval/loss": _number(loss)})
        return loss

    def flush(self) -> None:
        """Applies the last step's update, waits for it, and writes the step's metrics."""
        self._catch_up()
        previous, self._pending = self._pending, None
        self._record(previous)
        self._finished, self._rate = None, float("nan")

    def save(self) -> None:
        """Saves a checkpoint, durable on return. The last one is kept, and the one with the best ``eval/loss``.

        Evaluate before saving: a step that is saved already is not saved again.
        """
        self.flush()
        loss = self._eval_loss.get(self._done)
        metrics = {} if loss is None or not np.isfinite(loss) else {"eval/loss": loss}
        self._snapshots.save(self._state, self._kept.entries(self._stream), metrics)

    def export(self, folder: str | Path) -> Path:
        """Writes the present weights as a Hugging Face folder; see `zo2jax.models.hub.export`."""
        self.flush()
        return export(self.model, folder)

    def close(self) -> None:
        """Writes the last step's metrics, and lets go of the model. What was not saved or exported is gone."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:  # each is closed, whatever becomes of the others
            for part in (self._metrics, self._snapshots, self._stream):
                stack.callback(part.close)
            self._record(self._pending)

    def _losses(self, keys: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        """(sums of losses, counts) of the members [M]; the weights have every update then."""
        if self._generated is not None:
            self._catch_up()
            visit = self._stream.probe_visits((keys, self._matrix))
            return self._generated.sums(self._model, visit, batch, len(self._matrix))
        batch = jax.device_put(batch)  # may refuse what is no batch
        update, self._update = self._update, self._nothing
        sums = self._stream.train(update, (keys, self._matrix), batch)
        if not isinstance(sums, tuple):
            raise ValueError(f"a batch of {sorted(batch)} has no loss: expected 'ids' and 'targets'")
        return sums

    def _catch_up(self) -> None:
        """Applies the update that the weights still lack."""
        update, self._update = self._update, self._nothing
        if update is not self._nothing:
            self._stream.apply(update)

    def _period(self, step: int) -> int:
        """How many periods of a direction with a refresh came before that of a step."""
        return step // refresh if (refresh := self._estimator.direction.refresh) else 0

    def _basis(self, period: int) -> jax.Array | None:
        """The key of a period of a direction with which matrices are only read."""
        direction = self._estimator.direction
        step = jnp.uint32(period * (direction.refresh or 1))
        return period_key(self._state.key, step, direction) if direction.read_only else None

    def _fold(self) -> None:
        """Where a period begins: takes the updates of the last one into matrices that were only read."""
        period = self._period(self._done)
        if period != self._folded:
            self._catch_up()
            basis = self._basis(period)
            assert basis is not None
            self._stream.fold(basis)
            self._folded = period

    def _restored(self, like: State, step: int) -> State:
        try:
            return self._snapshots.restore(like, step)
        except ValueError as error:
            self._snapshots.close()
            raise self._misfit(step, error) from error

    def _misfit(self, step: int, error: ValueError) -> ValueError:
        return ValueError(
            f"the checkpoint of step {step} in {self.directory} does not fit this model and optimizer ({error}): "
            "use those that it was made with, or another directory"
        )

    def _record(self, info: StepInfo | None) -> None:
        if info is None:
            return
        skipped = bool(info.skipped)  # waits for the step
        now = time.perf_counter()
        seconds = float("nan") if self._finished is None else now - self._finished
        self._finished, self._rate = now, info.tokens / seconds
        gradient = [_number(g) for g in np.asarray(info.projected_gradient)]
        line: dict[str, Any] = {
            "step": info.step,
            "train/loss": _number(info.loss),
            "train/projected_gradient": gradient[0] if len(gradient) == 1 else gradient,
            "tokens_per_second": _number(self._rate),
        }
        if moved := info.bytes_up + info.bytes_down:
            share = _number(moved / seconds / measure_link().both)
            line |= {"link/bytes_up": info.bytes_up, "link/bytes_down": info.bytes_down, "link/share": share}
        self._metrics.write(line | memory_peaks() | ({"train/skipped": True} if skipped else {}))
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0


_step_keys = jax.jit(step_keys, static_argnums=(2, 3))


@partial(jax.jit, static_argnums=(0, 1))
def _conclude(
    estimator: Estimator, optimizer: Optimizer, keys: jax.Array, sums: Any, opt_state: Any, step: jax.Array
) -> tuple[Info, Any, jax.Array]:
    """From (loss sums, counts) of the members to the step's update, the optimizer's state and the next step."""
    total, count = sums
    info, opt_state = conclude(estimator, optimizer, keys, total / jnp.where(count > 0, count, 1), opt_state)
    return info, opt_state, step + 1


def _tokens(batch: Any) -> int:
    """How many tokens a batch holds: the size of ``ids``, or of its first array."""
    leaf = batch["ids"] if isinstance(batch, Mapping) and "ids" in batch else jax.tree.leaves(batch)[0]
    return int(np.size(leaf))


def _described(
    model: Model, estimator: Estimator, optimizer: Optimizer, rounding: Rounding, loss: Loss | None, key: jax.Array
) -> dict[str, Any]:
    """The config of a run that was given none."""
    return {
        "model": None if model.folder is None else str(model.folder.resolve()),
        "estimator": str(estimator),
        "optimizer": optimizer.name,
        "rounding": str(rounding),
        **({} if model.format is None else {"format": str(model.format)}),
        "loss": None if loss is None else getattr(loss, "__name__", str(loss)),
        "key": jax.random.key_data(key).tolist(),
    }
