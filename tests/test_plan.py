"""The plan: sizes in text, what a block takes by hand, choices within a budget, and what printing says."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zo2jax as zo
from zo2jax.models.blocks import Block
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.opt import OptConfig
from zo2jax.plan import Budget, Plan, parse_size, plan
from zo2jax.plan.liveness import needs_of
from zo2jax.plan.machine import Machine, known
from zo2jax.plan.schedule import Work

GIB = 2**30
OPT = {"vocabulary": 67, "size": 32, "hidden": 40, "layers": 2, "heads": 4, "context": 64, "token_size": 32}
OPT |= {"tied": False}


def bare(config, dtype=jnp.float32):
    """A model without any weights: a plan needs none."""
    return zo.Model(config, config.blocks(dtype), {})


@pytest.fixture
def small():
    return bare(OptConfig(**OPT))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 * 2**30),
        ("24GB", 24 * 10**9),
        ("900MiB", 900 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        (".5kB", 500),
        ("2 tib", 2 * 2**40),
        (" 123 ", 123),
        ("7B", 7),
        (4096, 4096),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "4 Gb it", "4G", "-4GiB", "0", "0.1B", 0, -1, "1e9", "4,5GiB", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=re.escape(f"size {text!r}: expected a positive number of bytes with a unit")):
        parse_size(text)


def test_the_bytes_of_an_mlp_by_hand(small):
    """x, norm and reductions, fc1 [t, 40], its relu, fc2 [t, 32], x + fc2; float32, t = 12."""
    t, x = 12, jax.ShapeDtypeStruct((1, 12, 32), jnp.float32)
    needs, result = needs_of(small.blocks[2], x, {"ids": jax.ShapeDtypeStruct((1, t), jnp.int32)})
    wide, narrow = 4 * t * 40, 4 * t * 32
    assert result.shape == x.shape and needs.carry == narrow
    # At the second product: what came in, the first one's result, its relu (which the second reads), the second's own.
    assert needs.activations == narrow + 2 * wide + narrow
    assert needs.weight == 4 * 40 * 32
    assert needs.operations == 2 * t * (40 * 32 + 32 * 40)
    every_matrix = needs_of(
        replace(small.blocks[2], takes_weights=False), x, {"ids": jax.ShapeDtypeStruct((1, t), jnp.int32)}
    )
    assert every_matrix[0].weight == 2 * 4 * 40 * 32


def test_embeddings_take_rows_and_heads_take_slabs():
    config = OptConfig(**OPT | {"vocabulary": 20_000})
    first, *_, last = config.blocks()
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    embed, x = needs_of(first, None, {"ids": ids})
    assert embed.weight == 0 and embed.operations == 0
    assert embed.activations < 4 * 4 * x.size < 4 * 20_000 * 32
    head, _ = needs_of(last, x, {"ids": ids, "targets": ids})
    assert 0 < head.weight < 4 * 20_000 * 32 / 2  # of the vocabulary at most half at a time
    slab = head.weight // (4 * 32)
    assert 4 * 4096 * slab < head.activations < 4 * 4096 * 2 * slab
    assert head.operations == pytest.approx(2 * 4096 * 32 * 20_000, rel=0.05)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_activations_are_those_that_xla_allots(family):
    """XLA's own count of a compiled block, on the CPU: its temporaries, what comes in, and what goes out."""
    shape = {"vocabulary": 500, "size": 64, "hidden": 256, "layers": 1, "heads": 4, "context": 128}
    more = {"token_size": 64} if family == "opt" else {"kv_heads": 2, "head_size": 16}
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    x = jax.ShapeDtypeStruct((2, 128, 64), jnp.float32)
    for block in (OptConfig if family == "opt" else LlamaConfig)(**shape, **more).blocks()[1:3]:
        needs, _ = needs_of(block, x, {"ids": ids})
        compiled = jax.jit(block.apply).lower(block.shapes, x, {"ids": ids}).compile().memory_analysis()
        there = compiled.temp_size_in_bytes + compiled.output_size_in_bytes + 4 * x.size
        assert 0.97 * there < needs.activations < 1.2 * there


def test_elementwise_chains_take_nothing_and_convolutions_are_counted():
    class Stage(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Conv(3, 8, (5, 5), rngs=rngs)

        def __call__(self, x, batch):
            return jnp.tanh(jnp.exp(self.kernel(batch)) * 2.0 + 1.0)

    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    needs, result = needs_of(Block.define("conv", Stage), None, images)
    assert result.shape == (2, 16, 16, 8)
    assert needs.activations == 2 * needs.carry  # of the convolution, and of the chain that reads it
    assert needs.operations == 2 * (2 * 16 * 16 * 8) * (5 * 5 * 3)


def test_the_budget_by_hand(small):
    """Pages of 2048 elements: embed 4 (of 2144 + 2112 weights), attention 4, MLP 2, head 2; float32."""
    page = 4 * 2048
    budget = plan(small, tokens=12).budget
    assert list(budget.sizes.values()) == [4 * page, 4 * page, 2 * page, 4 * page, 2 * page, 2 * page]
    assert budget.window == (4 + 4 + 2) * page  # head, embed, attention, or the ones after
    assert plan(small, tokens=12, prefetch=0).budget.window == (4 + 2) * page  # embed and attention one by one
    assert plan(small, tokens=12, prefetch=9).budget.window == sum(budget.sizes.values())
    assert budget.probes == 2 * 4 * 67 * 32  # of the head, whose slab is all of it here
    assert plan(small, zo.averaged(zo.two_point(1e-3), 3), tokens=12).budget.probes == 3 * budget.probes
    biases, norms = 5 * 32 + 40, 2 * 2 * 32
    assert budget.resident == 4 * (2 * (biases + norms) + 2 * 32)
    there = plan(small, tokens=12, tier="device").budget
    assert there.window == 0 and there.resident == budget.resident + sum(budget.sizes.values())
    assert there.peak == sum((there.resident, there.probes, there.activations, there.libraries))


def test_more_rows_and_tokens_take_more(small):
    one = plan(small, tokens=16).budget
    assert plan(small, tokens=32).budget.activations > one.activations
    assert plan(small, tokens=16, rows=2).budget.activations == pytest.approx(2 * one.activations, rel=0.1)
    assert plan(small, tokens=16, rows=2).budget.operations == 2 * one.operations


def random_model(seed, scale=1):
    rng = np.random.default_rng(seed)
    shape = {"vocabulary": int(rng.integers(50, 4000)), "size": 8 * scale * int(rng.integers(1, 9)), "context": 64}
    shape |= {"hidden": scale * int(rng.integers(8, 300)), "layers": int(rng.integers(1, 7)), "heads": 2}
    tied = bool(rng.integers(2))
    if rng.integers(2):
        return bare(OptConfig(**shape, token_size=shape["size"], tied=tied)), int(rng.integers(4))
    return bare(LlamaConfig(**shape, kv_heads=1, head_size=8, tied=tied)), int(rng.integers(4))


@pytest.mark.parametrize("seed", range(8))
def test_a_larger_budget_keeps_more_and_is_never_exceeded(seed):
    model, prefetch = random_model(seed)
    options = {"tokens": 8, "prefetch": prefetch}
    least, most = (plan(model, tier=tier, **options).budget.peak for tier in ("host", "device"))
    before = 0
    for limit in np.linspace(least, most, 25).astype(int).tolist():
        made = plan(model, device_memory=limit, **options)
        assert made.budget.peak <= limit == made.budget.limit
        resident = sum(made.budget.sizes[name] for name, tier in made.tiers.items() if tier == "device")
        assert resident >= before
        before = resident
    assert before == sum(made.budget.sizes.values())
    assert plan(model, device_memory=most, **options).tiers == made.tiers


@pytest.mark.parametrize("seed", range(8))
def test_a_refusal_names_a_budget_that_works(seed):
    model, prefetch = random_model(seed, scale=100)
    least = plan(model, tokens=8, prefetch=prefetch, probe_batch=1).budget.peak
    with pytest.raises(ValueError, match=r"device_memory is .* GiB, and a batch of 1 x 8 needs") as refusal:
        plan(model, tokens=8, prefetch=prefetch, device_memory=least - 1)
    assert ("prefetch=0" in str(refusal.value)) == (prefetch > 0) and "fewer rows or tokens" in str(refusal.value)
    named = re.search(r"needs ([\d.]+ GiB) at least", str(refusal.value))[1]
    assert plan(model, tokens=8, prefetch=prefetch, device_memory=named).budget.peak <= parse_size(named)
    assert parse_size(named) - least < 0.011 * GIB


def test_all_on_the_device_is_refused_with_another_way(small):
    with pytest.raises(ValueError, match=r"needs 0.01 GiB at least with all blocks on the device: .*tier='host'"):
        plan(small, tokens=8, tier="device", device_memory="10kB")


def test_resident_blocks_are_spread_among_streamed_ones():
    model = bare(OptConfig(**OPT | {"layers": 12}))
    half = (plan(model, tokens=8).budget.peak + plan(model, tokens=8, tier="device").budget.peak) // 2
    tiers = list(plan(model, tokens=8, device_memory=half).tiers.values())
    runs = [len(run) for run in "".join("d" if tier == "device" else " " for tier in tiers).split()]
    assert 8 <= sum(runs) <= 18 and max(runs) <= 3


def test_blocks_that_own_shared_leaves_stay():
    tied = bare(OptConfig(**OPT | {"tied": True}))
    made = plan(tied, tokens=8)
    assert [name for name, tier in made.tiers.items() if tier == "device"] == ["embed", "head"]
    assert made.budget.sizes["head"] == 0
    assert made.budget.resident >= made.budget.sizes["embed"] > 0
    assert made.budget.window == (4 + 2 + 4) * 4 * 2048  # attention, MLP, attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0, rows=1, batches=1: expected integers of at least 1"),
        ({"batches": 0}, "tokens=2048, rows=1, batches=0: expected integers of at least 1"),
        ({"probe_batch": 0, "device_memory": "1GiB"}, "probe_batch is 0, expected an integer of at least 1"),
        ({"probe_batch": 2, "device_memory": "1kB"}, ", or a smaller probe_batch"),
        ({"tier": "tape"}, "tier='tape': expected 'device', 'host', 'disk' or 'auto'"),
        ({"host_memory": "1GiB"}, "host_memory, disk_space or formats with tier='host': expected tier='auto'"),
        ({"prefetch": -1}, "prefetch is -1, expected"),
        ({"device_memory": "much"}, "size 'much': expected"),
    ],
)
def test_bad_arguments(small, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(small, **options)


def test_a_batch_in_place_of_rows_of_tokens(small):
    batch = {"ids": np.zeros((2, 8), np.int32), "targets": np.zeros((2, 8), np.int32)}
    assert plan(small, batch=batch).budget == plan(small, rows=2, tokens=8).budget
    unknown = replace(small, config=None)
    assert plan(unknown, batch=batch).budget == plan(small, rows=2, tokens=8).budget
    with pytest.raises(ValueError, match="batches of its own kind: give batch="):
        plan(unknown, tokens=8)


def test_no_array_is_read(small):
    class Untouched(dict):
        def __getitem__(self, name):
            raise AssertionError(f"{name} was read")

    assert plan(small.replace(Untouched()), tokens=8).tiers == plan(small, tokens=8).tiers


@pytest.mark.parametrize(("readers", "most"), [(1, 160 + 40), (2, 160 + 5 + 40), (4, 160 + 30 + 5 + 5 + 40)])
def test_host_memory_is_the_most_that_there_is_while_blocks_are_read(readers, most):
    """Largest first, so many at once: pages, what was read, and a copy of what goes to the device."""
    sizes, reads = {"embed": 20, "a": 30, "b": 30, "head": 100}, {"embed": 20, "a": 5, "b": 5, "head": 30}
    tiers = {"embed": "device", "a": "host", "b": "host", "head": "host"}
    budget = Budget(0, 0, 0, 0, 0, sizes=sizes, reads=reads, readers=readers, process=7)
    assert Plan(tiers, budget=budget).host() == 7 + most


def test_what_is_printed(monkeypatch):
    rates = {"up": 10 * GIB, "down": 11 * GIB, "both": 16 * GIB, "products": 2e12, "memory": 100 * GIB}
    machine = Machine(**rates, disk=2.0 * GIB, kind="toy")
    monkeypatch.setattr(import_module("zo2jax.plan.planned"), "this_machine", lambda: machine)
    sizes = {"a": GIB, "b": 4 * GIB, "c": 8 * GIB}
    works = tuple(Work(name, size=size, products=1e12, traffic=20 * GIB) for name, size in sizes.items())
    budget = Budget(
        resident=GIB, window=3 * GIB, probes=GIB // 2, activations=GIB // 4, libraries=0, limit=5 * GIB,
        sizes=sizes, works=works, masters={"b": GIB}, process=GIB // 2,
    )  # fmt: skip
    made = Plan({"a": "device", "b": "host", "c": "disk"}, budget=budget)
    text = str(made)
    for line in (r"device +1 +1.00", r"host +1 +4.00", r"disk +1 +8.00", "4.75 of 5.00 GiB expected", "0.50 probes"):
        assert re.search(line, text), line
    assert "12.00 GiB up, 12.00 GiB down, 3 TFLOP" in text
    # b and its master, what a comes from, four buffers of c, the process
    assert "host memory: 38.50 GiB, page files: 8.00 GiB" in text
    assert made.seconds(machine) == pytest.approx({"compute": 3 * (0.5 + 0.2), "link": 24 / 16, "disk": 16 / 2})
    assert "bound by the files (each alone: compute 2.1, link 1.5, disk 8)" in text
    assert made.timeline(machine).seconds >= 8
    assert replace(made, prefetch=0, overlap=False).expected(machine) >= made.expected(machine)
    assert "1 block on the device, 1 block in host memory, 1 block on the disk; 4.75 of 5.00 GiB" in made.summary
    assert str(Plan({"a": "host", "b": "host"})) == "2 blocks in host memory, all others on the device"
    assert str(Plan()) == "all blocks on the device"
    assert made == Plan(made.tiers) and repr(made) == repr(Plan(made.tiers))


def test_a_plan_of_a_model_is_printed(small, monkeypatch):
    monkeypatch.setattr(import_module("zo2jax.plan.planned"), "this_machine", lambda: known("h200"))
    text = str(plan(small, tokens=8))
    assert re.search(r"host +6 ", text) and "GiB expected" in text and "bound by the" in text


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_run_within_a_budget_has_the_same_weights(tier, tmp_path):
    model = OptConfig(**OPT).init(jax.random.key(1))
    ids = np.random.default_rng(0).integers(0, 67, (2, 12)).astype(np.int32)
    least, most = (plan(model, tokens=12, rows=2, tier=t).budget.peak for t in ("host", "device"))
    made = plan(model, tokens=12, rows=2, tier=tier, device_memory=(least + most) // 2)
    assert set(made.tiers.values()) == {"device", tier}

    def weights(directory, plan):
        with zo.Run(
            model, zo.two_point(1e-3), zo.sgd(1e-2), directory=directory, key=jax.random.key(0), plan=plan
        ) as run:
            for _ in range(3):
                run.step({"ids": ids, "targets": np.roll(ids, -1, 1)})
            return run.state.params

    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "a", None), weights(tmp_path / "b", made))


H200 = [  # OPT's layers and size, rows, tier, GiB
    (40, 5120, 1, "host", 1.658),
    (40, 5120, 4, "host", 2.674),
    (40, 5120, 1, "device", 25.455),
    (24, 2048, 1, "host", 0.670),
    (32, 4096, 1, "host", 1.417),
    (48, 7168, 1, "host", 3.197),
]


@pytest.mark.parametrize(("depth", "size", "rows", "tier", "measured"), H200, ids=lambda x: str(x))
def test_peaks_that_were_measured(depth, size, rows, tier, measured):
    """OPT in bfloat16, 2048 tokens, prefetch 1, on one H200.

    One constant of the model is fitted to the third figure and others. The last three were measured while an embedding
    with a second matrix copied its page, which it does no more.
    """
    shape = {"vocabulary": 50272, "size": size, "hidden": 4 * size, "layers": depth, "heads": size // 64}
    model = bare(OptConfig(**shape, context=2048, token_size=size, tied=False), jnp.bfloat16)
    budget = plan(model, tier=tier, rows=rows, machine=known("h200")).budget
    assert 0.95 * measured < budget.peak / GIB < 1.1 * measured
    operations = 4 * rows * 2048 * (model.parameter_count - 52322 * size)
    assert math.isclose(budget.operations, operations, rel_tol=0.01)


@pytest.mark.gpu
def test_the_peak_of_a_run_on_a_gpu():
    code = """
import json, tempfile, jax, zo2jax as zo
from zo2jax.bench import Work, random_model
model = random_model("opt-1.3b")
plan = zo.plan(model, zo.two_point(1e-3), tokens=2048)
with tempfile.TemporaryDirectory() as folder:
    options = {"directory": folder, "key": jax.random.key(0), "plan": plan}
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-6), **options) as run:
        for _ in range(3):
            float(run.step(Work(tokens=2048).batch(model.config.vocabulary)).loss)
        peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
print(json.dumps([peak, plan.budget.peak]))
"""
    root = Path(zo.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    measured, expected = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 * expected <= measured <= expected
