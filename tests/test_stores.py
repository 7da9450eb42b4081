"""Blocks that stay in the model's own files: the same bits as in page files, where the files have them as pages do."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from families import make_model
from safetensors.numpy import load_file, save_file
from test_stream import FAMILIES, NAMES, PLANS, batches

import zo2jax as zo
from zo2jax.link import StoreError
from zo2jax.models import hub
from zo2jax.models.blocks import Source
from zo2jax.models.tensors import Tensor
from zo2jax.plan import Plan
from zo2jax.quantize import quantize
from zo2jax.stream import Stream

pytestmark = pytest.mark.usefixtures("quick_compilation")

FROZEN = zo.lowrank(2, refresh=None)


def in_page_files(model: zo.Model) -> zo.Model:
    """The same model, of which nobody knows in which files it lies."""
    source = model.source
    readers, codes = ({name: partial(read, name) for name in source} for read in (source.__getitem__, source.coded))
    return model.replace(Source(readers, codes=codes))


def run_of(model: zo.Model, directory: Path, plan: Plan = PLANS["disk"], direction: zo.Direction = FROZEN) -> zo.Run:
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan}
    return zo.Run(model, zo.two_point(1e-3, direction=direction), zo.sgd(1e-2, 0.1), **how)


def trained(model: zo.Model, directory: Path, plan: Plan = PLANS["disk"]):
    """(blocks in the model's files, whether there are page files, weights, losses)."""
    with run_of(model, directory, plan) as run:
        losses = [float(run.step(batch).loss) for batch in batches(3)] + [run.evaluate(batches(1))]
        files = len(list(directory.glob("pages/*")))
        return run.in_files, files, jax.tree.map(np.asarray, dict(run.model.params)), losses


def stream_of(model: zo.Model, directory: Path, plan: Plan = PLANS["disk"], **options) -> Stream:
    how = FROZEN, zo.stochastic, plan, directory
    return Stream(model.blocks, model.source, *how, format=model.format, **options)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("family", "tied", "format", "shards"),
    [
        ("llama", False, None, 4),
        ("opt", True, zo.int8(), 1),
        ("llama", True, zo.int4(group=8, keep=("*.attn.q.*", "*.mlp.*")), 3),
    ],
)
def test_files_are_page_files(family, tied, format, shards, tmp_path, monkeypatch):
    """Weights and losses are the same to the bit, no page file is made, and the files stay as they are."""
    monkeypatch.setattr(hub, "_SHARD_SIZE", {1: "1GB", 3: "15KB", 4: "12KB"}[shards])
    folder = hub.export(FAMILIES[family](tied).init(jax.random.key(1), "bfloat16"), tmp_path / "m")
    folder = folder if format is None else quantize(zo.load(folder), format, tmp_path / "codes")
    before, model = contents(folder), zo.load(folder)
    assert len(list(folder.glob("*.safetensors"))) == shards
    found, page_files, *expected = trained(in_page_files(model), tmp_path / "pages")
    stay = [name for name in NAMES if not tied or name.startswith("layers")]  # matrices that others share do not
    assert (found, page_files) == ([], len(stay))
    found, page_files, *ours = trained(model, tmp_path / "files")
    assert (found, page_files) == (sorted(stay), 0) and not (tmp_path / "files" / "pages").exists()
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert contents(folder) == before
    some, _, *ours = trained(model, tmp_path / "mixed", PLANS["mixed"])
    assert some == ["layers.0.attn", "layers.1.attn"]
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_block_whose_matrices_lie_otherwise_has_a_page_file(tmp_path):
    """In another dtype, transposed, or to become codes; or if they change at all."""
    folder = hub.export(make_model("gpt2", "bfloat16", tied=False), tmp_path / "gpt2")
    some = load_file(hub.export(make_model("llama", "bfloat16"), tmp_path / "mixed") / "model.safetensors")
    for name in [name for name in some if "model.layers.0.mlp." in name or "embed" in name]:
        some[name] = some[name].astype(np.float32)
    some["model.layers.1.mlp.up_proj.weight"] = some["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    save_file(some, tmp_path / "mixed" / "model.safetensors")
    gpt2, mixed = zo.load(folder), zo.load(tmp_path / "mixed")
    cases = {
        "transposed": (gpt2, ["embed", "head"]),
        "cast": (zo.load(folder, dtype="float16"), []),
        "encoded": (gpt2.with_format(zo.int8(keep=("head.*",))), ["head"]),
        "several dtypes": (mixed, ["embed", "layers.0.mlp"]),
    }
    for case, (model, expected) in cases.items():
        stream = stream_of(model, tmp_path / case, basis=jax.random.key(2))
        page_files = {path.stem for path in (tmp_path / case).glob("*.page")}
        assert sorted(stream.in_files) == expected and page_files == set(NAMES) - set(expected), case
        if case != "encoded":
            jax.tree.map(np.testing.assert_array_equal, dict(stream), dict(model.source))
        stream.close()
    for name, direction in {"dense": zo.normal, "folded": zo.lowrank(2, refresh=5)}.items():
        with run_of(gpt2, tmp_path / name, direction=direction) as run:
            assert run.in_files == []


def test_only_vectors_are_read_when_a_run_begins(tmp_path, monkeypatch):
    folder = hub.export(FAMILIES["opt"](False).init(jax.random.key(1), "bfloat16"), tmp_path / "m")
    model, read, array = quantize(zo.load(folder), zo.int8(keep=("head.*",)), tmp_path / "codes"), [], Tensor.array
    model = zo.load(model)
    monkeypatch.setattr(Tensor, "array", lambda self, *a, **k: read.append(self.shape) or array(self, *a, **k))
    monkeypatch.setattr("zo2jax.models.tensors.CodedTensor.codes", None)
    with run_of(model, tmp_path / "run"):
        assert len(read) > 20 and {len(shape) for shape in read} == {1}


def test_evaluation_and_generation_make_no_page_files(tiny_folder, tmp_path):
    model = zo.load(tiny_folder)
    stream = stream_of(
        model, tmp_path / "pages", Plan(dict.fromkeys(("layers.0.attn", "layers.0.mlp"), "disk")), fixed=True
    )
    streamed = model.replace(stream)
    np.testing.assert_array_equal(streamed.logits([[1, 2, 3]]), zo.load(tiny_folder).logits([[1, 2, 3]]))
    assert streamed.generate("abc", 4) == zo.load(tiny_folder).generate("abc", 4)
    assert sorted(stream.in_files) == ["layers.0.attn", "layers.0.mlp"] and not (tmp_path / "pages").exists()
    stream.close()
    with pytest.raises(StoreError, match="are closed, as their run is"):
        stream["layers.0.mlp"]


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def write(path: Path) -> None:
    """Other bytes, as many as there were."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")


@pytest.mark.parametrize("change", [append, write, lambda path: os.truncate(path, 5000)])
def test_a_file_that_changes_is_one_error(change: Callable[[Path], None], tmp_path):
    """The run goes on from its checkpoint, which needs none of the files."""
    folder = hub.export(FAMILIES["llama"](False).init(jax.random.key(1), "bfloat16"), tmp_path / "m")
    model, path, steps = zo.load(folder), folder / "model.safetensors", list(batches(3))
    with run_of(model, tmp_path / "run") as run:
        run.step(steps[0])
        run.save()
        change(path)
        message = (
            r"model\.safetensors has changed since the model was loaded .*: the run goes on from its last checkpoint"
        )
        with pytest.raises(StoreError, match=message):
            run.step(steps[1])
            run.step(steps[2])
    with pytest.raises(StoreError, match="has changed since the model was loaded"):
        run_of(model, tmp_path / "other")
    with run_of(zo.load(folder, dtype="bfloat16", weights=False), tmp_path / "run") as run:
        assert run.steps_done == 1 and run.in_files == [] and len(list(tmp_path.glob("run/pages/*"))) == len(NAMES)
        run.step(steps[1])


def test_files_may_be_removed_and_replaced(tmp_path):
    """The run keeps to those that it has opened."""
    folder = hub.export(FAMILIES["llama"](False).init(jax.random.key(1), "bfloat16"), tmp_path / "m")
    other = hub.export(FAMILIES["llama"](False).init(jax.random.key(2), "bfloat16"), tmp_path / "other")
    expected = trained(zo.load(folder), tmp_path / "expected")
    gone = zo.load(folder)
    with run_of(gone, tmp_path / "run") as run:
        losses = [float(run.step(batch).loss) for batch in batches(1)]
        os.replace(other / "model.safetensors", folder / "model.safetensors")
        losses += [float(run.step(batch).loss) for batch in list(batches(2))[1:]]
        (folder / "model.safetensors").unlink()
        losses += [float(run.step(batch).loss) for batch in list(batches(3))[2:]]
    assert losses == expected[3][:3]
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be read \(No such file or directory\)"):
        run_of(gone, tmp_path / "none")
