"""What only a GPU can show: cuDNN attention, true float32 products, and steps of bfloat16 models."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from zo2jax import stream
from zo2jax import visits as visits_of_a_stream
from zo2jax.models.blocks import visits
from zo2jax.models.generation import continuations
from zo2jax.models.gpt2 import Gpt2Config
from zo2jax.models.layers import attention, cudnn_applies, linear
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.model import Model
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
RNG = np.random.default_rng(41)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 8, 64), (8, 2, 128), (4, 4, 8), (6, 3, 96)])
@pytest.mark.parametrize("ragged", [False, True])
def test_cudnn_attention_is_as_near_to_float32_as_xla(dtype, heads, kv_heads, size, ragged):
    time = 130
    assert cudnn_applies(dtype, size)
    q, k, v = (jnp.asarray(RNG.normal(size=(3, time, n, size)), dtype) for n in (heads, kv_heads, kv_heads))
    lengths = jnp.array([130, 1, 77], jnp.int32) if ragged else None
    real = np.arange(time)[None, :] < (np.asarray(lengths)[:, None] if ragged else time)
    wide = attention(*(x.astype(jnp.float32) for x in (q, k, v)), lengths)
    errors = {
        name: np.abs(np.asarray(attention(q, k, v, lengths, name), np.float32) - np.asarray(wide))[
            np.broadcast_to(real, (3, time))
        ].max()
        for name in ("cudnn", "xla")
    }
    assert errors["cudnn"] <= 2 * errors["xla"]
    np.testing.assert_array_equal(attention(q, k, v, lengths), attention(q, k, v, lengths, "cudnn"))


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 64), (jnp.bfloat16, 12), (jnp.bfloat16, 512)])
def test_cudnn_by_name_is_refused_where_it_does_not_apply(dtype, size):
    x = jnp.ones((1, 4, 2, size), dtype)
    assert attention(x, x, x, None).shape == x.shape
    with pytest.raises(NotImplementedError, match=f"head size {size}"):
        attention(x, x, x, None, "cudnn")


def test_float32_is_float32():
    """No TF32, whose products are good to three digits."""
    x, w = RNG.normal(size=(256, 1024)), RNG.normal(size=(512, 1024))
    y = np.asarray(jax.jit(linear)(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)), np.float64)
    assert np.abs(y - x @ w.T).max() / np.abs(y).max() < 2e-6


@pytest.mark.parametrize("direction", [zo.normal, zo.rademacher])
def test_a_bfloat16_model_moves_alike_in_jit_scan_and_replay(direction):
    config = LlamaConfig(
        vocabulary=1000, size=256, hidden=688, layers=3, heads=4, kv_heads=2, head_size=64, context=128, tied=True
    )
    model = config.init(jax.random.key(0), jnp.bfloat16)
    ids = jnp.asarray(RNG.integers(0, 1000, (4, 128)), jnp.int32)
    batch = {"ids": ids, "targets": jnp.roll(ids, -1, axis=1)}
    algorithm = zo.mezo(model.loss, zo.two_point(1e-3, direction=direction), zo.sgd(1e-4, 0.1))
    start = algorithm.init(model.params, jax.random.key(2))
    end, infos = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.step(s, batch), s, None, length=5))(start)
    replayed = model.params
    for t in range(5):
        update = jax.tree.map(lambda x, t=t: x[t], infos.update)
        replayed = zo.apply_update(replayed, update, start.leaf_ids, direction=direction)
    jax.tree.map(np.testing.assert_array_equal, end.params, replayed)
    moved = np.mean(np.asarray(end.params["embed"]["weight"]) != np.asarray(model.params["embed"]["weight"]))
    assert moved > 0.01 and np.isfinite(infos.loss).all() and np.abs(infos.projected_gradient).max() > 0


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_of_several_members_is_that_of_each(ragged):
    """Under vmap the members join cuDNN's batch; lengths are shared by all."""
    q, k, v = (jnp.asarray(RNG.normal(size=(2, 3, 130, 4, 64)), jnp.bfloat16) for _ in range(3))
    lengths = jnp.array([130, 1, 77], jnp.int32) if ragged else None
    together = jax.jit(jax.vmap(lambda q, k, v: attention(q, k, v, lengths)))(q, k, v)
    real = np.arange(130)[None, :] < (np.asarray(lengths)[:, None] if ragged else 130)
    for m in range(2):
        alone = attention(q[m], k[m], v[m], lengths)
        where = np.broadcast_to(real, (3, 130))
        np.testing.assert_array_equal(np.asarray(together[m])[where], np.asarray(alone)[where])


def wide_model() -> Model:
    config = LlamaConfig(
        vocabulary=4096, size=2048, hidden=8192, layers=2, heads=16, kv_heads=16, head_size=128, context=64
    )
    return config.init(jax.random.key(0), jnp.bfloat16)


def test_a_run_moves_the_weights_like_the_plain_step(tmp_path):
    """Kernels, block by block, against `apply_update`, and both against XLA without kernels."""
    model, ids = wide_model(), RNG.integers(0, 4096, (1, 16)).astype(np.int32)
    batch = {"ids": ids, "targets": np.roll(ids, -1, 1)}
    expected = jax.tree.map(jnp.copy, model.params)
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-4, 0.1), directory=tmp_path, key=jax.random.key(2)) as run:
        ids_of_leaves = run.state.leaf_ids
        for _ in range(3):
            expected = zo.apply_update(expected, run.step(batch).update, ids_of_leaves)
        jax.tree.map(np.testing.assert_array_equal, run.model.params, expected)
    leaf = expected["layers.0.mlp"]["up"]["weight"]
    assert np.mean(np.asarray(leaf) != np.asarray(model.params["layers.0.mlp"]["up"]["weight"])) > 0.01


def train_on(directory: Path, copy: Path | None = None) -> None:
    """Eight steps of `wide_model`; after half of them the directory is copied."""
    ids = np.random.default_rng(5).integers(0, 4096, (8, 1, 64)).astype(np.int32)
    batches = [{"ids": row, "targets": np.roll(row, -1, 1)} for row in ids]
    model, half = wide_model(), len(batches) // 2
    with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-4), directory=directory, key=jax.random.key(2)) as run:
        for batch in run.remaining(batches):
            run.step(batch)
            if copy is not None and run.steps_done == half:
                run.flush()
                shutil.copytree(directory, copy)


def test_another_process_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Losses too: it computes with the kernels that XLA chose by timing in the first one."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    for arguments in (f"Path({str(whole)!r}), Path({str(copy)!r})", f"Path({str(copy)!r})"):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_gpu import *\n"
        subprocess.run([sys.executable, "-c", f"{code}train_on({arguments})"], check=True)
    assert (copy / "compiled").is_dir() and len(list((whole / "compiled").iterdir())) > 1
    assert (whole / "journal").read_bytes() == (copy / "journal").read_bytes()


@pytest.mark.parametrize(("family", "tier"), [("opt", "host"), ("llama", "disk"), ("qwen3", "mixed")])
def test_tiers_change_no_bit(family, tier, tmp_path):
    """With the kernels and the driver's copies, on pages of some megabytes."""
    model = replace(FAMILIES[family], size=512, hidden=2048, heads=8).init(jax.random.key(0), jnp.bfloat16)
    names = [block.name for block in model.blocks]
    tiers = dict.fromkeys(names, tier)
    if tier == "mixed":
        tiers = dict(zip(names, ["host", "disk", "device", "host", "disk", "host"], strict=True))
    ids = RNG.integers(0, 512, (2, 64)).astype(np.int32)
    batch, found = {"ids": ids, "targets": np.roll(ids, -1, 1)}, []
    for plan in (zo.Plan(), zo.Plan(tiers), zo.Plan(tiers, prefetch=2)):
        options = {"directory": tmp_path / str(len(found)), "key": jax.random.key(2), "plan": plan}
        with zo.Run(model, zo.two_point(1e-3), zo.sgd(1e-3, 0.1), **options) as run:
            infos = [run.step(batch) for _ in range(20)]
            losses = [run.evaluate([batch]), *(float(info.loss) for info in infos)]
            found.append((run.state.params, losses, [info.update for info in infos]))
    for weights, losses, _ in found[1:]:
        assert losses == found[0][1]
        jax.tree.map(np.testing.assert_array_equal, weights, found[0][0])
    expected, leaf_ids = model.params, jnp.asarray(zo.directions.leaf_ids(model.params))
    for update in found[0][2]:
        expected = zo.apply_update(expected, update, leaf_ids)
    jax.tree.map(np.testing.assert_array_equal, found[0][0], expected)


def test_a_visit_needs_the_probes_of_one_leaf():
    """Beside the weights, which are changed in place; activations are small here."""
    model, estimator = wide_model(), zo.two_point(1e-3)
    run = stream.Stream(model.blocks, model.source, zo.normal, zo.stochastic, zo.Plan())
    update = zo.Update(jax.random.split(jax.random.key(0), 1), jnp.zeros(1), jnp.zeros(()))
    tokens, number = jnp.zeros((1, 16), jnp.int32), 2
    pages, rest = run._conveyor.take(number), run._resident.vectors()[model.blocks[number].name]
    compiled = visits_of_a_stream.train.lower(
        run._stages[number],
        pages,
        rest,
        (),
        None,
        run._ids[number],
        update,
        (update.keys, jnp.asarray(estimator.probes)),
        jnp.zeros((2, 1, 16, 2048)),
        {"ids": tokens, "targets": tokens},
        direction=zo.normal,
        rounding=zo.stochastic,
    ).compile()
    memory = compiled.memory_analysis()
    largest = max(place.size * 2 for _, place in run._stages[number].layout.matrices)
    assert memory.alias_size_in_bytes >= 0.99 * run._stages[number].layout.nbytes
    assert memory.temp_size_in_bytes < 2.2 * largest


SHAPE = {"vocabulary": 512, "size": 256, "hidden": 512, "layers": 2, "heads": 4, "context": 128}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, kv_heads=2, head_size=64),
    "qwen3": Qwen3Config(**SHAPE, kv_heads=2, head_size=64),
    "opt": OptConfig(**SHAPE, token_size=256),
    "opt-350m": OptConfig(**SHAPE, token_size=128, pre_norm=False, final_norm=False),
    "gpt2": Gpt2Config(**SHAPE),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_bfloat16_are_near_to_float32(family):
    """Right-padded rows through cuDNN, against the same weights in float32 through XLA."""
    model = FAMILIES[family].init(jax.random.key(1), jnp.bfloat16)
    wide = model.replace(jax.tree.map(lambda x: x.astype(jnp.float32), model.params))
    ids, lengths = RNG.integers(0, 512, (3, 96)).astype(np.int32), np.array([96, 5, 60], np.int32)
    real = np.arange(96)[None, :] < lengths[:, None]
    exact = np.asarray(wide.logits(ids, lengths))[real]
    assert np.abs(np.asarray(model.logits(ids, lengths))[real] - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_follows_the_logits(family, dtype):
    """Every token is the best, or within rounding of the best, of a pass over the whole row."""
    model = FAMILIES[family].init(jax.random.key(2), dtype)
    lengths = np.array([17, 3, 9], np.int32)
    ids = RNG.integers(0, 512, (3, 24)).astype(np.int32)
    written = continuations(visits(model.blocks, model.params), model.blocks, (ids, lengths), 20, lambda *_: False)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    whole = np.zeros((3, 40), np.int32)
    for i, (row, length, new) in enumerate(zip(ids, lengths, written, strict=True)):
        whole[i, : length + 20] = [*row[:length], *new]
    logits = np.asarray(model.logits(whole, lengths + 20))
    for row, length, new in zip(logits, lengths, written, strict=True):
        at = row[length - 1 : length + 19]
        assert (at.max(axis=1) - at[np.arange(20), new] <= tolerance * np.abs(at).max()).all()


def test_a_step_on_generated_text_moves_the_weights(tmp_path):
    """Both probes write with caches of their own; the update is applied to bfloat16 weights by the kernel."""
    model = replace(FAMILIES["opt"].init(jax.random.key(3), jnp.bfloat16), tokenizer=Digits())
    before = jax.tree.map(np.asarray, model.params)
    batch = {"ids": RNG.integers(0, 512, (4, 16)).astype(np.int32), "lengths": np.array([16, 3, 9, 1])}
    batch["answers"] = [["7"]] * 4
    score = zo.Generated(lambda text, answers: sum(map(int, text.split())) / 1000, tokens=8, stop=())
    with zo.Run(model, zo.two_point(1e-1), zo.sgd(1e-2), directory=tmp_path, key=jax.random.key(0), loss=score) as run:
        info = run.step(batch)
        assert float(info.projected_gradient[0]) != 0
        after = run.model.params
    moved = [np.mean(a != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert min(moved) > 0.5


class Digits:
    """Decodes tokens to their numbers."""

    def decode(self, ids):
        return " ".join(map(str, ids))
