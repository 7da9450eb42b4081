"""A run that kills itself: ``python killing.py SETTING DIRECTORY WHERE NUMBER`` (see `main`)."""

import os
import signal
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from families import optimization

import zo2jax as zo
from zo2jax.checkpoint import Snapshots
from zo2jax.masters import Masters
from zo2jax.models.llama import LlamaConfig

STEPS, SAVE_EVERY = 200, 40
NAMES = ("embed", "layers.0.attn", "layers.0.mlp", "head")
SHAPE = {"vocabulary": 67, "size": 32, "hidden": 40, "layers": 1, "heads": 4, "kv_heads": 2, "head_size": 8}
MODEL = LlamaConfig(**SHAPE, context=64, tied=False)
RATE = optax.linear_schedule(1e-2, 1e-3, STEPS)
# name -> (dtype, format, direction, optimizer, rounding, tier)
SETTINGS = {
    "dense": (jnp.bfloat16, None, zo.normal, zo.meazo(RATE, 0.1), zo.stochastic, "device"),
    "disk": (jnp.float32, None, zo.rademacher, zo.sgd(RATE, 0.1), zo.stochastic, "disk"),
    "codes": (jnp.bfloat16, zo.int8(), zo.dense("normal", refresh=4), zo.sgd(RATE, 0.1), zo.stochastic, "host"),
    "momentum": (jnp.bfloat16, None, zo.lowrank(2, refresh=7), zo.sgd(RATE, momentum=0.9), zo.residual, "host"),
    "factors": (jnp.float32, zo.int4(), zo.lowrank(2, refresh=9), zo.sgd(RATE, 0.1), zo.stochastic, "disk"),
    "lora": (jnp.float32, None, zo.lora(3, targets=("*.attn.q.*",)), zo.sgd(RATE, 0.1), zo.stochastic, "device"),
    "hybrid": (jnp.bfloat16, zo.int8(), zo.lowrank(2, refresh=7), zo.sgd(RATE, 0.1), zo.stochastic, "host"),
    "frozen": (jnp.bfloat16, zo.int8(), zo.lowrank(2, refresh=None), zo.sgd(RATE, 0.1), zo.stochastic, "device"),
}


def batches():
    rng = np.random.default_rng(3)
    found = []
    for step in range(STEPS):
        ids = rng.integers(0, 67, (2, 12)).astype(np.int32)
        weights = np.full(ids.shape, np.nan if step % 50 == 20 else 1, np.float32)  # some steps are skipped
        found.append({"ids": ids, "targets": np.roll(ids, -1, 1), "weights": weights})
    return found


def model_of(setting, key=1):
    return MODEL.init(jax.random.key(key), SETTINGS[setting][0]).with_format(SETTINGS[setting][1])


def opened(setting, directory):
    _, _, direction, optimizer, rounding, tier = SETTINGS[setting]
    plan = zo.Plan() if tier == "device" else zo.Plan(dict.fromkeys(NAMES, tier))
    options = {"directory": directory, "key": jax.random.key(5), "plan": plan, "rounding": rounding}
    if setting == "hybrid":
        options["hybrid"] = zo.hybrid(first_order=zo.last_blocks(2), optimizer=optax.adamw(1e-3))
    return zo.Run(model_of(setting), zo.two_point(1e-3, direction=direction), optimizer, **options)


def kept(run):
    """All that a run keeps, as arrays."""
    run.flush()
    entries = dict(run._kept.entries(run._stream)), run._whole.opt_state, run._state.step
    return jax.tree.map(np.asarray, entries)


def go(run, until=STEPS):
    """Steps, with a checkpoint now and then; gives all that the run keeps, as arrays."""
    data = batches()
    for batch in run.remaining(data[:until]):
        run.step(batch)
        if run.steps_done % SAVE_EVERY == SAVE_EVERY // 8:
            run.save(wait=False)
        if run.steps_done % SAVE_EVERY == 0:
            run.evaluate(data[:1])
            run.save()
    return kept(run)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def main(setting, directory, where, number):
    """Goes on until it is killed.

    ``where`` is "time", ``number`` ms after the first step; or in the ``number``-th call of a kind: "journal" or
    "page", a write of which half is done; "snapshot", "background" (a snapshot there) or "fold", of a block.
    """
    calls = 0

    def at(real, half=None):
        def called(*arguments, **options):
            nonlocal calls
            background = threading.current_thread().name == "zo2jax-saver"
            calls += where not in ("snapshot", "background") or background == (where == "background")
            if calls == number:
                if half is not None:
                    half(real, *arguments)
                kill()
            return real(*arguments, **options)

        return called

    if where == "journal":
        os.pwrite = at(os.pwrite, lambda write, file, data, offset: write(file, data[: len(data) // 2], offset))
    if where == "page":
        half = lambda write, file, parts, at: write(file, [parts[0][: len(parts[0]) // 2]], at)  # noqa: E731
        os.pwritev = at(os.pwritev, half)
    if where in ("snapshot", "background"):
        Snapshots._write = at(Snapshots._write)
    if where == "fold":
        Masters.fold = at(Masters.fold)
    with optimization(False), opened(setting, directory) as run:
        run.step(next(run.remaining(batches())))
        if where == "time":
            threading.Timer(number / 1000, kill).start()
        go(run)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
