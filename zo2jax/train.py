"""The main of `zo2jax train`: load, step, evaluate, save, plot; readable from top to bottom."""

import contextlib
import json
import math
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from zo2jax.config import Config, ConfigError
from zo2jax.config_files import load_config
from zo2jax.metrics import read_metrics, write_atomically
from zo2jax.models.blocks import forward
from zo2jax.models.hub import load
from zo2jax.models.model import Model
from zo2jax.monitor import Monitor
from zo2jax.objectives import Generated, mean_loss
from zo2jax.plan import Plan
from zo2jax.replay import read_journal
from zo2jax.run import Run
from zo2jax.selected import keep, select, selected
from zo2jax.shapes import shaped
from zo2jax.stream import Stream
from zo2jax.tasks.encoding import TaskBatches, TaskHeldOut
from zo2jax.tasks.prepare import InParts, Prepared, prepare
from zo2jax.tasks.scoring import Evaluation
from zo2jax.trained import begun, load_model, trained_model


@dataclass(frozen=True)
class Result:
    """What a training run ended with; losses are held-out.

    >>> Result(Path("out"), 10, 5.0, 4.0, True).last
    4.0
    """

    directory: Path
    steps: int
    first: float
    last: float
    finished: bool
    metrics: dict[str, float] | None = None
    """Of a task: its metric on the evaluation examples, by the checkpoint with the best held-out loss."""


def train(config: Config, console: Console | None = None) -> Result:
    """Trains by a config, going on where the directory's run stopped, and plots the losses.

    A task's metric is taken at the end, with the weights of the best held-out loss. Ctrl-C finishes the step, saves,
    and returns; a second Ctrl-C interrupts at once.

    Raises:
        FileNotFoundError, ValueError, PermissionError: for bad input, before anything is written.
        NonFiniteLoss: see `zo2jax.Run`; the weights before those steps are saved.
    """
    console = console or Console()
    model = load_model(config)
    data = prepare(config, model)
    at_once = _members_at_once(config)
    plan = _plan(replace(config, probe_batch=at_once), model, data)
    console.print(
        f"{config.model}: {model.parameter_count:,} parameters, {model.dtype}, on {jax.devices()[0].device_kind}; "
        f"{data.summary}"
    )
    asked, (config, measured) = config, select(config, model, data, plan, console)
    if asked.train_blocks:  # plans are of what trains
        plan = _plan(replace(config, probe_batch=at_once), model, data)
    if plan.tiers:
        console.print(plan.summary, highlight=False)
    run = _open_run(config, model, data, plan, asked)
    if measured is not None:
        keep(measured, run.directory)
    del model  # the run holds its own copy
    if run.in_files:
        console.print(f"{len(run.in_files)} of the blocks on the disk are read from the model's own files")
    with run, _interruptible() as interrupted:
        if run.steps_done == 0:
            _report(console, 0, run.evaluate(data.held_out), data.unit)
        else:
            console.print(f"going on after step {run.steps_done} in {run.directory}")
            _check(run, config, data, console)  # the run may have been killed before it did
        patient = False
        with Monitor(run, config.steps, console=console) as monitor:
            try:
                for batch in run.remaining(data.batches):
                    if patient := _waited(run.held_out, config.patience):
                        break
                    info = run.step(batch)
                    monitor.show(info)
                    _check(run, config, data, console)
                    if interrupted.is_set():
                        break
            except Exception:
                with contextlib.suppress(Exception):  # the error that is already on its way says more
                    run.save()
                raise
        run.save()
        done, finished = run.steps_done, run.steps_done >= config.steps or patient
        if patient:
            console.print(f"stopped after step {done}: {config.patience} evaluations without a lower held-out loss")
        elif not finished:
            console.print(f"stopped after step {done} of {config.steps}, saved; the same command goes on from there")
    del run  # its weights: those of the best checkpoint are read next
    plot_losses(config.directory, data.unit)
    metrics = None
    if data.evaluate is not None and finished:
        metrics = _evaluate_best(config, data, console)
    losses = _held_out_losses(config.directory)
    directory = Path(config.directory).expanduser()
    return Result(directory, done, losses[0], losses[-1], finished, metrics)


def _held_out_losses(directory: str) -> list[float]:
    found = [line["eval/loss"] for line in read_metrics(directory) if "eval/loss" in line]
    return [math.nan if loss is None else loss for loss in found]


def _members_at_once(config: Config) -> int:
    """Those that the run of the config's directory was begun with; what the config says if there is none."""
    folder = Path(config.directory).expanduser()
    if not (folder / "journal").is_file():
        return config.probe_batch
    return read_journal(folder).header.members_at_once


def _plan(config: Config, model: Model, data: Prepared) -> Plan:
    """Where the blocks live, by the largest batch; without a wish, on the device."""
    if config.tier == "device" and not config.device_memory:
        return Plan(probe_batch=config.probe_batch or None)
    batches = [_largest(batches) for batches in (data.batches, data.held_out)]
    batch = max(batches, key=lambda batch: batch["ids"].size)
    if isinstance(data.loss, Generated):  # reads the prompts, and needs what the head says of their last tokens
        ids, lengths = batch["ids"], batch["lengths"]
        return config.make_plan(model, {"ids": ids, "lengths": lengths, "positions": lengths[:, None]})
    return config.make_plan(model if data.loss is None else model.with_loss(data.loss), batch)


def _largest(batches: Any) -> Any:
    """A batch as large as any of these: the first one, or of a task one with the longest example."""
    if isinstance(batches, InParts):
        batches = batches.batches
    if not isinstance(batches, TaskBatches | TaskHeldOut):
        return next(iter(batches))
    items = batches.encoded.items
    longest = max(items, key=lambda item: max(len(one.ids) for one in item.inputs))
    return batches.encoded.batch([longest], batches.batch)


def _open_run(config: Config, model: Model, data: Prepared, plan: Plan, asked: Config) -> Run:
    """The run that a config describes, made of the one that was asked for."""
    return Run(
        model,
        config.make_estimator(),
        config.make_optimizer(),
        directory=config.directory,
        key=jax.random.key(config.seed),
        plan=plan,
        rounding=config.make_rounding(),
        loss=data.loss,
        config=asked.as_json(),
        may_grow=asked.may_grow(),
        max_skipped=config.max_skipped,
        tensorboard=config.tensorboard,
        sync_every=config.sync_every,
        replay_within=config.replay_within,
        hybrid=config.make_hybrid(),
    )


def open_elsewhere(config: Config, directory: str | Path) -> tuple[Run, Prepared]:
    """The run that a config describes, begun anew in another directory than its own, and its data; for measurements.

    With ``train_blocks`` it trains those that the config's run chose, or all if that has not begun.

    Raises:
        FileNotFoundError, ValueError: for bad input, before anything is written.
    """
    config = replace(selected(config), probe_batch=_members_at_once(config), directory=str(directory))
    model = load_model(config)
    data = prepare(config, model)
    return _open_run(config, model, data, _plan(config, model, data), config), data


def _evaluate_best(config: Config, data: Prepared, console: Console) -> dict[str, float]:
    """The task's metric by the best checkpoint; kept in evaluation.json, beside the predictions."""
    step, model = trained_model(config.directory, best=True)
    with _placed(config, model, data) as placed:
        evaluation = _evaluated(data, placed, console)
    console.print(f"step {step:6d}  {evaluation}", highlight=False)
    text = json.dumps({"step": step, **asdict(evaluation)}, indent=1, default=list)
    write_atomically(Path(config.directory).expanduser() / "evaluation.json", text + "\n")
    return evaluation.metrics


def _evaluated(data: Prepared, model: Model, console: Console) -> Evaluation:
    """The evaluation of a task, with a progress bar."""
    assert data.evaluate is not None
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("evaluating")
        return data.evaluate(model, progress=lambda done, total: progress.update(bar, completed=done, total=total))


@contextlib.contextmanager
def _placed(config: Config, model: Model, data: Prepared) -> Iterator[Model]:
    """The model with its blocks where the config's plan puts them; page files are made beside the run, if there is one.

    Their folder is a new one, as the run itself may be training.
    """
    plan = _plan(config, model, data)
    if not plan.tiers and model.format is None:
        yield model
        return
    directory = Path(config.directory).expanduser()
    with contextlib.ExitStack() as stack:
        pages = None
        if "disk" in plan.tiers.values():
            beside = directory if directory.is_dir() else None
            pages = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pages-", dir=beside)))
        how = config.make_estimator().direction, config.make_rounding()
        stream = Stream(model.blocks, model.source, *how, plan, pages, format=model.format, fixed=True)
        stack.callback(stream.close)
        yield model.replace(stream)


def evaluate(target: str, overrides: Sequence[str] = (), *, best: bool = False) -> tuple[int, dict[str, float], str]:
    """(step, numbers by name, a line to print) of a run directory, or of a config's untrained model (step 0).

    For plain text the held-out loss in nats per token, for a task its metric on the evaluation examples.
    """
    config = load_config(target, overrides)
    is_run = (Path(target).expanduser() / "config.json").is_file()
    if best and not is_run:
        raise ConfigError(f"--best: {target} is a config, expected the directory of a run")
    if is_run and any(override.startswith(("model=", "dtype=")) for override in overrides):
        raise ConfigError(f"{target} is a run, whose model and dtype are its own: leave these overrides out")
    if is_run:
        step, model = trained_model(target, best=best)
    else:
        made = shaped(config.model, config.dtype) or load(config.model, dtype=config.dtype or None)
        step, model = 0, begun(config, made)
    data = prepare(config, model)
    with _placed(config, model, data) as placed:
        if data.evaluate is not None:
            evaluation = _evaluated(data, placed, Console(stderr=True))
            return step, evaluation.metrics, str(evaluation)
        loss = mean_loss(partial(forward, placed.visits(), placed.blocks), data.held_out)
    return step, {"loss": loss}, f"held-out loss {loss:.4f} {data.unit}"


def plot_losses(directory: str | Path, unit: str = "nats/token") -> Path:
    """Draws ``loss.png`` from a run's metrics.jsonl: the probes' loss, its running mean, and the held-out loss."""
    lines = read_metrics(directory)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    trained = [(x["step"], x["train/loss"]) for x in lines if x.get("train/loss") is not None]
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color="0.85", linewidth=0.6, label="probes, each step")
        axes.plot(steps, _running_mean(losses), color="C0", label="probes, running mean")
    held = [(x["step"], x["eval/loss"]) for x in lines if x.get("eval/loss") is not None]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="C3", markersize=3, label="held out")
        axes.set_title(f"held-out loss {held[0][1]:.3f} to {held[-1][1]:.3f} {unit}")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(directory).expanduser() / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _running_mean(values: tuple[float, ...]) -> list[float]:
    """Exponential mean over about 0.5 % of the values."""
    keep = 1 - 1 / max(2.0, len(values) / 200)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def _check(run: Run, config: Config, data: Prepared, console: Console) -> None:
    """Evaluates and saves where it is time to, unless that was done."""
    if run.steps_done % config.eval_every == 0 or run.steps_done == config.steps:
        if not run.evaluated:
            _report(console, run.steps_done, run.evaluate(data.held_out), data.unit)
        run.save()


def _waited(losses: Mapping[int, float | None], patience: int) -> bool:
    """Whether so many evaluations in a row found no lower loss than those before; a patience of 0 never ends.

    >>> [_waited({0: 3.0, 5: 2.0, 10: 2.5, 15: None}, patience) for patience in (0, 1, 2, 3)]
    [False, True, True, False]
    """
    found = [math.inf if loss is None or math.isnan(loss) else loss for _, loss in sorted(losses.items())]
    return bool(found) and 0 < patience <= len(found) - 1 - found.index(min(found))


def _report(console: Console, step: int, loss: float, unit: str) -> None:
    console.print(f"step {step:6d}  held-out loss {loss:.4f} {unit}")


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; the second interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def first(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
