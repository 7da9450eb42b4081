"""A run: the step of `zo2jax.mezo` with checkpoints, metrics and resume around it."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.adapters import export_for_peft
from zo2jax.directory import Directory
from zo2jax.estimators import Estimator
from zo2jax.first_order import Hybrid, Learner, only_finite, split
from zo2jax.header import Header
from zo2jax.kept import Kept
from zo2jax.metrics import Metrics, number
from zo2jax.mezo import State, begin
from zo2jax.models.blocks import forward, owned_shapes
from zo2jax.models.hub import export
from zo2jax.models.layers import Batch
from zo2jax.models.model import Model
from zo2jax.objectives import Generated, mean_loss, ratio
from zo2jax.optimizers import as_optimizer
from zo2jax.plan import Plan
from zo2jax.recorder import Recorder, StepInfo
from zo2jax.restored import opened
from zo2jax.rule import Rule
from zo2jax.saver import Saver
from zo2jax.tail import Tail
from zo2jax.updates import Rounding, stochastic

Loss = Callable[[Any, Batch], jax.Array] | Generated


class Run:
    """Trains a model in a directory, and goes on where an earlier run in the same directory stopped.

    The directory holds ``config.json``, a ``journal`` of all steps (`zo2jax.journal`), ``metrics.jsonl`` (one JSON
    object a line) and ``checkpoints``; only one process may train in it at a time. The model's source (`zo2jax.load`
    reads nothing before it is asked) is read block by block into the tiers of the plan, so that there is never a second
    model in memory; `model` gives the trained one at any time. The same calls with the same directory resume after the
    last step of the journal, saved or not, to the same weights as if nothing had happened.

    With low-rank directions, or dense ones that have a refresh, matrices are only read, and the updates of a period
    stay beside them; see `zo2jax.factored` and `zo2jax.pending`. A model with a format (`zo2jax.Model.with_format`)
    keeps its matrices as codes then.

    Args:
        model: from `zo2jax.load`.
        estimator: for example ``zo.two_point(1e-3)``.
        optimizer: ``zo.sgd(...)``, or an optax transformation of the projected gradients.
        directory: where the run lives; made if it is not there.
        key: ``jax.random.key(seed)``.
        plan: where the model's blocks live; on the device if None. It changes no weights, and may be another on resume;
            but for its ``probe_batch``, which changes the last bits of losses: that of the beginning stays.
        rounding: how updates of 16-bit matrices are rounded.
        config: what describes the run; compared with config.json on resume. The model's folder and the loss if None.
        loss: what is trained on instead of the model's own loss: ``fn(what the head gives, batch) -> float32
            [examples]`` (see `zo2jax.Model.with_loss`), or a `zo2jax.Generated` score of what the model writes.
        may_grow: keys of ``config`` that may be larger on resume.
        max_skipped: so many steps in a row may have a loss that is not finite, before `NonFiniteLoss` is raised.
        tensorboard: whether the metrics go to ``tensorboard`` in the directory as well.
        sync_every: seconds after which a step is on the disk, should the power fail; 0: each at once. A process that is
            killed loses the last step at most.
        replay_within: seconds. Checkpoints are saved in the background so often that a run that was killed is back
            where it was within this time; with infinity, only what `save` is called for. See `zo2jax.saver`.
        hybrid: what is trained by backpropagation, of `zo2jax.hybrid`; nothing if None. Such a run goes on after its
            last checkpoint, and its steps since then are done again. It saves between two steps.

    Raises:
        ValueError: if the directory holds another run, naming what differs, or one that is damaged; for a format or
            `residual` rounding with directions with which matrices also change; for momentum without low-rank ones;
            for targets of a direction that name no leaf; for what a hybrid run cannot be made of.
        BlockingIOError: if another process trains in the directory.
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
        sync_every: float = 1.0,
        replay_within: float = 600.0,
        hybrid: Hybrid | None = None,
    ):
        """Opens the directory; restores the newest checkpoint if there is one."""
        optimizer = as_optimizer(optimizer)
        self._learner: Learner | None = None
        if hybrid is not None:
            if isinstance(loss, Generated):
                raise ValueError(f"the loss is {loss}, in a hybrid run: a score of texts has no gradient")
            parts = split(model, estimator, hybrid)
            model, estimator, plan = parts.model, parts.estimator, parts.resident(plan)
            self._learner = Learner(parts)
        self._kept = Kept.of(model, estimator, optimizer, rounding)
        self._state = begin(owned_shapes(model.blocks), key, estimator, optimizer)._replace(params={})
        if config is None:  # the journal says all the rest
            folder, name = model.folder, None if loss is None else getattr(loss, "__name__", str(loss))
            config = {"model": None if folder is None else str(folder.resolve()), "loss": name}
        wanted = None if plan is None else plan.probe_batch
        said = "" if hybrid is None else str(hybrid.first_order)
        header = Header.of(model, estimator, optimizer, rounding, self._state.key, wanted, said)
        self._files = Directory(directory, header, config, may_grow, sync_every=sync_every)
        self.directory = self._files.path
        at_once = self._files.header.members_at_once  # that of a run that is there stays
        if plan is not None and plan.budget is not None and at_once > header.members_at_once:
            warnings.warn(
                f"the run evaluates {at_once} members at once, as it was begun; the plan expects "
                f"{header.members_at_once}, and less memory: give zo.plan(probe_batch={at_once})",
                stacklevel=2,
            )
        self._closed = False
        self._generated = loss if isinstance(loss, Generated) else None
        self._model = model.replace({}).with_format(None)  # what is looked at: arrays, not the untrained weights
        trained = model if loss is None or isinstance(loss, Generated) else model.with_loss(loss)
        with ExitStack() as on_error:
            on_error.callback(self._files.close)
            began = time.monotonic()
            self._weights, state = opened(self._files, trained, self._kept, self._whole, plan)
            on_error.callback(self._weights.close)
            self._stream, saved = self._weights.stream, int(state.step)
            self._rule = Rule(estimator, optimizer, self._files.journal)
            self._begin(state)
            self._replay()
            behind = time.monotonic() - began if self.steps_done > saved else 0.0
            self._saver = Saver(self._files.snapshots, self._files.journal, self._kept, replay_within, behind)
            self._metrics = Metrics(self.directory, self.steps_done or -1, tensorboard=tensorboard)
            on_error.pop_all()
        self._recorder = Recorder(self._files.journal, self._metrics, max_skipped)
        self._recorder.complete(lambda step: self._rule.again(self._state, step)[0])

    def __enter__(self) -> "Run":
        """The run itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the run; saving is up to the caller."""
        self.close()

    @property
    def steps_done(self) -> int:
        """Steps done so far, those before a resume included."""
        return self._weights.done

    @property
    def evaluated(self) -> bool:
        """Whether the present step has a held-out loss."""
        return self.steps_done in self._metrics.evaluated

    @property
    def held_out(self) -> dict[int, float | None]:
        """What `evaluate` found, by the steps done then, those before a resume included; None: not finite."""
        return dict(self._metrics.evaluated)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is written in the background, or will be from the next step on."""
        return self._saver.busy

    @property
    def plan(self) -> Plan:
        """Where the model's blocks live."""
        return self._stream.plan

    @property
    def in_files(self) -> list[str]:
        """Blocks of the disk tier that are read from the model's own files; see `zo2jax.stream.Stream`."""
        return sorted(self._stream.in_files)

    @property
    def state(self) -> State:
        """The state of `zo2jax.mezo`, with every update applied; a copy, of the whole model.

        Of a hybrid run the optimizer's state is a pair, with a `zo2jax.first_order.FirstOrder`.
        """
        self._weights.settle()
        whole = self._whole if self._learner is None else jax.tree.map(jnp.copy, self._whole)
        return whole._replace(params=dict(self._stream))

    @property
    def model(self) -> Model:
        """The model with its present weights, every update applied; the run's own, read when asked for.

        After further steps ask again: those weights lack the last one's update.
        """
        self._weights.settle()
        return self._model.replace(self._stream)

    def remaining(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that were not trained on yet; a sequence is indexed, anything else is skipped through."""
        if isinstance(batches, Sequence):
            return (batches[i] for i in range(self.steps_done, len(batches)))
        return itertools.islice(batches, self.steps_done, None)

    def step(self, batch: Any) -> StepInfo:
        """One step: the last step's update and this one's probes, block by block, from one upload of the weights.

        A list of batches makes one step of them all (gradient accumulation): they go through a block one after the
        other while it is on the device, each in the memory of one, and the loss is the sum of all losses over the sum
        of all counts. A batch itself is anything but a list.

        Metrics of a step are written when the next one is under way, so that the device never waits.

        Raises:
            ValueError: for a batch without targets. It, and any batch that the model cannot take, changes no weights.
            NonFiniteLoss: after ``max_skipped`` steps in a row without a finite loss; they changed no weights.
            OSError: if a checkpoint could not be written in the background; nothing is lost, the step is not done yet.
        """
        self._saver.check()
        if self._learner is not None and self._saver.late:
            self.save()
        keys = self._rule.keys(self._state)
        tail = None if self._learner is None else self._learner.begin()
        self._weights.begin()
        up, down = self._stream.bytes_up, self._stream.bytes_down
        sums = self._losses(keys, batch, tail)
        up, down = self._stream.bytes_up - up, self._stream.bytes_down - down
        info, state = self._rule.conclude(self._state, keys, sums, self.steps_done)
        self._recorder.write()  # the one before; if that fails, this one was not done
        if self._learner is None:
            self._saver.step(self._state, self._weights)
        leaves = None if self._learner is None else self._learner.conclude(sums[1], info.skipped)
        self._state = state
        self._weights.take(info.update, leaves)
        return self._recorder.take(self.steps_done, info, batch, up, down)

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
        self._metrics.evaluated[self.steps_done] = number(loss)
        self._metrics.write({"step": self.steps_done, "eval/loss": number(loss)})
        return loss

    def note(self, step: int, values: Mapping[str, float | str]) -> None:
        """Gives TensorBoard, if the run writes for it, further numbers of a step (every tenth) or texts, by name.

        ``metrics.jsonl`` does not have them: its lines are the same whether somebody looks or not.
        """
        self._metrics.note(step, values)

    def flush(self) -> None:
        """Applies the last step's update, waits for it, and writes the step's metrics."""
        self._weights.settle()
        self._recorder.flush()

    def save(self, *, wait: bool = True) -> None:
        """Saves a checkpoint, durable on return. The last one is kept, and the one with the best ``eval/loss``.

        Evaluate before saving: a step that is saved already is not saved again.

        Args:
            wait: if not, it is written while the next steps are done, each of which hands over one block; it never is
                the best one, and is given up if the run is closed or saved meanwhile: the journal has everything. A
                hybrid run waits all the same.
        """
        if not wait and self._learner is None:
            self._saver.begin()
            return
        self.flush()
        loss = self._metrics.evaluated.get(self.steps_done)
        metrics = {} if loss is None or not np.isfinite(loss) else {"eval/loss": loss}
        self._saver.save(self._whole, self._weights, metrics)

    def export(self, folder: str | Path, *, adapter: bool = False) -> Path:
        """Writes the present weights as a Hugging Face folder; see `zo2jax.models.hub.export`.

        Args:
            folder: to be made.
            adapter: of a run with `zo2jax.lora`, or of a model with a prefix: writes those alone; see
                `zo2jax.adapters`.
        """
        self.flush()
        if not adapter:
            return export(self.model, folder)
        names = () if self._learner is None else self._learner.split.names
        of_run = self._kept.direction, self._stream.beside, folder, names
        return export_for_peft(self._model, lambda: self.model, *of_run)

    def close(self) -> None:
        """Writes the last step to the journal and the metrics, and lets go of the model and the directory."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:  # each is closed, whatever becomes of the others
            for part in (self._files, self._metrics, self._weights, self._saver):
                stack.callback(part.close)
            self._recorder.write()

    def _losses(self, keys: jax.Array, batch: Any, tail: Tail | None) -> tuple[jax.Array, jax.Array]:
        """(sums of losses, counts) of the members of the next step [M]; the weights have every update then."""
        parts = batch if isinstance(batch, list) else [batch]
        if not parts:
            raise ValueError("a step of no batches: expected a batch, or a list of them")
        members, anchored = self._rule.members(self._state, keys, self.steps_done)
        if self._generated is not None:
            self._weights.settle()
            visits = [(self._stream.probe_visits(some), len(some[1])) for some in members]
            visits += [(self._stream.probe_visits(some, then=True), len(some[1])) for some in anchored]
            found = [[self._generated.sums(self._model, visit, part, n) for visit, n in visits] for part in parts]
            sums: list[Any] = [tuple(map(jnp.concatenate, zip(*of_part, strict=True))) for of_part in found]
        else:
            parts = [jax.device_put(part) for part in parts]  # may refuse what is no batch
            sums = self._weights.train(members, parts, anchored, tail)
        for part, given in zip(parts, sums, strict=True):
            if not isinstance(given, tuple):
                raise ValueError(f"a batch of {sorted(part)} has no loss: expected 'ids' and 'targets'")
        total = sums[0] if len(sums) == 1 else _total(sums)
        return total if tail is None else only_finite(total, tail.gradient)

    @property
    def _whole(self) -> State:
        """The state as checkpoints have it: of a hybrid run, both optimizers' and the first-order leaves."""
        state, learner = self._state, self._learner
        return state if learner is None else state._replace(opt_state=(state.opt_state, learner.state))

    def _begin(self, state: State) -> None:
        """Takes the state of a checkpoint, or that of the beginning."""
        self._state = state
        if self._learner is None:
            return
        opt_state, found = state.opt_state
        self._state, self._learner.state = state._replace(opt_state=opt_state), found
        if self._files.snapshots.last is None:
            self._learner.read(self._stream)
        journal, saved = self._files.journal, int(state.step)
        if len(journal) > saved:
            warnings.warn(
                f"the hybrid run in {self.directory} goes on after its last checkpoint, of step {saved}: the steps up "
                f"to {len(journal)} are done again, as its journal lacks what backpropagation did",
                stacklevel=3,
            )
            journal.cut(saved)

    def _replay(self) -> None:
        """Takes the steps of the journal that are later than the weights."""
        journal = self._files.journal
        for step in range(int(self._state.step), len(journal)):
            self._state = self._rule.again(self._state, step)[1]
        self._weights.replay(journal, len(journal))


@jax.jit
def _total(sums: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Of all batches of a step, in their order."""
    losses, counts = zip(*sums, strict=True)
    return sum(losses[1:], losses[0]), sum(counts[1:], counts[0])
