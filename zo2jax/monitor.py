"""What a run does: a live display, numbers for TensorBoard, and warnings where it is off its plan."""

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from zo2jax.metrics import memory_peaks, read_metrics
from zo2jax.plan import Plan
from zo2jax.plan.machine import Machine, cache_file
from zo2jax.plan.measure import measure_link
from zo2jax.recorder import StepInfo
from zo2jax.run import Run

_SHOWN_EVERY, _LINE_EVERY, _MEMORY_EVERY = 1.0, 30.0, 1.0  # seconds
_BETA = 0.99
_RECENT = 20
"""Steps of which the median is taken, or that g is 0 in, before anything is said."""
_SLOWER, _MORE_DEVICE, _SWAPPED = 1.5, 1.1, 64 * 2**20
_LEAST = 0.05
"""Seconds: where a step is expected to be shorter, the host's own work counts, which plans know roughly."""


@dataclass(frozen=True)
class Memory:
    """Bytes of memory; None where nobody counts them.

    >>> Memory.now().host_peak > 2**20
    True
    """

    host_peak: int
    host: int | None = None
    """Of this process, at present; on Linux."""
    swapped: int | None = None
    """Of this process, on the disk at present; on Linux."""
    device: int | None = None
    device_peak: int | None = None

    @classmethod
    def now(cls) -> "Memory":
        """That of this process and the first device; waits for nothing."""
        peaks, status = memory_peaks(), Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.is_file() else []
        fields = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS:", "VmSwap:")))
        host, swapped = (
            1024 * int(fields[name].split()[0]) if name in fields else None for name in ("VmRSS", "VmSwap")
        )
        used = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
        peak = max(peaks["memory/host_peak"], host or 0)  # the kernel counts them apart, each a little late
        return cls(peak, host, swapped, used, peaks.get("memory/device_peak"))


@dataclass(frozen=True)
class Numbers:
    """What is shown of a step; NaN for what is not known.

    >>> Numbers(3, loss=2.5, gradient=4.0).scalars()
    {'train/gradient_norm': 4.0}
    """

    step: int
    loss: float = math.nan
    gradient: float = math.nan
    """|g|: the norm of the step's projected gradients."""
    scale: float = math.nan
    """Its running root mean square, as of `zo2jax.clip_by_running_scale`, without a bound."""
    learning_rate: float = math.nan
    """By what g was multiplied: a learning rate, and what a clip or a scale of the optimizer makes of it."""
    skipped: bool = False
    seconds: float = math.nan
    tokens_per_second: float = math.nan
    """Of the last step that was timed."""
    moved: int = 0
    """Bytes over the link, both ways."""
    link_share: float = math.nan
    """Of the measured rate both ways."""
    left: float = math.nan
    """Seconds until the last step."""
    memory: Memory | None = None

    def scalars(self) -> dict[str, float]:
        """Those that `zo2jax.Run` does not write by itself, by name."""
        memory = self.memory
        found = {
            "train/gradient_norm": self.gradient,
            "train/gradient_scale": self.scale,
            "train/learning_rate": self.learning_rate,
            "memory/host": math.nan if memory is None or memory.host is None else float(memory.host),
            "memory/device": math.nan if memory is None or memory.device is None else float(memory.device),
            "seconds_left": self.left,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def texts(self) -> dict[str, str]:
        """What people read, by its heading.

        >>> Numbers(3, loss=2.5, gradient=4.0, tokens_per_second=1234.0).texts()
        {'loss': '2.500', '|g|': '4', 'tokens/s': '1,234'}
        """
        found = {"loss": f"{self.loss:.3f}", "|g|": f"{self.gradient:.3g}"}
        if math.isfinite(self.scale):
            found["its scale"] = f"{self.scale:.3g}"
        if math.isfinite(self.learning_rate):
            found["learning rate"] = f"{self.learning_rate:.3g}"
        if math.isfinite(self.tokens_per_second):
            found["tokens/s"] = f"{self.tokens_per_second:,.0f}"
        if self.moved:
            share = f" ({self.link_share:.0%} of the link)" if math.isfinite(self.link_share) else ""
            found["moved"] = f"{_bytes(self.moved)}{share}"
        if self.memory is not None:
            if self.memory.device is not None:
                found["device"] = f"{_bytes(self.memory.device)} (peak {_bytes(self.memory.device_peak or 0)})"
            now = "" if self.memory.host is None else f"{_bytes(self.memory.host)} "
            found["host"] = f"{now}(peak {_bytes(self.memory.host_peak)})"
        if math.isfinite(self.left):
            found["left"] = str(timedelta(seconds=int(self.left)))
        return found


class Watch:
    """Says what is wrong with a run, from its numbers alone: once, and again when it was fine in between.

    Args:
        begun: the memory before the first step.
        expected: seconds that a step should take, bound by the link or the disk; None if nobody knows.
        device_peak: bytes of device memory that a step should take at most; None if nobody knows.

    >>> watch = Watch(Memory(0))
    >>> found = [watch.look(Numbers(step, gradient=0.0)) for step in range(1, 30)]
    >>> [len(texts) for texts in found].index(1), sum(len(texts) for texts in found)
    (19, 1)
    """

    def __init__(self, begun: Memory, expected: float | None = None, device_peak: int | None = None):
        """Knows of no step yet."""
        self._begun, self._expected, self._device_peak = begun, expected, device_peak
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._zeros = 0
        self._said: set[str] = set()

    def look(self, numbers: Numbers) -> list[str]:
        """What there is to say after a step."""
        found = [self._slow(numbers.seconds), self._stuck(numbers)]
        if numbers.memory is not None:
            found += [self._swapping(numbers.memory), self._device(numbers.memory)]
        return [text for text in found if text is not None]

    def _once(self, name: str, wrong: bool, fine: bool, text: str) -> str | None:
        if fine:
            self._said.discard(name)
        if not wrong or name in self._said:
            return None
        self._said.add(name)
        return text

    def _slow(self, seconds: float) -> str | None:
        if self._expected is None or not math.isfinite(seconds):
            return None
        self._seconds.append(seconds)
        if len(self._seconds) < _RECENT:
            return None
        median = statistics.median(self._seconds)
        limit = _SLOWER * self._expected
        text = (
            f"a step takes {median:.3g} s (median of the last {_RECENT}), where the plan expects {self._expected:.3g} "
            "s at the rates that were measured: the link, or the disk, is slower now. Look for another process that "
            "uses them or the host's memory; `zo2jax machine` measures them again"
        )
        return self._once("slow", median > limit, median < 0.9 * limit, text)

    def _stuck(self, numbers: Numbers) -> str | None:
        if numbers.skipped or math.isnan(numbers.gradient):
            return None
        self._zeros = self._zeros + 1 if numbers.gradient == 0 else 0
        text = (
            f"the projected gradient was exactly 0 in {self._zeros} steps in a row, up to step {numbers.step}: nothing "
            "is learned. The probes' losses are equal, mostly because they differ by less than rounding: try an eps "
            "ten times as large, a loss in float32 if it is of 16 bits, or dtype=float32"
        )
        return self._once("stuck", self._zeros >= _RECENT, self._zeros == 0, text)

    def _swapping(self, memory: Memory) -> str | None:
        more = (memory.swapped or 0) - (self._begun.swapped or 0)
        text = (
            f"{_bytes(memory.swapped or 0)} of this process are swapped to the disk, {_bytes(more)} more than before "
            "the first step, expected none: steps wait for them. End other processes, keep more blocks on the device "
            "(device_memory) or on the disk (tier=disk), or take a smaller format"
        )
        return self._once("swapping", more > _SWAPPED, more < _SWAPPED / 2, text)

    def _device(self, memory: Memory) -> str | None:
        if self._device_peak is None or memory.device is None:
            return None
        risen = (memory.device_peak or 0) > (self._begun.device_peak or 0)  # it counts what was before the run, too
        used = max(memory.device, (memory.device_peak or 0) if risen else 0)
        text = (
            f"{_bytes(used)} of device memory were in use, where the plan expects {_bytes(self._device_peak)} at most: "
            "it may run out. Something else may use the device; or plan with a smaller device_memory or probe_batch"
        )
        limit = _MORE_DEVICE * self._device_peak
        return self._once("device", used > limit, used < 0.9 * limit, text)


def expected_seconds(plan: Plan, machine: Machine) -> float | None:
    """Seconds that a step without a fold should take, if blocks are streamed and their transfers bound it; or None.

    >>> expected_seconds(Plan(), Machine(1.0, 1.0, 1.5, 10.0, 4.0)) is None
    True
    """
    if plan.budget is None or not any(plan.moved().values()):
        return None
    timeline = plan.timeline(machine)
    return timeline.seconds if timeline.seconds >= _LEAST and timeline.bound in ("link", "files") else None


def _expected(plan: Plan) -> float | None:
    """By rates that were measured before; measures nothing, which takes seconds, and device memory."""
    try:
        return expected_seconds(plan, Machine.read(cache_file(jax.devices()[0].device_kind)))
    except (OSError, ValueError):  # none was measured, or by another version
        return None


class Monitor:
    """Shows what a run does, warns where it is off its plan, and gives TensorBoard further numbers.

    On a terminal a bar with a table below it, renewed each second; elsewhere a line each half minute. TensorBoard, if
    the run writes for it, has every tenth step: |g| and its running scale, the learning rate, memory at present, and
    seconds left, beside what the run writes itself (loss, g, tokens/s, bytes and share of the link, peaks of memory).

    Warnings come once, and again if all was fine in between: steps that take 1.5 times what the plan expects, where the
    link or the disk bounds them (if such a machine was measured before, by ``zo2jax machine`` or for a plan that was
    printed); memory of this process that is swapped (on Linux); a projected gradient of exactly 0 in 20 steps in a row;
    more device memory than 1.1 times the plan's peak.

    What is shown is the step before the last one, which is done: nothing waits for the device.

    Args:
        run: that is trained.
        total_steps: of the run, those before a resume included; None if nobody knows.
        console: standard output if None.

    >>> import tempfile, numpy as np, zo2jax as zo
    >>> from zo2jax.demo import model_folder
    >>> batch = {"ids": np.ones((2, 8), np.int32), "targets": np.ones((2, 8), np.int32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with zo.Run(zo.load(model_folder()), zo.two_point(1e-3), zo.sgd(1e-6), directory=folder,
    ...                 key=jax.random.key(0)) as run, Monitor(run, 3, console=Console(quiet=True)) as monitor:
    ...         for b in run.remaining([batch] * 3):
    ...             monitor.show(run.step(b))
    >>> monitor.numbers.step, monitor.warnings
    (3, [])
    """

    def __init__(self, run: Run, total_steps: int | None = None, *, console: Console | None = None):
        """Takes the running scale from the steps that are done already."""
        self.numbers: Numbers | None = None
        """Of the last step that is known to be done."""
        self.warnings: list[str] = []
        self._run, self._total = run, total_steps
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[left]}"), auto_refresh=False
        )
        self._bar = self._progress.add_task("train", total=total_steps, completed=run.steps_done, left="")
        self._live = Live(self._progress, console=self._console, auto_refresh=False)
        self._second = self._weight = 0.0
        for line in read_metrics(run.directory)[-2000:] if run.steps_done else []:  # earlier ones weigh nothing
            if (g := line.get("train/projected_gradient")) is not None:
                self._scale(math.hypot(*(x or 0.0 for x in (g if isinstance(g, list) else [g]))))
        self._memory, self._measured = Memory.now(), time.monotonic()
        budget = run.plan.budget
        peak = None if budget is None else budget.peak
        self._watch = Watch(self._memory, _expected(run.plan), peak)
        self._last: StepInfo | None = None
        self._first: tuple[float, int] | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> "Monitor":
        """Begins the display."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Ends it, with the last step."""
        last, self._last = self._last, None
        try:
            if last is not None and kind is None:
                self._take(last, math.nan)
                self._draw()
        finally:
            self._live.stop()

    def show(self, info: StepInfo) -> None:
        """Takes note of a step, and shows the one before."""
        last, self._last = self._last, info
        if last is not None:
            self._take(last, info.tokens_per_second if info.step == last.step + 1 else math.nan)
            now, every = time.monotonic(), _SHOWN_EVERY if self._console.is_terminal else _LINE_EVERY
            if now - self._shown >= every:
                self._shown = now
                self._draw()

    def _take(self, info: StepInfo, rate: float) -> None:
        """Makes the numbers of a step that is done; ``rate`` is its tokens/s."""
        found = info.loss, info.projected_gradient, info.update.coefs, info.skipped
        loss, g, coefs, skipped = jax.device_get(found)  # the run has them on the host already
        now, seconds = time.monotonic(), info.tokens / rate
        if now - self._measured >= _MEMORY_EVERY:
            self._memory, self._measured = Memory.now(), now
        norm = math.hypot(*g.tolist())
        moved, before = info.bytes_up + info.bytes_down, self.numbers
        if not math.isfinite(rate) and before is not None:
            rate = before.tokens_per_second  # somebody looked at the run meanwhile
        self.numbers = Numbers(
            info.step,
            float(loss),
            norm,
            self._scale(norm),
            math.hypot(*coefs.tolist()) / norm if norm else math.nan,
            bool(skipped),
            seconds,
            rate,
            moved,
            moved * rate / info.tokens / measure_link().both if moved else math.nan,
            self._left(now, info.step),
            self._memory,
        )
        self._run.note(info.step, self.numbers.scalars())
        for text in self._watch.look(self.numbers):
            self.warnings.append(text)
            line = f"warning, step {info.step}: {text}"
            self._console.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
            self._run.note(info.step, {"warning": text})

    def _scale(self, norm: float) -> float:
        """The running root mean square with another |g|; steps whose g is 0, or not finite, say nothing of it."""
        if norm > 0 and math.isfinite(norm):
            self._second = _BETA * self._second + (1 - _BETA) * norm**2
            self._weight = _BETA * self._weight + (1 - _BETA)
        return math.sqrt(self._second / self._weight) if self._weight else math.nan

    def _left(self, now: float, step: int) -> float:
        """Seconds until the last step, by the time since the first one shown, with its evaluations and the like."""
        if self._total is None:
            return math.nan
        if self._first is None:  # it has waited for compilers
            self._first = now, step
            return math.nan
        began, first = self._first
        return (now - began) / (step - first) * max(0, self._total - step) if step > first else math.nan

    def _draw(self) -> None:
        """Shows the numbers."""
        numbers = self.numbers
        if numbers is None:
            return
        texts = numbers.texts()
        if not self._console.is_terminal:
            of = "" if self._total is None else f"/{self._total}"
            line = "  ".join(f"{name} {text}" for name, text in texts.items())
            self._console.print(f"step {numbers.step}{of}  {line}", soft_wrap=True, markup=False, highlight=False)
            return
        left = texts.pop("left", None)
        self._progress.update(self._bar, completed=numbers.step, left="" if left is None else f"{left} left")
        table = Table(*texts, box=None, padding=(0, 2, 0, 0))
        table.add_row(*texts.values())
        self._live.update(Group(self._progress, table), refresh=True)


def _bytes(count: float) -> str:
    """A number of bytes for people.

    >>> _bytes(3 * 2**29), _bytes(1000)
    ('1.50 GiB', '0.98 KiB')
    """
    power = min(4, max(1, int(math.log2(max(1.0, abs(count)))) // 10))
    return f"{count / 2 ** (10 * power):.2f} {'KMGT'[power - 1]}iB"
