"""Runs: resume to the same bits, metrics without gaps, checkpoints, and what happens when things go wrong."""

import gc
import itertools
import json
import resource
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo2jax as zo
from zo2jax.checkpoint import Snapshots
from zo2jax.metrics import Metrics, read_metrics
from zo2jax.tasks.text import HeldOut, TextBatches, load_text

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def setting(tiny_folder, text_file):
    model = zo.load(tiny_folder)
    text = load_text(model, str(text_file), tokens=16, batch=4)
    return model, TextBatches(text.train, batch=4, steps=200, seed=3), HeldOut(text.held_out, 4)


def make(setting, directory, *, dtype=None, **options):
    model = setting[0]
    if dtype is not None:
        model = zo.load(model.folder, dtype=dtype)
    options = {"key": jax.random.key(7)} | options
    return zo.Run(model, zo.two_point(1e-2), zo.sgd(1e-3, 0.01), directory=directory, **options)


def train(run, batches, until):
    for batch in run.remaining(batches):
        if run.steps_done >= until:
            break
        run.step(batch)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.model.params, b.model.params)
    for x, y in zip(a.state.opt_state[:1], b.state.opt_state[:1], strict=True):
        assert int(x) == int(y)
    assert int(a.state.step) == int(b.state.step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_reaches_the_same_bits(setting, tmp_path, dtype):
    """100 steps, stop, resume, 100 steps: the weights of 200 steps in a row."""
    _, batches, held_out = setting
    with make(setting, tmp_path / "whole", dtype=dtype) as whole:
        train(whole, batches, 200)
    with make(setting, tmp_path / "parts", dtype=dtype) as first:
        train(first, batches, 100)
        first.evaluate(held_out)
        first.save()
        start = zo.load(setting[0].folder, dtype=dtype).params["embed"]["weight"]
        moved = np.mean(np.asarray(first.model.params["embed"]["weight"]) != np.asarray(start))
        assert moved > 0.5
    with make(setting, tmp_path / "parts", dtype=dtype) as second:
        assert second.steps_done == 100
        train(second, batches, 200)
        assert_same(whole, second)
    steps = [line["step"] for line in read_metrics(tmp_path / "parts") if "train/loss" in line]
    assert steps == list(range(1, 201))


def test_metrics_have_each_step_once(setting, tmp_path):
    """Whatever the file lacks of the journal's steps, or has of later ones."""
    _, batches, _ = setting
    with make(setting, tmp_path) as run:
        train(run, batches, 10)
        run.save()
        train(run, batches, 15)  # no checkpoint, but in the journal
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    torn = '{"step": 16, "train/loss": 3.0}\n{"step": 17, "train/lo'  # killed while writing
    (tmp_path / "metrics.jsonl").write_text("".join(kept[:13]) + torn)
    with make(setting, tmp_path) as run:
        assert run.steps_done == 15
        again = read_metrics(tmp_path)
        for line, old in zip(again, map(json.loads, kept), strict=True):
            assert line.items() <= old.items()
        train(run, batches, 20)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    trained = {"step", "train/loss", "train/projected_gradient", "tokens_per_second"}
    assert set(lines[0]) - {"memory/device_peak"} == trained | {"memory/host_peak"}
    assert all(isinstance(line["train/projected_gradient"], float) for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_is_the_step_of_mezo(setting, tmp_path, dtype):
    """Given the same coefficients the weights of the bare step, to the bit; and nearly the same losses."""
    _, batches, _ = setting
    model = zo.load(setting[0].folder, dtype=dtype)
    algorithm = zo.mezo(model.loss, zo.two_point(1e-2), zo.sgd(1e-3, 0.01))
    state, step = algorithm.init(model.params, jax.random.key(7)), jax.jit(algorithm.step)
    with make(setting, tmp_path, dtype=dtype) as run:
        for batch in itertools.islice(batches, 10):
            info = run.step(batch)
            _, bare = step(state, batch)
            np.testing.assert_allclose(info.loss, bare.loss, rtol=1e-6 if dtype == "float32" else 1e-2)
            moved = zo.apply_update(state.params, info.update, state.leaf_ids)
            state = state._replace(params=moved, step=state.step + 1)
        jax.tree.map(np.testing.assert_array_equal, run.model.params, state.params)
    assert np.mean(np.asarray(state.params["embed"]["weight"]) != np.asarray(model.params["embed"]["weight"])) > 0.5


def test_looking_at_a_run_changes_nothing(setting, tmp_path):
    """Updates wait for the next step; whoever looks sees them applied, and the run goes on as if nobody had."""
    _, batches, held_out = setting
    with make(setting, tmp_path / "a") as quiet, make(setting, tmp_path / "b") as watched:
        for batch in itertools.islice(batches, 6):
            quiet.step(batch)
            before = watched.evaluate(held_out)
            model = jax.tree.map(np.array, watched.model.params)
            update = watched.step(batch).update
            ids = watched.state.leaf_ids
            moved = zo.apply_update(jax.tree.map(jnp.asarray, model), update, ids)
            jax.tree.map(np.testing.assert_array_equal, watched.model.params, moved)
            assert watched.evaluate(held_out) != before
        assert_same(quiet, watched)


@pytest.mark.parametrize("broken", [{"ids": np.ones((2, 3), np.float32)}, {"ids": np.ones((2, 3), np.int32)}])
def test_a_batch_that_does_not_fit_costs_nothing(setting, tmp_path, broken):
    """Float ids fail in the first block, missing targets after the last: the run goes on as if nothing had happened."""
    _, batches, _ = setting
    with make(setting, tmp_path / "a") as quiet, make(setting, tmp_path / "b") as troubled:
        for batch in itertools.islice(batches, 3):
            quiet.step(batch)
            troubled.step(batch)
            with pytest.raises(Exception):  # noqa: B017 (whatever JAX says)
                troubled.step(broken)
        assert_same(quiet, troubled)


def test_averaged_and_tied_and_masked(tiny_folder, tmp_path):
    """Several directions, a tied head, padded rows: the run against the plain step."""
    model = zo.load(tiny_folder)
    assert model.blocks[-1].aliases
    rng = np.random.default_rng(5)
    ids = rng.integers(1, 100, (3, 12)).astype(np.int32)
    batch = {"ids": ids, "targets": np.roll(ids, -1, 1), "lengths": np.array([12, 1, 7], np.int32)}
    estimator = zo.averaged(zo.two_point(1e-2, direction=zo.rademacher), 3)
    algorithm = zo.mezo(model.loss, estimator, zo.sgd(1e-2))
    state = algorithm.init(model.params, jax.random.key(1))
    with zo.Run(model, estimator, zo.sgd(1e-2), directory=tmp_path, key=jax.random.key(1)) as run:
        info = run.step(batch)
        _, bare = algorithm.step(state, batch)
        np.testing.assert_allclose(info.projected_gradient, bare.projected_gradient, rtol=1e-2, atol=1e-3)
        moved = zo.apply_update(model.params, info.update, state.leaf_ids, direction=zo.rademacher)
        jax.tree.map(np.testing.assert_array_equal, run.model.params, moved)


def test_the_callers_model_is_left_alone(setting, tmp_path):
    model, batches, _ = setting
    before = jax.tree.map(np.array, model.params)
    with make(setting, tmp_path) as run:
        train(run, batches, 3)
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


def test_the_untrained_weights_are_let_go(tiny_folder, setting, tmp_path):
    """A step holds the weights and one probe; the model that the run started from must not stay beside them."""
    model = zo.load(tiny_folder)
    leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(model.params)]
    with zo.Run(model, zo.two_point(1e-2), zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(0)) as run:
        del model
        run.step(setting[1][0])
        gc.collect()
        assert not [leaf for leaf in leaves if leaf() is not None]


def test_remaining_goes_on_in_any_iterable(setting, tmp_path):
    _, batches, _ = setting
    with make(setting, tmp_path) as run:
        train(run, batches, 4)
        rest = list(run.remaining(iter([batches[i] for i in range(6)])))
        np.testing.assert_array_equal([b["ids"] for b in rest], [batches[i]["ids"] for i in (4, 5)])
        assert len(list(run.remaining(batches[:6]))) == 2


def test_best_and_last_are_kept(setting, tmp_path):
    _, batches, held_out = setting
    with make(setting, tmp_path) as run:
        losses = {}
        for until in (2, 4, 6, 8):
            train(run, batches, until)
            losses[until] = run.evaluate(held_out)
            run.save()
        train(run, batches, 9)
        run.save()  # without an evaluation
    best = min(losses, key=losses.get)
    snapshots = Snapshots(tmp_path / "checkpoints")
    assert (snapshots.best, snapshots.last) == (best, 9)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == sorted({best, 9})
    snapshots.close()


def test_evaluate_is_the_mean_over_tokens(setting, tmp_path):
    model, _, held_out = setting
    with make(setting, tmp_path) as run:
        loss = run.evaluate(held_out)
        total, count = 0.0, 0
        for row in held_out.rows:
            logits = np.asarray(model.logits(row[None, :-1]), np.float64)[0]
            total -= sum(
                x[t] - np.log(np.exp(x - x.max()).sum()) - x.max() for x, t in zip(logits, row[1:], strict=True)
            )
            count += len(row) - 1
        assert loss == pytest.approx(total / count, rel=1e-5)
        with pytest.raises(ValueError, match="no batches"):
            run.evaluate([])
    assert read_metrics(tmp_path) == [{"step": 0, "eval/loss": loss}]


def nan_setting(setting):
    """The same, with a weight that makes every loss NaN."""
    model = setting[0]
    params = jax.tree.map(lambda w: w, model.params)
    params["head"]["norm"]["weight"] = jnp.full_like(params["head"]["norm"]["weight"], jnp.nan)
    return (model.replace(params), *setting[1:])


@pytest.mark.parametrize("max_skipped", [1, 3])
def test_losses_that_are_not_finite_stop_the_run(setting, tmp_path, max_skipped):
    _, batches, _ = setting
    with make(nan_setting(setting), tmp_path, max_skipped=max_skipped) as run:
        with pytest.raises(zo.NonFiniteLoss, match=rf"in {max_skipped} steps in a row.* changed no weights"):
            train(run, batches, 100)
        run.save()  # nothing is lost
        assert Snapshots(tmp_path / "checkpoints").last == run.steps_done == max_skipped + 1
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, max_skipped + 2))
    assert all(line["train/loss"] is None and line["train/skipped"] is True for line in lines)


def test_evaluation_before_the_first_checkpoint_stands_once(setting, tmp_path):
    for _ in range(2):  # the first is killed before it saved anything
        with make(setting, tmp_path) as run:
            run.evaluate(setting[2])
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("option", [{"key": jax.random.key(8)}, {"rounding": zo.nearest}])
def test_another_run_in_the_directory_is_refused(setting, tmp_path, option):
    with make(setting, tmp_path) as run:
        train(run, setting[1], 2)
        run.save()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=next(iter(option))):
        make(setting, tmp_path, **option)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_optimizer_is_refused(setting, tmp_path):
    def start(optimizer, **options):
        return zo.Run(setting[0], zo.two_point(1e-2), optimizer, directory=tmp_path, key=jax.random.key(7), **options)

    with start(zo.sgd(1e-3)) as run:
        run.step(setting[1][0])
        run.save()
    with pytest.raises(ValueError, match=r"optimizer: sgd\(0\.001, weight_decay=0\.0\) there, sgd\(0\.1,"):
        start(zo.sgd(0.1))
    with pytest.raises(ValueError, match=r"journal is of another run \(optimizer: sgd.* there, optax here\)"):
        start(optax.sgd(1e-3))


def test_only_named_keys_may_grow(setting, tmp_path):
    make(setting, tmp_path, config={"steps": 10, "seed": 0}, may_grow=("steps",)).close()
    make(setting, tmp_path, config={"steps": 20, "seed": 0}, may_grow=("steps",)).close()
    with pytest.raises(ValueError, match="steps: 20 there, 10 now"):
        make(setting, tmp_path, config={"steps": 10, "seed": 0}, may_grow=("steps",))
    with pytest.raises(ValueError, match=r"batch: None there, 4 now; seed: 0 there, 1 now.*Only steps may grow"):
        make(setting, tmp_path, config={"steps": 20, "seed": 1, "batch": 4}, may_grow=("steps",))
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 20, "seed": 0}


def test_a_damaged_config_is_refused(setting, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        make(setting, tmp_path)


def test_a_directory_that_cannot_be_made(setting, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        make(setting, tmp_path / "file" / "run")


def test_export_holds_the_trained_weights(setting, tmp_path):
    with make(setting, tmp_path / "run") as run:
        train(run, setting[1], 5)
        run.export(tmp_path / "exported")
        exported = zo.load(tmp_path / "exported")
        jax.tree.map(np.testing.assert_array_equal, exported.params, run.model.params)
    assert Path(tmp_path / "exported" / "tokenizer.json").is_file()


def test_a_line_that_does_not_fit_the_disk_leaves_nothing(tmp_path):
    metrics, file = Metrics(tmp_path, -1), tmp_path / "metrics.jsonl"
    metrics.write({"step": 1, "train/loss": 2.0})
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))  # Python ignores the signal
    try:
        for _ in range(2):
            with pytest.raises(OSError):
                metrics.write({"step": 2, "train/loss": 1.0})
            assert file.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.write({"step": 2, "train/loss": 1.0})
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_metrics_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path)
