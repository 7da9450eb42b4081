"""Which blocks matter: estimates against gradients, choices, and runs that train what was chosen."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_stream import FAMILIES, PLANS, batches
from test_targets import arrays, assert_same

import zo2jax as zo
from zo2jax import cli, train
from zo2jax.config import Config, ConfigError
from zo2jax.config_files import with_overrides
from zo2jax.directions import draw, lowrank, step_keys
from zo2jax.formats import decoded, encode
from zo2jax.leaves import leaf_id
from zo2jax.metrics import read_metrics
from zo2jax.pages import flat
from zo2jax.plan import Plan
from zo2jax.replay import read_journal
from zo2jax.sensitivity import BlockSensitivity, Sensitivity, sensitivity
from zo2jax.stream import Stream
from zo2jax.trained import trained_model

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow
BATCHES = list(batches(2))


def model_of(family, tied, layers=2):
    """With larger matrices than usual, so that the loss depends on them."""
    model = replace(FAMILIES[family](tied), layers=layers).init(jax.random.key(1))
    return model.replace(jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, model.params))


def squares(model, batch, direction=zo.normal):
    """||grad_b L||^2 of each block by `jax.grad`, a shared leaf with its owner."""
    found = jax.jit(jax.grad(model.loss))(model.params, batch)
    return {
        block: sum(
            float(jnp.sum(x**2)) for name, x in flat(leaves).items() if direction.trains(f"{block}.{name}", x.ndim)
        )
        for block, leaves in found.items()
    }


@pytest.mark.parametrize(("family", "tied"), [("llama", True), pytest.param("opt", False, marks=SLOW)])
def test_estimates_are_squared_norms_of_gradients(family, tied):
    model, batch = model_of(family, tied), BATCHES[0]
    found = sensitivity(model, [batch], key=jax.random.key(0), directions=250, eps=1e-3)
    exact = squares(model, batch)
    assert [block.name for block in found.blocks] == [block.name for block in model.blocks]
    for block in found.blocks:
        assert abs(block.square - exact[block.name]) < 4 * block.error, block
        assert 0.06 < block.error / exact[block.name] < 0.2  # sqrt(2 / 250) is 0.09, and V adds to it
        assert block.parameters == sum(x.size for x in jax.tree.leaves(model.params[block.name]))
    assert max(exact.values()) > 2 * min(exact.values()) and found.draws == 250
    (chosen,) = found.choose(blocks=1).chosen
    assert exact[chosen] > 0.8 * max(exact.values())


CASES = [
    ("llama", True, "host", None, zo.dense(targets=("layers.*", "embed.*"))),  # by programs of the test above
    ("opt", False, "mixed", zo.int8(), zo.lowrank(2, targets=("*.attn.[qv].*", "*.mlp.*"))),
    pytest.param("llama", True, "device", None, zo.dense(targets=("*.0.attn.[qv].*", "embed.*", "head.*")), marks=SLOW),
    pytest.param("qwen3", True, "disk", None, zo.lora(2, targets=("layers.1.*",)), marks=SLOW),
    pytest.param("opt", True, "disk", zo.int4(group=8), zo.dense(refresh=4), marks=SLOW),
]


@pytest.mark.parametrize(("family", "tied", "tier", "format", "direction"), CASES)
def test_a_draw_is_the_difference_of_two_losses(family, tied, tier, format, direction, tmp_path):
    """With the z of the block alone, where it is shared too, by the plain loss; in any tier and format."""
    model = model_of(family, tied)
    eps, key, z = 2.0**-7, jax.random.key(3), lowrank(8, None)
    how = {"plan": PLANS.get(tier), "pages": tmp_path, "eps": eps, "direction": direction}
    found = sensitivity(model.with_format(format), [BATCHES, BATCHES[1]], key=key, **how)
    params = model.params
    if format is not None:
        kept = lambda x: x if x.ndim < 2 else decoded(encode(x, format.bits, format.group_of("", x.shape)))  # noqa: E731
        params = jax.tree.map(kept, params)
    plain = jax.jit(model.loss_sum)
    for block in found.blocks:
        leaves = {n: x for n, x in flat(params[block.name]).items() if direction.trains(f"{block.name}.{n}", x.ndim)}
        assert block.leaves == tuple(f"{block.name}.{n}" for n in leaves)
        total = 0.0
        for i, parts in enumerate((BATCHES, BATCHES[1:])):
            (pair,) = step_keys(jax.random.fold_in(key, i), jnp.uint32(0), 1, z)
            losses = []
            for sign in (eps, -eps) if leaves else ():
                moved = {
                    n: x + sign * draw(z, pair, np.uint32(leaf_id(f"{block.name}.{n}")), x.shape)
                    for n, x in leaves.items()
                }
                own = {**flat(params[block.name]), **moved}
                tree = {}
                for n, x in own.items():
                    zo.models.blocks.set_leaf(tree, n, x)
                sums = [plain({**params, block.name: tree}, part) for part in parts]
                losses.append(float(sum(s for s, _ in sums)) / float(sum(n for _, n in sums)))
            total += ((losses[0] - losses[1]) / (2 * eps)) ** 2 / 2 if losses else 0.0
        assert block.square == pytest.approx(total, rel=2e-3, abs=1e-6), block.name
    assert sum(bool(block.leaves) for block in found.blocks) >= 2


def test_one_draw_is_known_to_its_own_size():
    model = model_of("llama", True)
    (block,) = [b for b in sensitivity(model, BATCHES[:1], key=jax.random.key(0)).blocks if b.name == "embed"]
    assert block.error == pytest.approx(2**0.5 * block.square)


ROWS = [
    ("embed", 8, 0.0, 1.0),
    ("a", 64, 100.0, 4.0),
    ("act", 0, 0.0, 0.0),
    ("b", 64, 100.0, 9.0),
    ("head", 8, 50.0, 2.0),
]
TABLE = Sensitivity(
    tuple(BlockSensitivity(n, (f"{n}.w",) if size else (), size, ops, sq, sq / 2) for n, size, ops, sq in ROWS), 8
)


def test_choices():
    chosen = TABLE.choose(0.5)
    assert chosen.chosen == ("a", "b") and chosen.targets == ("a.*", "b.*")
    assert chosen.share == 13 / 16 and chosen.parameters == 128 / 144 and chosen.work == 1.0
    last = TABLE.choose(blocks=1)
    assert last.chosen == ("b",) and last.work == pytest.approx(1 - 100 / 500)  # a is computed for one member
    assert TABLE.cost == pytest.approx(8 * (100 * 5 + 100 * 7 + 50 * 9) / 500)
    assert TABLE.choose(1.0).targets == () and TABLE.choose(0.01).chosen == ("b",)
    text = str(chosen)
    assert "2 of 4 blocks train: 81% of the squared norm of the gradient, 89% of the parameters" in text
    assert text.splitlines()[2].split() == ["a", "64", "4", "2", "25.0%", "trains"] and "act" in text
    assert Sensitivity.from_json(json.loads(json.dumps(chosen.as_json()))) == chosen
    nested = [BlockSensitivity("a", ("a.w", "a.v"), 2, 0.0, 3.0), BlockSensitivity("a.b", ("a.b.w",), 1, 0.0, 1.0)]
    assert Sensitivity(tuple(nested), 1).choose(blocks=1).targets == ("a.w", "a.v")
    for wrong, message in (
        ({}, "fraction is None and blocks is None"),
        ({"fraction": 0.5, "blocks": 2}, "expected one of them"),
        ({"fraction": 1.5}, "fraction is 1.5, expected a number above 0"),
        ({"blocks": 5}, "blocks is 5, expected 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            TABLE.choose(**wrong)


def test_what_cannot_be_measured():
    model = model_of("llama", True)
    for given, how, message in (
        ([], {}, "0 batches and 1 directions"),
        (BATCHES, {"direction": zo.dense(targets=("tail",))}, r"targets \['tail'\] name no leaf"),
        ([{"ids": BATCHES[0]["ids"]}], {}, r"a batch of \['ids'\] has no loss"),
        (BATCHES, {"eps": 1e30}, "the loss is not finite with probes of block"),
    ):
        with pytest.raises(ValueError, match=message):
            sensitivity(model, given, key=jax.random.key(0), **how)


@pytest.fixture
def arguments(tiny_folder, text_file, tmp_path):
    def make(name, *extra):
        keys = {
            "model": tiny_folder,
            "data": text_file,
            "directory": tmp_path / name,
            "steps": 6,
            "batch": 4,
            "tokens": 16,
        }
        keys |= {
            "tokens": 16,
            "eval_every": 4,
            "learning_rate": 0.001,
            "eps": 0.01,
            "train_blocks": 0.5,
            "sensitivity_steps": 2,
        }
        return ["train", "stories260k_shakespeare", *(f"{k}={v}" for k, v in keys.items()), *extra]

    return make


@pytest.mark.parametrize(
    ("direction", "tier", "able"),
    [
        ("normal", "host", 4),
        pytest.param("lowrank", "disk", 4, marks=SLOW),
        pytest.param("lora", "device", 3, marks=SLOW),  # the norm of the head has no adapter
    ],
)
def test_a_run_keeps_what_was_chosen(direction, tier, able, arguments, tmp_path, capsys, monkeypatch):
    """When it goes on, nothing is measured again; its weights are those of the same targets given by hand."""
    how, run = (f"direction={direction}", f"tier={tier}"), tmp_path / "run"
    assert cli.main(arguments("run", *how, "steps=3")) == 0
    assert f"2 of {able} blocks train" in capsys.readouterr().out
    monkeypatch.setattr(zo.selected, "sensitivity", lambda *_, **__: 1 / 0)
    assert cli.main(arguments("run", *how)) == 0
    weights = arrays(trained_model(run)[1].source)
    found = Sensitivity.from_json(json.loads((run / "sensitivity.json").read_text()))
    targets = read_journal(run).header.direction["targets"]
    assert list(found.targets) == targets and found.draws == 2 and 0 < found.share < 1
    config = json.loads((run / "config.json").read_text())
    assert config["train_blocks"] == 0.5 and config["sensitivity_steps"] == 2 and not config.get("targets")

    by_hand = "train_blocks=0", "targets=" + ",".join(targets)
    assert cli.main(arguments("by hand", *how, *by_hand)) == 0
    assert_same(arrays(trained_model(tmp_path / "by hand")[1].source), weights)
    lines = [read_metrics(folder) for folder in (run, tmp_path / "by hand")]
    losses = [[line["train/loss"] for line in of if "train/loss" in line] for of in lines]
    assert losses[0] == losses[1] and not (tmp_path / "by hand" / "sensitivity.json").exists()

    base = zo.load(config["model"])
    changed = {name for name, leaves in arrays(base.source).items() if not same(leaves, weights[name])}
    assert changed == set(found.chosen)
    if direction != "lora":
        assert_same(arrays(zo.replay(base, run).source), weights)
    assert train.evaluate(str(run))[1]["loss"] == pytest.approx(lines[0][-1]["eval/loss"], abs=1e-6)
    capsys.readouterr()
    assert cli.main(arguments("run", *how, "train_blocks=0.9")) == 1
    assert "train_blocks: 0.5 there, 0.9 now" in capsys.readouterr().err


def same(a, b):
    return all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_blocks_before_the_first_one_that_was_chosen_have_one_member():
    """What `work` counts is what a stream does with these targets."""
    model = model_of("opt", False)
    rows = [BlockSensitivity(b.name, (f"{b.name}.w",), 1, 1.0, float(i)) for i, b in enumerate(model.blocks)]
    chosen = Sensitivity(tuple(rows), 1).choose(0.5)
    assert chosen.targets == ("layers.1.attn.*", "layers.1.mlp.*", "head.*")
    stream = Stream(model.blocks, model.source, zo.dense(targets=chosen.targets), zo.nearest, Plan())
    assert chosen.work == pytest.approx(1 - stream._first / (2 * len(model.blocks))) == pytest.approx(0.75)
    stream.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train_blocks=1.5"], r"train_blocks=1\.5: expected a fraction from 0 to 1"),
        (["train_blocks=0.5", "first_order=head"], "expected neither first_order nor"),
        (["train_blocks=0.5", "format=int8"], "expected direction=lowrank, which has targets with codes"),
        (["sensitivity_steps=0"], "sensitivity_steps=0: expected an integer of at least 1"),
    ],
)
def test_configs_are_checked(overrides, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(Config, overrides)
    assert not {"train_blocks", "sensitivity_steps"} & Config().as_json().keys()  # runs from before it go on
