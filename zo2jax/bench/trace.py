"""``zo2jax bench trace``: what the device does at each moment of a streamed step, in a picture."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from zo2jax.bench.planes import copy_of, on_streams
from zo2jax.bench.process import machine, measured, new_file
from zo2jax.bench.report import title
from zo2jax.bench.throughput import NO_PREALLOCATION, WARM_UPS, Setting, running, timed_step
from zo2jax.bench.timeline import Event, Window, busy

LANES = ("upload", "compute", "write-back")
_COLOURS = ("#0072b2", "#e69f00", "#009e73")
_STEPS = 2


def lane_of(name: str) -> str:
    """The lane of an event by the name that the GPU's profiler gives it.

    >>> [lane_of(name) for name in ("MemcpyH2D", "MemcpyD2H", "MemcpyD2D", "gemm_fusion_7")]
    ['upload', 'write-back', 'compute', 'compute']
    """
    return copy_of(name) or "compute"


def events(planes: Iterable[Any]) -> list[Event]:
    """What ran on the streams of GPUs, from the planes of a `jax.profiler.ProfileData`, by time from the first event.

    Raises:
        ValueError: if no GPU is among them.

    >>> events([])
    Traceback (most recent call last):
    ValueError: the trace shows no work of a GPU, which the picture is of
    """
    found = [(event.start_ns, event.duration_ns, lane_of(event.name)) for event in on_streams(planes)]
    if not found:
        raise ValueError("the trace shows no work of a GPU, which the picture is of")
    first = min(found)[0]
    return [Event(lane, (start - first) / 1e6, duration / 1e6) for start, duration, lane in sorted(found)]


def middle(happened: Sequence[Event], length: float, steps: int = _STEPS) -> Window:
    """The middle ``length`` milliseconds of the last of ``steps`` steps as long as each other; all of it if shorter.

    >>> middle([Event("upload", 0.0, 10.0), Event("compute", 10.0, 10.0)], 4.0)
    Window(start=13.0, end=17.0)
    """
    end = max(event.start + event.duration for event in happened)
    step = end / steps
    half = min(length, step) / 2
    return Window(end - step / 2 - half, end - step / 2 + half)


def draw(happened: Sequence[Event], window: Window, heading: str, file: Any) -> None:
    """Draws the lanes over a window, with the share of it that each is busy; the file's name says the format.

    >>> import io
    >>> draw([Event("upload", 0.0, 2.0)], Window(0.0, 4.0), "title", image := io.BytesIO())
    >>> image.getvalue()[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, (lane, colour) in enumerate(zip(LANES, _COLOURS, strict=True)):
        spans = [(e.start - window.start, e.duration) for e in happened if e.lane == lane and _seen(e, window)]
        axes.broken_barh(spans, (y - 0.4, 0.8), facecolors=colour, linewidth=0)
    axes.set_yticks(range(len(LANES)), [f"{lane}\n{busy(happened, lane, window):.0%} busy" for lane in LANES])
    axes.invert_yaxis()
    axes.set(xlim=(0, window.end - window.start), xlabel="ms", title=heading)
    axes.title.set_fontsize("medium")
    figure.savefig(file, dpi=150)


def _seen(event: Event, window: Window) -> bool:
    return event.start < window.end and event.start + event.duration > window.start


def traced(setting: Setting) -> dict[str, Any]:
    """The events of two steps of a run of the setting, after some that are not traced.

    Raises:
        ValueError: if the default device is no GPU.

    >>> traced(Setting("tiny")) if jax.default_backend() == "gpu" else "only of GPUs"
    'only of GPUs'
    """
    _check_device()
    with running(setting) as (run, batch), tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + WARM_UPS):
            timed_step(run, batch)
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                timed_step(run, batch)
        (file,) = Path(folder).rglob("*.xplane.pb")
        happened = events(jax.profiler.ProfileData.from_file(str(file)).planes)
        count = run.model.parameter_count
    return machine() | {"parameters": count, "events": happened}


def _check_device() -> None:
    if jax.default_backend() != "gpu":
        raise ValueError(f"a trace shows an NVIDIA GPU's transfers, and the default device is {jax.devices()[0]}")


def trace(setting: Setting, output: str | Path, length: float = 80.0) -> Path:
    """Traces two steps in a process of its own, and draws the middle ``length`` milliseconds of the second.

    Raises:
        ValueError: for a file that cannot be written, or a length of nothing.
        RuntimeError: if there is no GPU, or the run fails.

    >>> trace(Setting("tiny"), "no/such/folder/trace.png")
    Traceback (most recent call last):
    ValueError: no/such/folder/trace.png cannot be written: expected a file in a folder that is there
    """
    path = new_file(output)
    assert path is not None
    if not length > 0:
        raise ValueError(f"the window is {length} ms, expected more than 0")
    found = measured("trace", traced, setting, env=NO_PREALLOCATION)
    happened = [Event(*event) for event in found.pop("events")]
    window = middle(happened, length)
    heading = title(found | {"setting": setting.__dict__})
    draw(happened, window, heading, path)
    shares = ", ".join(f"{lane} {busy(happened, lane, window):.0%}" for lane in LANES)
    Console().print(f"{path}: {window.end - window.start:.0f} ms of a step, busy: {shares}")
    return path
