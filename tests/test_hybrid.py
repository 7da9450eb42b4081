"""Hybrid runs: the gradient of the tail, what moves by it and what does not, and how such a run goes on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from killing import MODEL, SAVE_EVERY, go, kept, opened

import zo2jax as zo
from zo2jax import cli
from zo2jax.config import ConfigError
from zo2jax.config_files import load_config
from zo2jax.first_order import split
from zo2jax.header import Header
from zo2jax.leaves import leaf_ids
from zo2jax.metrics import read_metrics
from zo2jax.models.blocks import get_leaf, set_leaf, with_tied
from zo2jax.models.hub import load
from zo2jax.pages import flat
from zo2jax.replay import pack, read_journal
from zo2jax.tail import Tail
from zo2jax.trained import trained_model
from zo2jax.updates import perturb

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow


def small(dtype=jnp.float32):
    """Stages that soon compile, of which the last shares a matrix with the first."""
    rng = np.random.default_rng(8)
    shapes = (
        {"w": (5, 7), "bias": (7,)},
        {"v": (7, 7)},
        {"cube": (7, 3, 7), "scale": (7,)},
        {"w": (5, 7), "shift": (5,)},
    )
    leaves = [
        {k: (0.3 * rng.normal(size=n)).astype(dtype if len(n) > 1 else np.float32) for k, n in named.items()}
        for named in shapes
    ]

    def first(p, batch):
        return jnp.tanh(batch["x"] @ p["w"].astype(jnp.float32) + p["bias"])

    def middle(p, x):
        return x + jnp.tanh(x @ p["v"].astype(jnp.float32))

    def second(p, x):
        return x + p["scale"] * jnp.tanh(jnp.einsum("bi,ijk->bk", x, p["cube"].astype(jnp.float32)))

    def third(p, x):
        return x @ p["w"].astype(jnp.float32).T + p["shift"]

    def loss(y, batch):
        losses = ((y - batch["x"]) ** 2).mean(1)
        bad = jnp.sqrt(
            jnp.sum(0 * y, axis=1) + (batch["bad"] != 2).astype(jnp.float32)
        )  # of 2: 0, with a derivative of 0 / 0
        losses = losses + bad - 1 + jnp.where(batch["bad"] == 1, jnp.nan, 0)
        return jnp.sum(batch["weights"] * losses), jnp.sum(batch["weights"])

    names, functions = ("first", "middle", "second", "third"), (first, middle, second, third)
    stages = dict(zip(names, zip(functions, leaves, strict=True), strict=True))
    return zo.blocks(stages, loss=loss, tied={"third.w": "first.w"})


def numbers(count, rows=6, bad=0):
    """Batches of `small`."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, rows, 5)).astype(np.float32)
    weights = (rng.random((count, rows)) < rng.uniform(0.4, 1, (count, 1))).astype(np.float32)
    return [{"x": a, "weights": b, "bad": np.full(rows, bad, np.float32)} for a, b in zip(x, weights, strict=True)]


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


MIXED, OF_LAYER = ("second.scale", "third.*"), ("layers.0.mlp.norm.*", "layers.0.mlp.down.*")
CASES = [
    ("small", zo.last_blocks(2), zo.normal, {"parts": 2, "probe_batch": 1}),
    ("small", MIXED, zo.normal, {}),
    ("small", MIXED, zo.lowrank(2, refresh=2), {}),
    ("tied", zo.last_blocks(3), zo.normal, {}),
    pytest.param("tied", zo.last_blocks(2), zo.lowrank(2), {"candidates": True}, marks=SLOW),
    pytest.param("tied", OF_LAYER, zo.normal, {"parts": 2}, marks=SLOW),
    pytest.param("tied", OF_LAYER, zo.lowrank(2), {"candidates": True}, marks=SLOW),
    pytest.param("untied", zo.last_blocks(1), zo.rademacher, {"probe_batch": 3, "parts": 2}, marks=SLOW),
    pytest.param("untied", zo.last_blocks(2), zo.lora(2), {"parts": 2}, marks=SLOW),
]


def made(name, dtype=jnp.float32):
    if name == "small":
        return small(dtype)
    return replace(MODEL, tied=name == "tied").init(jax.random.key(1), dtype)


@pytest.mark.parametrize(("name", "first_order", "direction", "how"), CASES)
def test_the_gradient_is_that_of_the_whole_plain_loss(name, first_order, direction, how, tmp_path):
    """Float32, at every member of the population; then optax moves the leaves by it."""
    model, estimator = made(name), zo.averaged(zo.two_point(1e-2, direction=direction), 2)
    given, chosen = hybrid(first_order), split(model, estimator, hybrid(first_order)).estimator
    parts = how.get("parts", 1)
    data = numbers(parts) if name == "small" else batches(parts, how.get("candidates", False))
    plan = zo.Plan(dict.fromkeys(model.source, "host"), probe_batch=how.get("probe_batch"))
    options = {"directory": tmp_path, "key": jax.random.key(5), "plan": plan, "hybrid": given}
    with zo.Run(model, estimator, zo.sgd(1e-3), **options) as run:
        before = arrays(run.model.source)
        info = run.step(data)
        found, after = run.state.opt_state[1], arrays(run.model.source)
    gradient, leaves, names = found.opt_state[0], found.leaves, names_of(found.leaves)
    assert names == {
        leaf
        for leaf in names_of(before)
        if (
            any(fnmatchcase(leaf, x) for x in first_order)
            if isinstance(first_order, tuple)
            else leaf.startswith(tuple(f"{block.name}." for block in model.blocks[-first_order.count :]))
        )
    }

    def loss(leaves, params, data):
        params = {block: dict(own) for block, own in params.items()}
        for block, own in leaves.items():
            params[block] = with_tied(params[block], flat(own))
        sums = [model.loss_sum(params, batch) for batch in data]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    start = jax.tree.map(jnp.asarray, {})
    for leaf in names:
        block = next(block for block in before if leaf.startswith(f"{block}."))
        set_leaf(start.setdefault(block, {}), leaf[len(block) + 1 :], jnp.asarray(get_leaf(before, leaf)))
    if direction.adapter is None:  # adapters are no leaves of the plain model
        ids, differentiate = jnp.asarray(leaf_ids(model.params)), jax.jit(jax.value_and_grad(loss))
        keys, how = info.update.keys, {"direction": chosen.direction}
        probes = [perturb(model.params, keys, row, ids, **how) for row in jnp.asarray(chosen.probes)]
        losses, expected = zip(*[differentiate(start, probe, data) for probe in probes], strict=True)
        np.testing.assert_allclose(info.losses, losses, rtol=1e-6)
        expected = jax.tree.map(lambda *x: sum(x) / len(x), *expected)
        for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            assert 0 < np.linalg.norm(x - y) + 1e-30 < 2e-6 * np.linalg.norm(y)
    adamw = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        moved = optax.apply_updates(start, adamw.update(gradient, adamw.init(start), start)[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), moved, leaves)
    assert all(np.array_equal(get_leaf(after, x), get_leaf(leaves, x)) for x in names)  # what a run shows has them
    changed = {x for x in names_of(after) if not np.array_equal(get_leaf(after, x), get_leaf(before, x))}
    assert changed == names | {x for x in names_of(after) - names if direction.trains(x, get_leaf(after, x).ndim)}


TIERS = [
    ("small", "bfloat16", zo.normal, zo.last_blocks(2), "disk"),
    ("small", "float32", zo.lowrank(2, refresh=2), MIXED, "host"),
    pytest.param("tied", "bfloat16", zo.normal, zo.last_blocks(3), "host", marks=SLOW),
    pytest.param("untied", "bfloat16", zo.lowrank(2, refresh=2), zo.last_blocks(2), "disk", marks=SLOW),
    pytest.param("untied", "float32", zo.rademacher, OF_LAYER, "host", marks=SLOW),
]


@pytest.mark.parametrize(("name", "dtype", "direction", "first_order", "tier"), TIERS)
def test_tiers_change_no_bit(name, dtype, direction, first_order, tier, tmp_path):
    """Evaluations in between neither; zeroth-order leaves are those that the coefficients make, and the tail falls."""
    model, data = made(name, dtype), numbers(6) if name == "small" else batches(6)
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
    others, other_state, _, tiers = trained("other", zo.Plan(dict.fromkeys(model.source, tier)), True)
    assert_same(weights, others)
    assert_same(state, other_state)
    leaves = state[1].leaves
    tail = split(model, estimator, given).blocks
    assert {tiers[block] for block in tail} == {"device"} and tier in tiers.values()
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
    return next(block for block in blocks if name.startswith(block + "."))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(what, tmp_path):
    """A loss that is, of which the gradient is not, neither."""
    good, bad = numbers(1)[0], numbers(1, bad=1 if what == "loss" else 2)[0]
    options = {"directory": tmp_path, "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(2))}
    with zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), **options) as run:
        run.step(good)
        before = jax.tree.map(np.asarray, (arrays(run.model.source), run.state.opt_state[1]))
        assert bool(run.step(bad).skipped)
        after = jax.tree.map(np.asarray, (arrays(run.model.source), run.state.opt_state[1]))
        assert_same(before, after)
        assert not bool(run.step(good).skipped)
        moved = zip(*map(jax.tree.leaves, (arrays(run.model.source), after[0])), strict=True)
        assert all((x != y).any() for x, y in moved)


@pytest.mark.parametrize("name", ["small", pytest.param("untied", marks=SLOW)])
def test_a_batch_that_the_tail_cannot_take_costs_nothing(name, tmp_path):
    model, data = made(name), numbers(2) if name == "small" else batches(2)
    bad = {"x": data[0]["x"]} if name == "small" else {"ids": data[0]["ids"]}
    expected = (KeyError, "bad") if name == "small" else (ValueError, r"a batch of \['ids'\] has no loss")

    def trained(directory, between):
        options = {"directory": tmp_path / directory, "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(1))}
        with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-2), **options) as run:
            run.step(data[0])
            for batch in between:
                with pytest.raises(expected[0], match=expected[1]):
                    run.step(batch)
            run.step(data[1])
            return arrays(run.model.source)

    assert_same(trained("a", []), trained("b", [bad]))


def test_members_go_through_the_tail_one_after_the_other(monkeypatch, tmp_path):
    """Eight take the memory of two."""
    model, found, compile = small(), {}, Tail.compile

    def seen(tail, stages, held, probes, *given):
        compiled = compile(tail, stages, held, probes, *given)
        found[len(probes[1])] = compiled.memory_analysis().temp_size_in_bytes
        return compiled

    monkeypatch.setattr(Tail, "compile", seen)
    for n in (1, 4):
        options = {"directory": tmp_path / str(n), "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(2))}
        with zo.Run(model, zo.averaged(zo.two_point(1e-3), n), zo.sgd(1e-2), **options) as run:
            run.step(numbers(1, rows=2000)[0])
    assert sorted(found) == [2, 8] and found[8] < 1.1 * found[2]


def test_codes(tmp_path):
    """First-order matrices are floats in a model with a format; what is shared with the tail may be codes."""
    model = small("bfloat16").with_format(zo.int8())
    estimator, data = zo.two_point(1e-3, direction=zo.lowrank(2)), numbers(1)
    options = {"key": jax.random.key(5), "hybrid": hybrid(("middle.*", "third.*"))}
    with zo.Run(model, estimator, zo.sgd(1e-3), directory=tmp_path / "a", **options) as run:
        losses = [float(run.step(data[0]).loss) for _ in range(6)]
        layouts = run._stream.layouts
    coded = {block: [place.scale is not None for _, place in layout.matrices] for block, layout in layouts.items()}
    assert coded == {"first": [True], "middle": [False], "second": [False], "third": []}
    assert losses[-1] < 0.9 * losses[0]
    fast = model.with_format(zo.int8(compute="int8"))
    with pytest.raises(ValueError, match=r"the format is int8.*first.w is used in the tail.* have no derivative"):
        zo.Run(fast, estimator, zo.sgd(1e-3), directory=tmp_path / "b", **options)


# --- how it goes on ---


def test_it_goes_on_after_its_last_checkpoint(tmp_path):
    """With the same bits, also of the journal, and says so; until then its last steps are nowhere."""
    model, data = small("bfloat16"), numbers(9)
    options = {"key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(2))}

    def opened(name):
        return zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-2, 0.1), directory=tmp_path / name, **options)

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
    with pytest.raises(ValueError, match="is of a hybrid run"):
        pack(tmp_path / "parts", tmp_path / "parts.zo")
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
    options["hybrid"] = hybrid(zo.last_blocks(1))
    with pytest.raises(ValueError, match=r"hybrid: last_blocks\(2\) there, last_blocks\(1\) here"):
        opened("parts")
    del options["hybrid"]
    with pytest.raises(ValueError, match=r"hybrid: last_blocks\(2\) there,  here"):
        opened("parts")


def test_it_saves_so_often_that_little_is_done_again(tmp_path):
    options = {"directory": tmp_path, "key": jax.random.key(5), "hybrid": hybrid(zo.last_blocks(1))}
    with zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), **options, replay_within=0.0) as run:
        for batch in numbers(4):
            run.step(batch)
        assert run._files.snapshots.last == 3
    with pytest.warns(UserWarning, match="of step 3: the steps up to 4 are done again"):
        zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), **options).close()


@SLOW
def test_killed_while_it_saves(tmp_path):
    """In a later checkpoint than the first: over folds and codes, the bits of a run that nothing happened to."""
    until = 2 * SAVE_EVERY + 3
    with opened("hybrid", tmp_path / "whole") as run:
        whole = go(run, until)
    script = Path(__file__).parent / "killing.py"
    where = ["snapshot", "20"]  # a checkpoint has the state, four blocks, and what is beside each
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
    assert losses[-1] < losses[0] - 0.03
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
    r"first_order \['tail.\*'\] name no leaf that a block owns, such as .*third.shift": ("third.*", "tail.*"),
    "first_order names first.w, which another block shares: it is zeroth-order": ("first.*",),
    r"first_order=last_blocks\(3\) begins at block middle, and before it .* trains nothing": zo.last_blocks(3),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_first_order(message, tmp_path):
    frozen = zo.two_point(1e-3, direction=zo.dense(targets=("middle.*", "second.*")))
    options = {"directory": tmp_path, "key": jax.random.key(0), "hybrid": hybrid(REFUSED[message])}
    with pytest.raises(ValueError, match=message):
        zo.Run(small(), frozen, zo.sgd(1e-3), **options)
    assert not list(tmp_path.iterdir())


def test_targets_that_are_first_order_are_not_perturbed():
    """Whatever the patterns; of other blocks those stay that the direction had."""
    given = hybrid(MIXED)
    for targets, expected in (
        ((), ("first.*", "middle.*", "second.cube")),
        (("middle.*", "second.*"), ("middle.*", "second.cube")),
        (("first.b*", "third.*"), ("first.bias",)),
    ):
        estimator = zo.two_point(1e-3, direction=zo.dense(targets=targets))
        assert split(small(), estimator, given).estimator.direction.targets == expected


def test_what_does_not_go_with_it(tmp_path):
    options = {"directory": tmp_path, "key": jax.random.key(0), "hybrid": hybrid(("third.*",))}
    with pytest.raises(ValueError, match="a score of texts has no gradient"):
        zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), **options, loss=zo.Generated(lambda text, gold: 0.0))
    periods = zo.two_point(1e-3, direction=zo.dense("normal", refresh=4))
    with pytest.raises(ValueError, match="in a hybrid run: expected one without a refresh, or lowrank"):
        zo.Run(small(), periods, zo.sgd(1e-3), **options)
    with pytest.raises(ValueError, match=r"first_order is 'head.\*', expected"):
        zo.hybrid(first_order="head.*", optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"first_order is \(\), expected"):
        zo.hybrid(first_order=(), optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match="expected an optax transformation"):
        zo.hybrid(first_order=("head.*",), optimizer=zo.sgd(0.1))
    noisy = optax.chain(optax.add_noise(1e-3, 0.5, 0), optax.sgd(1e-2))
    with pytest.raises(ValueError, match="has a typed random key, which checkpoints cannot hold"):
        zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), **options | {"hybrid": hybrid(("third.*",), noisy)})
    anchored = zo.svrg(zo.two_point(1e-3, direction=zo.lowrank(2)), 2)
    with pytest.raises(ValueError, match="in a hybrid run: expected one without an anchor"):
        zo.Run(small(), anchored, zo.sgd(1e-3), **options)


def test_an_optimizer_may_keep_the_leaves_themselves(tmp_path):
    kept = optax.GradientTransformation(
        lambda leaves: leaves, lambda g, first, p: (jax.tree.map(jnp.negative, g), first)
    )
    options = {"directory": tmp_path, "key": jax.random.key(0), "hybrid": hybrid(zo.last_blocks(1), kept)}
    with zo.Run(small(), zo.two_point(1e-3), zo.sgd(1e-3), **options) as run:
        before = arrays(run.model.source)
        run.step(numbers(1)[0])
        (_, (leaves, first)), now = run.state.opt_state, arrays(run.model.source)
    for name, leaf in flat(first).items():
        assert (np.asarray(leaf) == np.asarray(get_leaf(before, name))).all()
        assert (np.asarray(flat(leaves)[name]) == np.asarray(get_leaf(now, name))).all()
    assert not (np.asarray(get_leaf(now, name)) == np.asarray(get_leaf(before, name))).all()


@pytest.mark.parametrize("kind", ["prefix", pytest.param("lora", marks=pytest.mark.slow)])
def test_files_of_adapters_lack_what_backpropagation_trained(kind, tmp_path):
    model = made("llama")
    direction = zo.lora(2, targets=("*.attn.q.*",))
    if kind == "prefix":
        model, direction = zo.with_prefix(model, [1, 2]), zo.dense(targets=("*.prefix.*",))
    options = {"directory": tmp_path / "run", "key": jax.random.key(0), "hybrid": hybrid(("head.norm.*",))}
    with zo.Run(model, zo.two_point(1e-1, direction=direction), zo.sgd(1e-2), **options) as run:
        run.step(batches(1)[0])
        with pytest.raises(ValueError, match=r"backpropagation train(s|ed) head\.norm\.weight (beside the prefix|too)"):
            run.export(tmp_path / "peft", adapter=True)
    assert not (tmp_path / "peft").exists()
