"""Times the kernels against XLA, the textbook and the memory's bandwidth, all in one run.

``python -m pallas_kernels.bench [--op NAME ...] [--shape NAME ...] [--json FILE] [--plot FILE] [--size N]``
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from pallas_kernels import implementations, specs
from pallas_kernels.bench_operations import OPS, Lowrank, Operation, Step, textbook
from pallas_kernels.perturb import perturb

_ROUNDS = 3
_IMPLEMENTATIONS = ("xla", "mosaic", "mosaic_portable", "none", "textbook")  # the others are compared with XLA
_WITHOUT_NOISE = ("xla", "mosaic", "mosaic_portable")  # of what draws none
_DTYPES = ("bfloat16", "float16", "float32")


class Row(NamedTuple):
    """One line of the table.

    >>> Row("w", "dual", "xla", 6000, 0.5, 1.0, 2, 0.1).rate
    0.012
    """

    shape: str
    op: str
    implementation: str
    bytes: int
    ms: float
    """Median over rounds of the time of a call."""
    compile_s: float
    differ: int | None
    """Elements of the results that are not, bit for bit, those of "xla"; None where others are expected."""
    floor_ms: float
    """The time in which a copy on the device moves as many bytes."""

    @property
    def rate(self) -> float:
        """GB/s.

        >>> Row("w", "dual", "none", 10**9, 1.0, 1.0, None, 0.5).rate
        1000.0
        """
        return self.bytes / self.ms / 1e6


def _unsuitable(name: str, op: Operation) -> str | None:
    """Why an implementation is not timed, or None."""
    if name == "textbook":
        return None if op == OPS["dual"] else "only for dual"
    if name == "mosaic_portable" and isinstance(op, Lowrank):
        return "there is no portable kernel"
    return implementations.problem("mosaic" if name == "none" else name)


def _seconds(step: Step, w: Any, arguments: Sequence[Any], in_place: bool, calls: int) -> float:
    """The median, over rounds, of the mean time of a call. Results are dropped at once, to bound the memory."""
    times: list[float] = []
    for _ in range(_ROUNDS + 1):  # the first warms up
        start = time.perf_counter()
        for _ in range(calls if times else 3):
            out = step(w, *arguments)
            if in_place:
                w = out[0]
            last = out[-1]
            del out
        jax.block_until_ready((w, last))
        times.append((time.perf_counter() - start) / calls)
        del last
    return statistics.median(times[1:])


@jax.jit
def _differing(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """How many elements differ in a bit; one fused reduction, which stores nothing."""

    def count(x: jax.Array, y: jax.Array) -> jax.Array:
        of = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        different = lax.bitcast_convert_type(x, of) != lax.bitcast_convert_type(y, of)
        return jnp.sum(different, dtype=jnp.uint32)

    return sum((count(x, y) for x, y in zip(a, b, strict=True)), jnp.uint32(0))


def _weights(shape: specs.Shape, dtype: str) -> jax.Array:
    return jax.jit(lambda k: (0.02 * jax.random.normal(k, shape, jnp.float32)).astype(dtype))(jax.random.key(0))


def copy_rate(w: jax.Array, calls: int) -> float:
    """Bytes per second that a copy of ``w`` on the device reads and writes together.

    >>> copy_rate(jnp.ones(1000), calls=2) > 0
    True
    """
    step = jax.jit(lambda w: (jnp.copy(w),))
    return 2 * w.nbytes / _seconds(step, w, (), False, calls)


def draw_rate(w: jax.Array, calls: int) -> float:
    """Values of z per second, drawn and added to ``w`` by the best kernel there is, from one read of it in 64 updates.

    >>> draw_rate(jnp.ones(1000), calls=2) > 0
    True
    """
    w, *arguments = OPS["replay64"].inputs(w, jax.random.key(0))
    step = jax.jit(lambda w, terms, _: (perturb(w, terms)[0],), donate_argnums=0)
    return arguments[0].coefs.size * w.size / _seconds(step, jnp.copy(w), arguments, True, calls)


def measure(shape_name: str, shape: specs.Shape, dtype: str, ops: Sequence[str], calls: int, log: Any) -> list[Row]:
    """Times the ops of these names on one shape, in every implementation that runs here; ``log`` is told of the others.

    >>> measure("w", (64,), "bfloat16", ["probe"], 1, log=lambda line: None)[0].implementation
    'xla'
    """
    array = _weights(shape, dtype)
    rate = copy_rate(array, calls)
    rows = []
    for op_name in ops:
        op = OPS[op_name]
        w, *arguments = op.inputs(array, jax.random.key(1))
        expected = None
        for name in _IMPLEMENTATIONS if op.noise else _WITHOUT_NOISE:
            if reason := _unsuitable(name, op):
                if name != "textbook":
                    log(f"skipped {name}: {reason}")
                continue
            in_place = op.in_place
            function = textbook if name == "textbook" else op.step(name, dtype)
            start = time.perf_counter()
            step = jax.jit(function, donate_argnums=(0,) if in_place else ()).lower(w, *arguments).compile()
            compile_s = time.perf_counter() - start
            differ = None
            if name not in ("none", "textbook") and not isinstance(op, Lowrank):
                found = step(jnp.copy(w) if in_place else w, *arguments)
                expected = found if expected is None else expected
                differ = int(_differing(found, expected))
                del found
            seconds = _seconds(step, jnp.copy(w) if in_place else w, arguments, in_place, calls)
            total = op.bytes(array.size, array.dtype.itemsize)
            rows.append(Row(shape_name, op_name, name, total, 1e3 * seconds, compile_s, differ, 1e3 * total / rate))
        del expected
    return rows


def _others(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """The times of all implementations of the same op on the same shape."""
    return {r.implementation: r.ms for r in rows if (r.shape, r.op) == (row.shape, row.op)}


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned; then the speed as a share of a copy's and of the kernel without noise, and in units of XLA's.

    >>> print(table([Row("w", "dual", "xla", 6000, 0.5, 1.0, 0, 0.1)]).splitlines()[0].split()[:5])
    ['shape', 'op', 'implementation', 'ms', 'GB/s']
    """
    head = "shape,op,implementation,ms,GB/s,floor ms,of copy,of none,x xla,differ,compile s"
    lines: list[tuple[str, ...]] = [tuple(head.split(","))]
    for row in rows:
        times = _others(row, rows) | {"copy": row.floor_ms}
        ratios = [times[name] / row.ms if name in times else None for name in ("copy", "none", "xla")]
        lines.append(
            (
                *(row.shape, row.op, row.implementation, f"{row.ms:.4g}", f"{row.rate:.1f}", f"{row.floor_ms:.4g}"),
                *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
                *("-" if row.differ is None else str(row.differ), f"{row.compile_s:.2f}"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (
        [c.ljust(n) if i < 3 else c.rjust(n) for i, (c, n) in enumerate(zip(x, widths, strict=True))] for x in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in cells)


def plot(rows: Sequence[Row], title: str, file: Any) -> None:
    """Writes a PNG: a bar for each op and implementation, lines for the kernel without noise and the device's copy.

    >>> import io
    >>> plot([Row("w", "dual", "xla", 6000, 0.5, 1.0, 0, 0.1)], "title", image := io.BytesIO())
    >>> image.getvalue()[1:4]
    b'PNG'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {"mosaic": "#0072b2", "mosaic_portable": "#56b4e9", "xla": "#e69f00", "textbook": "#999999"}
    groups = list(dict.fromkeys((row.shape, row.op) for row in rows))
    figure = Figure(figsize=(8, 1 + 0.8 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = {name: colour for name, colour in shown.items() if any(row.implementation == name for row in rows)}
    height = 0.8 / max(1, len(used))
    for y, group in enumerate(groups):
        mine = {row.implementation: row for row in rows if (row.shape, row.op) == group}
        for i, (name, colour) in enumerate(used.items()):
            if name in mine:
                axes.barh(y - 0.4 + (i + 0.5) * height, mine[name].rate, height, color=colour)
        first = next(iter(mine.values()))
        axes.vlines(first.bytes / first.floor_ms / 1e6, y - 0.42, y + 0.42, color="black", linestyle="dashed")
        if "none" in mine:
            axes.vlines(mine["none"].rate, y - 0.42, y + 0.42, color="black")
    for name, colour in used.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.plot([], [], color="black", label="kernel without noise")
    axes.plot([], [], color="black", linestyle="dashed", label="copy on the device")
    one_shape = len({shape for shape, _ in groups}) == 1
    axes.set_yticks(range(len(groups)), [op if one_shape else f"{op}, {shape}" for shape, op in groups])
    axes.invert_yaxis()
    axes.set(xlabel="GB/s (bytes that must move / time)", title=title, xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description="Times the kernels.")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="NAME", help=", ".join(OPS))
    parser.add_argument("--shape", nargs="+", type=_named, metavar="NAME", help="0.5G or MODEL.LEAF, as in opt-13b.fc1")
    parser.add_argument("--size", type=_positive, help="elements of the default array (2**29; 2**18 on a CPU)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--calls", type=_positive, help="calls a round (20; 3 on a CPU)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")
    parser.add_argument("--plot", metavar="FILE", help="write a chart here, a PNG")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def _named(name: str) -> tuple[str, specs.Shape]:
    if name == "0.5G":
        return name, (2**17, 4096)
    try:
        return name, specs.shape_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _flat(size: int) -> tuple[str, specs.Shape]:
    return str(size), (size // 4096, 4096) if size % 4096 == 0 else (size,)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes what was asked for.

    >>> main(["--op", "probe", "--size", "1024", "--calls", "1"])  # doctest: +ELLIPSIS
    device ...
    """
    options = _parser().parse_args(arguments)
    device, on_cpu = jax.devices()[0], jax.default_backend() == "cpu"
    calls = options.calls or (3 if on_cpu else 20)
    shapes = options.shape or [_flat(options.size or 2**18) if on_cpu or options.size else _named("0.5G")]
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    versions["numpy"] = np.__version__
    print(f"device {device.device_kind}, " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    seen: set[str] = set()

    def log_once(line: str) -> None:
        if line not in seen:
            seen.add(line)
            print(line, flush=True)

    rows = []
    for name, shape in shapes:
        rows += measure(name, shape, options.dtype, options.op, calls, log_once)
    print(f"{options.dtype}; floor: a copy of as many bytes on the device; differ: elements with other bits than xla's")
    print(table(rows))
    if options.json:
        numbers = [row._asdict() | {"GB/s": row.rate, "size": math.prod(dict(shapes)[row.shape])} for row in rows]
        found = {"device": device.device_kind, "versions": versions, "dtype": options.dtype, "rows": numbers}
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    if options.plot:
        plot(rows, f"{device.device_kind}, jax {jax.__version__}, {options.dtype}", options.plot)


if __name__ == "__main__":
    main()
