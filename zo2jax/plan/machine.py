"""A machine, as far as a step of a run depends on it: rates and sizes; those of well-known GPUs, and a cache."""

import json
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from zo2jax.metrics import write_atomically

_GIB = 2**30
_MAY_BE_0 = ("launch", "device_memory", "host_memory", "disk_space", "kernels")
_OF_PRODUCTS = 0.55
"""Of the rate of products is that of attention, where nothing else is known (cuDNN on an H200)."""


@dataclass(frozen=True)
class Machine:
    """Rates of a machine: of transfers, device memory and files in bytes a second, of products in operations a second.

    >>> Machine(1.0, 1.0, 1.5, 10.0, 4.0).both
    1.5
    """

    up: float
    down: float
    both: float
    """Both directions at once, together."""
    products: float
    """Of 16-bit numbers; float32 ones on a CPU."""
    memory: float
    """Read and written, together."""
    int8_products: float = 0.0
    """0: as those of 16-bit numbers."""
    attention: float = 0.0
    """0: a share of the products'."""
    draws: float = math.inf
    """Random numbers a second, in a kernel that moves a matrix."""
    launch: float = 0.0
    """Seconds that the host takes to issue the work of a block."""
    disk: float = math.inf
    """Page files, read and written at once, together."""
    disk_read: float = math.inf
    device_memory: int = 0
    """Bytes that a program may take; 0: not known."""
    host_memory: int = 0
    """Bytes that are free."""
    disk_space: int = 0
    """Bytes that are free where page files are made."""
    kind: str = ""
    """What the device calls itself."""
    backend: str = "gpu"
    """As JAX names it."""
    kernels: bool = True
    """Whether updates and probes are made by the fused kernels, which need compute capability 9.0 or more; else by XLA,
    for which matrices take more memory while they move."""

    def __post_init__(self) -> None:
        """Fills in what is not known; raises ValueError for rates that are not positive, and sizes below 0."""
        object.__setattr__(self, "int8_products", self.int8_products or self.products)
        object.__setattr__(self, "attention", self.attention or _OF_PRODUCTS * self.products)
        if not isinstance(self.kernels, bool):
            raise ValueError(f"kernels of a machine is {self.kernels}: expected true or false")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float | int) and not (value >= 0 if field.name in _MAY_BE_0 else value > 0):
                raise ValueError(f"{field.name} of a machine is {value}: expected a positive number")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of device memory, host memory and disk space; 0 for what is not known.

        >>> known("rtx4090").sizes[1:]
        (0, 0)
        """
        return self.device_memory, self.host_memory, self.disk_space

    def transfers(self, read_only: bool) -> tuple[float, float, int]:
        """Rates of link and files, and the ways in which blocks pass them: up alone, or both, counted together.

        >>> known("h200").transfers(True)[2], known("h200").transfers(False)[2]
        (1, 2)
        """
        return (self.up, self.disk_read, 1) if read_only else (self.both, self.disk, 2)

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        numbers = {k: None if v == math.inf else v for k, v in asdict(self).items()}
        write_atomically(path, json.dumps(numbers, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Machine":
        """What `save` wrote.

        Raises:
            ValueError: for a file that holds no machine.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     known("h200").save(Path(folder) / "m.json")
        ...     Machine.read(Path(folder) / "m.json") == known("h200")
        True
        """
        try:
            numbers: dict[str, Any] = json.loads(path.read_text())
            given: dict[str, Any] = {name: math.inf if value is None else value for name, value in numbers.items()}
            if missing := {field.name for field in fields(cls)} - given.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}, as those of other versions do")
            return cls(**given)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no machine ({error}): expected what `zo2jax machine` wrote") from None

    def __str__(self) -> str:
        """A line for each number."""
        tera, giga = (lambda x: f"{x / 1e12:.4g} T"), (lambda x: f"{x / _GIB:.4g} GiB")
        rows = [
            ("link up / down / both at once", f"{giga(self.up)} / {giga(self.down)} / {giga(self.both)} a second"),
            ("products of 16-bit / of int8 numbers", f"{tera(self.products)}FLOP/s / {tera(self.int8_products)}OP/s"),
            ("attention", f"{tera(self.attention)}FLOP/s"),
            ("device memory", f"{giga(self.memory)} a second" + _amount(self.device_memory)),
            ("random numbers", "-" if self.draws == math.inf else f"{tera(self.draws)} a second"),
            ("host: work of a block issued in", f"{self.launch * 1e6:.0f} us" + _amount(self.host_memory)),
            ("files, read and written / read", f"{giga(self.disk)} / {giga(self.disk_read)} a second"),
        ]
        space = [("", f"{_amount(self.disk_space)[2:]}")] if self.disk_space else []
        return "\n".join([self.kind, *(f"  {name:<38}{value}" for name, value in [*rows, *space])])


def _amount(nbytes: int) -> str:
    return f", {nbytes / _GIB:.1f} GiB there" if nbytes else ""


_H200 = Machine(
    up=48.6 * _GIB,
    down=48.9 * _GIB,
    both=90.0 * _GIB,
    products=700e12,
    memory=4.1e12,
    int8_products=1334e12,
    attention=400e12,
    draws=0.78e12,
    launch=0.3e-3,
    disk=2.0 * _GIB,
    disk_read=2.0 * _GIB,
    device_memory=int(139.8 * _GIB),
    kind="NVIDIA H200",
)
"""Measured (docs/LOG.md), but for the disk, which is whatever there is."""

_DATASHEETS = {
    # 16-bit and int8 operations a second without sparsity, bytes a second of memory and of one way of the link, bytes
    "h200": (989e12, 1979e12, 4.8e12, 64e9, 141e9),
    "h100": (989e12, 1979e12, 3.35e12, 64e9, 80e9),
    "a100": (312e12, 624e12, 2.039e12, 32e9, 80e9),
    "rtx4090": (165.2e12, 660.6e12, 1.008e12, 32e9, 24e9),
}
"""NVIDIA's data sheets: H200 SXM, H100 SXM 80 GB, A100 SXM 80 GB, GeForce RTX 4090 (with float32 accumulation)."""

_HOPPER = ("h200", "h100")


def known(name: str) -> Machine:
    """A machine with a well-known GPU: its data sheet, of which it gives the share that an H200 gave of its own.

    Host memory and disk space are unknown: 0 there sets no limit.

    Raises:
        ValueError: for another name.

    >>> known("h200").products, round(known("rtx4090").up / 2**30, 1)
    (700000000000000.0, 24.3)
    """
    if name not in _DATASHEETS:
        raise ValueError(f"machine {name!r}: expected one of {', '.join(_DATASHEETS)}, or a file")
    products, int8, memory, link, size = _DATASHEETS[name]
    ours = _DATASHEETS["h200"]
    share = [new / old for new, old in zip((products, int8, memory, link, size), ours, strict=True)]
    rates = {"products": share[0], "attention": share[0], "draws": share[0], "int8_products": share[1]}
    rates |= {"memory": share[2]} | dict.fromkeys(("up", "down", "both"), share[3])
    scaled: dict[str, Any] = {rate: getattr(_H200, rate) * by for rate, by in rates.items()}
    scaled |= {"device_memory": int(_H200.device_memory * share[4]), "kind": name, "kernels": name in _HOPPER}
    return replace(_H200, **scaled)


def cache_file(kind: str) -> Path:
    """Where the rates of a machine with a device of this kind are kept: in ``ZO2JAX_CACHE``, or the usual folder.

    >>> cache_file("NVIDIA H200").name
    'nvidia-h200.json'
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zo2jax"
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    try:
        folder = Path(os.environ.get("ZO2JAX_CACHE") or usual).expanduser()
    except RuntimeError:  # there is no home
        folder = Path(tempfile.gettempdir()) / "zo2jax"
    return folder / "machines" / f"{name}.json"


def find(name: str) -> Machine:
    """A machine by the name that `known` takes, or a file of one.

    Raises:
        ValueError: for neither.

    >>> find("h100").kind
    'h100'
    """
    path = Path(name).expanduser()
    return Machine.read(path) if path.is_file() else known(name)
