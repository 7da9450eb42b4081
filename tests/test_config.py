"""Configs: files, names, overrides, and one clear error for each mistake."""

from dataclasses import fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from zo2jax.config import Config, ConfigError
from zo2jax.config_files import find_config, load_config, with_overrides
from zo2jax.models.llama import LlamaConfig


def test_names_others_rely_on():
    names = {"model", "data", "steps", "directory", "seed", "batch", "tokens", "learning_rate", "eps", "dtype"}
    assert names <= {field.name for field in fields(Config)}


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_by_name_and_by_path(path):
    by_name, by_path = find_config(path.stem)(), find_config(str(path))()
    assert by_name.as_json() == by_path.as_json()
    assert "zo2jax" in (path.read_text().split('"""')[1])  # the docstring gives the command


def test_overrides_are_typed():
    config = with_overrides(
        Config, ["steps=12", "learning_rate=1e-5", "model=a=b", "direction=rademacher", "dtype=bfloat16", "data="]
    )
    assert (config.steps, config.learning_rate, config.model, config.data) == (12, 1e-5, "a=b", "")
    assert config.make_estimator().direction is zo.rademacher and config.dtype == "bfloat16"


def test_dense_directions_have_a_refresh_with_a_format():
    config = with_overrides(Config, ["direction=normal", "refresh=8", "format=int8"])
    assert config.make_estimator().direction == zo.dense("normal", refresh=8) and config.as_json()["refresh"] == 8
    plain = with_overrides(Config, ["direction=normal", "refresh=8"])
    assert plain.make_estimator().direction is zo.normal and "refresh" not in plain.as_json()
    with pytest.raises(
        ConfigError, match=r"format=int8, direction=normal, refresh=0: expected a refresh, such as 8, or"
    ):
        with_overrides(Config, ["refresh=0", "format=int8"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=5", "unknown config key 'stepz': did you mean steps"),
        ("zzz=5", "known keys are alpha, anchor_directions, batch"),
        ("steps", "'steps': expected key=value"),
        ("steps=many", "steps=many: expected"),
        ("steps=1.5", "steps=1.5: expected"),
        ("steps=0", "steps=0: expected an integer of at least 1"),
        ("direction=cauchy", "direction=cauchy: expected .*rademacher"),
        ("dtype=int8", "dtype=int8: expected"),
        ("eps=0", "eps=0.0: expected a positive number"),
        ("learning_rate=nan", "learning_rate=nan: expected a finite number"),
        ("held_out=1", "held_out=1.0: expected a fraction"),
        ("seed=-1", "seed=-1: expected"),
        ("tier=tape", "tier=tape: expected one of 'device', 'host', 'disk'"),
        ("device_memory=much", "device_memory=much: size 'much': expected .* such as 4GiB"),
        ("prefetch=-1", "prefetch=-1: expected an integer of at least 0"),
        ("alpha=-1", "alpha=-1.0: expected a finite number of at least 0"),
        ("momentum=1", r"momentum=1\.0: expected a number of at least 0 and below 1"),
        ("momentum=0.9", r"momentum=0\.9, direction=normal: expected direction=lowrank"),
        ("estimator=one_sided", "estimator=one_sided, directions=1: n is 1, expected at least 2 directions"),
        ("estimator=spsa", "estimator=spsa: expected one of 'two_point', 'one_sided', 'leave_one_out'"),
        ("warmup=1000", "warmup=1000: expected a number of steps below steps=1000"),
        ("eps_end=-1", r"eps_end=-1\.0: expected a finite number of at least 0"),
        ("patience=-1", "patience=-1: expected an integer of at least 0"),
        ("clip_scale=1", r"clip_scale=1\.0: expected a number above 1"),
        ("micro_batches=3", "micro_batches=3, batch=16: expected a divisor of the batch"),
        ("probe_batch=-1", "probe_batch=-1: expected an integer of at least 0"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(Config, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "holds 0 classes"),
        ("raise RuntimeError('no')", r"does not run \(RuntimeError: no\)"),
        ("def f(:", r"does not run \(SyntaxError"),
        ("from zo2jax.config import Config\nclass Mine(Config):\n    steps: int = 77\n", "Mine lacks @dataclass"),
        (
            "from dataclasses import dataclass\nfrom zo2jax.config import Config\n"
            "@dataclass(frozen=True, kw_only=True)\nclass A(Config): pass\n"
            "@dataclass(frozen=True, kw_only=True)\nclass B(Config): pass\n",
            "holds 2 classes",
        ),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "mine.py"))


def test_where_blocks_live_is_no_part_of_a_runs_config():
    config = with_overrides(Config, ["tier=host", "device_memory=4GiB", "prefetch=2", "probe_batch=3"])
    assert config.as_json() == Config().as_json()
    assert not {"tier", "device_memory", "prefetch", "probe_batch"} & config.as_json().keys()
    assert not {"estimator", "micro_batches"} & config.as_json().keys()  # nor do runs of older versions have them


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_a_warmup_comes_before_the_schedule(schedule, expected):
    optimizer = Config(steps=8, learning_rate=1.0, schedule=schedule, warmup=4).make_optimizer()
    state, rates = optimizer.init(1), []
    for _ in range(8):
        coefs, _, state = optimizer.update(np.ones(1, np.float32), state)
        rates.append(-float(coefs[0]))
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    once = Config(learning_rate=0.5, warmup=1).make_optimizer()
    assert float(once.update(np.ones(1, np.float32), once.init(1))[0][0]) == -0.5


def test_one_clip_at_a_time():
    with pytest.raises(ConfigError, match=r"clip=2\.0, clip_scale=3\.0: expected one of them"):
        Config(clip=2.0, clip_scale=3.0)
    optimizer = Config(learning_rate=1.0, clip_scale=2.0).make_optimizer()
    state = optimizer.init(1)
    for g, expected in ((1.0, -1.0), (9.0, -2.0)):
        coefs, _, state = optimizer.update(np.full(1, g, np.float32), state)
        assert float(coefs[0]) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "expected"), [("one_sided", zo.one_sided), ("leave_one_out", zo.leave_one_out)])
def test_a_config_makes_an_estimator(name, expected):
    config = with_overrides(Config, [f"estimator={name}", "directions=5", "eps=0.5", "direction=rademacher"])
    made, expected = config.make_estimator(), expected(5, 0.5, direction=zo.rademacher)
    assert str(made) == str(expected) and made.probes.tolist() == expected.probes.tolist()
    assert config.as_json()["estimator"] == name
    config = with_overrides(Config, ["steps=4", f"estimator={name}", "directions=2", "eps=1", "eps_end=0.5"])
    scales = [float(config.make_estimator().scaled(np.ones(1, np.float32), np.uint32(t))[0]) for t in (0, 2, 9)]
    assert scales == [1.0, 0.75, 0.5] and config.may_grow() == ()


def test_an_anchor():
    given = ["estimator=svrg", "direction=lowrank", "refresh=5", "directions=2", "anchor_directions=10", "eps=0.5"]
    config = with_overrides(Config, given)
    pairs = zo.averaged(zo.two_point(0.5, direction=zo.lowrank(2, refresh=5)), 2)
    assert str(config.make_estimator()) == str(zo.svrg(pairs, 10))
    assert config.make_estimator().full.probes.shape == (20, 10)
    assert config.as_json()["anchor_directions"] == 10 and "anchor_directions" not in Config().as_json()
    with pytest.raises(ConfigError, match=r"directions=2, anchor_directions=5: .* a multiple of 2, at least 4"):
        with_overrides(Config, [*given, "anchor_directions=5"])
    with pytest.raises(ConfigError, match=r"estimator=svrg, .*: the direction is normal: expected zo2jax.lowrank"):
        with_overrides(Config, [*given, "direction=normal"])
    with pytest.raises(ConfigError, match="anchor_directions=10: expected estimator=svrg"):
        Config(anchor_directions=10)


def test_a_config_makes_a_plan():
    shape = {"vocabulary": 8, "size": 8, "hidden": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_size": 4}
    model = LlamaConfig(**shape, context=16).init(jax.random.key(0))
    ids = np.zeros((2, 4), np.int32)
    batch = {"ids": ids, "targets": ids}
    config = with_overrides(Config, ["tier=disk", "device_memory=1GiB", "prefetch=2", "directions=3"])
    plan = config.make_plan(model, batch)
    estimator = zo.averaged(zo.two_point(1e-3), 3)
    options = {"tokens": 4, "rows": 2, "tier": "disk", "prefetch": 2}
    assert plan.budget == zo.plan(model, estimator, device_memory="1GiB", **options).budget
    assert set(plan.tiers.values()) == {"device"} and plan.prefetch == 2
    assert Config(tier="disk").make_plan(model, batch).tiers["head"] == "disk"
    with pytest.raises(ValueError, match=r"device_memory is .* with all blocks on the device: .*tier='host'"):
        Config(device_memory="1kB").make_plan(model, batch)


def test_unknown_config_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no config file 'nothing'.*demo, .*stories260k_shakespeare"):
        load_config("nothing")


def test_a_users_own_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom zo2jax.config import Config\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Config):\n    steps: int = 77\n"
    )
    assert load_config(str(tmp_path / "mine.py"), ["seed=3"]).steps == 77


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"without config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"steps": -1}')
    with pytest.raises(ConfigError, match=r"not the config of a run .*steps=-1"):
        load_config(str(tmp_path))


def test_objects():
    config = with_overrides(Config, ["directions=3", "schedule=linear", "steps=10", "weight_decay=0.5", "clip=2"])
    assert config.make_estimator().probes.shape == (6, 3)
    optimizer, g = config.make_optimizer(), jnp.array([5.0, 1.0, -5.0], jnp.float32)
    state = optimizer.init(3)
    for t in range(3):
        coefs, decay, state = optimizer.update(g, state)
        rate = 1e-6 * (1 - t / 10)
        assert [float(c) for c in coefs] == pytest.approx([-2 * rate, -rate, 2 * rate])
        assert float(decay) == pytest.approx(rate / 2)
    assert config.make_rounding() is zo.stochastic
    assert config.may_grow() == () and with_overrides(Config, []).may_grow() == ("steps",)
    cosine = with_overrides(Config, ["schedule=cosine", "steps=10"]).make_optimizer()
    assert float(cosine.update(g, cosine.init(3))[0][0]) == pytest.approx(-5e-6)
    moving = with_overrides(Config, ["direction=lowrank", "momentum=0.5"])
    assert moving.make_optimizer().momentum == moving.as_json()["momentum"] == 0.5
    assert "momentum" not in config.as_json()  # runs from before there was one go on
    adapters = with_overrides(Config, ["direction=lora", "rank=4", "alpha=8", "targets=*.q.*, head.*", "format=int8"])
    assert adapters.make_estimator().direction == zo.lora(4, 8, targets=("*.q.*", "head.*"))
    assert {"rank", "alpha", "targets"} <= adapters.as_json().keys() and "alpha" not in moving.as_json()


def test_what_lies_in_the_current_folder_does_not_matter(tmp_path, monkeypatch):
    """A folder or a script of the same name is neither a run nor a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo.py").write_text("raise SystemExit")
    assert type(load_config("demo")).__name__ == "Demo"
