"""Model folders: what is written comes back bit by bit, and what is damaged is refused by name."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import zo2jax as zo
from zo2jax.models import hub
from zo2jax.models.blocks import get_leaf, owned_shapes
from zo2jax.models.llama import LlamaConfig, RopeScaling

SCALING = RopeScaling(8.0, 1.0, 4.0, original_context=16)
VARIANTS = {
    "plain": {},
    "tied": {"tied": True, "stop_ids": (2, 5), "bos_id": 1},
    "biased": {"attention_bias": True, "mlp_bias": True, "rope_scaling": SCALING, "stop_ids": (7,)},
}
DTYPES = ("float32", "bfloat16", "float16")
Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@cache
def make_model(variant: str = "plain", dtype: str = "float32") -> zo.Model:
    """A model whose every leaf is random, norms and biases too."""
    shape = {"vocabulary": 23, "size": 12, "hidden": 20, "layers": 2, "heads": 3, "kv_heads": 1, "head_size": 4}
    config = LlamaConfig(context=32, **shape, **VARIANTS[variant])
    rng, blocks = np.random.default_rng(0), config.blocks(dtype)
    leaves = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape).astype(s.dtype)), owned_shapes(blocks))
    return zo.Model(config, blocks, leaves)


def make_tokenizer() -> Tokenizer:
    """One token per character."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return tokenizer


def assert_same(first: zo.Model, second: zo.Model) -> None:
    """Equal configurations, and leaves of equal names, dtypes and bits."""
    assert first.config == second.config
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    for (path, a), b in zip(jax.tree.leaves_with_path(first.params), jax.tree.leaves(second.params), strict=True):
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bitwise(variant, dtype, shard_size, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_SHARD_SIZE", shard_size)
    model = make_model(variant, dtype)
    folder = hub.export(model, tmp_path / "deep" / "one")
    files = {p.name for p in folder.iterdir()} - {"config.json"}
    assert files == {"model.safetensors"} or (shard_size == "2KB" and "model.safetensors.index.json" in files)
    assert (len(files) > 2) == (shard_size == "2KB")
    read = zo.load(folder)
    assert_same(model, read)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(read.params) if leaf.ndim == 1} == {"float32"}
    assert (str(read.dtype), read.folder, read.tokenizer) == (dtype, folder, None)
    assert read.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(model.params))
    hub.export(read, tmp_path / "two")
    assert contents(folder) == contents(tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "two"]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_load_converts_matrices_only(stored, dtype, tmp_path):
    model = make_model("biased", stored)
    read = zo.load(hub.export(model, tmp_path / "m"), dtype=dtype)
    converted = jax.tree.map(lambda x: np.asarray(x).astype(dtype) if x.ndim > 1 else x, model.params)
    assert_same(model.replace(converted), read)


def test_a_file_in_half_precision_throughout_gives_float32_norms(tmp_path):
    folder = hub.export(make_model(), tmp_path / "m")
    edit_weights(folder, lambda t: t.update({n: x.astype(ml_dtypes.bfloat16) for n, x in t.items()}))
    norm = zo.load(folder).params["head"]["norm"]["weight"]
    assert norm.dtype == jnp.float32
    assert norm.tolist() == make_model().params["head"]["norm"]["weight"].astype(jnp.bfloat16).tolist()


@pytest.mark.parametrize("form", ["single", "sharded", "unzipped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_files_load_bitwise(dtype, form, tmp_path):
    torch = pytest.importorskip("torch")
    model = make_model("tied", dtype)
    folder = hub.export(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    state = {}
    for ours, theirs in model.config.hub_names().items():
        leaf = get_leaf(model.params, ours)
        state[theirs] = torch.tensor(np.asarray(leaf, np.float32)).to(getattr(torch, str(leaf.dtype)))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # the copy that tied models carry
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    if form == "sharded":
        index = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        index = dict.fromkeys(state, "pytorch_model.bin")
    for file in set(index.values()):
        part = {name: tensor for name, tensor in state.items() if index[name] == file}
        torch.save(part, folder / file, _use_new_zipfile_serialization=form != "unzipped")
    assert_same(model, zo.load(folder))


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_pytorch_file_is_named(damage, tmp_path):
    torch = pytest.importorskip("torch")
    folder = hub.export(make_model(), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({NORM: torch.ones(12)}, path := folder / "pytorch_model.bin")
    path.write_bytes(b"no weights" if damage == "text" else path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin \(\d+ bytes\) is truncated or no PyTorch"):
        zo.load(folder)


def test_without_torch_a_pytorch_file_is_refused(tmp_path, monkeypatch):
    folder = hub.export(make_model(), tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pytorch_model\.bin is a PyTorch file.*pip install torch"):
        zo.load(folder)


def test_safetensors_come_before_pytorch_files(tmp_path):
    folder = hub.export(make_model(), tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_same(make_model(), zo.load(folder))


def test_the_tokenizer_and_foreign_keys_travel_along(tmp_path):
    source = hub.export(replace(make_model(), tokenizer=make_tokenizer()), tmp_path / "source")
    for name in set(hub._TOKENIZER_FILES) - {"tokenizer.json"}:
        (source / name).write_text(f"contents of {name}")
    (source / "README.md").write_text("about another model")
    edit_config(source, _name_or_path="somewhere", pretraining_tp=1)
    model = zo.load(source)
    assert model.tokenizer.get_vocab() == {"a": 0, "b": 1, "?": 2}
    copied = hub.export(model, tmp_path / "copy")
    before, after = contents(source), contents(copied)
    assert json.loads(after.pop("config.json")) == json.loads(before.pop("config.json"))
    assert after | {"README.md": b"about another model"} == before


def test_texts_are_never_truncated_or_padded(tmp_path):
    """A tokenizer.json may ask for both, which would drop text silently."""
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    model = zo.load(hub.export(replace(make_model(), tokenizer=tokenizer), tmp_path / "m"))
    assert model.tokenizer.encode("abbab").ids == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("file, downloads", [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_a_hub_id_is_downloaded(file, downloads, tmp_path, monkeypatch):
    asked = []
    (tmp_path / file).touch()
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert hub.resolve("org/name") == tmp_path
    assert [names for names, _ in asked] == [("org/name",)] * downloads
    assert ("pytorch_model*.bin" in asked[-1][1]["allow_patterns"]) == (downloads == 2)


def fail(*args, **kwargs):
    raise OSError("no luck")


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"org/name.*OSError: no luck"):
        zo.load("org/name")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


INDEX = "model.safetensors.index.json"
DAMAGES = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"no model folder at .*/m\b"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"m has no config\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"m has no model\.safetensors"),
    "config no JSON": (write("config.json", "{oops"), ValueError, r"config\.json is not JSON .*line 1"),
    "config no object": (write("config.json", "[1]"), ValueError, r"config\.json: model_type is None"),
    "family": (lambda f: edit_config(f, model_type="gpt9"), ValueError, r"model_type is 'gpt9', .*'llama'"),
    "keys": (lambda f: edit_config(f, vocab_size=None, hidden_size=None), ValueError, "vocab_size, hidden_size"),
    "rope type": (lambda f: edit_config(f, rope_scaling={"type": "yarn"}), ValueError, "rope type is 'yarn'"),
    "rope keys": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ValueError,
        "high_freq_factor, original_max_position_embeddings",
    ),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), ValueError, "hidden_act is 'gelu'"),
    "layers as text": (lambda f: edit_config(f, num_hidden_layers="5"), ValueError, "found num_hidden_layers='5'"),
    "truncated": (cut, ValueError, r"model\.safetensors \(\d+ bytes\) is truncated"),
    "empty": (write("model.safetensors", ""), ValueError, r"model\.safetensors \(0 bytes\) is truncated"),
    "shard": (write(INDEX, '{"weight_map": {"a": "x.safetensors"}}'), FileNotFoundError, f"{INDEX} names .* x.safe"),
    "index no JSON": (write(INDEX, "{"), ValueError, f"{INDEX} is no index"),
    "index no map": (write(INDEX, "{}"), ValueError, f"{INDEX} is no index"),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({Q0: t[Q0].astype(np.int8)})),
        ValueError,
        rf"{re.escape(Q0)} is int8, expected float32, float16 or bfloat16",
    ),
    "tokenizer": (write("tokenizer.json", "{}"), ValueError, r"tokenizer\.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(damage, tmp_path):
    folder = hub.export(make_model(), tmp_path / "m")
    harm, kind, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(kind, match=message):
        zo.load(folder)


def test_a_dtype_that_is_no_float_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is int8, expected float32"):
        zo.load(hub.export(make_model(), tmp_path / "m"), dtype="int8")


def test_all_misfits_are_in_one_error(tmp_path):
    def edit(tensors):
        del tensors[NORM], tensors["lm_head.weight"]
        tensors |= {"extra.one": np.ones(2, np.float32), Q0: tensors[Q0].T.copy()[:5]}
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((20, 12), np.int64)

    edit_weights(folder := hub.export(make_model(), tmp_path / "m"), edit)
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: the weights do not fit") as caught:
        zo.load(folder)
    message = str(caught.value)
    assert f"missing: {NORM}, lm_head.weight;" in message
    assert "unexpected: extra.one;" in message
    assert f"{Q0} is [5, 12], expected [12, 12]" in message
    assert "model.layers.1.mlp.up_proj.weight is int64" in message


def test_export_overwrites_nothing(tmp_path):
    folder = hub.export(make_model(), tmp_path / "m")
    before = contents(tmp_path)
    for target in (folder, folder / "config.json"):
        with pytest.raises(FileExistsError, match=rf"{re.escape(str(target))} exists and is not empty"):
            hub.export(make_model("tied"), target)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert_same(make_model("tied"), zo.load(hub.export(make_model("tied"), tmp_path / "empty")))


@pytest.mark.parametrize("failing", ["Writer", "Writer.write", "json.dumps"])
def test_an_export_that_fails_leaves_nothing(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_SHARD_SIZE", "2KB")
    monkeypatch.setattr(f"zo2jax.models.hub.{failing}", fail)
    with pytest.raises(OSError, match="no luck"):
        hub.export(make_model(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        hub.export(make_model(), tmp_path / "file" / "m")
    assert contents(tmp_path) == {"file": b"kept"}
