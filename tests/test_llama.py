"""Llama against transformers on torch, against NumPy in float64, and its own invariants."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from zo2jax.models import hub
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.layers import attention, realign
from zo2jax.models.llama import LlamaConfig, RopeScaling, rope_frequencies

pytestmark = pytest.mark.usefixtures("quick_compilation")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What transformers' LlamaConfig is asked for; "stories" is the real model instead of random weights.
CASES = {
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "odd heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6},
    "llama 3 rope": {"rope_parameters": LLAMA3_ROPE},
    "tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "stories": None,
}
BATCH, TIME = 3, 64
LENGTHS = np.array([TIME, 41, 7])


def make_reference(changes: dict, folder: Path):
    """A transformers model with random weights (norms and biases too), saved to ``folder``."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 67}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**shape | heads | {"max_position_embeddings": 128} | changes)
    model = transformers.LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            random = 0.2 * rng.standard_normal(tuple(leaf.shape)) + (1 if "norm" in name else 0)
            leaf.copy_(torch.tensor(random))
    model.save_pretrained(folder)
    return model.eval()


def reference_logits(model, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    torch = pytest.importorskip("torch")
    more = {}
    if mask is not None:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        more = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(positions)}
    with torch.no_grad():
        return model(torch.tensor(ids), **more).logits.numpy()


def random_ids(vocabulary: int, seed: int = 1, shape: tuple[int, int] = (BATCH, TIME)) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocabulary, size=shape)


def assert_close(ours: jax.Array, theirs: np.ndarray, real: np.ndarray) -> None:
    """Logits of the real tokens agree within 1e-4, and are not so small that this means nothing."""
    assert np.abs(theirs[real]).max() > 1
    np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(the transformers model, ours loaded from its files)."""
    pytest.importorskip("torch").set_num_threads(1)  # models this small only lose time with more
    folder = tmp_path_factory.mktemp("reference")
    if CASES[request.param] is not None:
        return make_reference(CASES[request.param], folder), zo.load(folder)
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue("stories")
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype="float32").eval(), zo.load(folder)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_are_those_of_transformers(pair, padding):
    reference, ours = pair
    ids = random_ids(ours.config.vocabulary)
    right = np.arange(TIME) < LENGTHS[:, None]
    if padding == "none":
        assert_close(ours.logits(ids), reference_logits(reference, ids), np.full(ids.shape, True))
    elif padding == "right":
        mask = right.astype(np.int64)
        assert_close(ours.logits(ids, LENGTHS), reference_logits(reference, ids, mask), right)
    else:
        left = right[:, ::-1]
        moved, lengths = realign(jnp.asarray(ids, jnp.int32), jnp.asarray(left))
        assert lengths.tolist() == LENGTHS.tolist()
        theirs = reference_logits(reference, ids, left.astype(np.int64))
        shifted = np.stack([np.roll(row, n - TIME, axis=0) for row, n in zip(theirs, LENGTHS, strict=True)])
        assert_close(ours.logits(moved, lengths), shifted, right)


@pytest.mark.parametrize("shard_size, config", [("5GB", "own"), ("20KB", "copied")])
def test_transformers_reads_exports(pair, shard_size, config, tmp_path, monkeypatch):
    """Without its folder, a model's config.json is written from our own configuration instead of copied."""
    transformers = pytest.importorskip("transformers")
    reference, ours = pair
    monkeypatch.setattr(hub, "_SHARD_SIZE", shard_size)
    folder = hub.export(ours if config == "copied" else replace(ours, folder=None), tmp_path / "m")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    read, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert str(read.dtype) == "torch.float32"
    ids = random_ids(ours.config.vocabulary, seed=2)
    np.testing.assert_array_equal(reference_logits(read, ids), reference_logits(reference, ids))


def test_greedy_text_is_that_of_transformers(stories):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reference, ours = transformers.LlamaForCausalLM.from_pretrained(stories, dtype="float32"), zo.load(stories)
    ids = ours.tokenizer.encode("Once upon a time").ids
    theirs = reference.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
    assert ours.generate("Once upon a time", 40) == ours.tokenizer.decode(theirs.tolist())


# From here on without torch.


def make_config(**changes) -> LlamaConfig:
    shape = {"vocabulary": 31, "size": 24, "hidden": 20, "layers": 2, "heads": 3, "kv_heads": 1, "head_size": 8}
    return LlamaConfig(**shape | {"context": 64} | changes)


@cache
def make_model(**changes) -> zo.Model:
    """Random weights that are ten times larger than those of init, so that the logits are not tiny."""
    config, rng = make_config(**changes), np.random.default_rng(0)
    shapes = owned_shapes(config.blocks())
    leaves = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape) + (s.ndim == 1), s.dtype), shapes)
    return zo.Model(config, config.blocks(), leaves)


def test_rope_scaling_matters():
    """The oracle's Llama-3 case would not notice a missing scaling if it did not change the logits."""
    plain, ids = make_model(), random_ids(31)
    config = make_config(rope_scaling=RopeScaling(factor=8.0, low=1.0, high=4.0, original_context=16))
    scaled = replace(plain, config=config, blocks=config.blocks())
    difference = np.asarray(scaled.logits(ids) - plain.logits(ids))
    assert np.abs(difference[:, 0]).max() == 0
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize(
    "theta, size, factor, low, high, original",
    [
        (500000.0, 128, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (500000.0, 64, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        (10000.0, 8, 8.0, 1.0, 4.0, 16),
        (10000.0, 6, 3.0, 0.5, 2.0, 100),
    ],
)
def test_rope_frequencies_are_llama_3s(theta, size, factor, low, high, original):
    expected = []
    for i in range(size // 2):
        frequency = theta ** (-2 * i / size)
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low:
            frequency /= factor
        elif wavelength >= original / high:
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
    config = make_config(head_size=size, rope_theta=theta, rope_scaling=RopeScaling(factor, low, high, original))
    frequencies = rope_frequencies(config)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, np.array(expected), rtol=1e-6)


def test_padding_does_not_change_real_tokens():
    model = make_model()
    ids = random_ids(31, shape=(2, 20))
    other, lengths = ids.copy(), np.array([20, 9])
    other[1, 9:] = (ids[1, 9:] + 1) % 31
    first, second = np.asarray(model.logits(ids, lengths)), np.asarray(model.logits(other, lengths))
    assert (first[1, 9:] != second[1, 9:]).any()
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1, :9], second[1, :9])
    np.testing.assert_allclose(first[1, :9], model.logits(ids[1:, :9])[0], rtol=0, atol=1e-5)


@cache
def jitted_loss():
    model = make_model()
    return jax.jit(lambda batch: (*model.loss_sum(model.params, batch), model.loss(model.params, batch)))


@pytest.mark.parametrize("counted", ["all", "lengths", "weights", "nothing"])
def test_loss_is_the_float64_cross_entropy_of_the_logits(counted):
    rng = np.random.default_rng(3)
    ids, targets = random_ids(31, seed=4), random_ids(31, seed=5)
    weights = {
        "all": np.ones(ids.shape),
        "lengths": np.arange(TIME) < LENGTHS[:, None],
        "weights": rng.random(ids.shape) * (rng.random(ids.shape) < 0.5),
        "nothing": np.zeros(ids.shape),
    }[counted]
    more = {"all": {}, "lengths": {"lengths": jnp.asarray(LENGTHS)}}.get(counted, {"weights": jnp.asarray(weights)})
    batch = {"ids": jnp.asarray(ids, jnp.int32), "targets": jnp.asarray(targets, jnp.int32), **more}
    logits = np.asarray(make_model().logits(ids), np.float64)
    picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = (np.log(np.exp(logits).sum(axis=-1)) - picked) * weights
    results = jitted_loss()(batch)
    assert [r.dtype for r in results] == [jnp.float32] * 3
    expected = [losses.sum(), weights.sum(), losses.sum() / weights.sum() if weights.any() else 0]
    np.testing.assert_allclose(results, expected, rtol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.05), ("float16", 0.006)])
def test_half_precision_is_near_float32(dtype, tolerance):
    model, ids = make_model(), random_ids(31, seed=6)
    half = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, model.params)
    exact = np.asarray(model.replace(jax.tree.map(lambda x: x.astype(jnp.float32), half)).logits(ids))
    logits = model.replace(half).logits(ids)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert error < (1e-5 if jax.default_backend() == "cpu" else tolerance), error  # CPUs compute in float32


def test_realign_keeps_the_order_of_tokens_around_holes():
    ids, lengths = realign(jnp.array([[9, 1, 9, 2, 3], [4, 9, 9, 9, 5]]), jnp.array([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1]]))
    assert lengths.tolist() == [3, 2]
    assert [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)] == [[1, 2, 3], [4, 5]]


def test_greedy_generation_stops_at_a_stop_token(stories):
    model, prompt = zo.load(stories), "Once upon a time"
    text = model.generate(prompt, 40)
    assert text == model.generate(prompt, 40)
    start, written = model.tokenizer.encode(prompt).ids, []
    while len(written) < 40:
        ids = np.zeros((1, len(start) + 40))
        ids[0, : len(start) + len(written)] = [*start, *written]
        written.append(int(model.logits(ids)[0, len(start) + len(written) - 1].argmax()))
    assert text == model.tokenizer.decode(written)
    stop = written[12]
    stopping = replace(model, config=replace(model.config, stop_ids=(stop,)))
    assert stopping.generate(prompt, 40) == model.tokenizer.decode(written[: written.index(stop)])


def test_attention_of_several_dtypes():
    """As of probes in another dtype than the matrices that stay."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
    mixed = attention(q.astype("bfloat16"), k, v, None)
    alike = attention(*(x.astype("bfloat16") for x in (q, k, v)), None)
    assert mixed.dtype == "bfloat16" and bool((mixed == alike).all())


@pytest.mark.parametrize("dtype, size", [("float32", 8), ("bfloat16", 12)])
def test_cudnn_by_name_is_refused_where_it_does_not_apply(dtype, size):
    q = jnp.ones((1, 4, 2, size), dtype)
    with pytest.raises(NotImplementedError, match=f"does not take {dtype} with head size {size}"):
        attention(q, q, q, None, implementation="cudnn")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.logits(np.zeros((1, 65))), "65 tokens do not fit the model's context of 64"),
        (lambda m: m.logits(np.zeros(3)), r"ids\[3\]"),
        (lambda m: m.logits(np.zeros((2, 3)), [3]), r"ids\[2, 3\], lengths\[1\]"),
        (lambda m: m.generate("x", 3), "has no tokenizer"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model())
