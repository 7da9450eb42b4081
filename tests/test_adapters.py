"""Adapters in the folder that PEFT loads, by PEFT itself, and what of them cannot be written."""

import json
import warnings

import jax
import numpy as np
import pytest
from families import make_reference, random_ids, reference_logits
from safetensors.numpy import load_file

import zo2jax as zo
from zo2jax import cli
from zo2jax.models.opt import OptConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPT_TARGETS = ("*.attn.*", "*.mlp.*", "embed.weight", "*project*")


def batches(count, classes):
    for seed in range(count):
        ids = random_ids(seed, (2, 9)).astype(np.int32)
        wanted = {"labels": np.array([seed % 3, 1], np.int32)} if classes else {"targets": np.roll(ids, -1, 1)}
        yield {"ids": ids, **wanted}


def trained(model, directory, direction, steps=4):
    """A run whose adapters have moved far enough for logits to tell."""
    estimator = zo.two_point(1e-2, direction=direction)
    run = zo.Run(model, estimator, zo.sgd(1e-2, 0.1), directory=directory, key=jax.random.key(3))
    for batch in batches(steps, model.config is not None and isinstance(model.config.head, zo.Classification)):
        run.step(batch)
    return run


@pytest.mark.parametrize(
    ("case", "head", "targets"),
    [
        ("llama", "CausalLM", ("*.attn.[qv].*", "head.*")),
        ("qwen3", "CausalLM", ()),  # embedding and head share their matrix
        ("opt 350m", "CausalLM", OPT_TARGETS),
        ("gpt2", "CausalLM", ()),  # matrices lie the other way round
        ("llama", "SequenceClassification", ("*.mlp.*", "head.*")),
    ],
)
def test_peft_computes_the_same_logits(case, head, targets, tmp_path):
    peft = pytest.importorskip("peft")
    reference = make_reference(case, head, tmp_path / "base")
    model, ids = zo.load(tmp_path / "base"), random_ids(7, (3, 11))
    untrained = reference_logits(reference, ids)
    with trained(model, tmp_path / "run", zo.lora(3, 6, targets=targets)) as run:
        folder = run.export(tmp_path / "adapter", adapter=True)
        ours = np.asarray(run.model.logits(ids))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with warnings.catch_warnings(
        record=True
    ) as said:  # that the head shares the embedding's matrix, or lies transposed
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(reference, folder).eval()
    assert not [str(w.message) for w in said if "missing" in str(w.message).lower()]
    np.testing.assert_allclose(reference_logits(loaded, ids), ours, atol=2e-5 * np.abs(ours).max())
    assert np.abs(ours - untrained).max() > 1e-2 * np.abs(ours).max()


def test_the_command_line_writes_what_the_run_does(tmp_path, tiny_folder, text_file, capsys):
    directory = tmp_path / "run"
    words = ["demo", f"model={tiny_folder}", f"data={text_file}", f"directory={directory}", "dtype=float32"]
    words += ["direction=lora", "rank=2", "alpha=4", "targets=*.attn.*", "steps=3", "eval_every=3", "batch=2"]
    assert cli.main(["train", *words, "tokens=8", "learning_rate=1e-3"]) == 0
    capsys.readouterr()
    for name, more in (("last", []), ("best", ["--best"])):
        assert cli.main(["export", str(directory), "--adapter", "-o", str(tmp_path / name), *more]) == 0
    written = json.loads((tmp_path / "last" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (2, 4, "LORA")
    assert written["target_modules"] == [f"model.layers.0.self_attn.{part}_proj" for part in "koqv"]
    tensors = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 16)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (16, 2)
    assert len(tensors) == 8 and all(x.dtype == np.float32 and np.abs(x).max() > 0 for x in tensors.values())
    assert cli.main(["export", str(directory), "--adapter", "-o", str(tmp_path / "last")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused(tmp_path):
    def refused(run, message):
        with run, pytest.raises(ValueError, match=message):
            run.export(tmp_path / "adapter", adapter=True)

    config = OptConfig(vocabulary=67, size=8, hidden=8, layers=1, heads=2, context=32, token_size=8)
    model = config.init(jax.random.key(0))
    positions = "no adapter on embed.positions of opt: export the model itself, or train with targets"
    refused(trained(model, tmp_path / "all", zo.lora(2), steps=0), positions)
    lacking = "the direction is normal, which trains no adapters: expected zo2jax.lora"
    refused(trained(model, tmp_path / "dense", zo.normal, steps=0), lacking)
    start = {"w": np.ones((3, 3), np.float32)}
    stages = zo.blocks([(lambda p, batch: batch["x"] @ p["w"], start)], loss=lambda y, _: y.sum())
    refused(trained(stages, tmp_path / "own", zo.lora(2), steps=0), "no Hugging Face names")
    assert not (tmp_path / "adapter").exists()
