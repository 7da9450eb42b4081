"""Checkpoints in the background: training goes on, and no bit of it is another one."""

import shutil
import threading

import jax
import numpy as np
import pytest
from killing import batches, model_of, opened

import zo2jax as zo
from zo2jax import saver
from zo2jax.checkpoint import Snapshots
from zo2jax.journal import JournalError
from zo2jax.kept import Kept
from zo2jax.restored import Restored

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow
DATA = batches()


def kept(run):
    """All that a run keeps, as arrays."""
    run.flush()
    entries = dict(run._kept.entries(run._stream)), run._state.opt_state, run._state.step
    return jax.tree.map(np.asarray, entries)


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


def train(run, steps):
    for batch in run.remaining(DATA[:steps]):
        run.step(batch)


@pytest.mark.parametrize(
    "setting",
    ["dense", "codes", *(pytest.param(x, marks=SLOW) for x in ("disk", "momentum", "factors", "lora", "frozen"))],
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
        assert (background.error, background.given_up) == (None, False)
        assert run._files.snapshots.last == 6
        steps = run._files.snapshots.steps(6)
        assert list(steps) == list(run._stream) and sorted(set(steps.values())) == sorted(steps.values())
        train(run, 23)
        at = {23: jax.tree.map(np.asarray, dict(run.model.source))}
    snapshots = Snapshots(tmp_path / "run" / "checkpoints")
    estimator, _, rounding = run._estimator, run._optimizer, run._kept.rounding
    journal = zo.replay.__globals__["read_journal"](tmp_path / "run")
    model = model_of(setting)
    restored = Restored(model, Kept.of(model, estimator, run._optimizer, rounding), snapshots, 6, journal)
    for step, weights in at.items():
        assert_same({name: restored.arrays(name, step) for name in weights}, weights)
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
        assert (run._files.snapshots.last, run._files.snapshots.steps(5)) == (5, {})
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
            if (background := run._saver._background) is not None:
                if not begun or begun[-1] is not background:
                    begun.append(background)
                while background.is_alive() and (background._handed.full() or background._ended):
                    background.join(0.01)
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
            background = run._saver._background
            while background is not None and background.is_alive() and (background._handed.full() or background._ended):
                background.join(0.01)
        assert run._files.snapshots.steps(2)
    return folder


def cut(folder):
    data = (folder / "journal").read_bytes()
    (folder / "journal").write_bytes(data[: -21 * 8])


DAMAGES = {
    "short": (cut, JournalError, "has a checkpoint of step 2, but its journal ends at step 4: put .* back from a copy"),
    "gone": (lambda folder: (folder / "checkpoints/2/blocks/steps.json").unlink(), ValueError, "steps.json is damaged"),
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
