"""Hybrid runs: the gradient of the tail, what moves by it and what does not, and how such a run goes on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from killing import SAVE_EVERY, go, kept, opened
from test_stream import FAMILIES, PLANS

import zo2jax as zo
from zo2jax import cli, visits
from zo2jax.config import ConfigError, load_config
from zo2jax.directions import leaf_ids
from zo2jax.header import Header
from zo2jax.hybrid import split
from zo2jax.metrics import read_metrics
from zo2jax.models.blocks import get_leaf, set_leaf
from zo2jax.models.hub import load
from zo2jax.pages import flat
from zo2jax.replay import read_journal
from zo2jax.trained import trained_model
from zo2jax.updates import perturb

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow
MIXED = ("layers.1.attn.q.*", "layers.1.mlp.norm.*")


def batches(count, candidates=False):
    """With unequal numbers of targets; or of examples with three candidates, of which one is none."""
    rng, found = np.random.default_rng(3), []
    for _ in range(count):
        ids = rng.integers(0, 67, (3, 12)).astype(np.int32)
        weights = (rng.random(ids.shape) < rng.uniform(0.3, 1)).astype(np.float32)
        batch = {"ids": ids, "targets": np.roll(ids, -1, 1), "weights": weights}
        if candidates:
            weights = weights.reshape(3, 3, 4)
            weights[:, 2] = 0
            batch |= {"weights": weights, "labels": np.array([0, 1, 0], np.int32)}
        found.append(batch)
    return found


def recorded(then):
    """An optimizer that has the last gradient in its state, before another one's."""
    zeros = lambda leaves: jax.tree.map(jnp.zeros_like, leaves)  # noqa: E731
    return optax.chain(optax.GradientTransformation(zeros, lambda g, state, params=None: (g, g)), then)


def hybrid(first_order, optimizer=None):
    return zo.hybrid(first_order=first_order, optimizer=optimizer or recorded(optax.adamw(1e-2)))


def arrays(weights):
    return {name: jax.tree.map(np.asarray, weights[name]) for name in weights}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def names_of(tree):
    return {f"{block}.{name}" for block, leaves in tree.items() for name in flat(leaves)}


def of_last(model, count):
    """Names of the leaves that the last blocks own."""
    blocks = [block.name for block in model.blocks[-count:]]
    return {name for name in names_of(arrays(model.source)) if name.startswith(tuple(f"{b}." for b in blocks))}


CASES = [
    ("llama", True, 3, zo.normal, {}),
    ("opt", False, 2, zo.lowrank(2, refresh=2), {"parts": 2, "probe_batch": 1}),
    ("llama", True, MIXED, zo.normal, {"parts": 2}),
    ("llama", True, MIXED, zo.lowrank(2), {"candidates": True}),
    pytest.param("qwen3", False, 1, zo.rademacher, {"probe_batch": 3, "parts": 2}, marks=SLOW),
    pytest.param("qwen3", True, 4, zo.lora(2), {"parts": 2}, marks=SLOW),
]


@pytest.mark.parametrize(("family", "tied", "tail", "direction", "how"), CASES)
def test_the_gradient_is_that_of_the_whole_plain_loss(family, tied, tail, direction, how, tmp_path):
    """Float32, at every member of the population; then optax moves the leaves by it."""
    model = FAMILIES[family](tied).init(jax.random.key(1))
    first_order = tail if isinstance(tail, tuple) else zo.last_blocks(tail)
    estimator, given = zo.averaged(zo.two_point(1e-2, direction=direction), 2), hybrid(first_order)
    data = batches(how.get("parts", 1), how.get("candidates", False))
    plan = zo.Plan(dict.fromkeys(model.source, "host"), probe_batch=how.get("probe_batch"))
    options = {"directory": tmp_path, "key": jax.random.key(5), "plan": plan, "hybrid": given}
    with zo.Run(model, estimator, zo.sgd(1e-3), **options) as run:
        before = arrays(run.model.source)
        info = run.step(data)
        (gradient, _), leaves = run.state.opt_state[1].opt_state, run.state.opt_state[1].leaves
        after = arrays(run.model.source)
    expected_names = {n for n in names_of(before) if n.startswith(("layers.1.attn.q.", "layers.1.mlp.norm."))}
    assert names_of(leaves) == (expected_names if tail == MIXED else of_last(model, tail))

    chosen = split(model, estimator, given)
    ids = jnp.asarray(leaf_ids(model.params))

    def mean(leaves, row):
        params = jax.tree.map(lambda x: x, model.params)
        if direction.adapter is None:
            params = perturb(params, info.update.keys, row, ids, direction=chosen.estimator.direction)
        for block, own in leaves.items():
            for name, leaf in flat(own).items():
                set_leaf(params[block], name, leaf)
        sums = [model.loss_sum(params, batch) for batch in data]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    start = {block: jax.tree.map(jnp.asarray, before[block]) for block in leaves}
    start = {
        block: jax.tree.map(lambda x: x, _only(start[block], names_of({block: leaves[block]}), block))
        for block in leaves
    }
    found = [jax.jit(jax.value_and_grad(mean))(start, row) for row in jnp.asarray(chosen.estimator.probes)]
    if direction.adapter is None:  # adapters are no leaves of the plain model
        np.testing.assert_allclose(info.losses, [loss for loss, _ in found], rtol=1e-6)
        expected = jax.tree.map(lambda *x: sum(x) / len(x), *[g for _, g in found])
        for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(x - y) < 2e-6 * np.linalg.norm(y)
    adamw = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        moved = optax.apply_updates(start, adamw.update(gradient, adamw.init(start), start)[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), moved, leaves)
    assert all(
        np.array_equal(get_leaf(after, name), get_leaf(leaves, name)) for name in names_of(leaves)
    )  # what a run shows has them
    changed = {n for n in names_of(after) if not np.array_equal(get_leaf(after, n), get_leaf(before, n))}
    others = {n for n in names_of(after) - names_of(leaves) if direction.trains(n, np.ndim(get_leaf(after, n)))}
    assert changed == names_of(leaves) | others


def _only(leaves, names, block):
    kept = {}
    for name, leaf in flat(leaves).items():
        if f"{block}.{name}" in names:
            set_leaf(kept, name, leaf)
    return kept


TIERS = [
    ("llama", True, "bfloat16", zo.normal, zo.last_blocks(3), "mixed"),
    ("opt", False, "float32", zo.lowrank(2, refresh=2), ("layers.1.mlp.*", "head.norm.*"), "disk"),
    pytest.param("llama", False, "bfloat16", zo.rademacher, MIXED, "host", marks=SLOW),
]


@pytest.mark.parametrize(("family", "tied", "dtype", "direction", "first_order", "tier"), TIERS)
def test_tiers_change_no_bit(family, tied, dtype, direction, first_order, tier, tmp_path):
    """Evaluations in between neither; zeroth-order leaves are those that the coefficients make, and the tail falls."""
    model, data = FAMILIES[family](tied).init(jax.random.key(1), dtype), batches(6)
    estimator, given = zo.averaged(zo.two_point(1e-3, direction=direction), 2), hybrid(first_order)

    def trained(name, plan, evaluate):
        options = {"directory": tmp_path / name, "key": jax.random.key(5), "plan": plan, "hybrid": given}
        with zo.Run(model, estimator, zo.sgd(1e-2, 0.1), **options) as run:
            start, updates = run.evaluate(data), []
            for i, batch in enumerate(data):
                updates.append(run.step(batch).update)
                if evaluate and i in (2, 3):
                    run.evaluate(data[:1])
            assert run.evaluate(data) < start
            tiers = run._stream.tiers
            return arrays(run.model.source), jax.tree.map(np.asarray, run.state.opt_state), updates, tiers

    weights, state, updates, _ = trained("device", None, False)
    others, other_state, _, tiers = trained("other", PLANS[tier], True)
    assert_same(weights, others)
    assert_same(state, other_state)
    leaves = state[1].leaves
    assert all(tiers[block] == "device" for block in leaves) and tiers["layers.0.mlp"] != "host" or tier != "host"
    for name in names_of(leaves):  # what is looked at is the float32 leaf, rounded
        found = get_leaf(weights, name)
        assert np.array_equal(found, get_leaf(leaves, name).astype(found.dtype))
    if not direction.read_only:
        chosen = split(model, estimator, given).estimator.direction
        expected, ids = model.params, jnp.asarray(leaf_ids(model.params))
        for update in updates:
            expected = zo.apply_update(expected, update, ids, direction=chosen)
        expected = arrays(expected)
        for name in names_of(leaves):
            set_leaf(expected[(block := _block(expected, name))], name[len(block) + 1 :], get_leaf(weights, name))
        assert_same(expected, weights)


def _block(blocks, name):
    return max((block for block in blocks if name.startswith(block + ".")), key=len)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what, tmp_path):
    def loss(outputs, batch):
        bad = jnp.sqrt(jnp.sum(0 * outputs, axis=(1, 2)))  # 0, with a derivative of 0 / 0
        return jnp.sum(jax.nn.logsumexp(outputs, -1), 1) + jnp.where(
            batch["bad"], bad if what == "gradient" else jnp.nan, 0
        )

    model, data = FAMILIES["opt"](True).init(jax.random.key(1)), batches(1)[0]
    options = {"directory": tmp_path, "key": jax.random.key(5), "loss": loss, "hybrid": hybrid(zo.last_blocks(2))}
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options, max_skipped=3) as run:
        run.step(data | {"bad": np.array([False] * 3)})
        before = jax.tree.map(np.asarray, (dict(run.model.source), run.state.opt_state[1]))
        info = run.step(data | {"bad": np.array([True] * 3)})
        after = jax.tree.map(np.asarray, (dict(run.model.source), run.state.opt_state[1]))
        assert bool(info.skipped)
        assert_same(before, after)
        run.step(data | {"bad": np.array([False] * 3)})
        assert not np.array_equal(run.model.source["head"]["norm"]["weight"], after[0]["head"]["norm"]["weight"])


def test_a_batch_without_targets_costs_nothing(tmp_path):
    model, data = FAMILIES["opt"](True).init(jax.random.key(1)), batches(2)

    def trained(name, between):
        options = {"directory": tmp_path / name, "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(2))}
        with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-2), **options) as run:
            run.step(data[0])
            for batch in between:
                with pytest.raises(ValueError, match=r"a batch of \['ids'\] has no loss"):
                    run.step(batch)
            run.step(data[1])
            return arrays(run.model.source)

    assert_same(trained("a", []), trained("b", [{"ids": data[0]["ids"]}]))


def test_members_go_through_the_tail_one_after_the_other(monkeypatch, tmp_path):
    """Eight take the memory of two but for what comes and goes; and blocks are computed again on the way back."""
    model, found = FAMILIES["opt"](True).init(jax.random.key(1)), {}
    lower = visits.backpropagate.lower

    class Seen:
        def __call__(self, *given, **how):
            return visits_backpropagate(*given, **how)

        def lower(self, *given, **how):
            lowered = lower(*given, **how)
            found[len(given[3][1])] = lowered.compile().memory_analysis().temp_size_in_bytes
            return lowered

    visits_backpropagate = visits.backpropagate
    monkeypatch.setattr(visits, "backpropagate", Seen())
    for n in (1, 4):
        options = {"directory": tmp_path / str(n), "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(3))}
        with zo.Run(model, zo.averaged(zo.two_point(1e-3), n), zo.sgd(1e-2), **options) as run:
            run.step(batches(1)[0])
    assert sorted(found) == [2, 8] and found[8] < 1.2 * found[2]


def test_codes(tmp_path):
    """First-order matrices are floats in a model with a format; what is shared with the tail may be codes."""
    model = FAMILIES["llama"](True).init(jax.random.key(1), "bfloat16").with_format(zo.int8())
    estimator, data = zo.two_point(1e-3, direction=zo.lowrank(2, refresh=3)), batches(8)
    options = {"key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(3), optax.adamw(1e-3))}
    with zo.Run(model, estimator, zo.sgd(1e-3), directory=tmp_path / "a", **options) as run:
        for batch in data:
            run.step(batch)
        whole = arrays(run.model.source)
        places = {block: dict(run._stream.layouts[block].matrices) for block in ("layers.0.mlp", "layers.1.mlp")}
        assert [
            places[block]["up.weight" if "up.weight" in places[block] else "gate.weight"].scale is None
            for block in places
        ] == [False, True]
    with zo.Run(model, estimator, zo.sgd(1e-3), directory=tmp_path / "b", **options) as run:
        for batch in data[:5]:
            run.step(batch)
        run.save()
    with zo.Run(model, estimator, zo.sgd(1e-3), directory=tmp_path / "b", **options) as run:
        for batch in run.remaining(data):
            run.step(batch)
        assert_same(arrays(run.model.source), whole)
    fast = model.with_format(zo.int8(compute="int8"))
    with pytest.raises(ValueError, match=r"the format is int8.*embed.weight is used in the tail.* have no derivative"):
        zo.Run(fast, estimator, zo.sgd(1e-3), directory=tmp_path / "c", **options)


# --- how it goes on ---


def test_it_goes_on_after_its_last_checkpoint(tmp_path):
    """With the same bits, also of the journal, and says so; until then its last steps are nowhere."""
    model, data = FAMILIES["opt"](True).init(jax.random.key(1), "bfloat16"), batches(9)
    options = {"key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(2))}

    def opened(name, **more):
        return zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-2, 0.1), directory=tmp_path / name, **options, **more)

    def train(run, until):
        for batch in run.remaining(data[:until]):
            run.step(batch)
            if run.steps_done == 4:
                run.evaluate(data[:2])
                run.save(wait=False)
                assert not run.saving
        run.flush()

    def lines(name):
        names = ("step", "train/loss", "train/projected_gradient", "eval/loss")
        return [[line.get(name) for name in names] for line in read_metrics(tmp_path / name)]

    with opened("whole") as run:
        train(run, 9)
        whole = kept(run)
    with opened("parts") as run:
        train(run, 3)  # and no checkpoint
    with pytest.warns(UserWarning, match="after its last checkpoint, of step 0: the steps up to 3 are done again"):
        run = opened("parts")
    with run:
        train(run, 7)
        assert run.steps_done == 7
    with pytest.raises(ValueError, match=r"is of a hybrid run, last_blocks\(2\): no journal has what backprop"):
        zo.replay(model, tmp_path / "parts")
    with pytest.warns(UserWarning, match="after its last checkpoint, of step 4: the steps up to 7 are done again"):
        run = opened("parts")
    with run:
        assert run.steps_done == 4
        train(run, 9)
        assert_same(kept(run), whole)
        assert list(run.held_out) == [4]
    assert lines("parts") == lines("whole") and len(lines("whole")) == 10
    assert (tmp_path / "parts" / "journal").read_bytes() == (tmp_path / "whole" / "journal").read_bytes()
    assert "hybrid    last_blocks(2)" in str(read_journal(tmp_path / "parts"))
    options["hybrid"] = hybrid(zo.last_blocks(3))
    with pytest.raises(ValueError, match=r"hybrid: last_blocks\(2\) there, last_blocks\(3\) here"):
        opened("parts")
    del options["hybrid"]
    with pytest.raises(ValueError, match=r"hybrid: last_blocks\(2\) there,  here"):
        opened("parts")


def test_it_saves_so_often_that_little_is_done_again(tmp_path):
    model, data = FAMILIES["opt"](True).init(jax.random.key(1)), batches(4)
    options = {"directory": tmp_path, "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(1))}
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options, replay_within=0.0) as run:
        for batch in data:
            run.step(batch)
        assert run._files.snapshots.last == 3
    with pytest.warns(UserWarning, match="of step 3: the steps up to 4 are done again"):
        zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options).close()


def test_killed_while_it_saves(tmp_path):
    """In the second checkpoint: over folds and codes, the bits of a run that nothing happened to."""
    until = 2 * SAVE_EVERY + 3
    with opened("hybrid", tmp_path / "whole") as run:
        whole = go(run, until)
    script = Path(__file__).parent / "killing.py"
    where = ["snapshot", str(2 * 2 * 4 + 4)]  # the blocks and what is beside them, and the state, of a checkpoint
    command = [sys.executable, str(script), "hybrid", str(tmp_path / "run"), *where]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    with pytest.warns(UserWarning, match="are done again"):
        run = opened("hybrid", tmp_path / "run")
    with run:
        assert 0 < run.steps_done < until and run.steps_done % (SAVE_EVERY // 8) == 0
        assert_same(go(run, until), whole)


def test_a_journal_without_it_has_the_header_of_before():
    header = Header(key=(0, 7))
    assert "hybrid" not in header.as_json() and Header.from_json(header.as_json()) == header
    other = replace(header, hybrid="last_blocks(2)")
    assert Header.from_json(other.as_json()) == other
    assert header.differences(other) == ["hybrid:  there, last_blocks(2) here"]


def test_train_by_a_config(tiny_folder, text_file, tmp_path, capsys, monkeypatch):
    """Interrupted without a chance to save, and gone on with; evaluated, exported, not replayed."""

    def arguments(name):
        keys = {"model": tiny_folder, "data": text_file, "directory": tmp_path / name, "steps": 6, "batch": 4}
        keys |= {"tokens": 16, "eval_every": 4, "first_order": "last_blocks:2", "first_order_rate": 0.01}
        keys |= {"tensorboard": "False", "schedule": "cosine", "micro_batches": 2}
        return ["train", "stories260k_shakespeare", *(f"{k}={v}" for k, v in keys.items())]

    assert cli.main(arguments("whole")) == 0
    step = zo.Run.step

    def interrupted(run, batch):
        if run.steps_done == 5:
            raise KeyboardInterrupt
        return step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(zo.Run, "step", interrupted)
        assert cli.main(arguments("run")) == 130
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run")]) == 1
    assert "its journal ends at step 5, but what backpropagation did is in checkpoints alone, the last of step 4" in (
        capsys.readouterr().err
    )
    assert trained_model(tmp_path / "run", best=True)[0] == 4
    with pytest.warns(UserWarning, match="of step 4: the steps up to 5 are done again"):
        assert cli.main(arguments("run")) == 0
    losses = [line["eval/loss"] for line in read_metrics(tmp_path / "run") if "eval/loss" in line]
    assert losses[-1] < losses[0] - 0.1
    for name in ("run", "whole"):
        assert cli.main(["export", str(tmp_path / name), "-o", str(tmp_path / f"{name} model")]) == 0
    assert_same(*(arrays(load(tmp_path / f"{name} model").source) for name in ("run", "whole")))
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    assert f"step 6  held-out loss {losses[-1]:.4f}" in capsys.readouterr().out
    assert cli.main(["replay", str(tiny_folder), str(tmp_path / "run"), "-o", str(tmp_path / "replayed")]) == 1
    assert "is of a hybrid run" in capsys.readouterr().err


def test_configs_say_what_they_cannot_be():
    config = load_config("stories260k_shakespeare", ["first_order=head"])
    assert config.as_json()["first_order"] == "head" and config.as_json()["first_order_rate"] == 1e-3
    assert not {"first_order", "first_order_rate"} & load_config("stories260k_shakespeare").as_json().keys()
    assert str(config.make_hybrid()) == "hybrid(first_order=last_blocks(1))"
    assert load_config("stories260k_shakespeare", ["first_order=a.*, b"]).make_hybrid().first_order == ("a.*", "b")
    for overrides, message in (
        (["first_order=last_blocks:0"], r"first_order=last_blocks:0: last_blocks\(0\): expected at least 1"),
        (["first_order=last_blocks:x"], "first_order=last_blocks:x: invalid literal"),
        (["first_order=head", "objective=accuracy"], "objective=accuracy: expected an objective with a gradient"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config("stories260k_shakespeare", overrides)


REFUSED = {
    r"first_order \['tail.\*'\] name no leaf that a block owns, such as .*head.norm.weight": ("head.*", "tail.*"),
    r"first_order names embed.weight, which another block shares": ("embed.*",),
    r"first_order=last_blocks\(6\) begins at block embed|which another block shares": zo.last_blocks(6),
    r"begins at block layers.0.attn, and before it .* trains nothing": zo.last_blocks(5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_first_order(message, tmp_path):
    model, options = FAMILIES["opt"](True).init(jax.random.key(1)), {"directory": tmp_path, "key": jax.random.key(0)}
    frozen = zo.two_point(1e-3, direction=zo.dense(targets=("layers.*",)))
    with pytest.raises(ValueError, match=message):
        zo.Run(model, frozen, zo.sgd(1e-3), **options, hybrid=hybrid(REFUSED[message]))
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_with_it(tmp_path):
    model, options = FAMILIES["opt"](True).init(jax.random.key(1)), {"directory": tmp_path, "key": jax.random.key(0)}
    how, options["hybrid"] = (model, zo.two_point(1e-3), zo.sgd(1e-3)), hybrid(("head.*",))
    with pytest.raises(ValueError, match="a score of texts has no gradient"):
        zo.Run(*how, **options, loss=zo.Generated(lambda text, gold: 0.0))
    periods = zo.two_point(1e-3, direction=zo.dense("normal", refresh=4))
    with pytest.raises(ValueError, match="in a hybrid run: expected one without a refresh, or lowrank"):
        zo.Run(model, periods, zo.sgd(1e-3), **options)
    with pytest.raises(ValueError, match=r"first_order is 'head.\*', expected"):
        zo.hybrid(first_order="head.*", optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"first_order is \(\), expected"):
        zo.hybrid(first_order=(), optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match="expected an optax transformation"):
        zo.hybrid(first_order=("head.*",), optimizer=zo.sgd(0.1))
