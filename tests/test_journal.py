"""The journal: every bit of a run is known from it, whenever the process dies, and no damage goes unseen."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import SAVE_EVERY, STEPS, batches, go, model_of, opened

import zo2jax as zo
from pallas_kernels import bits
from zo2jax.demo import model_folder
from zo2jax.directory import Directory, _cache_programs
from zo2jax.header import Header, digest
from zo2jax.journal import Journal, JournalError, Record, Recorded
from zo2jax.metrics import read_metrics
from zo2jax.replay import read_journal

SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("quick_compilation")


def record(step, members=2, directions=1):
    rng = np.random.default_rng(step)
    losses, coefs = rng.standard_normal(members), rng.standard_normal(directions)
    return Record(np.float32(losses), np.float32(coefs), np.float32(rng.random()), step % 5 == 4)


def write(path, steps, **header):
    header = Header(**{"key": (0, 7), "base": {"embed": "ab"}} | header)
    with Journal.create(path, header) as journal:
        for step in range(steps):
            journal.append(record(step, header.members, header.directions))
    return path


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("members", "directions"), [(2, 1), (6, 3), (1, 1)])
def test_records_come_back_to_the_bit(tmp_path, members, directions):
    path = write(tmp_path / "journal", 7, members=members, directions=directions)
    found = Recorded(path)
    assert len(found) == 7 and all(same(found.record(i), record(i, members, directions)) for i in range(7))
    with Journal(path) as journal:  # goes on
        journal.append(record(7, members, directions))
    found = Recorded(path)
    assert len(found) == 8 and all(same(found.record(i), record(i, members, directions)) for i in range(8))
    assert path.read_bytes().startswith(b'zo2jax journal 1\n{"base": {"embed": "ab"}, ')


def test_twenty_thousand_steps_fit_in_an_e_mail(tmp_path):
    path = write(tmp_path / "journal", 20_000)
    assert path.stat().st_size < 640_000
    assert len(Recorded(path)) == 20_000


def test_a_torn_end_is_cut_off(tmp_path):
    """Half a record, or blocks of the file that were never written: zeros."""
    path, whole = tmp_path / "journal", write(tmp_path / "whole", 5).read_bytes()
    before = len(write(tmp_path / "shorter", 4).read_bytes())
    for end in range(before, len(whole)):
        for tail in (b"", b"\0" * (len(whole) - end), b"\0" * 100):
            if whole[end:].strip(b"\0") and not (len(whole) - end < 4 and tail):
                path.write_bytes(whole[:end] + tail)
                assert len(Recorded(path)) == 4, (end, tail)
    assert path.read_bytes() != whole  # looking changes nothing
    with Journal(path) as journal:
        assert len(journal) == 4
        journal.append(record(4))
    assert path.read_bytes() == whole


def test_every_flipped_bit_is_found(tmp_path):
    path = write(tmp_path / "journal", 3)
    whole = path.read_bytes()
    begin = len(whole) - 3 * 21
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        step = (at - begin) // 21 + 1
        message = f"damaged at step {step} of 3: its checksum" if at >= begin else "journal is|was written with version"
        with pytest.raises(JournalError, match=message):
            Journal(path)
        assert path.read_bytes() == damaged


def test_records_have_one_place(tmp_path):
    """Neither an exchange nor a record of another journal is taken."""
    path, other = write(tmp_path / "journal", 3), write(tmp_path / "other", 3, key=(0, 8)).read_bytes()
    whole = path.read_bytes()
    for records in (whole[-21:] + whole[-42:-21], whole[-42:-21] + other[-21:], whole[-42:-21] + whole[-42:-21]):
        path.write_bytes(whole[:-42] + records)
        with pytest.raises(JournalError, match=r"damaged at step [23] of 3"):
            Recorded(path)


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "journal", 1)
    path.write_bytes(path.read_bytes().replace(b"journal 1\n", b"journal 2\n"))
    with pytest.raises(JournalError, match=r"another version .*expected a file that begins with 'zo2jax journal 1'"):
        Recorded(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(JournalError, match="is no journal"):
        Recorded(path)
    write(path, 1)
    monkeypatch.setattr(bits, "GENERATOR", bits.GENERATOR + 1)
    with pytest.raises(JournalError, match=r"version 1 of the generator, here it is 2.*Use the zo2jax that wrote it"):
        Recorded(path)


def test_the_generator_is_the_one_of_its_number():
    """When this fails, addresses have other values than before: bits.GENERATOR has to change with them."""
    key, rows = jnp.array([1, 2], jnp.uint32), jnp.arange(300, dtype=jnp.uint32)
    pairs = (bits.normal_pair, bits.rademacher_pair, bits.rounding_pair)
    values = {pair.__name__: bits.draw(pair, key, rows, 67) for pair in pairs}
    keys = zo.directions.step_keys(jax.random.key(3), jnp.uint32(5), 2, zo.lowrank(2, refresh=4))
    known = {1: "f61491ebb6a914456965241789a8b260"}
    assert digest(values | {"keys": jax.random.key_data(keys)}) == known[bits.GENERATOR]


def test_a_full_disk_costs_no_step(tmp_path, monkeypatch):
    path = write(tmp_path / "journal", 2)
    with Journal(path) as journal:
        before, real = path.read_bytes(), os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:9], at))
        for _ in range(2):
            with pytest.raises(OSError, match=r"step 3 could not be written to .*No space left.*2 steps before it are"):
                journal.append(record(2))
            assert path.read_bytes() == before
        monkeypatch.undo()
        journal.append(record(2))
    assert len(Recorded(path)) == 3


def test_a_run_goes_on_after_a_full_disk(tmp_path, monkeypatch):
    """Whoever frees some space after `flush` has failed loses nothing: the journal has that step too."""
    data, real = batches(), os.pwrite
    with opened("dense", tmp_path) as run:
        for batch in data[:2]:
            run.step(batch)
        monkeypatch.setattr(os, "pwrite", lambda file, record, at: real(file, record[:5], at))
        for _ in range(2):
            with pytest.raises(OSError, match="step 2 could not be written"):
                run.flush()
        monkeypatch.undo()
        for batch in data[2:4]:
            run.step(batch)
        weights = jax.tree.map(np.array, run.model.params)
    assert len(Recorded(tmp_path / "journal")) == 4
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    jax.tree.map(np.testing.assert_array_equal, dict(zo.replay(model_of("dense"), tmp_path).params), weights)


def test_a_step_of_an_empty_batch_is_a_step(tmp_path):
    """As where the loss looks at no batch: it moves the weights, so the journal has it."""
    block = (lambda params, batch: params["w"]), {"w": jnp.ones((2, 2))}
    model = zo.blocks([block], loss=lambda y, batch: jnp.sum(y**2)[None])
    with zo.Run(model, zo.two_point(1e-2), zo.sgd(0.1), directory=tmp_path, key=jax.random.key(0)) as run:
        assert [run.step(batch).tokens for batch in ({}, {"a": np.ones(3)}, None)] == [0, 3, 0]
    assert len(Recorded(tmp_path / "journal")) == 3


@pytest.mark.parametrize("configured", [False, True])
def test_programs_of_a_gpu_stay_with_the_run(configured, tmp_path, monkeypatch):
    """As if there were one: tests/test_gpu.py has a process that goes on with them."""
    cache, folder = jax.config.jax_compilation_cache_dir, tmp_path / "run"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        _cache_programs(str(tmp_path / "own") if configured else None)
        directory = Directory(folder, Header(key=(0, 7)), {})
        jnp.sort(jnp.asarray(np.random.default_rng().normal(size=(7, 1234)))).block_until_ready()
        directory.close()
        now = jax.config.jax_compilation_cache_dir
    finally:
        _cache_programs(cache)
    assert now == (str(tmp_path / "own") if configured else None)
    assert (folder / "compiled").exists() != configured


def test_digests_tell_weights_apart():
    leaves, flipped = {"w": np.zeros((4, 6), np.float32), "n": {"scale": np.ones(3)}}, np.zeros((4, 6), np.float32)
    flipped.view(np.uint32)[3, 5] = 1
    others = [leaves | {"w": w} for w in (flipped, np.zeros((6, 4), np.float32), np.zeros((4, 6), np.int32))]
    others += [{"v": leaves["w"], "n": leaves["n"]}, {"w": leaves["w"]}]
    assert digest(leaves) == digest(dict(reversed(leaves.items())))
    assert digest({"w": leaves["w"]}) == digest({"w": jnp.asarray(leaves["w"])})
    assert len({digest(leaves), *map(digest, others)}) == 6


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What the runs of `killing` end with that nothing happens to."""
    known = {}

    def of(setting):
        if setting not in known:
            with opened(setting, tmp_path_factory.mktemp("straight")) as run:
                known[setting] = go(run)
        return known[setting]

    return of


CALLS = {"time": 1500, "journal": 190, "page": 500, "snapshot": 24, "background": 24, "fold": 80}
"""Milliseconds, or calls, of which there are a few more; but in the background, where what is late is given up."""
SOME = [("disk", "page"), ("disk", "time"), ("momentum", "background"), ("momentum", "fold"), ("momentum", "journal")]
MORE = [
    (setting, where)
    for _ in range(3)
    for setting in ("dense", "disk", "codes", "momentum", "factors")
    for where in ("time", "journal", "page", "snapshot", "background", "fold")
    if (where != "page" or setting == "disk") and (where != "fold" or setting not in ("dense", "disk"))
]
KILLS = [*SOME, *(pytest.param(*kill, marks=SLOW) for kill in MORE[:40])]


@pytest.mark.parametrize(("setting", "where"), KILLS)
def test_killed_at_any_moment(setting, where, straight, tmp_path):
    """In the end all that the run keeps is what it would have been, and the metrics have each step once."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown if the test fails
    draw = random.Random(seed)
    expected = straight(setting)
    # What a process is killed at while it writes there would be damaged for all tests: it only reads.
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    number = draw.randint(1, CALLS[where])
    arguments = [setting, str(tmp_path), where, str(number)]
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
    journal = tmp_path / "journal"
    print(f"{where} {number}: {done.returncode}, {len(Recorded(journal)) if journal.is_file() else 'no'} steps")
    late = where in ("time", "background") and done.returncode == 0  # it was done by then
    assert done.returncode == -signal.SIGKILL or late, done.stderr
    with opened(setting, tmp_path) as run:
        found = go(run)
    assert_same(found, expected)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    evaluated = [line["step"] for line in lines if "eval/loss" in line]
    assert len(set(evaluated)) == len(evaluated) and set(evaluated) <= set(range(0, STEPS + 1, SAVE_EVERY))


@pytest.mark.parametrize(
    "setting",
    ["dense", "factors", *(pytest.param(x, marks=SLOW) for x in ("codes", "lora", "disk", "momentum", "frozen"))],
)
def test_replay_gives_the_weights_of_any_step(setting, tmp_path):
    """Block by block, without data: the bits of the run, which evaluated, stopped and went on in between."""
    model, known = model_of(setting), {}
    for until in (23, 70):
        with opened(setting, tmp_path) as run:
            go(run, until)
            known[until] = jax.tree.map(np.asarray, dict(run.model.source))
    moved = jax.tree.map(
        lambda x, y: np.mean(np.asarray(x) != y), known[23]["layers.0.attn"], known[70]["layers.0.attn"]
    )
    assert max(jax.tree.leaves(moved)) > 0.5
    for step, weights in known.items():
        assert_same(dict(zo.replay(model, tmp_path, step=step).source), weights)
    if model.format is None:
        assert_same(dict(zo.replay(model, tmp_path, step=0).source), dict(model.source))
    with pytest.raises(ValueError, match="has 70 steps: step 71 is not among them"):
        zo.replay(model, tmp_path, step=71)
    found = zo.replay(model_of(setting, 2), tmp_path)
    with pytest.raises(JournalError, match=r"block head of the model is not what the run of .*journal began with"):
        found.source["head"]


OLD = {
    "dense": ("bfloat16", "0c750e46070fd50ed018d64d1b1dc7e26c0fe541d641616a37f944f3bb21237c"),
    "factors": ("float32", "b27542787e9173b2ccfddb43cd1118591ef55f9fb6ab91b1763b9b28e7fae94d"),
}


@pytest.mark.parametrize("name", OLD)
def test_old_journals_still_replay(name):
    """Of 40 steps on the model that comes with the package, written when the format was new; never to be made anew."""
    path, (dtype, expected) = Path(__file__).parent / "journals" / f"{name}.zo", OLD[name]
    weights = zo.replay(zo.load(model_folder(), dtype=dtype), path).source
    found = {block: digest(leaves) for block, leaves in weights.items()}
    assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() == expected


def unchanged(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of 10 steps with a checkpoint of step 6."""
    folder = tmp_path_factory.mktemp("short")
    with opened("dense", folder) as run:
        for batch in run.remaining(batches()[:10]):
            run.step(batch)
            if run.steps_done == 6:
                run.save()
    return folder


def other_base(folder, monkeypatch):
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.setattr("killing.model_of", lambda setting: model_of(setting, 9))


def flip(folder, monkeypatch):
    data = bytearray((folder / "journal").read_bytes())
    data[-21 * 3] ^= 4
    (folder / "journal").write_bytes(data)


def cut(folder, monkeypatch):
    data = (folder / "journal").read_bytes()
    (folder / "journal").write_bytes(data[: -21 * 5])


def miss(folder, monkeypatch):
    max((folder / "checkpoints" / "6" / "blocks").rglob("d/*"), key=lambda path: path.stat().st_size).unlink()


BAD = {
    "a file of the checkpoint": (miss, "the checkpoint .* is damaged"),
    "other base": (
        other_base,
        r"of another run \(the weights before the first step, of 4 blocks: embed .* there, .* here\)",
    ),
    "flipped": (flip, "damaged at step 8 of 10"),
    "cut": (cut, "has a checkpoint of step 6, but its journal ends at step 5: put .*journal back from a copy"),
    "gone": (lambda folder, _: (folder / "journal").unlink(), "checkpoint of step 6, but it has no journal"),
}


# TensorStore's other reads of a damaged checkpoint report to an event loop that Orbax has closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_go_on_is_refused_and_left_alone(case, short, tmp_path, monkeypatch):
    shutil.copytree(short, tmp_path / "run")
    change, message = BAD[case]
    change(tmp_path / "run", monkeypatch)
    before = unchanged(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            opened("dense", tmp_path / "run")
    assert unchanged(tmp_path / "run") == before


def test_a_file_system_that_is_read_only(short, tmp_path, monkeypatch):
    shutil.copytree(short, tmp_path / "run")
    before, really = unchanged(tmp_path / "run"), os.open

    def refuse(path, flags, *options, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return really(path, flags, *options, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"the run directory .*run cannot be written \(.*Read-only file system"):
        opened("dense", tmp_path / "run")
    assert len(read_journal(tmp_path / "run")) == 10 and unchanged(tmp_path / "run") == before


def test_a_journal_alone_is_enough(short, tmp_path):
    """Without its checkpoint the run goes on from the model's own weights."""
    shutil.copytree(short, tmp_path / "run")
    with opened("dense", short) as run:
        whole = go(run, 12)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with opened("dense", tmp_path / "run") as run:
        assert run.steps_done == 10
        assert_same(go(run, 12), whole)


def test_one_process_at_a_time(short, tmp_path):
    shutil.copytree(short, tmp_path / "run")
    with opened("dense", tmp_path / "run") as run:
        before = unchanged(tmp_path / "run")
        with pytest.raises(BlockingIOError, match=r"another process trains in .*run: wait until it is done"):
            opened("dense", tmp_path / "run")
        assert unchanged(tmp_path / "run") == before
        run.step(batches()[10])
    opened("dense", tmp_path / "run").close()
