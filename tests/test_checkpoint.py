"""Snapshots: the same bits back, one block at a time, whole or not at all."""

import errno
import itertools
import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import zo2jax
from zo2jax import checkpoint
from zo2jax.checkpoint import Snapshots
from zo2jax.mezo import State

pytestmark = pytest.mark.usefixtures("quick_compilation")

DTYPES = [
    np.float32,
    ml_dtypes.bfloat16,
    np.float16,
    np.float64,
    np.int8,
    np.uint8,
    np.int32,
    np.uint32,
    np.int64,
    bool,
]


def state(step, opt_state=()):
    return State({}, opt_state, jnp.uint32(step), jax.random.key(3), jnp.arange(5, dtype=jnp.uint32))


def numbers(shape, dtype=np.float32, seed=0):
    """Every bit pattern may come up, NaNs with payloads among them."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def equal_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def model(seed=0):
    """Three blocks with different leaves."""
    return {
        "embed": {"weight": numbers((7, 4), seed=seed)},
        "layers.0.attn": {"q": {"weight": numbers((4, 4), ml_dtypes.bfloat16, seed)}, "norm": numbers(4, seed=seed)},
        "head": {"weight": numbers((4, 7), np.float16, seed)},
    }


def check_whole(snapshots, step, blocks):
    """All of a snapshot is there, to the bit."""
    for name, leaves in blocks.items():
        found = snapshots.block(step, name, like(leaves))
        assert all(jax.tree.leaves(jax.tree.map(equal_bits, found, leaves)))
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(found))
    assert int(snapshots.restore(state(0), step).step) == step


@pytest.fixture
def snapshots(tmp_path):
    opened = Snapshots(tmp_path / "checkpoints")
    yield opened
    opened.close()


@pytest.fixture
def saved(snapshots):
    """With step 1 saved."""
    snapshots.save(state(1), model(1).items(), {"eval/loss": 2.0})
    return snapshots


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["numpy", "view", "transposed", "jax"])
@pytest.mark.parametrize("chunk", [2**26, 256])
def test_every_dtype_comes_back_to_the_bit(snapshots, monkeypatch, kind, chunk):
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", chunk)
    made = {}
    for i, dtype in enumerate(DTYPES):
        leaf = numbers((13, 29), dtype, seed=i)
        if kind == "view":  # of a host's buffer, not aligned to a page
            buffer = np.zeros(leaf.nbytes + 640, np.uint8)
            buffer[640:] = leaf.view(np.uint8).reshape(-1)
            leaf = buffer[640:].view(leaf.dtype).reshape(leaf.shape)
        elif kind == "transposed":
            leaf = leaf.T
        elif kind == "jax" and leaf.dtype.itemsize < 8:
            leaf = jnp.asarray(leaf)
        made[np.dtype(dtype).name] = {"weight": leaf, "scalar": leaf[1, 2]}
    if kind != "jax":
        made = jax.tree.map(np.asarray, made)
    snapshots.save(state(0), [("block", made), ("empty", {})], {})
    found = snapshots.block(0, "block", like(made))
    assert all(jax.tree.leaves(jax.tree.map(equal_bits, found, made)))
    assert jax.tree.structure(found) == jax.tree.structure(made)
    assert snapshots.block(0, "empty", {}) == {}


def test_the_state_comes_back(snapshots):
    opt_state = (optax.adam(1e-3).init(jnp.ones(3)), {"z": jnp.float32(np.nan), "a": jnp.bfloat16(2)}, ())
    made = state(12, opt_state)
    snapshots.save(made, model().items(), {})
    found = snapshots.restore(jax.tree.map(jnp.zeros_like, made._replace(key=0))._replace(key=made.key), 12)
    assert found.params == {}
    assert jax.tree.structure(found) == jax.tree.structure(made)
    assert jnp.array_equal(jax.random.key_data(found.key), jax.random.key_data(made.key))
    rest = [jax.tree.leaves(s._replace(key=())) for s in (found, made)]
    assert all(equal_bits(a, b) and a.sharding == b.sharding for a, b in zip(*rest, strict=True))


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_a_block_is_on_disk_and_dropped_before_the_next_is_asked_for(snapshots, folder, kind):
    buffer = np.empty((300, 40), np.float32)  # used again for every block
    last = []

    def blocks():
        for i in range(4):
            if last:
                path = folder / "unfinished" / "blocks" / f"block{i - 1}"
                found = ocp.StandardCheckpointer().restore(path)
                assert np.all(np.asarray(found["weight"]) == i - 1)
                assert [reference() for reference in last] == [None] * len(last)
            buffer[:] = i
            leaves = {"weight": buffer[:], "other": np.full(300, i, np.float32)}
            if kind == "jax":
                leaves = {name: jnp.array(leaf) for name, leaf in leaves.items()}
            last[:] = [weakref.ref(leaf) for leaf in leaves.values()]
            pair = f"block{i}", leaves
            del leaves
            yield pair
            del pair

    snapshots.save(state(1), blocks(), {})
    shapes = {"weight": jax.ShapeDtypeStruct((300, 40), np.float32), "other": jax.ShapeDtypeStruct((300,), np.float32)}
    for i in range(4):
        assert all(np.all(leaf == i) for leaf in snapshots.block(1, f"block{i}", shapes).values())


def test_blocks_are_asked_for_in_the_thread_that_saves(snapshots):
    with jax.numpy_dtype_promotion("standard"):  # a setting of the thread

        def blocks():
            yield "block", {"weight": jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)}

        snapshots.save(state(1), blocks(), {})
    assert snapshots.last == 1


@pytest.mark.parametrize("name", model())
def test_a_block_is_read_without_the_others(saved, folder, name):
    for path in (folder / "1" / "blocks").iterdir():
        if path.is_dir() and path.name != name:
            shutil.rmtree(path)
    assert all(jax.tree.leaves(jax.tree.map(equal_bits, saved.block(1, name, like(model(1)[name])), model(1)[name])))


@pytest.mark.parametrize("error", [RuntimeError("no more"), OSError("mine"), ValueError("mine"), KeyboardInterrupt()])
def test_a_save_that_is_broken_off_leaves_nothing(saved, folder, error):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def blocks():
        yield from itertools.islice(model(2).items(), 2)
        raise error

    with pytest.raises(type(error)) as caught:
        saved.save(state(2), blocks(), {"eval/loss": 0.0})
    assert caught.value is error  # as it was raised
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (saved.last, saved.best) == (1, 1)
    check_whole(saved, 1, model(1))
    saved.save(state(2), model(2).items(), {"eval/loss": 1.0})
    assert (saved.last, saved.best) == (2, 2)
    check_whole(saved, 2, model(2))


def test_a_full_disk(saved, folder):
    """Files of at most 20,000 bytes, in the place of a disk without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    blocks = {"small": {"weight": np.ones(4, np.float32)}, "large": {"weight": numbers((100, 100))}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=rf"no snapshot could be written in {folder} .*too large.*free some space"):
            saved.save(state(2), blocks.items(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(folder) == ["1"]
    check_whole(saved, 1, model(1))
    saved.save(state(2), blocks.items(), {})
    check_whole(saved, 2, blocks)


def test_a_disk_that_is_full_at_the_last_moment(saved, folder):
    def fail(self, directory, args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint._Move, "save", fail)
            with pytest.raises(OSError, match=rf"written in {folder} .*No space left"):
                saved.save(state(2), model(2).items(), {})
        assert (listing(folder), saved.last) == (["1"], 1)
    check_whole(saved, 1, model(1))
    saved.save(state(2), model(2).items(), {})
    check_whole(saved, 2, model(2))


def test_a_folder_that_cannot_be_made(tmp_path):
    snapshots = Snapshots(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match=f"written in {tmp_path / 'checkpoints'} .*make the folder writable"):
        snapshots.save(state(1), model().items(), {})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".hidden"])
def test_names_that_are_no_folders(saved, folder, name):
    with pytest.raises(ValueError, match="is no name of a block"):
        saved.save(state(2), [(name, {"weight": np.ones(3)})], {})
    assert listing(folder) == ["1"]


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ({1: 3.0}, [1], 1),
        ({1: 3.0, 2: 2.0}, [2], 2),
        ({1: 2.0, 2: 3.0}, [1, 2], 1),
        ({1: 2.0, 2: 3.0, 3: 4.0}, [1, 3], 1),
        ({1: 2.0, 2: 1.0, 3: 4.0, 5: None}, [2, 5], 2),
        ({1: None, 2: None}, [2], None),
        ({1: None, 2: 1.0, 9: None, 10: None}, [2, 10], 2),
    ],
)
def test_the_last_and_the_best_are_kept(snapshots, folder, losses, kept, best):
    assert (snapshots.last, snapshots.best) == (None, None)
    for step, loss in losses.items():
        snapshots.save(
            state(step), [("block", {"weight": np.full(3, step)})], {} if loss is None else {"eval/loss": loss}
        )
        assert snapshots.last == step
    again = Snapshots(folder)
    for opened in (snapshots, again):
        assert (opened.last, opened.best) == (max(losses), best)
        for step in kept:
            check_whole(opened, step, {"block": {"weight": np.full(3, step)}})
    assert listing(folder) == sorted(map(str, kept))
    again.close()


def test_killed_while_a_snapshot_is_deleted(saved, folder, monkeypatch):
    """It is out of sight before the first of its files goes, and gone after the next save."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
    saved.save(state(2), model(2).items(), {"eval/loss": 0.5})
    monkeypatch.undo()
    assert listing(folder) == ["2", "unfinished"]
    snapshots = Snapshots(folder)
    assert (snapshots.last, snapshots.best) == (2, 2)
    snapshots.save(state(3), model(3).items(), {"eval/loss": 0.25})
    assert listing(folder) == ["3"]
    snapshots.close()


@pytest.mark.parametrize("gone", ["metrics", "blocks", "state", "_CHECKPOINT_METADATA"])
def test_what_an_older_version_left_half_deleted_goes(saved, folder, gone):
    shutil.copytree(folder / "1", folder / "copy")
    saved.save(state(2), model(2).items(), {"eval/loss": 0.5})
    (folder / "copy").rename(folder / "1")
    path = folder / "1" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    snapshots = Snapshots(folder)
    assert (snapshots.last, snapshots.best) == (2, 2)
    snapshots.save(state(3), model(3).items(), {})
    assert listing(folder) == ["2", "3"]
    snapshots.close()


def test_a_step_that_is_saved_is_left_as_it_is(saved):
    def blocks():
        raise AssertionError("asked for blocks")
        yield

    saved.save(state(1), blocks(), {"eval/loss": 0.0})
    check_whole(saved, 1, model(1))


def test_another_process_may_look_while_one_saves(saved, folder):
    """Opening removes nothing, and does not see what is not whole."""

    def blocks():
        for pair in model(2).items():
            yield pair
            reader = Snapshots(folder)
            assert (reader.last, reader.best) == (1, 1)
            check_whole(reader, 1, model(1))
            reader.close()

    saved.save(state(2), blocks(), {})
    check_whole(saved, 2, model(2))


def test_saving_and_restoring_are_quiet(snapshots, caplog):
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            snapshots.save(state(step), model(step).items(), {})
        check_whole(snapshots, 3, model(3))
    assert caplog.records == []


def changed(leaves, path, shape=(4, 4), dtype=np.float32):
    """A block's shapes with one leaf put there, or without it if ``shape`` is None."""
    tree = jax.tree.map(lambda x: x, like(leaves))
    *parents, last = path.split(".")
    inner = tree
    for key in parents:
        inner = inner[key]
    inner.pop(last, None)
    if shape is not None:
        inner[last] = jax.ShapeDtypeStruct(shape, dtype)
    return tree


@pytest.mark.parametrize(
    ("step", "name", "change", "message"),
    [
        (
            1,
            "layers.0.mlp",
            (),
            r"1/blocks has no block 'layers.0.mlp', only embed, head, layers.0.attn: .*another model",
        ),
        (2, "embed", (), r"has no whole snapshot of step 2, only of: 1"),
        (1, "embed", ("weight", (7, 5)), r"embed.weight is float32\[7, 4\] there, expected float32\[7, 5\]"),
        (1, "embed", ("weight", (7, 4), np.int32), r"embed.weight is float32\[7, 4\] there, expected int32\[7, 4\]"),
        (
            1,
            "layers.0.attn",
            ("q.weight", (4, 4), np.float16),
            r"attn does not fit: layers.0.attn.q.weight is bfloat16\[4, 4\] there, expected float16\[4, 4\]\.",
        ),
        (1, "layers.0.attn", ("norm", None), r"layers.0.attn.norm is float32\[4\] there, expected no such leaf"),
        (1, "layers.0.attn", ("q.bias", (4,)), r"layers.0.attn.q.bias is missing there, expected float32\[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(saved, step, name, change, message):
    leaves = model()[name] if name in model() else {"weight": np.ones(2)}
    shapes = changed(leaves, *change) if change else like(leaves)
    with pytest.raises(ValueError, match=message):
        saved.block(step, name, shapes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (state(0, jnp.ones(3)), r"1/state does not fit: state.opt_state is missing there, expected float32\[3\]"),
        (state(0)._replace(leaf_ids=jnp.zeros(6, jnp.uint32)), r"leaf_ids is uint32\[5\] there, expected uint32\[6\]"),
        (state(0)._replace(step=jnp.int32(0)), r"state.step is uint32\[\] there, expected int32\[\]"),
    ],
)
def test_another_state_is_refused(saved, other, message):
    with pytest.raises(ValueError, match=message + r".*Use the model and optimizer that it was saved with"):
        saved.restore(other, 1)


DAMAGES = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
}


# Orbax reads the leaves at once; those that are still on their way when one fails say so, as nobody waits for them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["blocks/layers.0.attn", "state"])
def test_damaged_files(saved, folder, damage, part):
    """Each file in turn: an error that names the folder, or the same bits if nothing of them is in it."""
    files = [path for path in (folder / "1" / part).rglob("*") if path.is_file()]
    found = {}
    for path in files:
        before = path.read_bytes()
        DAMAGES[damage](path)
        try:
            check_whole(saved, 1, model(1))
        except ValueError as error:
            found[path.name] = str(error)
        path.write_bytes(before)
    assert all(str(folder) in message for message in found.values())
    assert all("is damaged" in message or "no whole snapshot" in message for message in found.values())
    needed = {"_METADATA", "manifest.ocdbt", max(files, key=lambda path: path.stat().st_size).name}
    assert needed <= found.keys()
    check_whole(saved, 1, model(1))


def test_folders_that_only_have_the_name_of_a_step(saved, folder):
    """As a copy or a removal that was broken off leaves them."""
    (folder / "7" / "blocks").mkdir(parents=True)
    again = Snapshots(folder)
    assert (again.last, again.best) == (1, 1)
    with pytest.raises(ValueError, match="no whole snapshot of step 7, only of: 1"):
        again.restore(state(0), 7)
    for step in (5, 7):
        again.save(state(step), model(step).items(), {})
        assert again.last == step
        check_whole(again, step, model(step))
    assert listing(folder) == ["1", "7"]
    again.close()


def test_snapshots_of_an_older_format(folder):
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=True)) as manager:
        manager.save(4, args=ocp.args.StandardSave({"params": model()["embed"], "step": np.uint32(4)}))
    snapshots = Snapshots(folder)
    assert snapshots.last == 4
    for read in (lambda: snapshots.restore(state(0), 4), lambda: snapshots.block(4, "embed", like(model()["embed"]))):
        with pytest.raises(
            ValueError, match=rf"{folder / '4'} was saved by an older zo2jax, .*expected a folder per block"
        ):
            read()
    snapshots.save(state(5), model().items(), {})
    check_whole(snapshots, 5, model())
    snapshots.close()


SAVE_FOR_EVER = """
import sys, itertools, pathlib, jax, numpy as np
from zo2jax.checkpoint import Snapshots
from zo2jax.mezo import State

snapshots = Snapshots(pathlib.Path(sys.argv[1]))
for step in itertools.count(1):
    state = State({}, (), np.uint32(step), jax.random.key(3), np.arange(5, dtype=np.uint32))
    blocks = ((f"block{i}", {"weight": np.full((64, 64), step)}) for i in range(4))
    snapshots.save(state, blocks, {"eval/loss": 5.0 + step % 3})
    print(step, flush=True)
"""


@pytest.mark.parametrize("kill", range(2))
def test_killed_at_any_moment(tmp_path, kill):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown if the test fails
    wait = random.Random(seed).uniform(0, 0.5)
    root = str(Path(zo2jax.__file__).parent.parent)
    command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        known = int(process.stdout.readline())
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        known = max([known, *map(int, process.stdout.read().split())])
    left = listing(tmp_path)
    print(f"waited {wait:.3f} s, {known} snapshots, left {left}")
    snapshots = Snapshots(tmp_path)
    last, best = snapshots.last, snapshots.best
    assert last in (known, known + 1)  # it may be killed between saving and saying so
    assert best == max(step for step in range(1, last + 1) if step % 3 == min(s % 3 for s in range(1, last + 1)))
    for step in {last, best}:
        check_whole(snapshots, step, {f"block{i}": {"weight": np.full((64, 64), step)} for i in range(4)})
    snapshots.save(state(last + 1), model().items(), {"eval/loss": 9.0})
    check_whole(snapshots, last + 1, model())
    assert set(listing(tmp_path)) == {str(best), str(last + 1)}
    snapshots.close()
