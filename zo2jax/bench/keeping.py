"""``zo2jax bench replay | checkpoint``: what it costs to have a run's weights again, and to save them meanwhile."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import copy_rate, draw_rate
from zo2jax.bench.process import machine, memory
from zo2jax.bench.rates import floor_ms
from zo2jax.bench.throughput import WARM_UPS, Setting, running, timed_step
from zo2jax.directions import lowrank
from zo2jax.estimators import two_point
from zo2jax.journal import Recorded
from zo2jax.models.blocks import Params, owned_shapes
from zo2jax.models.model import Model
from zo2jax.replay import read_journal, replay
from zo2jax.weights import AT_A_TIME

_COPIED = {"gpu": 2**28}  # values of 16 bits: 0.5 GiB; elsewhere 0.125: no cache holds them
_DRAWN = {"gpu": 2**24}  # weights to draw z for, where there is a kernel
_SHORT = 8  # the shorter one of two replays has so many times fewer steps

REPLAY = (
    ("training, ms a step", ("ms",), 2),
    ("replay, ms a step / its share of training", ("replay_ms", "share"), 3),
    ("steps replayed a second", ("replayed_per_s",), 1),
    ("all of it, with base and hashes, s", ("replay_s",), 2),
    ("floor of the device's memory, ms a step", ("memory_ms",), 3),
    ("  of the generator", ("generator_ms",), 3),
    ("  replay / the higher one", ("floor_ratio",), 2),
    ("leaves with other bits than the run's", ("differing",), 0),
)
"""The lines of a replay's table, see `zo2jax.bench.report.figures_table`."""
CHECKPOINT = (
    ("step, ms", ("ms",), 1),
    ("  while a checkpoint is written: mean / most", ("during_ms", "most_ms"), 1),
    ("  steps in that time", ("during",), 0),
    ("  speed in that time / without", ("speed",), 3),
    ("checkpoint, s / GiB", ("checkpoint_s", "checkpoint_gib"), 2),
    ("peak device memory, GiB / more with it", ("peak_device_gib", "peak_device_gib_more"), 3),
    ("peak host memory, GiB / more with it", ("peak_host_gib", "peak_host_gib_more"), 3),
)
"""Those of a checkpoint's."""


def measure_replay(setting: Setting) -> dict[str, Any]:
    """Trains ``setting.steps`` steps, and replays their journal block by block on the device.

    Two replays of different lengths are timed, once all is compiled: their difference is what a step takes, without
    the reading and hashing of the base. One floor is a read and a write of the weights, at the rate of a copy, for as
    many steps as are taken at once, which with periods are those of one; the products that end a period of factored
    directions take less. The other one is that of dense directions: a draw of z for each weight and direction, by a
    kernel that reads the weights once for 64 of them. All bits are compared with the run's.

    >>> measure_replay(Setting("opt-tiny", steps=1))
    Traceback (most recent call last):
    ValueError: steps is 1, expected 2 or more, of which some are replayed alone
    """
    if setting.steps < 2:
        raise ValueError(f"steps is {setting.steps}, expected 2 or more, of which some are replayed alone")
    direction, refresh = setting.estimator.direction, setting.refresh or None
    if direction.rank:
        direction = lowrank(setting.rank, refresh=refresh)
    with running(setting, two_point(1e-3, direction=direction)) as (run, batch):
        found: dict[str, Any] = machine() | {"setting": asdict(setting), "parameters": run.model.parameter_count}
        found["ms"] = statistics.median([timed_step(run, batch) * 1e3 for _ in range(setting.steps)])
        run.flush()
        model, journal, short = setting.random_model, read_journal(run.directory), max(setting.steps // _SHORT, 1)
        if model.format is None:  # made once, so that the two times differ by steps alone
            model = model.replace(dict(model.source))
        _replayed(model, journal, short)
        times = {count: _replayed(model, journal, count) for count in (short, setting.steps)}
        found["replay_s"] = times[setting.steps]
        found["replay_ms"] = (times[setting.steps] - times[short]) / (setting.steps - short) * 1e3
        found["differing"] = _differing(replay(model, journal).source, run.model.source)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(owned_shapes(model.blocks)))
    copied = _COPIED.get(jax.default_backend(), 2**26)
    found["copy_gib_s"] = (rate := copy_rate(jnp.zeros(copied, jnp.bfloat16), calls=10)) / 2**30
    together = min(refresh or setting.steps, setting.steps) if direction.read_only else AT_A_TIME
    found["memory_ms"] = floor_ms(2 * nbytes, rate) / together
    found["draws_per_s"] = draws = draw_rate(
        jnp.zeros(_DRAWN.get(jax.default_backend(), 2**14), jnp.bfloat16), calls=10
    )
    found["generator_ms"] = 0.0 if direction.rank else run.model.parameter_count / draws * 1e3
    found |= {"share": found["replay_ms"] / found["ms"], "replayed_per_s": 1e3 / found["replay_ms"]}
    return found | {"floor_ratio": found["replay_ms"] / max(found["memory_ms"], found["generator_ms"])} | memory()


def _replayed(model: Model, journal: Recorded, count: int) -> float:
    """Seconds of a replay of so many steps."""
    start = time.perf_counter()
    source = replay(model, journal, step=count).source
    for name in source:
        jax.block_until_ready(source[name])
    return time.perf_counter() - start


def _differing(a: Mapping[str, Params], b: Mapping[str, Params]) -> int:
    """How many leaves are not the same, in any bit."""
    same = (
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for name in b
        for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True)
    )
    return sum(not equal for equal in same)


def measure_checkpoint(setting: Setting) -> dict[str, Any]:
    """Times steps before, during and after a checkpoint in the background; and what it adds to the peaks of memory.

    >>> measure_checkpoint(Setting("opt-tiny", tokens=4096))
    Traceback (most recent call last):
    ValueError: 4096 tokens do not fit the model's context of 2048: shorten them
    """
    with running(setting) as (run, batch):
        found: dict[str, Any] = machine() | {"setting": asdict(setting), "parameters": run.model.parameter_count}
        for _ in range((setting.period or 0) + WARM_UPS + 1):
            timed_step(run, batch)

        def times() -> list[float]:
            return [timed_step(run, batch) * 1e3 for _ in range(setting.steps)]

        before, peaks = times(), memory()
        start, during = time.perf_counter(), list[float]()
        run.save(wait=False)
        while run.saving:
            during.append(timed_step(run, batch) * 1e3)
        found["checkpoint_s"] = time.perf_counter() - start
        later = memory()
        files = [path.stat().st_size for path in (run.directory / "checkpoints").rglob("*") if path.is_file()]
        found |= {"checkpoint_gib": sum(files) / 2**30, "during": len(during)}
        found |= {"ms": statistics.median([*before, *times()]), "during_ms": statistics.mean(during)}
        found |= {"most_ms": max(during), "speed": found["ms"] / found["during_ms"]}
    for name, peak in later.items():
        found[name], old = peak, peaks[name]
        found[f"{name}_more"] = None if peak is None or old is None else peak - old
    return found
