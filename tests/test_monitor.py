"""The monitor: its numbers against those of others, what it warns of, and that nothing waits for it."""

import io
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import zo2jax as zo
from zo2jax import monitor
from zo2jax.metrics import read_metrics
from zo2jax.monitor import Memory, Monitor, Numbers, Watch, expected_seconds
from zo2jax.plan import Budget, Plan
from zo2jax.plan.machine import Machine
from zo2jax.plan.schedule import Work

pytestmark = pytest.mark.usefixtures("quick_compilation")
GIB = 2**30
RATES = Machine(up=1.0, down=1.0, both=2.0, products=10.0, memory=100.0)


def said(watch, numbers):
    """At which of these a watch says something, and the texts."""
    found = [watch.look(one) for one in numbers]
    return [i for i, texts in enumerate(found) if texts], [text for texts in found for text in texts]


def test_steps_that_are_slower_than_planned_are_said_once_and_again():
    def times(seconds, count):
        return [Numbers(1, seconds=seconds)] * count

    slow = [*times(1.4, 30), *times(math.nan, 5), *times(2.0, 30), *times(1.0, 30), *times(2.0, 30)]
    at, texts = said(Watch(Memory(0), expected=1.0), slow)
    assert at == [35 + 9, 95 + 10]  # as soon as the median of 20 is above 1.5: (1.4 + 2) / 2 is, (1 + 2) / 2 is not
    assert "takes 1.7 s (median of the last 20), where the plan expects 1 s" in texts[0]
    assert said(Watch(Memory(0), expected=1.0), times(2.0, 19)) == ([], [])
    assert said(Watch(Memory(0)), slow) == ([], [])
    assert said(Watch(Memory(0), expected=1.0), [*times(1.0, 11), *times(50.0, 9)] * 3) == ([], [])  # evaluations


def test_a_gradient_that_is_stuck_at_0_is_said():
    def steps(*runs):
        return [Numbers(1, gradient=g) for g, count in runs for _ in range(count)]

    at, texts = said(Watch(Memory(0)), steps((1e-30, 5), (0.0, 40), (1.0, 1), (0.0, 19), (1.0, 1), (0.0, 20)))
    assert at == [24, 85] and "exactly 0 in 20 steps in a row" in texts[0] and "larger eps" not in texts[0]
    skipped = [Numbers(1, gradient=math.nan, skipped=True), *steps((0.0, 15))]
    assert said(Watch(Memory(0)), steps((0.0, 10)) + skipped)[0] == [20]  # those that were skipped say nothing


def test_memory_is_watched():
    def device(*used):
        return [Numbers(1, memory=Memory(0, device=now, device_peak=peak)) for now, peak in used]

    def swapped(*count):
        return [Numbers(1, memory=Memory(0, swapped=x)) for x in count]

    begun = Memory(0, swapped=GIB, device=0, device_peak=5 * GIB)
    at, texts = said(Watch(begun), swapped(GIB, GIB + 2**25, 2 * GIB, 3 * GIB, GIB, 2 * GIB))
    assert at == [2, 5] and "2.00 GiB of this process are swapped to the disk, 1.00 GiB more" in texts[0]
    watch = Watch(begun, device_peak=2 * GIB)
    at, texts = said(watch, device((GIB, 5 * GIB), (2 * GIB, 5 * GIB), (GIB, 6 * GIB), (GIB, 7 * GIB)))
    assert at == [2] and "6.00 GiB of device memory were in use, where the plan expects 2.00 GiB" in texts[0]
    assert said(Watch(begun, device_peak=2 * GIB), device((3 * GIB, 5 * GIB)))[0] == [0]
    assert said(Watch(begun, device_peak=2 * GIB), [Numbers(1, memory=Memory(0))])[0] == []  # nobody counts


def test_what_a_plan_expects_of_a_step():
    """What it says itself; nothing where the link does not bound it, or it is short."""
    works = tuple(Work(name, size, products=2.0) for name, size in (("a", 6), ("b", 6), ("c", 6)))
    plan = Plan(dict.fromkeys("abc", "host"), budget=Budget(0, 0, 0, 0, 0, sizes=dict.fromkeys("abc", 6), works=works))
    assert expected_seconds(plan, RATES) == plan.timeline(RATES).seconds >= 18  # each way at a rate of 1
    files = Plan(dict.fromkeys("abc", "disk"), budget=plan.budget)
    assert expected_seconds(files, replace(RATES, disk=0.5, disk_read=1.0)) > 2 * 18
    assert expected_seconds(plan, replace(RATES, products=0.1)) is None
    assert expected_seconds(plan, replace(RATES, up=1e4, down=1e4, both=1e4, products=1e6, memory=1e6)) is None
    assert expected_seconds(Plan({"a": "host"}), RATES) is None
    assert expected_seconds(Plan(budget=plan.budget), RATES) is None


def test_a_machine_that_was_measured_before_is_what_a_run_is_compared_with(tmp_path, monkeypatch):
    works = (Work("a", 6, products=2.0),)
    plan = Plan({"a": "host"}, budget=Budget(0, 0, 0, 0, 0, sizes={"a": 6}, works=works))
    file = tmp_path / "machine.json"
    monkeypatch.setattr(monitor, "cache_file", lambda kind: file)
    assert monitor._expected(plan) is None
    RATES.save(file)
    assert monitor._expected(plan) == plan.timeline(RATES).seconds
    file.write_text("")  # as of a write that was cut short
    assert monitor._expected(plan) is None


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux says how much memory a process has")
def test_memory_of_this_process(monkeypatch):
    wanted = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    memory = Memory.now()
    assert memory.host == pytest.approx(wanted, rel=0.05) and memory.host <= memory.host_peak
    assert memory.swapped is not None and memory.device is None  # of CPUs nobody counts
    monkeypatch.setattr(monitor, "Path", lambda _: Path("/no/such/file"))
    assert Memory.now().host is None and Memory.now().swapped is None


W = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
BATCH = {"x": np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)}
NOTHING = {"x": np.zeros((4, 8), np.float32)}  # whose gradient is 0
RATE = optax.linear_schedule(1e-2, 1e-4, 40)


def opened(directory, estimator=None, scale=1.0, plan=None, **options):
    blocks = [("a", (lambda p, x: x["x"] @ p["w"], {"w": W}))]
    model = zo.blocks(dict(blocks), loss=lambda y, _: scale * (y**2).mean(1))
    how = {"directory": directory, "key": jax.random.key(5), "plan": plan}
    return zo.Run(model, estimator or zo.averaged(zo.two_point(1e-2), 2), zo.sgd(RATE), **how, **options)


def shown(run, count, **options):
    """The numbers of steps up to so many, of a monitor that sees them."""
    found, console = [], Console(file=io.StringIO(), width=150)
    with Monitor(run, 40, console=console, **options) as watched:
        for batch in run.remaining([*[BATCH] * 4, NOTHING, *[BATCH] * (count - 5)]):
            watched.show(run.step(batch))
            found += [watched.numbers]
        run.flush()
    return [*found[1:], watched.numbers], console.file.getvalue(), watched


def test_numbers_are_those_of_the_run(tmp_path):
    """Also after a resume: the scale is that of `clip_by_running_scale` without a bound, the rate the schedule's."""
    with opened(tmp_path / "whole") as run:
        numbers, _, watched = shown(run, 30)
    lines = [line for line in read_metrics(tmp_path / "whole") if "train/loss" in line]
    clip = zo.clip_by_running_scale(1e9).transformation
    state = clip.init(jnp.zeros(2))
    assert [one.step for one in numbers] == list(range(1, 31))
    for line, one in zip(lines, numbers, strict=True):
        g = np.array(line["train/projected_gradient"], np.float32)
        _, state = clip.update(jnp.asarray(g), state)
        second = float(state.second) / (1 - 0.99 ** int(state.steps))
        assert one.loss == pytest.approx(line["train/loss"]) and one.gradient == pytest.approx(np.linalg.norm(g))
        assert one.scale == pytest.approx(math.sqrt(second), rel=1e-4)
        rate = float(RATE(one.step - 1)) if one.step != 5 else math.nan
        assert one.learning_rate == pytest.approx(rate, rel=1e-3, nan_ok=True)
        if 1 < one.step < 30:  # the first one is not timed, nor is the last one when it is shown
            assert one.tokens_per_second == pytest.approx(line["tokens_per_second"])
            assert one.seconds == pytest.approx(32 / one.tokens_per_second)
    assert watched.warnings == [] and numbers[-1].left > 0
    for steps in (20, 30):
        with opened(tmp_path / "parts") as run:
            parts, _, _ = shown(run, steps)
    assert [one.scale for one in parts] == pytest.approx([one.scale for one in numbers[20:]])
    trained = [
        [{k: line[k] for k in ("step", "train/loss", "train/projected_gradient")} for line in read_metrics(directory)]
        for directory in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert trained[0] == trained[1] and set(read_metrics(tmp_path / "parts")[-1]) == set(lines[-1])


def test_nothing_waits_for_the_step_that_is_shown(tmp_path):
    """Of the last step not even an array is looked at; the former is on the host."""

    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"{name} of an array that may still be on its way")

        __array__ = __float__ = __getattr__

    arrays = dict.fromkeys(("loss", "projected_gradient", "losses", "skipped", "update"), Untouchable())
    with opened(tmp_path) as run, Monitor(run, console=Console(file=io.StringIO())) as watched:
        first, second = run.step(BATCH), run.step(BATCH)
        watched.show(replace(first, **arrays))
        assert watched.numbers is None
        watched._last = first
        watched.show(replace(second, **arrays))
        assert watched.numbers.step == 1
        watched._last = None


def test_tensorboard_has_what_the_run_does_not_write(tmp_path):
    from tensorboardX.proto import event_pb2

    with opened(tmp_path, scale=0.0, tensorboard=True) as run:
        numbers, text, watched = shown(run, 25)
    found, texts = {}, []
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    data = file.read_bytes()
    while data:  # TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
            texts += [s.decode() for s in value.tensor.string_val]
        data = data[16 + size :]
    assert found["train/gradient_norm"] == {10: 0.0, 20: 0.0} and set(found["memory/host"]) == {10, 20}
    assert found["memory/host"][20] == pytest.approx(numbers[19].memory.host) and 20 in found["seconds_left"]
    assert {"train/loss", "tokens_per_second", "memory/host_peak"} <= set(found)
    (warning,) = watched.warnings
    assert texts == [warning] and re.search(r"exactly 0 in 20 steps in a row, up to step 20", warning)
    assert "warning, step 20: the projected gradient" in text
    assert not [line for line in read_metrics(tmp_path) if "warning" in line]


def test_what_is_on_the_link_is_shown(tmp_path):
    with opened(tmp_path, zo.two_point(1e-2), plan=Plan({"a": "host"})) as run:
        numbers, text, _ = shown(run, 6)
    line = next(line for line in read_metrics(tmp_path) if line["step"] == 3)
    assert numbers[2].moved == line["link/bytes_up"] + line["link/bytes_down"] > 0
    assert numbers[2].link_share == pytest.approx(line["link/share"])
    assert "moved 16.00 KiB (" in text


def test_a_line_each_half_minute_and_a_table_on_terminals(tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: seconds[0])
    console = Console(file=io.StringIO(), width=150)
    with opened(tmp_path / "a") as run, Monitor(run, 100, console=console) as watched:
        for batch in run.remaining([BATCH] * 9):
            watched.show(run.step(batch))
            seconds[0] += 8.0
    lines = console.file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "4/100"], ["step", "8/100"], ["step", "9/100"]]
    wanted = (
        r"step 4/100  loss \d\.\d+  \|g\| \S+  its scale \S+  learning rate \S+  tokens/s [\d,]+  host .* left 0:12:48"
    )
    assert re.fullmatch(wanted, lines[0])  # 96 steps of 8 s
    terminal = Console(file=io.StringIO(), width=150, force_terminal=True)
    with opened(tmp_path / "b") as run, Monitor(run, 100, console=terminal) as watched:
        for batch in run.remaining([BATCH] * 4):
            watched.show(run.step(batch))
            terminal.print("between")
            seconds[0] += 8.0
    text = terminal.file.getvalue()
    for part in ("4/100", "loss", "its scale", "learning rate", "0:12:56 left", "between", "━"):
        assert part in text
