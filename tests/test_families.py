"""Llama, Qwen3, OPT and GPT-2 with each head against transformers: logits, losses, files both ways."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    CASES,
    CONFIGS,
    HEADS,
    LABELS,
    MAIN,
    PAD,
    make_model,
    make_reference,
    masked,
    random_ids,
)
from families import reference_logits as logits_of
from safetensors.numpy import load_file, save_file

import zo2jax as zo
from zo2jax.models import hub
from zo2jax.models.blocks import get_leaf, owned_shapes
from zo2jax.models.heads import CausalLM

TIME = 24
LENGTHS = np.array([TIME, 15, 3])
RIGHT = np.arange(TIME) < LENGTHS[:, None]
QA_PREFIX = {"llama": "transformer.", "qwen3": "transformer.", "gpt2": "transformer.", "opt": "model."}


pytestmark = pytest.mark.usefixtures("quick_compilation")


PAIRS = [(case, head) for case in CASES for head in HEADS if case in MAIN or head == "CausalLM"]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory):
    """(the transformers model, ours loaded from its files)."""
    folder = tmp_path_factory.mktemp("reference")
    reference = make_reference(*request.param, folder)
    ours = zo.load(folder)
    assert ours.config.head == HEADS[request.param[1]]
    return reference, ours


def bits(model):
    return {name: np.asarray(get_leaf(model.params, name)) for name in model.config.hub_names()}


def assert_same(first, second):
    """Equal configurations, and leaves of equal names, dtypes and bits."""
    assert first.config == second.config
    a, b = bits(first), bits(second)
    assert a.keys() == b.keys()
    assert not [n for n in a if a[n].dtype != b[n].dtype or a[n].tobytes() != b[n].tobytes()]


def assert_read(model, info, reference):
    """Nothing missing or unexpected, and the tensors of another transformers model bit by bit."""
    assert not any(info.values()), info
    mine, theirs = model.state_dict(), reference.state_dict()
    assert mine.keys() == theirs.keys()
    assert not [n for n in mine if mine[n].numpy().tobytes() != theirs[n].numpy().tobytes()]


def auto(suffix):
    return getattr(pytest.importorskip("transformers"), f"AutoModel{suffix}")


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_are_those_of_transformers(pair, padding):
    reference, ours = pair
    whole = isinstance(ours.config.head, zo.Classification)
    real = np.full(RIGHT.shape, True) if padding == "none" else RIGHT
    mask = real[:, ::-1] if padding == "left" else real
    ids = np.where(mask, random_ids(1, mask.shape), PAD)
    theirs = logits_of(reference, ids, None if padding == "none" else mask.astype(np.int64))
    if padding == "left" and not whole:
        theirs = np.stack([np.roll(row, n - TIME, axis=0) for row, n in zip(theirs, LENGTHS, strict=True)])
    moved = zo.realign(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
    mine = ours.logits(*{"none": (ids,), "right": (ids, LENGTHS), "left": moved}[padding])
    assert (mine.dtype, mine.shape) == (jnp.float32, theirs.shape)
    at = np.full(len(ids), True) if whole else real
    assert np.abs(theirs[at]).max() > 1 and np.std(theirs[at]) > 0.2
    np.testing.assert_allclose(np.asarray(mine)[at], theirs[at], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shard_size, config", [("5GB", "own"), ("5KB", "copied")])
def test_exports_are_read_by_transformers_and_by_load(pair, shard_size, config, tmp_path, monkeypatch):
    """Without its folder, a model's config.json is written from our own configuration instead of copied."""
    reference, ours = pair
    monkeypatch.setattr(hub, "_SHARD_SIZE", shard_size)
    folder = hub.export(ours if config == "copied" else replace(ours, folder=None), tmp_path / "m")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "5KB")
    read, info = auto(ours.config.head.suffix).from_pretrained(folder, output_loading_info=True)
    assert type(read) is type(reference)
    assert_read(read, info, reference)
    ids = random_ids(2, (2, TIME))
    np.testing.assert_array_equal(logits_of(read.eval(), ids), logits_of(reference, ids))
    if isinstance(ours.config.head, zo.Classification):
        assert read.config.id2label == dict(enumerate(LABELS))
        assert read.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert_same(zo.load(folder), ours)


@pytest.fixture(scope="module", params=MAIN)
def language_model(request, tmp_path_factory):
    """(the transformers model, ours, the case)."""
    folder = tmp_path_factory.mktemp("language model")
    return make_reference(request.param, "CausalLM", folder), zo.load(folder), request.param


@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering"])
def test_another_head_on_a_language_model(language_model, head, tmp_path):
    """The backbone stays as it is, the head is new, and transformers reads the export as a model of that kind."""
    _, ours, _ = language_model
    kind = zo.Classification(("a", "b")) if head == "SequenceClassification" else zo.QuestionAnswering()
    made = zo.load(ours.folder, head=kind)
    assert_same(made, zo.load(ours.folder, head=kind))
    before, after = bits(ours), bits(made)
    new = {"head.weight"} | ({"head.bias"} if head == "QuestionAnswering" else set())
    assert after.keys() == before.keys() - {"head.weight"} | new
    assert not [n for n in after.keys() - new if after[n].tobytes() != before[n].tobytes()]
    assert after["head.weight"].shape == (2, ours.config.head_size_in)
    assert 0.01 < after["head.weight"].std() < 0.03 and not after.get("head.bias", np.zeros(2)).any()
    folder = hub.export(made, tmp_path / "m")
    read, info = auto(kind.suffix).from_pretrained(folder, output_loading_info=True)
    assert type(read).__name__.endswith(f"For{head}") and not any(info.values()), info
    assert head == "QuestionAnswering" or read.config.id2label == {0: "a", 1: "b"}
    ids = random_ids(3, (1, TIME))
    mine = made.logits(ids)
    np.testing.assert_allclose(mine, logits_of(read.eval(), ids), rtol=0, atol=1e-5)
    assert np.abs(logits_of(read, ids)).max() > 0.05
    assert_same(zo.load(folder), made)


def test_question_answering_files_have_the_names_of_transformers(language_model):
    _, ours, case = language_model
    config = replace(ours.config, head=zo.QuestionAnswering())
    assert {n.split(".")[0] + "." for n in config.hub_names().values()} == {
        QA_PREFIX[case.split()[0]],
        "qa_outputs.",
    }


EXTRA = {
    "llama": {"layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
    "qwen3": {},
    "opt": {"decoder.version": np.array([3.0], np.float32)},
    "gpt2": {"h.0.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)), "h.1.attn.masked_bias": np.float32(-1e4)},
}


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefixed"])
def test_files_with_buffers_and_of_bare_backbones_load(language_model, prefixed, tmp_path):
    """Old files hold masks and versions beside the weights, and those of bare models name them without a prefix."""
    reference, ours, case = language_model
    (reference if prefixed else reference.base_model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = f"{reference.base_model_prefix}." if prefixed else ""
    assert all(name.startswith((prefix, "lm_head.")) for name in tensors)
    assert prefixed or not any(name.startswith(("model.", "transformer.")) for name in tensors)
    tensors |= {prefix + name: np.asarray(buffer) for name, buffer in EXTRA[case.split()[0]].items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if prefixed or ours.config.tied:
        assert_same(zo.load(tmp_path), ours)
        return
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight$"):
        zo.load(tmp_path)
    classifier = zo.Classification(("a", "b"))
    assert_same(zo.load(tmp_path, head=classifier), zo.load(ours.folder, head=classifier))


@pytest.mark.parametrize("case", MAIN)
def test_classification_loss_is_that_of_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    reference = make_reference(case, "SequenceClassification", tmp_path)
    model, ids, labels = zo.load(tmp_path), np.where(RIGHT, random_ids(4, RIGHT.shape), PAD), np.array([2, 0, 1])
    with torch.no_grad():
        more = masked(reference, RIGHT.astype(np.int64))
        theirs = float(reference(torch.tensor(ids), labels=torch.tensor(labels), **more).loss)
    batch, loss_sum = as_batch(ids=ids, lengths=LENGTHS, labels=labels), jax.jit(model.loss_sum)
    total, count = loss_sum(model.params, batch)
    assert theirs > 0.1 and (float(count), total.dtype) == (3, jnp.float32)
    np.testing.assert_allclose(total / count, theirs, rtol=1e-5, atol=1e-5)
    logits = logits_of(reference, ids, RIGHT.astype(np.int64)).astype(np.float64)
    expected = cross_entropy(logits[[0, 2]], np.array([2, 1])).sum()  # the second is left out
    some = loss_sum(model.params, batch | as_batch(labels=np.array([2, -1, 1])))
    np.testing.assert_allclose(some, [expected, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", MAIN)
def test_question_answering_loss_is_that_of_transformers(case, tmp_path):
    """On padded rows too, but that padding is no answer here."""
    torch = pytest.importorskip("torch")
    reference = make_reference(case, "QuestionAnswering", tmp_path)
    model, ids = zo.load(tmp_path), random_ids(5, RIGHT.shape)
    spans = {"starts": np.array([20, 3, 0]), "ends": np.array([23, 3, 2])}
    with torch.no_grad():
        positions = {f"{k[:-1]}_positions": torch.tensor(v) for k, v in spans.items()}
        theirs = float(reference(torch.tensor(ids), **positions).loss)
    total, count = jax.jit(model.loss_sum)(model.params, as_batch(ids=ids, **spans))
    assert theirs > 0.1 and float(count) == 3
    np.testing.assert_allclose(total / count, theirs, rtol=1e-5, atol=1e-5)
    logits = logits_of(reference, ids).astype(np.float64)
    expected = 0.0
    for i in (0, 1):  # the third is left out
        first, last = (cross_entropy(logits[i, : LENGTHS[i], k], v[i]) for k, v in enumerate(spans.values()))
        expected += (first + last) / 2
    left_out = {name: np.where(np.arange(3) == 2, -1, v) for name, v in spans.items()}
    padded = jax.jit(model.loss_sum)(model.params, as_batch(ids=ids, lengths=LENGTHS, **left_out))
    np.testing.assert_allclose(padded, [expected, 2], rtol=1e-5, atol=1e-5)


def as_batch(**arrays):
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def cross_entropy(logits, label):
    """-log softmax(logits)[label] in float64, over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=-1)) - np.take_along_axis(shifted, np.asarray(label)[..., None], -1)[..., 0]


def test_token_log_probs_are_those_of_torch(language_model):
    torch = pytest.importorskip("torch")
    reference, ours, _ = language_model
    ids, targets = random_ids(6, (2, TIME)), random_ids(7, (2, TIME))
    theirs = torch.log_softmax(torch.tensor(logits_of(reference, ids)), -1)
    theirs = theirs.gather(-1, torch.tensor(targets)[..., None])[..., 0].numpy()
    mine = ours.token_log_probs({"ids": ids.astype(np.int32), "targets": targets.astype(np.int32)})
    assert (mine.dtype, mine.shape) == (jnp.float32, (2, TIME))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


SHORT = {
    "Llama": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads",
    "Qwen3": "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings",
    "OPT": "vocab_size hidden_size ffn_dim num_hidden_layers num_attention_heads max_position_embeddings",
    "GPT2": "vocab_size n_embd n_layer n_head n_positions",
}


@pytest.mark.parametrize("family", SHORT)
def test_keys_that_config_json_lacks_have_the_values_of_transformers(family):
    config = getattr(pytest.importorskip("transformers"), f"{family}Config")
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    short = dict.fromkeys(SHORT[family].split(), 8) | ids
    read = hub.CONFIGS[config.model_type].from_hub
    assert read(short) == read(config(**short).to_dict())


# From here on without torch.


@pytest.mark.parametrize(
    "case, key, value, message",
    [
        ("qwen3", "use_sliding_window", True, "use_sliding_window is true"),
        ("opt 125m", "activation_function", "gelu", "activation_function is 'gelu', expected 'relu'"),
        ("opt 350m", "ffn_dim", None, "found ffn_dim=None"),
        ("gpt2", "activation_function", "relu", "activation_function is 'relu', expected 'gelu_new'"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True, expected False"),
        ("gpt2", "scale_attn_weights", False, "scale_attn_weights is False, expected True"),
        ("gpt2", "id2label", {"0": "a", "1": "a"}, r"labels are \('a', 'a'\), expected two or more different"),
    ],
)
def test_what_is_not_computed_here_is_refused(case, key, value, message):
    raw = make_model(case).config.to_hub() | {"architectures": ["XForSequenceClassification"]}
    with pytest.raises(ValueError, match=message):
        type(make_model(case).config).from_hub(raw | {key: value})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CONFIGS)
def test_round_trip_is_bitwise(case, head, tmp_path):
    """Without transformers: what is written in bfloat16 comes back, its configuration too."""
    model = make_model(case, "bfloat16", head=HEADS[head], bos_id=1, pad_id=2, stop_ids=(3,))
    folder = hub.export(model, tmp_path / "m")
    assert_same(zo.load(folder), model)
    written = json.loads((folder / "config.json").read_text())["architectures"]
    assert written[0].endswith("GPT2LMHeadModel" if (case, head) == ("gpt2", "CausalLM") else f"For{head}")


@pytest.mark.parametrize("case", CONFIGS)
def test_a_language_models_head_comes_back(case, tmp_path):
    """Where it is tied to the embedding; where it is not, a file for another purpose has none, and it is made new."""
    model = make_model(case)
    folder = hub.export(zo.load(hub.export(model, tmp_path / "lm"), head=zo.QuestionAnswering()), tmp_path / "qa")
    again = zo.load(folder, head=CausalLM())
    if model.config.tied:
        assert_same(again, model)
    else:
        assert bits(again).keys() == bits(model).keys()
        assert again.params["head"]["weight"].shape == (31, 24)


@pytest.mark.parametrize("case", CONFIGS)
def test_half_precision_is_near_float32(case):
    """CPUs multiply in float32, whatever the matrices are; accelerators in bfloat16."""
    model, ids = make_model(case, "bfloat16"), random_ids(10, (2, TIME), 31)
    exact = make_model(case).replace(jax.tree.map(lambda x: x.astype(jnp.float32), model.params)).logits(ids)
    logits, error = model.logits(ids), 1e-5 if jax.default_backend() == "cpu" else 0.05
    assert logits.dtype == jnp.float32 and np.abs(exact).max() > 1
    np.testing.assert_allclose(logits, exact, rtol=0, atol=error * float(np.abs(exact).max()))


@pytest.mark.parametrize("case, head", [*zip(MAIN[2:], HEADS, strict=True)])
def test_init(case, head):
    """Matrices from N(0, 0.02^2), norms of ones, biases of zeros: the leaves that the blocks ask for."""
    config = make_model(case, head=HEADS[head]).config
    model = config.init(jax.random.key(3), "bfloat16")
    shapes = owned_shapes(config.blocks("bfloat16"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    for name, leaf in bits(model).items():
        if leaf.ndim == 1:
            assert (leaf == name.endswith("weight")).all(), name
        else:
            assert abs(leaf.astype(np.float32).std() - 0.02) < (0.01 if leaf.size < 200 else 0.003), name


@pytest.mark.parametrize(
    "case, changes",
    [("opt 350m", {"biases": False}), *(pytest.param(x, {}, marks=pytest.mark.slow) for x in ("qwen3", "gpt2"))],
)
def test_run_is_the_step_of_mezo(case, changes, tmp_path):
    """The same directions, up to rounding the same losses, and so the same movement; Llama: see test_run.py."""
    model, estimator = make_model(case, layers=1, **changes), zo.two_point(1e-2, direction=zo.rademacher)
    batch = as_batch(ids=random_ids(8, (2, 8), 31), targets=random_ids(9, (2, 8), 31), lengths=[8, 5])
    algorithm = zo.mezo(model.loss, estimator, zo.sgd(1e-2))
    state, bare = jax.jit(algorithm.step)(algorithm.init(model.params, jax.random.key(11)), batch)
    with zo.Run(model, estimator, zo.sgd(1e-2), directory=tmp_path, key=jax.random.key(11)) as run:
        info = run.step(batch)
        trained = run.model
    np.testing.assert_allclose(info.loss, bare.loss, rtol=1e-6)
    np.testing.assert_allclose(info.projected_gradient, bare.projected_gradient, rtol=1e-3)
    assert abs(float(bare.projected_gradient[0])) > 1
    before, mine, theirs = bits(model), bits(trained), bits(model.replace(state.params))
    for name, start in before.items():
        assert np.abs(mine[name] - start).min() > 1e-4, name  # every weight moves
        np.testing.assert_allclose(mine[name] - start, theirs[name] - start, rtol=2e-3, atol=1e-6, err_msg=name)
