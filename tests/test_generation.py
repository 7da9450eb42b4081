"""Generation: greedy tokens against transformers, stops worked by hand, and what sampling draws."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, MAIN, PAD, make_model, make_reference, optimization, random_ids

import zo2jax as zo
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.generation import continuations, greedy, nucleus, sampling
from zo2jax.models.llama import LlamaConfig

NEW = 24
PROMPTS = [random_ids(seed, (1, length))[0].tolist() for seed, length in ((16, 11), (17, 4), (18, 7))]


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=MAIN)
def pair(request, tmp_path_factory):
    """(the transformers model, ours loaded from its files)."""
    folder = tmp_path_factory.mktemp("reference")
    return make_reference(request.param, "CausalLM", folder), zo.load(folder)


def generated(reference, stop=()):
    """(the new tokens of each row up to its stop token, by how much each beats the next best) by transformers."""
    torch, width = pytest.importorskip("torch"), max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": list(stop) or None, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    result = reference.generate(ids, attention_mask=(ids != PAD).long(), **options)
    best = torch.stack(result.logits, dim=1).topk(2).values.numpy()
    rows = result.sequences[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), NEW) for row in rows]
    margins = np.concatenate([b[:end, 0] - b[:end, 1] for b, end in zip(best, ends, strict=True)])
    return [row[:end] for row, end in zip(rows, ends, strict=True)], margins


def continued(model, prompts, tokens=NEW, **options):
    """The new tokens of each row up to its stop token, by `continuations`."""
    lengths = np.array([len(p) for p in prompts])
    ids = np.zeros((len(prompts), max(map(len, PROMPTS))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt

    def finished(row, new):
        return new[-1] in model.config.stop_ids

    return continuations(model.visits(), model.blocks, (ids, lengths), tokens, finished, **options)


def test_greedy_tokens_are_those_of_transformers(pair):
    """With a cache, without one, and each row alone: the same tokens, each chosen by a clear margin."""
    reference, ours = pair
    theirs, margins = generated(reference)
    assert margins.min() > 1e-3 and len(margins) == 3 * NEW
    assert len({token for row in theirs for token in row}) > 8
    with optimization(True):
        assert continued(ours, PROMPTS) == theirs
    assert continued(ours, PROMPTS, cache=False) == theirs
    assert [continued(ours, [prompt])[0] for prompt in PROMPTS] == theirs


def test_rows_end_at_stop_tokens_as_in_transformers(pair):
    """Rows end at different times, and the others go on."""
    reference, ours = pair
    whole, _ = generated(reference)
    counts = Counter(token for row in whole for token in set(row))
    stop = tuple(sorted(counts, key=lambda token: (abs(counts[token] - 1), token))[:2])
    expected, _ = generated(reference, stop)
    assert len({len(row) for row in expected}) > 1 and min(map(len, expected)) < NEW
    assert [row == full[: len(row)] for row, full in zip(expected, whole, strict=True)] == [True] * 3
    stopping = replace(ours, config=replace(ours.config, stop_ids=stop))
    assert continued(stopping, PROMPTS) == expected


@pytest.mark.parametrize("top_k", [0, 1, 5, 67, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_nucleus_is_that_of_transformers(top_k, top_p):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = 3 * np.random.default_rng(0).standard_normal((5, 67)).astype(np.float32)
    theirs = torch.tensor(logits)
    if top_k:
        theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
    kept = np.isfinite(theirs.numpy()).sum(axis=1)
    assert kept.min() >= 1 and (kept.max() < 67 or (top_k in (0, 67, 100) and top_p > 0.99))
    np.testing.assert_array_equal(nucleus(jnp.asarray(logits), top_k, top_p), theirs.numpy())


# From here on without torch.


@pytest.mark.parametrize("case", CONFIGS)
def test_a_cache_changes_no_token(case):
    """Sampled ones neither; rows do not see each other."""
    model = make_model(case)
    prompts = [[token % 31 for token in p] for p in PROMPTS]
    for choose in (greedy, sampling(jax.random.key(1), temperature=2.0)):
        cached = continued(model, prompts, 12, choose=choose)
        assert continued(model, prompts, 12, choose=choose, cache=False) == cached
        assert continued(model, [prompts[0], [1], [2]], 12, choose=choose)[0] == cached[0]


def test_finished_is_asked_of_live_rows_only():
    model, asked = make_model("gpt2"), []

    def finished(row, new):
        asked.append((row, len(new)))
        return (row, len(new)) in {(0, 3), (1, 1), (2, 4)}

    ids, lengths = np.ones((3, 4), np.int32), np.array([4, 2, 3])
    rows = continuations(model.visits(), model.blocks, (ids, lengths), 9, finished)
    assert [len(row) for row in rows] == [3, 1, 4]
    assert asked == [(0, 1), (1, 1), (2, 1), (0, 2), (2, 2), (0, 3), (2, 3), (2, 4)]


ALPHABET = "abcdefghijklmnopqrstuvwxyzé"  # the last letter is two tokens


@pytest.fixture(scope="module")
def chain(byte_tokenizer):
    """A model that continues each letter with the next one, and é with a."""
    shape = {"vocabulary": 256, "size": 256, "hidden": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_size": 4}
    config = LlamaConfig(context=64, **shape)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), owned_shapes(config.blocks()))
    letters = byte_tokenizer.encode(ALPHABET).ids
    following = np.zeros((256, 256), np.float32)
    following[np.roll(letters, -1), letters] = 1
    params["embed"]["weight"], params["head"]["weight"] = jnp.eye(256), jnp.asarray(following)
    params["head"]["norm"]["weight"] = jnp.ones(256)
    return zo.Model(config, config.blocks(), params, tokenizer=byte_tokenizer)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    "prompts, tokens, stop, expected",
    [
        ("a", 9, (), "bcdefghij"),
        (["a"], 9, (), ["bcdefghij"]),
        (["a", "vw"], 9, (), ["bcdefghij", "xyzéabcd"]),
        (("a", "klm"), 9, ("fg",), ["bcde", "nopqrstuv"]),
        ("x", 9, ("é",), "yz"),
        (["a", "x"], 9, ["zz", "gh", "e", "de"], ["bc", "yzéabc"]),
        (["a", "b"], 9, ("bc", "e"), ["", "cd"]),
        ("a", 9, ("jk",), "bcdefghij"),
        ("y", 2, (), "z\ufffd"),
        ("a", 0, (), ""),
    ],
)
def test_texts_and_stop_strings(chain, prompts, tokens, stop, expected, cache):
    assert chain.generate(prompts, tokens, stop=stop, cache=cache) == expected


def test_one_stop_string_is_one_string(chain):
    assert chain.generate("a", 6, stop="cd") == chain.generate("a", 6, stop=("cd",)) == "b"


@pytest.mark.parametrize("head", [zo.Classification(("no", "yes")), zo.QuestionAnswering()])
def test_other_heads_write_no_text(chain, head):
    model = replace(replace(chain.config, head=head).init(jax.random.key(0)), tokenizer=chain.tokenizer)
    with pytest.raises(ValueError, match="writes no text: expected a language model"):
        model.generate("a", 3)


@pytest.mark.parametrize("cache", [True, False])
def test_a_stop_token_in_the_middle(chain, cache):
    (e, r), (x, _) = (chain.tokenizer.encode(text).ids for text in ("er", "xa"))
    stopping = replace(chain, config=replace(chain.config, stop_ids=(e, r)))
    expected = ["bcd", "yzéab", "", "q"]
    assert stopping.generate(["a", "x", "pd", "p"], 6, cache=cache) == expected
    assert stopping.generate([[x - 23], [x], [x, x - 20], [x - 8]], 6, cache=cache) == expected  # ids instead of texts
    assert stopping.generate(["a", "x"], 6, stop=("é", "d"), cache=cache) == ["bc", "yz"]


@pytest.mark.parametrize(
    "prompts, tokens, message",
    [
        ("a" * 60, 5, "65 tokens do not fit the model's context of 64"),
        (["a", "a" * 65], 0, "65 tokens do not fit the model's context of 64"),
        ("", 5, "a prompt is empty"),
        (["a", ""], 5, "a prompt is empty"),
        ([[]], 5, "a prompt is empty"),
        ([], 5, "a prompt is empty"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(chain, prompts, tokens, message):
    with pytest.raises(ValueError, match=message):
        chain.generate(prompts, tokens)


def test_the_whole_context_can_be_written(chain):
    whole = ALPHABET * 3
    assert chain.generate(["a", whole[:54]], 8) == ["bcdefghi", whole[54:62]]  # é is two of the 64 tokens, twice
    assert chain.generate("a", 63) == whole[1:62]


DRAWS, LOGITS = 20000, np.array([1.5, -0.5, 0.25, 2.0, -3.0, 1.0, 0.0], np.float32)


CUTS = [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.5}]


@pytest.mark.parametrize("along, options", [("rows", options) for options in CUTS] + [("steps", {})])
def test_frequencies_of_samples(along, options):
    """Those of the softmax, over the rows of one step and over the steps of one row."""
    choose = sampling(jax.random.key(3), **options)
    if along == "rows":
        tokens = choose(jnp.tile(LOGITS, (DRAWS, 1)), 5)
    else:
        tokens = jax.vmap(lambda step: choose(jnp.asarray(LOGITS)[None], step))(jnp.arange(DRAWS))[:, 0]
    p = softmax(LOGITS / options.get("temperature", 1.0), options.get("top_k", 7), options.get("top_p", 1.0))
    assert (tokens.dtype, tokens.shape) == (jnp.int32, (DRAWS,))
    counts = np.bincount(tokens, minlength=7)
    assert not counts[p == 0].any()
    assert (np.abs(counts / DRAWS - p) <= 4 * np.sqrt(p * (1 - p) / DRAWS)).all(), (counts / DRAWS, p)


def softmax(logits, top_k, top_p):
    """In float64, cut to the ``top_k`` most probable, and then to the fewest that reach ``top_p``."""
    p = np.exp(logits.astype(np.float64))
    order = np.argsort(-p)
    p[order[top_k:]] = 0
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p * p.sum()]] = 0
    return p / p.sum()


def test_rows_and_steps_are_independent():
    """Pairs of draws occur as often as the product of their probabilities says."""
    choose, p = sampling(jax.random.key(4)), softmax(LOGITS, 7, 1.0)
    tokens = np.asarray(jax.vmap(lambda step: choose(jnp.tile(LOGITS, (2, 1)), step))(jnp.arange(DRAWS)))
    product = np.outer(p, p)
    for first, second in (
        (tokens[:, 0], tokens[:, 1]),
        (tokens[1:, 0], tokens[:-1, 0]),
        (tokens[1:, 0], tokens[:-1, 1]),
    ):
        counts = np.bincount(7 * first + second, minlength=49).reshape(7, 7)
        expected = len(first) * product
        assert ((counts - expected) ** 2 / expected).sum() < 97  # chi-square, 48 degrees of freedom: p = 0.00004


def test_samples_have_addresses():
    """The same key gives the same tokens, a row's do not depend on how many rows there are, and keys differ."""
    logits = jnp.asarray(np.random.default_rng(5).standard_normal((64, 67)), jnp.float32)
    first = sampling(jax.random.key(0))(logits, 3)
    np.testing.assert_array_equal(first, sampling(jax.random.key(0))(logits, 3))
    np.testing.assert_array_equal(first[:5], sampling(jax.random.key(0))(logits[:5], 3))
    for other in (sampling(jax.random.key(1))(logits, 3), sampling(jax.random.key(0))(logits, 4)):
        assert (first != other).mean() > 0.9
    np.testing.assert_array_equal(sampling(jax.random.key(0), top_k=1)(logits, 3), greedy(logits, 3))


@pytest.mark.parametrize(
    "options",
    [{"temperature": t} for t in (0.0, -1.0, float("nan"))]
    + [{"top_k": -1}]
    + [{"top_p": p} for p in (0.0, -0.1, 1.1)],
)
def test_sampling_out_of_range_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*expected a positive number"):
        sampling(jax.random.key(0), **options)
