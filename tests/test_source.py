"""Where a model's parameters come from: files that are read block by block, blocks that are made, streams."""

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families import CONFIGS, make_model, random_ids
from safetensors.numpy import load_file, save_file

import zo2jax as zo
from zo2jax.models import hub
from zo2jax.models.blocks import Source, get_leaf, kinds, owned_shapes, visits
from zo2jax.models.tensors import Tensor

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assert_same(first: Mapping, second: Mapping) -> None:
    """Equal names, dtypes and bits."""
    assert set(first) == set(second)
    for name in first:
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), first[name], second[name])


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each shape of tensor was read."""
    counted, array = Counter(), Tensor.array
    monkeypatch.setattr(Tensor, "array", lambda self, *a, **k: counted.update([id(self)]) or array(self, *a, **k))
    return counted


@pytest.mark.parametrize("case", CONFIGS)
def test_blocks_of_a_layer(case):
    blocks = make_model(case, layers=3).blocks
    layers = [f"layers.{i}.{part}" for i in range(3) for part in ("attn", "mlp")]
    assert [block.name for block in blocks] == ["embed", *layers, "head"]
    assert [block.caches for block in blocks] == [False, *[True, False] * 3, False]
    assert len(set(kinds(blocks))) == 4 and kinds(blocks)[1::2] == [kinds(blocks)[1]] * 3 + [kinds(blocks)[7]]
    assert all("norm" in block.shapes for block in blocks[1:-1])


@pytest.mark.parametrize("case", CONFIGS)
def test_a_loaded_model_reads_a_block_when_asked_for_it(case, reads, tmp_path):
    made = make_model(case)
    model = zo.load(hub.export(made, tmp_path / "m"))
    count = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    assert (model.parameter_count, model.dtype, len(model.source)) == (count, np.float32, len(model.blocks))
    assert list(model.source) == [block.name for block in model.blocks] and "layers.9.mlp" not in model.source
    assert not reads
    layer = model.source["layers.1.mlp"]
    assert len(reads) == len(jax.tree.leaves(layer)) == len(jax.tree.leaves(made.params["layers.1.mlp"]))
    assert set(reads.values()) == {1} and {type(leaf) for leaf in jax.tree.leaves(layer)} == {np.ndarray}
    reads.clear()
    folder = hub.export(model, tmp_path / "again")
    assert set(reads.values()) == {1} and len(reads) == len(made.config.hub_names())
    assert isinstance(model.source, Source)
    for path in (tmp_path / "m").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.parametrize("shard_size, shards", [("8KB", 3), ("3KB", 9)])
def test_sharded_files_are_read_and_written_block_by_block(shard_size, shards, reads, tmp_path, monkeypatch):
    """Some shards hold the end of one block and the beginning of the next; each block is read once all the same."""
    monkeypatch.setattr(hub, "_SHARD_SIZE", shard_size)
    made = make_model("llama")
    first = hub.export(made, tmp_path / "first")
    assert len(list(first.glob("*.safetensors"))) >= shards
    second = hub.export(zo.load(first), tmp_path / "second")
    assert set(reads.values()) == {1}
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}
    weight_map = json.loads((second / "model.safetensors.index.json").read_text())["weight_map"]
    for path in second.glob("*.safetensors"):
        assert sorted(load_file(path)) == sorted(name for name, file in weight_map.items() if file == path.name)
    assert_same(zo.load(second).params, made.params)


def test_params_are_read_once_and_shared_by_copies(reads, tmp_path):
    made = make_model("gpt2")
    model = zo.load(hub.export(made, tmp_path / "m"))
    assert_same(model.params, made.params)
    assert {type(leaf).__module__ for leaf in jax.tree.leaves(model.params)} == {type(jnp.ones(1)).__module__}
    copy = replace(model, folder=None).with_loss(lambda logits, batch: logits[:, 0, 0])
    assert model.params is model.source and copy.params is model.params
    assert model.logits([[1, 2]]).shape == (1, 2, 31) and set(reads.values()) == {1}


def test_files_are_mapped_as_long_as_the_source_lives(tmp_path):
    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    model = zo.load(hub.export(make_model("llama"), tmp_path / "m"))
    leaf = model.source["embed"]["weight"]
    assert mapped() and not leaf.flags.owndata
    del leaf
    assert model.params and jax.block_until_ready(model.params)
    gc.collect()
    assert not mapped()


def test_matrices_of_several_dtypes_become_float32(tmp_path):
    folder = hub.export(make_model("llama", "bfloat16"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name, other = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    tensors[name] = (wide := tensors[name].astype(np.float32) + np.float32(1e-3))
    save_file(tensors, folder / "model.safetensors")
    model = zo.load(folder)
    assert model.dtype == np.float32
    np.testing.assert_array_equal(model.source["embed"]["weight"], wide, strict=True)
    read = get_leaf(model.source, "layers.0.mlp.up.weight")
    np.testing.assert_array_equal(read, tensors[other].astype(np.float32), strict=True)


@pytest.mark.parametrize("asked", [None, "float16"])
def test_a_new_head_has_the_dtype_of_the_model(asked, tmp_path):
    folder = hub.export(make_model("opt 125m", "bfloat16"), tmp_path / "m")
    head = zo.load(folder, dtype=asked, head=zo.QuestionAnswering()).source["head"]
    assert (str(head["weight"].dtype), str(head["bias"].dtype)) == (asked or "bfloat16", "float32")


@pytest.mark.parametrize("case", CONFIGS)
def test_random_blocks_are_made_when_asked_for(case):
    config = make_model(case).config
    model = config.init(jax.random.key(3), "bfloat16")
    assert_same(dict(model.source), dict(model.source))
    deeper = replace(config, layers=4).init(jax.random.key(3), "bfloat16").source
    assert_same({name: deeper[name] for name in model.source}, dict(model.source))
    other = config.init(jax.random.key(4), "bfloat16").source["embed"]["weight"]
    assert np.mean(np.asarray(other) == np.asarray(model.source["embed"]["weight"])) < 0.1
    matrices = [leaf for leaf in jax.tree.leaves(dict(model.source)) if leaf.ndim == 2]
    assert len({np.asarray(leaf).tobytes() for leaf in matrices}) == len(matrices)
    shapes = owned_shapes(model.blocks)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
        lambda s: (s.shape, s.dtype), shapes
    )


def test_params_of_host_memory_come_to_the_device():
    made = make_model("llama")
    host = jax.tree.leaves(made.params)[0].sharding.with_memory_kind("pinned_host")
    model = made.replace(
        Source({name: lambda name=name: jax.device_put(made.params[name], host) for name in made.source})
    )
    kinds_of = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(model.params)}
    assert kinds_of == {jax.devices()[0].default_memory().kind}
    assert_same(model.params, made.params)


class Recorder(Mapping):
    """A stream that keeps its parameters to itself, and notes what is visited."""

    def __init__(self, params):
        self._params, self.visited = params, []

    def __getitem__(self, block):
        raise AssertionError(f"{block} was read")

    def __iter__(self):
        return iter(self._params)

    def __len__(self):
        return len(self._params)

    def visits(self, blocks):
        visit = visits(blocks, self._params)
        return lambda block, *rest: self.visited.append((block.name, rest[2] is None)) or visit(block, *rest)


@pytest.mark.parametrize("case", ["opt 350m", "qwen3"])
def test_a_stream_carries_logits_scores_and_generation(case, byte_tokenizer):
    made = replace(make_model(case, vocabulary=256), tokenizer=byte_tokenizer)
    model = made.replace(stream := Recorder(made.params))
    names = [block.name for block in made.blocks]
    ids, lengths = random_ids(3, (2, 9), 31), [9, 4]
    np.testing.assert_array_equal(model.logits(ids, lengths), made.logits(ids, lengths))
    assert stream.visited == [(name, True) for name in names]
    batch = {"ids": ids.astype(np.int32), "targets": np.ones((2, 9), np.int32)}
    np.testing.assert_array_equal(model.token_log_probs(batch), made.token_log_probs(batch))
    stream.visited.clear()
    assert model.generate(["abc", "d"], 3) == made.generate(["abc", "d"], 3)
    assert stream.visited == [(name, not name.endswith("attn")) for name in names] * 3
    assert model.source is stream and (model.dtype, model.parameter_count) == (made.dtype, made.parameter_count)


MEMORY = """
import json, sys, threading, time
from pathlib import Path
import jax
import zo2jax as zo
from zo2jax.models.hub import export
from zo2jax.models.llama import LlamaConfig

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

highest, done = 0.0, False

def watch():
    global highest
    while not done:
        highest = max(highest, anonymous())
        time.sleep(0.002)

def growth(what):
    global highest
    before = highest = anonymous()
    what()
    return highest - before

shape = dict(vocabulary=512, size=512, hidden=2048, layers=18, heads=4, kv_heads=4, head_size=128, context=64)
folder = Path(sys.argv[1])
model = LlamaConfig(**shape).init(jax.random.key(0))
for block in model.blocks[:3] + model.blocks[-1:]:
    model.source[block.name]  # compiled before anything is measured
result = {"size": sum(leaf.size * 4 for leaf in jax.tree.leaves([b.shapes for b in model.blocks])) / 2**20}
result["block"] = max(sum(leaf.size * 4 for leaf in jax.tree.leaves(b.shapes)) for b in model.blocks) / 2**20
threading.Thread(target=watch, daemon=True).start()
result["init and export"] = growth(lambda: export(model, folder / "a"))

def sweep(dtype):
    for leaves in zo.load(folder / "a", dtype=dtype).source.values():
        assert sum(float(leaf.ravel()[::512].sum()) for leaf in jax.tree.leaves(leaves)) != 0

result["load"] = growth(lambda: sweep(None))
result["load and cast"] = growth(lambda: sweep("bfloat16"))
result["load and export"] = growth(lambda: export(zo.load(folder / "a"), folder / "b"))
result["cast and export"] = growth(lambda: export(zo.load(folder / "a", dtype="bfloat16"), folder / "c"))
result["params"] = growth(lambda: zo.load(folder / "a").params)
done = True
print(json.dumps(result))
"""


def test_memory_is_that_of_a_block(tmp_path):
    """MiB of memory that no file stands behind; all parameters at once show that it is measured at all."""
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed goes back to the system
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    mebibytes = json.loads(done.stdout)
    size, block = mebibytes.pop("size"), mebibytes.pop("block")
    assert size > 280 and block < 15
    assert mebibytes.pop("params") > 0.9 * size
    assert max(mebibytes.values()) < 2 * block + 20, mebibytes
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    a, c = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.17.mlp.down_proj.weight"):
        np.testing.assert_array_equal(a[name].astype(ml_dtypes.bfloat16), c[name], strict=True)
