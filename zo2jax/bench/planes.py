"""What a trace of `jax.profiler` says: which operations ran when, and which part of a step each belongs to.

Operations are attributed by the ``jax.named_scope`` in which they were traced. A trace has the programs that ran, with
the scopes of all their instructions in its plane "/host:metadata", which `jax.profiler.ProfileData` does not show: it
is read here, as far as it is needed (https://protobuf.dev/programming-guides/encoding, and the messages XSpace in
tsl/profiler/protobuf/xplane.proto and HloProto in xla/service/hlo.proto).
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from zo2jax.bench.timeline import Event
from zo2jax.marks import DISK, MARKS, STEP

_SCOPE = re.compile(r"(?<!jit\()\b(?:perturb|update)\b")
"""Scopes that say which part of a step an operation belongs to, of several the innermost; the others are forward."""

_Bytes = memoryview
_Programs = Mapping[tuple[str, str], str]


class Operation(NamedTuple):
    """What ran on the device, or a mark of the host (`zo2jax.marks`); times in milliseconds.

    >>> Operation("perturb", 1.0, 0.5, "fusion.1").scope
    ''
    """

    part: str
    """forward, perturb, update, upload or write-back; or the name of a mark."""
    start: float
    duration: float
    name: str
    scope: str = ""
    """Where it was traced, such as "jit(_train)/perturb/add"."""
    nbytes: int = 0
    """Of a mark."""

    @property
    def event(self) -> Event:
        """In the lane that its part is, or for files "disk"."""
        return Event("disk" if self.part in DISK else self.part, self.start, self.duration)


def part_of(scope: str) -> str:
    """The part of a step that an operation belongs to, by where it was traced.

    >>> scopes = "jit(f)/perturb/while/body/update/mul", "jit(f)/vmap(perturb)/dot", "jit(update)/mul"
    >>> [part_of(scope) for scope in scopes]
    ['update', 'perturb', 'forward']
    """
    found = _SCOPE.findall(scope)
    return found[-1] if found else "forward"


def copy_of(name: str) -> str | None:
    """The part that a copy is, by the name that the GPU's profiler gives it; None for what is none over the link.

    >>> [copy_of(name) for name in ("MemcpyH2D", "MemcpyD2H", "MemcpyD2D", "gemm_fusion_7")]
    ['upload', 'write-back', None, None]
    """
    return "upload" if "MemcpyH2D" in name else "write-back" if "MemcpyD2H" in name else None


def on_streams(planes: Iterable[Any]) -> Iterator[Any]:
    """What ran on the streams of GPUs.

    >>> list(on_streams([]))
    []
    """
    for plane in planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from line.events


def operations(file: Path) -> list[Operation]:
    """All of a profiler's file: what ran on GPUs, or on the CPU if there is none, and the marks; by their beginnings.

    Raises:
        ValueError: if nothing ran.
    """
    data = file.read_bytes()
    programs, space = _programs(_Bytes(data)), jax.profiler.ProfileData.from_serialized_xspace(data)
    planes = list(space.planes)
    hosts = [event for plane in planes if plane.name == "/host:CPU" for line in plane.lines for event in line.events]
    with warnings.catch_warnings():  # of a binding's own type; as an error it would end the process
        warnings.filterwarnings("ignore", "builtin type event_stats has no __module__", DeprecationWarning)
        found = [_operation(event, dict(event.stats), programs) for event in on_streams(planes)]
        found = found or _on_cpu(hosts, programs)
        marks = [_mark(event) for event in hosts if event.name in MARKS or event.name == STEP]
    if not found:
        raise ValueError(f"the trace {file} shows nothing that ran on a device")
    return sorted(found + marks, key=lambda operation: operation.start)


def _operation(event: Any, stats: Mapping[str, Any], programs: _Programs, end: float | None = None) -> Operation:
    op = str(stats.get("hlo_op", ""))
    scope = ""
    for program, name in ((stats.get("program_id"), op), (stats.get("hlo_module"), op), ("", event.name)):
        scope = scope or programs.get((str(program), name), "")
    scope = scope or str(stats.get("tf_op", ""))
    part = copy_of(event.name) or part_of(scope)
    duration = event.duration_ns if end is None else end - event.start_ns
    return Operation(part, event.start_ns / 1e6, duration / 1e6, op or event.name, scope)


def _on_cpu(hosts: Iterable[Any], programs: _Programs) -> list[Operation]:
    """XLA's operations among the host's: one that is begun on a thread may be ended on another ("end: ..")."""
    begun: list[tuple[Any, dict[str, Any]]] = []
    ends: dict[Any, float] = {}
    for event in hosts:
        stats = dict(event.stats)
        if "hlo_op" in stats:
            begun.append((event, stats))
        elif event.name.startswith("end: "):
            ends[stats.get("_c")] = event.start_ns
    return [
        _operation(event, stats, programs, max(ends.get(stats.get("_p"), 0.0), event.end_ns)) for event, stats in begun
    ]


def _mark(event: Any) -> Operation:
    nbytes = dict(event.stats).get("nbytes", 0)
    return Operation(event.name, event.start_ns / 1e6, event.duration_ns / 1e6, event.name, "", int(nbytes))


def _programs(space: _Bytes) -> dict[tuple[str, str], str]:
    """Where the instructions of all programs were traced, by (program's number, name), and by (program's name, name).

    And by ("", the name of the kernel) where that is the instruction's: those of different scopes are left out.
    """
    found: dict[tuple[str, str], str] = {}
    kernels: dict[str, set[str]] = {}
    for number, proto in _hlo_protos(space):
        for module in _those(proto, 1):
            name = _text(module, 1)
            for instruction, scope in _scopes(module).items():
                found[str(number), instruction] = scope
                found.setdefault((name, instruction), scope)
                kernels.setdefault(re.sub(r"\W", "_", instruction), set()).add(scope)
    same = {("", kernel): min(scopes) for kernel, scopes in kernels.items() if len(set(map(part_of, scopes))) == 1}
    return found | same


def _hlo_protos(space: _Bytes) -> Iterator[tuple[int, _Bytes]]:
    """(number, HloProto) of the programs in the plane that has them."""
    for plane in _those(space, 1):
        if _text(plane, 2) == "/host:metadata":
            for entry in _those(plane, 4):
                for metadata in _those(entry, 2):
                    number = next(_those(metadata, 1), 0)
                    for stat in _those(metadata, 5):
                        yield from ((number, proto) for proto in _those(stat, 6))


def _scopes(module: _Bytes) -> dict[str, str]:
    """Where each instruction of a program was traced; of a fusion its root, or the last of it that is known."""
    scopes: dict[str, str] = {}
    calls: dict[str, int] = {}
    last: dict[int, str] = {}  # by computation
    for computation in _those(module, 3):
        number = next(_those(computation, 5), 0)
        for instruction in _those(computation, 2):  # those that others need come first, the root last
            name = ""
            for field, value in _fields(instruction):
                if field == 1:
                    name = _decoded(value)
                    scopes[name] = ""
                elif field == 7:
                    scopes[name] = _text(value, 2)
                elif field == 38:
                    calls.setdefault(name, next(_numbers(value)))
            scopes[name] = scopes[name] or last.get(calls.get(name, -1), "")  # computations that are called come first
            last[number] = scopes[name] or last.get(number, "")
    return scopes


# --- messages of Protocol Buffers -------------------------------------------------------------------------------------


def _fields(message: _Bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int, or bytes."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        if (kind := tag & 7) == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        length = 8 if kind == 1 else 4
        if kind == 2:
            length, at = _varint(message, at)
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: _Bytes, at: int) -> tuple[int, int]:
    """An integer, seven bits a byte, and where it ends."""
    value = shift = 0
    while (byte := message[at]) & 0x80:
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def _those(message: _Bytes, number: int) -> Iterator[Any]:
    return (value for field, value in _fields(message) if field == number)


def _numbers(value: int | _Bytes) -> Iterator[int]:
    """Of a repeated field, which comes as one number, or packed."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number


def _text(message: _Bytes, number: int) -> str:
    return _decoded(next(_those(message, number), b""))


def _decoded(value: Any) -> str:
    return bytes(value).decode(errors="replace")
