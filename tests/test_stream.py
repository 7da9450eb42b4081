"""A run is the same bit for bit wherever its blocks live, and, given its coefficients, the step of `zo2jax.mezo`."""

import contextlib
import gc
import importlib
import itertools
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kernel_marks import NEEDS_KERNELS, ON_GPU

import zo2jax as zo
from pallas_kernels import implementations
from zo2jax import visits
from zo2jax.link import StoreError
from zo2jax.metrics import read_metrics
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.pages import Layout
from zo2jax.plan import Plan

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = {"vocabulary": 67, "size": 32, "hidden": 40, "layers": 2, "heads": 4, "context": 64}
FAMILIES = {
    "llama": lambda tied: LlamaConfig(**SHAPE, kv_heads=2, head_size=8, tied=tied),
    "qwen3": lambda tied: Qwen3Config(**SHAPE, kv_heads=2, head_size=8, tied=tied),
    "opt": lambda tied: OptConfig(**SHAPE, token_size=32, tied=tied),
}
NAMES = ["embed", "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp", "head"]
PLANS = {
    "host": Plan(dict.fromkeys(NAMES, "host")),
    "host deep": Plan(dict.fromkeys(NAMES, "host"), prefetch=3),
    "host plain": Plan(dict.fromkeys(NAMES, "host"), prefetch=0, overlap=False, pinned=False),
    "disk": Plan(dict.fromkeys(NAMES, "disk")),
    "mixed": Plan(dict(zip(NAMES, ["host", "disk", "device", "disk", "host", "host"], strict=True))),
}


STEPS = 20


def batches(count=STEPS, rows=2):
    rng = np.random.default_rng(3)
    for _ in range(count):
        ids = rng.integers(0, 67, (rows, 12)).astype(np.int32)
        yield {"ids": ids, "targets": np.roll(ids, -1, 1), "weights": np.ones(ids.shape, np.float32)}


def trained(model, directory, plan=None, *, estimator=None, optimizer=None, flush=False, evaluate=True):
    """(weights, losses, updates) after 20 steps with an evaluation in the middle and a step whose g is 0."""
    estimator = estimator or zo.two_point(1e-3)
    optimizer = optimizer or zo.sgd(optax.linear_schedule(1e-2, 1e-3, STEPS), 0.1)
    losses, updates = [], []
    with zo.Run(model, estimator, optimizer, directory=directory, key=jax.random.key(5), plan=plan) as run:
        for i, batch in enumerate(batches()):
            if i == 2:  # no target counts: every loss is 0, and so is g
                batch |= {"weights": np.zeros((2, 12), np.float32)}
            info = run.step(batch)
            losses.append(float(info.loss))
            updates.append(info.update)
            if flush:
                run.flush()
            if i == 3 and evaluate:
                losses.append(run.evaluate(batches(2)))
        return run.state.params, losses, updates


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


CASES = [
    ("llama", True, jnp.bfloat16, zo.rademacher, 1, "mixed"),
    ("opt", False, jnp.bfloat16, zo.normal, 3, "disk"),
    ("opt", True, jnp.float32, zo.normal, 1, "host plain"),
]
DTYPES, DIRECTIONS = (jnp.float32, jnp.bfloat16), (zo.normal, zo.rademacher)
OTHERS = [c for c in itertools.product(FAMILIES, (0, 1), DTYPES, DIRECTIONS, (1, 3), PLANS) if c not in CASES]
ALL = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]


@pytest.mark.parametrize(("family", "tied", "dtype", "direction", "copies", "tier"), ALL)
def test_tiers_change_no_bit(family, tied, dtype, direction, copies, tier, tmp_path):
    estimator = zo.two_point(1e-3, direction=direction)
    estimator = estimator if copies == 1 else zo.averaged(estimator, copies)
    model = FAMILIES[family](bool(tied)).init(jax.random.key(1), dtype)
    weights, losses, updates = trained(model, tmp_path / "device", estimator=estimator)
    others = trained(model, tmp_path / "other", PLANS[tier], estimator=estimator, flush=tier == "mixed")
    assert losses == others[1]
    assert_same(weights, others[0])
    # The plain step, in other code: given the same coefficients the same weights, bit for bit.
    expected, ids = model.params, zo.mezo(model.loss, estimator, zo.sgd(0.0)).init(model.params, jax.random.key(0))
    for update in updates:
        expected = zo.apply_update(expected, update, ids.leaf_ids, direction=direction)
    assert_same(weights, expected)
    pairs = zip(*map(jax.tree.leaves, (weights, model.params)), strict=True)
    moved = [np.mean(np.asarray(x) != np.asarray(y)) for x, y in pairs if x.ndim > 1]
    assert min(moved) > 0.5


@pytest.mark.parametrize(("family", "tied"), [("llama", True), pytest.param("opt", False, marks=pytest.mark.slow)])
def test_losses_are_those_of_the_plain_step(family, tied, tmp_path):
    """Float32, over all steps, each with its own rounding of activations: to 1e-6."""
    model = FAMILIES[family](tied).init(jax.random.key(1))
    estimator, optimizer = zo.averaged(zo.two_point(1e-3), 2), zo.sgd(1e-4, 0.1)
    plain = zo.mezo(model.loss, estimator, optimizer)
    state = plain.init(model.params, jax.random.key(5))
    step = jax.jit(plain.step)
    with zo.Run(model, estimator, optimizer, directory=tmp_path, key=jax.random.key(5), plan=PLANS["host"]) as run:
        for batch in batches():
            state, info = step(state, batch)
            np.testing.assert_allclose(float(run.step(batch).loss), float(info.loss), rtol=1e-6)


def test_in_16_bits_g_is_as_near_to_float32_as_the_plain_step(tmp_path):
    model = FAMILIES["opt"](False).init(jax.random.key(1), jnp.bfloat16)
    wide = FAMILIES["opt"](False).init(jax.random.key(1)).replace(jax.tree.map(jnp.float32, model.params))
    estimator, optimizer = zo.two_point(1e-2), zo.sgd(0.0)
    gradients = {}
    for name, m in (("plain", model), ("exact", wide)):
        plain = zo.mezo(m.loss, estimator, optimizer)
        state, step = plain.init(m.params, jax.random.key(5)), jax.jit(plain.step)
        gradients[name] = []
        for batch in batches():
            state, info = step(state, batch)
            gradients[name].append(float(info.projected_gradient[0]))
    with zo.Run(model, estimator, optimizer, directory=tmp_path, key=jax.random.key(5), plan=PLANS["host"]) as run:
        gradients["run"] = [float(run.step(batch).projected_gradient[0]) for batch in batches()]
    error = {name: np.linalg.norm(np.subtract(g, gradients["exact"])) for name, g in gradients.items()}
    assert 0 < error["run"] <= 2 * error["plain"] < 0.2 * np.linalg.norm(gradients["exact"])


def test_metrics_say_what_went_over_the_link(tmp_path):
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    trained(model, tmp_path, PLANS["host"], evaluate=False)
    size = sum(Layout.of(leaves).nbytes for leaves in model.params.values())
    lines = read_metrics(tmp_path)
    assert [line["link/bytes_down"] for line in lines] == [size] * STEPS
    # Before the first step nothing is there; after each, the first block of the next is on its way.
    assert [line["link/bytes_up"] - size for line in lines] == [
        Layout.of(model.params["embed"]).nbytes,
        *[0] * (STEPS - 1),
    ]
    assert lines[0]["link/share"] is None and all(0 < line["link/share"] < 2 for line in lines[1:])
    trained(model, tmp_path / "resident", evaluate=False)
    assert not any(name.startswith("link/") for line in read_metrics(tmp_path / "resident") for name in line)


def test_a_run_goes_on_in_another_tier_without_its_page_files(tmp_path):
    model = FAMILIES["opt"](False).init(jax.random.key(1))
    straight = trained(model, tmp_path / "straight", evaluate=False)[0]
    options = {"directory": tmp_path / "parts", "key": jax.random.key(5)}
    arguments = (zo.two_point(1e-3), zo.sgd(optax.linear_schedule(1e-2, 1e-3, STEPS), 0.1))
    steps = list(batches())
    steps[2] |= {"weights": np.zeros((2, 12), np.float32)}
    for tier, until in (("disk", 3), ("host", 11), ("device", STEPS)):
        with zo.Run(model, *arguments, plan=PLANS.get(tier), **options) as run:
            for batch in steps[run.steps_done : until]:
                run.step(batch)
            run.save()
            weights = run.state.params
        assert not list((tmp_path / "parts").glob("pages/*"))
    assert_same(weights, straight)


def test_too_little_host_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("zo2jax.link.available_memory", lambda: 1000)
    with pytest.raises(StoreError, match=r"6 blocks need .* GiB of host memory, and 0.0 GiB are free"):
        trained(FAMILIES["llama"](False).init(jax.random.key(1)), tmp_path, PLANS["host"])


def tear(path):
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"torn")


DAMAGES = {"torn": (tear, "is not what was written"), "cut": (lambda p: os.truncate(p, 64), "is not what was written")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_page_file_is_not_read_as_good(damage, tmp_path):
    """The run goes on from its checkpoint, with another page file."""
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    arguments, steps = (zo.two_point(1e-3), zo.sgd(1e-3)), list(batches(3))
    options = {"key": jax.random.key(5), "plan": PLANS["disk"]}
    apply, message = DAMAGES[damage]
    with zo.Run(model, *arguments, directory=tmp_path / "straight", **options) as run:
        for batch in steps:
            run.step(batch)
        weights = run.state.params
    directory = tmp_path / "damaged"
    with (
        pytest.raises(StoreError, match=rf"layers.0.mlp.page {message}.*last checkpoint"),
        zo.Run(model, *arguments, directory=directory, **options) as run,
    ):
        run.step(steps[0])
        run.save()
        run._stream.wait()
        apply(directory / "pages" / "layers.0.mlp.page")
        run.step(steps[1])
    with zo.Run(model, *arguments, directory=directory, **options) as run:
        for batch in run.remaining(steps):
            run.step(batch)
        assert_same(run.state.params, weights)


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    arguments, first = (zo.two_point(1e-3), zo.sgd(1e-3)), next(batches())
    options = {"key": jax.random.key(5), "plan": PLANS["disk"]}

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(StoreError, match=r"no page file of .* \(No space left on device\): it needs room"),
    ):
        patch.setattr(os, "posix_fallocate", full)
        zo.Run(model, *arguments, directory=tmp_path / "none", **options)
    assert not list((tmp_path / "none").glob("pages/*"))
    with (
        pytest.raises(StoreError, match=r"page cannot be written \(No space left.*last checkpoint"),
        zo.Run(model, *arguments, directory=tmp_path / "later", **options) as run,
    ):
        run.step(first)
        run.save()
        monkeypatch.setattr(os, "pwritev", full)
        run.step(first)
        run.step(first)
    monkeypatch.undo()
    with zo.Run(model, *arguments, directory=tmp_path / "later", **options) as run:
        assert run.steps_done in (1, 2)  # as the error came in the second step or in the third


@pytest.mark.parametrize("call", ["preadv", "pwritev", "interrupt"])
def test_a_sweep_that_broke_off_is_not_saved(call, tmp_path, monkeypatch):
    """Some blocks have the update, others lack it: nothing can be had of such a model."""
    model, (first, *others) = FAMILIES["llama"](False).init(jax.random.key(1)), batches(4)
    options = {"directory": tmp_path, "key": jax.random.key(5), "plan": PLANS["disk"]}
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options) as run:
        run.step(first)
        run.save()
        run._stream.wait()
        calls = []

        def once(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt if call == "interrupt" else OSError(5, "Input/output error")
            return real(*arguments)

        if call == "interrupt":
            real = run._stream._conveyor._left
            monkeypatch.setattr(run._stream._conveyor, "_left", once)
        else:
            real = getattr(os, call)
            monkeypatch.setattr(os, call, once)
        with pytest.raises((StoreError, KeyboardInterrupt)):
            for batch in others:
                run.step(batch)
                run.flush()
        monkeypatch.undo()
        with contextlib.suppress(StoreError):  # of the step that is saved already, saving is nothing
            run.save()
        for use in (lambda: run.state, lambda: run.evaluate([first]), lambda: run.step(first)):
            with pytest.raises(StoreError, match="did not reach all blocks: the run goes on from its last checkpoint"):
                use()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["1"]
    weights = []
    for directory in (tmp_path, tmp_path / "straight"):
        with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options | {"directory": directory}) as run:
            for batch in run.remaining([first, *others]):
                run.step(batch)
            weights.append(run.state.params)
    assert_same(*weights)


def test_what_is_no_batch_changes_nothing(tmp_path):
    model, weights = FAMILIES["llama"](False).init(jax.random.key(1)), []
    for wrong in ([], [{"ids": "text"}, {"ids": np.ones((2, 3), np.int32)}]):
        options = {"directory": tmp_path / str(len(wrong)), "key": jax.random.key(5), "plan": PLANS["host"]}
        with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), **options) as run:
            for batch in batches(3):
                run.step(batch)
                for other in wrong:
                    with pytest.raises((TypeError, ValueError)):
                        run.step(other)
            weights.append(run.state.params)
    assert_same(*weights)


def test_page_files_are_let_go(tmp_path):
    """By a run that is closed, once and no more; by one that nobody has any more; and after one that was killed."""
    model = FAMILIES["llama"](False).init(jax.random.key(1))
    arguments, options = (zo.two_point(1e-3), zo.sgd(1e-3)), {"directory": tmp_path, "key": jax.random.key(5)}
    run = zo.Run(model, *arguments, plan=PLANS["disk"], **options)
    assert len(list(tmp_path.glob("pages/*.page"))) == len(NAMES)
    run.close()
    files = [(tmp_path / str(i)).open("w") for i in range(20)]
    run.close()
    with pytest.raises(StoreError, match="its run is closed"):
        _ = run.model.params
    for file in files:
        file.close()
    run = zo.Run(model, *arguments, plan=PLANS["disk"], **options)
    del run
    gc.collect()
    assert not list(tmp_path.glob("pages/*"))
    (tmp_path / "pages" / "embed.page").touch()
    zo.Run(model, *arguments, plan=PLANS["host"], **options).close()
    assert not list(tmp_path.glob("pages/*"))


def test_a_plan_for_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"names 'layers.0.mpl', which the model lacks: did you mean 'layers.0.mlp'"):
        trained(FAMILIES["llama"](False).init(jax.random.key(1)), tmp_path, Plan({"layers.0.mpl": "host"}))


def test_visits_are_compiled_once_and_before_the_sweep(tmp_path, caplog):
    """Four kinds of blocks are four programs, however many layers there are; the call finds what was compiled ahead."""
    model = FAMILIES["opt"](True).init(jax.random.key(1))
    began = []
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(5)) as run:
        take = run._stream._conveyor.take
        run._stream._conveyor.take = lambda i: began.append(len(caplog.records)) or take(i)
        with jax.log_compiles(), caplog.at_level("WARNING"):
            for batch in batches(2, rows=5):  # rows no other test has, or their programs are in the process already
                run.step(batch)
        programs = [n for n, r in enumerate(caplog.records) if "XLA compilation of jit(_train)" in r.getMessage()]
    assert len(programs) == 4 and max(programs) < began[0]


class Lowered:
    """A jitted function that is lowered for CUDA, and never compiled."""

    def __init__(self, program, texts):
        self._program, self._texts = program, texts

    def lower(self, *arguments, **options):
        lowered = self._program.trace(*arguments, **options).lower(lowering_platforms=("cuda",))
        self._texts.append(lowered.as_text())
        return SimpleNamespace(out_info=lowered.out_info, compile=lambda: None)


@NEEDS_KERNELS
@pytest.mark.skipif(ON_GPU, reason="lowered on the CPU")
@pytest.mark.parametrize(
    ("direction", "format"),
    [
        (zo.normal, None),
        (zo.lowrank(8), None),
        (zo.lowrank(2, refresh=None), zo.int8(compute="int8")),
        pytest.param(zo.lora(8, targets=("*.attn.*", "head.*")), zo.int4(), marks=pytest.mark.slow),
        (zo.dense("rademacher", refresh=4), zo.int8()),
    ],
    ids=str,
)
def test_visits_lower_for_cuda_with_all_kernels(direction, format, tmp_path, monkeypatch):
    """As on an H200, where Mosaic refuses what shared memory does not hold; it does so here too."""
    problem, texts = implementations.problem, []
    monkeypatch.setattr(implementations, "problem", lambda name: None if name == "mosaic" else problem(name))
    layers = importlib.import_module("zo2jax.models.layers")
    monkeypatch.setattr(layers, "backend", lambda: "gpu")  # products of 16 bits
    monkeypatch.setattr(layers, "cudnn_applies", lambda *_: False)  # JAX asks whether it is installed
    for name in ("train", "read"):
        monkeypatch.setattr(visits, name, Lowered(getattr(visits, name), texts))
    sizes = {"vocabulary": 1024, "size": 256, "hidden": 512, "heads": 4, "kv_heads": 2, "head_size": 64}
    model = LlamaConfig(**sizes, layers=1, context=128, tied=False).init(jax.random.key(0), jnp.bfloat16)
    ids = jnp.zeros((2, 64), jnp.int32)
    estimator = zo.averaged(zo.two_point(1e-3, direction=direction), 2)
    with (
        zo.Run(model.with_format(format), estimator, zo.sgd(1e-3), directory=tmp_path, key=jax.random.key(0)) as run,
        pytest.raises(TypeError, match="'Lowered' object is not callable"),  # all are lowered before the first visit
    ):
        run.step({"ids": ids, "targets": ids})
    assert len(texts) >= 3 and any(
        "mosaic_gpu" in text for text in texts
    )  # an embedding may come before all that trains
