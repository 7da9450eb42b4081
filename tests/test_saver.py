"""Checkpoints in the background: training goes on, and no bit of it is another one."""

import gc
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import batches, kept, model_of, opened

import zo2jax as zo
from zo2jax import saver
from zo2jax.checkpoint import Snapshots
from zo2jax.journal import JournalError
from zo2jax.kept import Kept
from zo2jax.metrics import read_metrics
from zo2jax.replay import read_journal
from zo2jax.restored import Restored

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow
DATA = batches()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Slow:
    """Snapshots that write one block each time that they are allowed to."""

    def __init__(self, monkeypatch):
        self.turns, self.written, write = threading.Semaphore(0), threading.Semaphore(0), Snapshots._write

        def slowly(snapshots, folder, leaves):
            if threading.current_thread() is not threading.main_thread() and folder.parent.name == "blocks":
                self.turns.acquire()
                write(snapshots, folder, leaves)
                self.written.release()
            else:
                write(snapshots, folder, leaves)

        monkeypatch.setattr(Snapshots, "_write", slowly)

    def write(self, count):
        for _ in range(count):
            self.turns.release()
            self.written.acquire()


def wait(run):
    """Until the writer has taken what it was given; so each step hands over a block."""
    background = run._saver._background
    while background is not None and background.is_alive() and (background._handed.full() or background._ended):
        background.join(0.01)


def train(run, steps):
    for batch in run.remaining(DATA[:steps]):
        run.step(batch)


@pytest.mark.parametrize(
    "setting",
    ["dense", *(pytest.param(x, marks=SLOW) for x in ("codes", "disk", "momentum", "factors", "lora", "frozen"))],
)
def test_blocks_of_several_steps_become_those_of_one(setting, tmp_path, monkeypatch):
    """Of each period's beginning, middle and end; resumed, and looked at, at any later step."""
    with opened(setting, tmp_path / "straight") as run:
        train(run, 40)
        whole = kept(run)
    slow = Slow(monkeypatch)
    with opened(setting, tmp_path / "run") as run:
        entries = 2 if run._kept.direction.read_only else 1
        train(run, 6)
        run.save(wait=False)
        for _ in run._stream:
            for batch in run.remaining(DATA[: run.steps_done + 3]):
                run.step(batch)
            slow.write(entries)
        train(run, run.steps_done + 1)
        background = run._saver._background
        background.join()
        assert background.error is None and run._files.snapshots.last == 6
        steps = run._files.snapshots.steps(6).of
        assert list(steps) == list(run._stream) and sorted(set(steps.values())) == sorted(steps.values())
        train(run, 23)
        weights = jax.tree.map(np.asarray, dict(run.model.source))
    snapshots = Snapshots(tmp_path / "run" / "checkpoints")
    restored = Restored(model_of(setting), run._kept, snapshots, 6, read_journal(tmp_path / "run"))
    assert_same({name: restored.arrays(name, 23) for name in weights}, weights)
    snapshots.close()
    with opened(setting, tmp_path / "run") as run:
        assert run.steps_done == 23
        train(run, 40)
        assert_same(kept(run), whole)


def test_it_is_given_up_when_the_run_ends_or_saves(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with opened("dense", tmp_path) as run:
        train(run, 3)
        run.save(wait=False)
        train(run, 5)
        slow.turns.release(9)
        run.save()
        assert (run._files.snapshots.last, run._files.snapshots.steps(5).of) == (5, {})
        assert not run.saving
        run.save(wait=False)
        train(run, 8)
        slow.turns.release(9)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5"]
    assert not [thread for thread in threading.enumerate() if thread.name == "zo2jax-saver"]
    with opened("dense", tmp_path) as run:
        assert run.steps_done == 8


def test_one_follows_the_other_so_that_a_replay_is_short(tmp_path, monkeypatch):
    """By a clock that is ours: 10 seconds a step."""
    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    model, options = model_of("dense"), {"directory": tmp_path, "key": jax.random.key(5), "replay_within": 100.0}
    begun = []
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options) as run:
        for batch in DATA[:60]:
            run.step(batch)
            now[0] += 10
            background = run._saver._background
            if background is not None and background not in begun:
                begun.append(background)
            wait(run)
        assert run._files.snapshots.last >= 50
    steps = [int(background._state.step) for background in begun]
    assert steps[0] == 10 and len(steps) > 5 and max(np.diff(steps)) <= 10
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options | {"replay_within": float("inf")}) as run:
        train(run, 80)
        assert run._saver._background is None


def test_a_full_disk_stops_the_next_step_and_costs_none(tmp_path, monkeypatch):
    write = Snapshots._write

    def full(snapshots, folder, leaves):
        if folder.name == "layers.0.mlp":
            raise OSError(28, "No space left on device")
        write(snapshots, folder, leaves)

    monkeypatch.setattr(Snapshots, "_write", full)
    with opened("dense", tmp_path) as run:
        train(run, 2)
        run.save(wait=False)
        with pytest.raises(OSError, match=r"no snapshot could be written in .*checkpoints .*No space left"):
            for batch in run.remaining(DATA):
                before = run.steps_done
                run.step(batch)
                run._saver._background and run._saver._background.join(0.2)
        assert run.steps_done == before and run._saver._background is None
        monkeypatch.undo()
        train(run, before + 3)
        assert list((tmp_path / "checkpoints").iterdir()) == []
        found = kept(run)
    with opened("dense", tmp_path / "straight") as run:
        train(run, before + 3)
        assert_same(found, kept(run))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of 12 steps whose checkpoint has blocks of several steps."""
    folder = tmp_path_factory.mktemp("mixed")
    with opened("dense", folder) as run:
        train(run, 2)
        run.save(wait=False)
        for batch in run.remaining(DATA[:12]):
            run.step(batch)
            wait(run)
        assert run._files.snapshots.steps(2).of
    return folder


STEPS = "checkpoints/2/blocks/steps.json"


def cut(folder):
    data = (folder / "journal").read_bytes()
    (folder / "journal").write_bytes(data[: -21 * 8])


DAMAGES = {
    "short": (cut, JournalError, "has a checkpoint of step 2, but its journal ends at step 4: put .* back from a copy"),
    "gone": (
        lambda folder: (folder / "checkpoints/2/blocks/steps.json").unlink(),
        ValueError,
        "steps.json is missing: .*move .*journal alone",
    ),
    "empty": (lambda folder: (folder / "checkpoints/2/blocks/steps.json").write_text(""), ValueError, "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_cannot_be_restored_is_refused(case, mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "run")
    damage, error, message = DAMAGES[case]
    damage(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        opened("dense", tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def model_with_still_blocks():
    rng = np.random.default_rng(0)
    parts = [
        (lambda p, batch: batch["x"] @ p["w"], {"w": rng.normal(size=(6, 8)).astype(np.float32)}),
        (lambda p, x: jnp.maximum(x, 0), {}),
        (lambda p, x: x[:, p["order"]], {"order": np.arange(8, dtype=np.int32)[::-1].copy()}),
        (lambda p, x: x * p["scale"], {"scale": np.ones(8, np.float32)}),
        (lambda p, x: x @ p["w"], {"w": rng.normal(size=(8, 2)).astype(np.float32)}),
    ]
    return zo.blocks(parts, loss=lambda y, batch: jnp.mean((y - batch["t"]) ** 2))


SMALL = {"x": np.ones((3, 6), np.float32), "t": np.zeros((3, 2), np.float32)}


def small_run(folder, **options):
    estimator = zo.two_point(1e-3, direction=options.pop("direction", zo.normal))
    optimizer = options.pop("optimizer", zo.sgd(1e-2))
    return zo.Run(model_with_still_blocks(), estimator, optimizer, directory=folder, key=jax.random.key(2), **options)


MOMENTUM = {"direction": zo.lowrank(2, refresh=4), "optimizer": zo.sgd(1e-2, momentum=0.9)}


@pytest.mark.parametrize("options", [{}, MOMENTUM], ids=["dense", "momentum"])
def test_blocks_of_each_step_and_some_that_nothing_moves_in(options, tmp_path):
    """The last one is taken where a period has just begun, and momentum been turned."""
    with small_run(tmp_path / "straight", **options) as run:
        for _ in range(20):
            run.step(SMALL)
        whole = kept(run)
    with small_run(tmp_path / "run", **options) as run:
        run.save(wait=False)
        while run.saving:
            run.step(SMALL)
            wait(run)
        assert run._files.snapshots.steps(0).of == {str(i): i for i in range(5)}
    with small_run(tmp_path / "run", **options) as run:
        for _ in range(run.steps_done, 20):
            run.step(SMALL)
        assert_same(kept(run), whole)
        expected = jax.tree.map(np.asarray, dict(run.model.source))
    assert_same(dict(zo.replay(model_with_still_blocks(), tmp_path / "run").source), expected)


def test_a_copy_that_fails_leaves_no_block_out(tmp_path, monkeypatch):
    failures = iter([False, False, True, *[False] * 99])
    entries_of = Kept.entries_of

    def failing(self, stream, block):
        if next(failures):
            raise MemoryError
        return entries_of(self, stream, block)

    monkeypatch.setattr(Kept, "entries_of", failing)
    with small_run(tmp_path) as run:
        run.step(SMALL)
        run.save(wait=False)
        with pytest.raises(MemoryError):
            for _ in range(60):
                run.step(SMALL)
                time.sleep(0.02)
        while run.saving:
            run.step(SMALL)
            time.sleep(0.05)
        assert set(run._files.snapshots.steps(1).of) == {"0", "1", "2", "3", "4"}
        found = kept(run)
    with small_run(tmp_path) as run:
        assert_same(kept(run), found)
    steps = [line["step"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert steps == list(range(1, int(found[2]) + 1))


def test_what_was_saved_after_a_period_had_begun(tmp_path):
    """A step that failed had taken the updates of the last period, and turned the momentum into the next one's."""
    with small_run(tmp_path / "straight", **MOMENTUM) as run:
        for _ in range(8):
            run.step(SMALL)
        whole = kept(run)
    with small_run(tmp_path / "run", **MOMENTUM) as run:
        for _ in range(4):
            run.step(SMALL)
        with pytest.raises(TypeError):
            run.step(SMALL | {"x": np.ones((3, 7), np.float32)})
        run.save()
    with small_run(tmp_path / "run", **MOMENTUM) as run:
        for _ in range(4):
            run.step(SMALL)
        assert_same(kept(run), whole)


def test_one_can_be_asked_for_when_the_last_is_done(tmp_path):
    with small_run(tmp_path) as run:
        for _ in range(2):
            run.save(wait=False)
            assert run.saving
            while run.saving:
                run.step(SMALL)
                time.sleep(0.05)
        assert run._files.snapshots.last > 0
        run.save(wait=False)
        run.save()
        assert not run.saving


def test_a_run_that_nobody_closes_leaves_no_thread(tmp_path):
    run = small_run(tmp_path)
    run.save(wait=False)
    run.step(SMALL)
    background = run._saver._background
    assert background.is_alive()
    del run
    gc.collect()
    background.join(10)
    assert not background.is_alive()
