"""Prefixes: real tokens before a row against those tokens themselves, PEFT's prefix tuning, training in every tier."""

import json
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import MAIN, make_model, make_reference, random_ids, reference_logits
from safetensors.numpy import load_file
from test_generation import PROMPTS, continued
from test_stream import FAMILIES, PLANS, batches
from test_targets import arrays, assert_same, changed

import zo2jax as zo
from zo2jax import cli
from zo2jax.adapters import export_prefix
from zo2jax.config import Config, ConfigError
from zo2jax.config_files import load_config, with_overrides
from zo2jax.directions import step_keys
from zo2jax.leaves import leaf_ids
from zo2jax.models import layers
from zo2jax.models.blocks import Source
from zo2jax.models.generation import sampling
from zo2jax.models.hub import export
from zo2jax.tasks.prepare import first_tokens, prepare
from zo2jax.trained import load_model, trained_model
from zo2jax.updates import perturb

pytestmark = pytest.mark.usefixtures("quick_compilation")
SLOW = pytest.mark.slow

TOKENS = (3, 9, 2, 7, 5)
PREFIX = zo.dense(targets=("*.prefix.*",))


def behind(tokens, ids):
    return np.concatenate([np.tile(np.asarray(tokens, ids.dtype), (len(ids), 1)), ids], axis=1)


@pytest.mark.parametrize("case", ["llama", "opt 350m", "gpt2", *(pytest.param(x, marks=SLOW) for x in MAIN[1:3])])
def test_an_untrained_prefix_is_its_tokens(case):
    """Logits of padded rows, and what is generated from them, with a cache and without."""
    model = make_model(case)
    prefixed, ids, lengths = zo.with_prefix(model, TOKENS), random_ids(1, (3, 9), 31), np.array([9, 4, 6])
    whole = np.asarray(model.logits(behind(TOKENS, ids), lengths + len(TOKENS)))[:, len(TOKENS) :]
    ours = np.asarray(prefixed.logits(ids, lengths))
    for row, theirs, length in zip(ours, whole, lengths, strict=True):
        np.testing.assert_allclose(row[:length], theirs[:length], atol=2e-5 * np.abs(whole).max())
    prompts = [[token % 31 for token in p] for p in PROMPTS]
    long = [[*TOKENS, *p] for p in prompts]
    for choose in ({}, {"choose": sampling(jax.random.key(1), temperature=2.0)}):
        expected = [continued_alone(model, p, **choose) for p in long] if not choose else None
        cached = continued(prefixed, prompts, 12, **choose)
        assert continued(prefixed, prompts, 12, cache=False, **choose) == cached
        assert expected in (None, cached)


def test_lengths_count_the_prefix(monkeypatch):
    """Only cuDNN looks at them."""
    seen, attention = [], layers.attention
    monkeypatch.setattr(layers, "attention", lambda *given: seen.append(given) or attention(*given))
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 2, 8))
    batch, before = {"ids": jnp.ones((2, 3), jnp.int32), "lengths": jnp.array([3, 1])}, jnp.ones((5, 2, 8))
    mixed, _ = layers.attend(q, k, k, batch, None, lambda: (before, before))
    (query, key, value, lengths), shapes = seen[0], (mixed.shape,)
    assert [*shapes, query.shape, key.shape, value.shape] == [(2, 3, 4, 8), (2, 8, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8)]
    assert lengths.tolist() == [8, 6]


def test_probes_write_with_their_own_prefix(tiny_folder, tmp_path):
    """Losses of texts that members generate, each with a cache of its own."""

    def score(text, answers):
        return float(sum(map(ord, text)))

    model = zo.with_prefix(zo.load(tiny_folder), TOKENS)
    rows, ids = [[97, 98, 99], [120, 32, 97]], leaf_ids(model.params)
    batch = {"ids": np.array(rows, np.int32), "lengths": np.array([3, 3]), "answers": [["a"], ["c"]]}
    how = {"directory": tmp_path, "key": jax.random.key(3), "loss": zo.Generated(score, tokens=6)}
    with zo.Run(model, zo.two_point(30.0, direction=PREFIX), zo.sgd(1e-1), **how) as run:
        losses = run.step(batch).losses.tolist()
    for found, scale in zip(losses, (30.0, -30.0), strict=True):
        params = perturb(model.params, step_keys(jax.random.key(3), 0, 1), jnp.float32([scale]), ids, direction=PREFIX)
        texts = model.replace(params).generate(rows, 6)
        assert found == pytest.approx(-np.mean([score(text.strip(), None) for text in texts]))
    assert losses[0] != losses[1]


def continued_alone(model, prompt):
    """Greedy tokens, each from all before it."""
    written = []
    for _ in range(12):
        logits = model.logits(np.array([prompt + written + [0] * (12 - len(written))], np.int32))
        written.append(int(np.argmax(logits[0, len(prompt) + len(written) - 1])))
    return written


def test_a_drawn_prefix_is_drawn_by_its_key():
    model = make_model("llama")
    a, b, c = (
        zo.with_prefix(model, 4, key=jax.random.key(seed)).params["layers.1.attn"]["prefix"] for seed in (1, 1, 2)
    )
    assert_same(a, b)
    assert (a["k"] != c["k"]).any() and a["k"].dtype == jnp.float32


def test_it_is_read_block_by_block_when_it_is_asked_for():
    """And once, whoever asks; the blocks of a run's stream too."""
    model, seen = make_model("qwen3"), []
    source = Source({n: (lambda n=n: seen.append(n) or model.params[n]) for n in model.source}, concurrent=True)
    prefixed = zo.with_prefix(replace(model, source=source), TOKENS)
    assert seen == []
    prefixed.source["layers.1.attn"]
    assert seen == ["layers.1.attn", *(block.name for block in model.blocks[:-1])]
    prefixed.source["layers.0.attn"]
    assert seen[len(model.source) :] == ["layers.0.attn"]
    again = zo.with_prefix(model, TOKENS)
    assert_same(arrays(again.source), arrays(prefixed.source))


def trained(model, directory, direction, plan=None, given=None):
    """(weights, losses, what steps reported, the weights before them)."""
    estimator = zo.averaged(zo.two_point(1e-1, direction=direction), 2)
    with zo.Run(model, estimator, zo.sgd(1e-1), directory=directory, key=jax.random.key(5), plan=plan) as run:
        start = arrays(run.model.source)
        infos = [run.step(batch) for batch in (given or batches(4))]
        return arrays(run.model.source), [x.losses.tolist() for x in infos], infos, start


CASES = [
    ("llama", "float32", None, PREFIX, "host"),
    ("opt", "float32", zo.int8(), PREFIX, "disk"),
    pytest.param("llama", "bfloat16", zo.int4(group=8), PREFIX, "mixed", marks=SLOW),
    pytest.param("qwen3", "float32", zo.int8(compute="int8"), PREFIX, "mixed", marks=SLOW),
    pytest.param("llama", "float32", zo.int8(), zo.lowrank(2, None, targets=("*.prefix.*",)), "host", marks=SLOW),
    pytest.param("llama", "float32", None, zo.lowrank(2, 2, targets=("*.prefix.*",)), "disk", marks=SLOW),
]


@pytest.mark.parametrize(("family", "dtype", "format", "direction", "tier"), CASES)
def test_it_trains_alone_in_every_tier(family, dtype, format, direction, tier, tmp_path):
    """Over matrices that are only read, codes too, and replayed; losses are those of the plain step."""
    base = FAMILIES[family](False).init(jax.random.key(1), dtype).with_format(format)
    model = zo.with_prefix(base, TOKENS)
    weights, losses, infos, start = trained(model, tmp_path / "device", direction)
    other = trained(model, tmp_path / "other", direction, PLANS[tier])
    assert other[1] == losses
    assert_same(weights, other[0])
    assert all(info.bytes_down == 0 for info in other[2]) and other[2][1].bytes_up > 0
    assert_same(arrays(zo.replay(model, tmp_path / "other").source), weights)
    expected = {f"layers.{i}.attn.prefix.{part}" for i in range(2) for part in "kv"}
    assert changed(model.replace(start), weights) == expected
    if direction is PREFIX:
        plain, ids = start, jnp.asarray(leaf_ids(start))
        for info in infos:
            plain = zo.apply_update(plain, info.update, ids, direction=direction)
        assert_same(arrays(plain), weights)
        algorithm = zo.mezo(model.loss, zo.averaged(zo.two_point(1e-1, direction=direction), 2), zo.sgd(1e-1))
        state, step = algorithm.init(start, jax.random.key(5)), jax.jit(algorithm.step)
        rough = 1e-5 if dtype == "float32" else 1e-4  # what codes stand for is rounded to 16 bits there
        rough = 1e-2 if format is not None and format.compute == "int8" else rough
        for batch, found in zip(batches(4), losses, strict=False):
            state, info = step(state, batch)
            np.testing.assert_allclose(found, info.losses, rtol=rough)


@pytest.mark.parametrize("format", [None, pytest.param(zo.int8(), marks=SLOW)])
def test_a_run_goes_on_with_the_same_bits(format, tmp_path):
    """After a kill with a checkpoint, and without one, where the prefix is made anew; matrices stay in the files."""
    folder = export(FAMILIES["opt"](True).init(jax.random.key(1)), tmp_path / "base")
    model = zo.with_prefix(zo.load(folder).with_format(format), TOKENS)
    given = list(batches(4))
    whole = trained(model, tmp_path / "whole", PREFIX, given=given)[0]
    if format is None:
        how = {"directory": tmp_path / "disk", "key": jax.random.key(5), "plan": PLANS["disk"]}
        with zo.Run(model, zo.two_point(1e-1, direction=PREFIX), zo.sgd(1e-1), **how) as run:
            assert run.in_files == sorted(name for name in model.source if name.startswith("layers"))
    for saved in (False, True):
        how = {"directory": tmp_path / str(saved), "key": jax.random.key(5)}
        estimator = zo.averaged(zo.two_point(1e-1, direction=PREFIX), 2)
        with zo.Run(model, estimator, zo.sgd(1e-1), **how) as run:
            for batch in given[:2]:
                run.step(batch)
            if saved:
                run.save()
        with zo.Run(model, estimator, zo.sgd(1e-1), **how) as run:
            for batch in run.remaining(given):
                run.step(batch)
            assert_same(arrays(run.model.source), whole)
            folder = run.export(tmp_path / "adapter" / str(saved), adapter=True)
            with pytest.raises(ValueError, match=r"a prefix of 5 tokens, for which a Hugging Face folder has no place"):
                run.export(tmp_path / "model")
        rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        of_layers = [whole[f"layers.{i}.attn"]["prefix"][part] for i in range(2) for part in "kv"]
        np.testing.assert_array_equal(rows, np.concatenate([x.reshape(len(TOKENS), -1) for x in of_layers], axis=1))


def by_name(reference):
    """PEFT 0.21 looks for an argument of this name in classifiers, which transformers 5.24 calls otherwise."""
    forward = reference.forward

    def named(input_ids=None, attention_mask=None, past_key_values=None, **others):
        return forward(input_ids, attention_mask=attention_mask, past_key_values=past_key_values)

    reference.forward = named
    return reference


HEADS = [pytest.param(case, "CausalLM", marks=[SLOW] * (case == "opt 125m")) for case in MAIN]
HEADS += [("opt 125m", "SequenceClassification"), ("llama", "QuestionAnswering")]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(("case", "head"), HEADS)
def test_peft_computes_the_same_logits(case, head, tmp_path):
    """Of a prefix that moved, with the head that moved beside it; of padded rows too."""
    peft = pytest.importorskip("peft")
    reference = make_reference(case, head, tmp_path / "base")
    model, ids = zo.with_prefix(zo.load(tmp_path / "base"), TOKENS), random_ids(7, (3, 11)).astype(np.int32)
    direction = PREFIX if head == "CausalLM" else zo.dense(targets=("*.prefix.*", "head.weight", "head.bias"))
    keys, moves = jax.random.split(jax.random.key(3), 1), jnp.float32([0.5])
    moved = model.replace(perturb(model.params, keys, moves, leaf_ids(model.params), direction=direction))
    folder = export_prefix(moved, direction, tmp_path / "adapter")
    reference = reference if head == "CausalLM" else by_name(reference)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(reference, folder).eval()
    assert not [str(w.message) for w in said if "missing" in str(w.message).lower()]
    ours, lengths = np.asarray(moved.logits(ids)), np.array([11, 6, 8])
    bound = 2e-5 * np.abs(ours).max()
    assert np.abs(ours - model.logits(ids)).max() > 1e3 * bound
    np.testing.assert_allclose(reference_logits(loaded, ids), ours, atol=bound)
    if head == "CausalLM":
        theirs = reference_logits(loaded, ids, (np.arange(11) < lengths[:, None]).astype(int))
        for their, row, length in zip(theirs, np.asarray(moved.logits(ids, lengths)), lengths, strict=True):
            np.testing.assert_allclose(their[:length], row[:length], atol=bound)


def test_what_the_files_of_peft_lack_is_refused(tmp_path):
    model = zo.with_prefix(make_model("llama"), TOKENS)
    for direction, lacking in ((zo.normal, "embed.weight"), (zo.lora(2, targets=("*.q.*",)), "layers.0.attn.q.weight")):
        with pytest.raises(ValueError, match=f"trains {lacking} beside the prefix: PEFT's files hold a prefix alone"):
            export_prefix(model, direction, tmp_path / "adapter")


def test_the_command_line(tmp_path, tiny_folder, text_file, capsys):
    """Trains, goes on, evaluates, generates and exports; the prefix begins with the first tokens of the data."""
    directory = tmp_path / "run"
    words = ["demo", f"model={tiny_folder}", f"data={text_file}", f"directory={directory}", "dtype=float32"]
    words += ["prefix=3", "eps=1e-1", "learning_rate=1e-1", "eval_every=2", "batch=2", "tokens=8", "format=int8"]
    assert cli.main(["train", *words, "steps=2"]) == 0
    assert cli.main(["train", *words, "steps=4"]) == 0
    kept = json.loads((directory / "config.json").read_text())
    assert kept["prefix"] == 3 and "refresh" not in kept
    step, found = trained_model(directory)
    prefix = found.params["layers.0.attn"]["prefix"]["k"]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line["eval/loss"] for line in lines if "eval/loss" in line]
    config = load_config("demo", words[1:])
    tokens = prepare(config, base := zo.load(tiny_folder)).batches[0]["ids"][0, :3].tolist()
    assert first_tokens(config, replace(base, config=replace(base.config, bos_id=7))) == [7, *tokens[:2]]
    assert first_tokens(config, replace(base, config=replace(base.config, bos_id=7, prompt_bos=tokens[0]))) == tokens
    assert_same(arrays(zo.with_prefix(zo.load(tiny_folder), tokens).source), arrays(load_model(config).source))
    capsys.readouterr()
    for target, expected in ((str(directory), last), ("demo", first)):
        assert cli.main(["eval", target, *(words[1:] if target == "demo" else [])]) == 0
        out = capsys.readouterr().out
        assert float(out.split()[-2]) == pytest.approx(expected, abs=2e-3)  # of codes in the run, else of floats
    assert cli.main(["generate", str(directory), "one and", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("one and")
    for name, more in (("last", []), ("best", ["--best"])):
        assert cli.main(["export", str(directory), "--adapter", "-o", str(tmp_path / name), *more]) == 0
    capsys.readouterr()
    tensors = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"] and tensors["prompt_embeddings"].shape == (3, 1 * 2 * 8)
    np.testing.assert_array_equal(tensors["prompt_embeddings"][:, :8], prefix.reshape(3, 8))
    assert cli.main(["export", str(directory), "-o", str(tmp_path / "whole")]) == 1
    assert "zo2jax export RUN --adapter" in capsys.readouterr().err
    assert cli.main(["replay", str(tiny_folder), str(directory), "-o", str(tmp_path / "whole")]) == 1
    assert "a run with a prefix of 3 tokens, which a folder has no place for" in capsys.readouterr().err
    assert step == 4


def test_configs():
    assert "prefix" not in Config(model="m").as_json()
    made = with_overrides(Config, ["prefix=5", "format=int4"]).make_direction()
    assert (made.targets, made.refresh) == (("*.prefix.*",), None)
    assert with_overrides(Config, ["prefix=5", "targets=*.prefix.*,head.*"]).make_direction().targets[1] == "head.*"
    for words, message in (
        (["prefix=-1"], "prefix=-1: expected an integer of at least 0"),
        (["prefix=5", "direction=lora"], "prefix=5, direction=lora: expected one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_overrides(Config, words)


def test_what_takes_no_prefix_says_so(tmp_path):
    model = make_model("gpt2")
    stages = zo.blocks([(lambda p, batch: batch["x"] @ p["w"], {"w": np.ones((3, 3), np.float32)})])
    for call, message in (
        (lambda: zo.with_prefix(stages, [1]), "no attention blocks that take a prefix"),
        (lambda: zo.with_prefix(model, []), "a prefix of 0 tokens: expected 1 to 63, of the model's context"),
        (lambda: zo.with_prefix(model, [1] * 64), "a prefix of 64 tokens"),
        (lambda: zo.with_prefix(model, [31]), r"tokens are \[31\], expected ids from 0 to 30"),
        (lambda: zo.with_prefix(model, 5), "tokens is 5 without a key"),
        (lambda: zo.with_prefix(zo.with_prefix(model, [1, 2]), [1]), "the model has a prefix of 2 tokens"),
        (lambda: zo.with_prefix(model, [1, 2]).logits(np.zeros((1, 63), np.int32)), "63 tokens do not fit .* of 62"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for direction, format in ((zo.dense(targets=("*.prefix.*", "*.q.*")), zo.int8()), (zo.normal, zo.int8())):
        coded = zo.with_prefix(make_model("llama").with_format(format), [1, 2])
        with pytest.raises(ValueError, match=r"expected zo2jax\.lowrank, or zo2jax.dense with a refresh"):
            zo.Run(
                coded, zo.two_point(1e-1, direction=direction), zo.sgd(1.0), directory=tmp_path, key=jax.random.key(0)
            )
