"""Blocks that stay in the model's own files: the same bits as in page files, where the files have them as pages do."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from families import make_model
from safetensors.numpy import load_file, save_file
from test_stream import FAMILIES, NAMES, PLANS, batches

import zo2jax as zo
from zo2jax.formats import Format
from zo2jax.link import StoreError
from zo2jax.models import hub
from zo2jax.models.blocks import Source
from zo2jax.models.tensors import CodedTensor, Tensor
from zo2jax.pages import flat
from zo2jax.plan import Plan
from zo2jax.stores import result
from zo2jax.stream import Stream

pytestmark = pytest.mark.usefixtures("quick_compilation")

FROZEN = zo.lowrank(2, refresh=None)


def in_page_files(model: zo.Model) -> zo.Model:
    """The same model, of which nobody knows in which files it lies."""
    source = model.source
    readers, codes = ({name: partial(read, name) for name in source} for read in (source.__getitem__, source.coded))
    return model.replace(Source(readers, codes=codes))


def run_of(model: zo.Model, directory: Path, plan: Plan = PLANS["disk"]) -> zo.Run:
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan}
    return zo.Run(model, zo.two_point(1e-3, direction=FROZEN), zo.sgd(1e-2, 0.1), **how)


@contextmanager
def stream_of(model: zo.Model, directory: Path, direction: zo.Direction = FROZEN, **options) -> Iterator[Stream]:
    how = direction, zo.stochastic, PLANS["disk"], directory
    stream = Stream(model.blocks, model.source, *how, format=model.format, **options)
    yield stream
    stream.close()


def stored(stream: Stream) -> dict:
    """What is in the tiers: read as for a checkpoint, and uploaded as for a visit."""
    found = {name: stream.stored(name) for name in stream}
    for i, name in enumerate(stream):
        pages = result(stream._conveyor._stores[i].upload())
        uploaded = stream.layouts[name].unpack(pages, {x: flat(found[name])[x] for x in stream.layouts[name].rest})
        jax.tree.map(np.testing.assert_array_equal, uploaded, found[name])
    return found


def folder_of(family: str, tied: bool, folder: Path, format: Format | None = None, seed: int = 1) -> Path:
    model = FAMILIES[family](tied).init(jax.random.key(seed), "bfloat16")
    return hub.export(model.with_format(format), folder)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


FOLDERS = [
    ("llama", False, None, 4),
    ("opt", True, zo.int8(), 1),
    ("llama", True, zo.int4(group=8, keep=("*.attn.q.*", "*.mlp.*")), 2),
]


@pytest.mark.parametrize(("family", "tied", "format", "shards"), FOLDERS)
def test_pages_from_the_files_of_a_model(family, tied, format, shards, tmp_path, monkeypatch):
    """What is read is what page files hold; the files stay as they are."""
    monkeypatch.setattr(hub, "_SHARD_SIZE", {1: "1GB", 2: "15KB", 4: "12KB"}[shards])
    folder = folder_of(family, tied, tmp_path / "m", format)
    assert len(list(folder.glob("*.safetensors"))) == shards
    before, model = contents(folder), zo.load(folder)
    stay = [name for name in NAMES if not tied or name.startswith("layers")]  # matrices that others share do not
    with stream_of(in_page_files(model), tmp_path / "pages", fixed=True) as stream:
        assert stream.in_files == [] and len(list((tmp_path / "pages").glob("*.page"))) == len(stay)
        expected = stored(stream)
    with stream_of(model, tmp_path / "none", fixed=True) as stream:
        assert sorted(stream.in_files) == sorted(stay) and not (tmp_path / "none").exists()
        jax.tree.map(np.testing.assert_array_equal, stored(stream), expected)
    with pytest.raises(StoreError, match="are closed, as their run is"):
        stream.stored(stay[0])
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("family", "tied", "format"),
    [FOLDERS[0][:3], *(pytest.param(*case[:3], marks=pytest.mark.slow) for case in FOLDERS[1:])],
)
def test_runs_with_and_without_page_files(family, tied, format, tmp_path):
    """Weights and losses are the same to the bit."""
    model, results = zo.load(folder_of(family, tied, tmp_path / "m", format)), {}
    cases = {"pages": (in_page_files(model), "disk"), "files": (model, "disk"), "mixed": (model, "mixed")}
    for case, (given, plan) in cases.items():
        with run_of(given, tmp_path / case, PLANS[plan]) as run:
            losses = [float(run.step(batch).loss) for batch in batches(3)] + [run.evaluate(batches(1))]
            results[case] = losses, jax.tree.map(np.asarray, dict(run.model.params))
            stay = {"pages": 0, "files": 4 if tied else 6, "mixed": 2}[case]
            assert len(run.in_files) == stay and (tmp_path / case / "pages").exists() == (case == "pages")
        jax.tree.map(np.testing.assert_array_equal, results[case], results["pages"])


def test_a_block_whose_matrices_lie_otherwise_has_a_page_file(tmp_path):
    """In another dtype, transposed, or to become codes; or if they change at all."""
    square = make_model("gpt2", "bfloat16", tied=False, hidden=24)  # in its MLP, so that no shape gives it away
    folder = hub.export(square, tmp_path / "gpt2")
    some = load_file(hub.export(make_model("llama", "bfloat16"), tmp_path / "mixed") / "model.safetensors")
    wide = ("layers.0.mlp.", "embed_tokens", "layers.1.mlp.up")
    some = {name: x.astype(np.float32) if any(part in name for part in wide) else x for name, x in some.items()}
    save_file(some, tmp_path / "mixed" / "model.safetensors")
    gpt2, fixed = zo.load(folder), {"fixed": True}
    cases = {
        "transposed": (gpt2, fixed, ["embed", "head"]),
        "cast": (zo.load(folder, dtype="float16"), fixed, []),
        "to be encoded": (gpt2.with_format(zo.int8(keep=("head.*",))), fixed, ["head"]),
        "several dtypes": (zo.load(tmp_path / "mixed"), fixed, ["embed", "layers.0.mlp"]),
        "dense": (gpt2, {"direction": zo.normal}, []),
        "folded": (gpt2, {"direction": zo.lowrank(2, refresh=5), "basis": jax.random.key(2)}, []),
    }
    for case, (model, options, expected) in cases.items():
        with stream_of(model, tmp_path / case, **options) as stream:
            assert sorted(stream.in_files) == expected, case
            page_files = {path.stem for path in (tmp_path / case).glob("*.page")}
            assert page_files == set(NAMES) - set(expected), case
            if case != "to be encoded":
                jax.tree.map(np.testing.assert_array_equal, stored(stream), dict(model.source))


def test_only_vectors_are_read_at_the_start(tmp_path, monkeypatch):
    folder = folder_of("opt", False, tmp_path / "m", zo.int8(keep=("head.*",)))
    read, array = [], Tensor.array
    monkeypatch.setattr(Tensor, "array", lambda self, *a, **k: read.append(self.shape) or array(self, *a, **k))
    monkeypatch.setattr(CodedTensor, "codes", None)
    with stream_of(zo.load(folder), tmp_path / "pages", basis=jax.random.key(2)) as stream:
        assert sorted(stream.in_files) == sorted(NAMES)
        assert len(read) == sum(map(len, stream._resident.vectors().values())) and {len(shape) for shape in read} == {1}


def test_evaluation_needs_no_page_files(tmp_path):
    folder = folder_of("llama", False, tmp_path / "m")
    with stream_of(zo.load(folder), tmp_path / "pages", direction=zo.normal, fixed=True) as stream:
        logits = zo.load(folder).replace(stream).logits([[1, 2, 3]])
        assert len(stream.in_files) == len(NAMES) and not (tmp_path / "pages").exists()
    np.testing.assert_array_equal(logits, zo.load(folder).logits([[1, 2, 3]]))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def other(path: Path) -> None:
    """Other bytes, as many as there were."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\1")


@pytest.mark.parametrize("change", [longer, other, lambda path: os.truncate(path, 5000)])
def test_a_file_that_changes_is_one_error(change: Callable[[Path], None], tmp_path):
    """While a stream has it open, and before."""
    model = zo.load(folder_of("llama", False, tmp_path / "m"))
    with stream_of(model, tmp_path / "pages", fixed=True) as stream:
        stored(stream)
        change(tmp_path / "m" / "model.safetensors")
        for use in (lambda: stream.stored("embed"), lambda: result(stream._conveyor._stores[0].upload())):
            with pytest.raises(StoreError, match=r"model\.safetensors has changed since the model was loaded"):
                use()
    with pytest.raises(StoreError, match=r"model\.safetensors has changed since the model was loaded"):
        run_of(model, tmp_path / "run")


def test_after_a_file_has_changed_the_run_goes_on_from_its_checkpoint(tmp_path):
    folder, steps = folder_of("llama", False, tmp_path / "m"), list(batches(3))
    with run_of(zo.load(folder), tmp_path / "run") as run:
        run.step(steps[0])
        run.save()
        other(folder / "model.safetensors")
        with pytest.raises(StoreError, match=r"has changed .*: the run goes on from its last checkpoint"):
            for batch in steps[1:]:
                run.step(batch)
    with run_of(zo.load(folder, dtype="bfloat16", weights=False), tmp_path / "run") as run:
        assert run.steps_done >= 1 and run.in_files == []  # and what the journal has
        run.step(steps[2])


def test_files_may_be_removed_and_replaced(tmp_path):
    """A stream keeps to those that it has opened."""
    model, path = zo.load(folder_of("llama", False, tmp_path / "m")), tmp_path / "m" / "model.safetensors"
    with stream_of(model, tmp_path / "pages", fixed=True) as stream:
        before = stored(stream)
        os.replace(folder_of("llama", False, tmp_path / "new", seed=2) / path.name, path)
        jax.tree.map(np.testing.assert_array_equal, stored(stream), before)
        path.unlink()
        jax.tree.map(np.testing.assert_array_equal, stored(stream), before)
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be read \(No such file or directory\)"):
        run_of(model, tmp_path / "run")
