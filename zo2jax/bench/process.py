"""A measurement in a process of its own, so that its peak memory is its own, and what a machine says of itself."""

import json
import os
import pickle
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import jax
import jaxlib
import numpy as np

import zo2jax

_REFUSALS = (ValueError, OSError, ImportError)
_TAIL = 2000


def serve() -> None:
    """Calls the function that standard input names, and prints its result as JSON; the other end of `measured`.

    >>> serve.__module__
    'zo2jax.bench.process'
    """
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        answer = {"result": function(*arguments)}
    except _REFUSALS as error:
        answer = {"refusal": str(error)}
    print(json.dumps(answer))


def measured(
    name: str,
    function: Callable[..., Any],
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> Any:
    """What ``function(*arguments)`` gives in a Python of its own, by way of JSON.

    ``name`` says in errors what was measured; ``env`` is added to the environment; after ``limit_s`` seconds it ends.

    Raises:
        RuntimeError: if it fails, with the end of what it wrote, or takes too long.

    >>> measured("step", int, "x")
    Traceback (most recent call last):
    RuntimeError: the measurement of 'step' failed: invalid literal for int() with base 10: 'x'
    """
    code = "from zo2jax.bench.process import serve; serve()"
    command, given = [sys.executable, "-c", code], pickle.dumps((function, arguments))
    output = run(f"measurement of {name!r}", command, given, env, limit_s=limit_s)
    answer = json.loads(output.splitlines()[-1])
    if "refusal" in answer:
        raise RuntimeError(f"the measurement of {name!r} failed: {answer['refusal']}")
    return answer["result"]


def run(
    name: str,
    command: list[str],
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    limit_s: float | None = None,
) -> str:
    r"""The standard output of a command.

    Raises:
        RuntimeError: if it fails, with the end of its standard error, or takes longer than ``limit_s`` seconds.

    >>> run("echo", ["echo", "hello"])
    'hello\n'
    """
    how: dict[str, Any] = {"env": {**os.environ, **(env or {})}, "cwd": cwd, "timeout": limit_s}
    try:
        with _ending_together():
            done = subprocess.run(command, input=stdin, capture_output=True, **how)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the {name} took longer than its limit of {limit_s:g} s, and was ended") from error
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip()[-_TAIL:]
        raise RuntimeError(f"the {name} failed with status {done.returncode}:\n{tail}")
    return done.stdout.decode(errors="replace")


@contextmanager
def _ending_together() -> Iterator[None]:
    """On SIGTERM this process meanwhile raises SystemExit, on which subprocess.run ends the other one."""
    if current_thread() is not main_thread():  # others may not have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def machine() -> dict[str, Any]:
    """The kind of the default device, and the versions of what a measurement depends on.

    >>> sorted(machine())
    ['device', 'versions']
    """
    versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    versions |= {"numpy": np.__version__, "zo2jax": zo2jax.__version__}
    return {"device": jax.devices()[0].device_kind, "versions": versions}


def memory() -> dict[str, float | None]:
    """Peaks of this process in GiB: of the allocator on the device, and resident in host memory; and NVML's figures.

    NVML's are not peaks, but memory that JAX has allocated stays with the process. None where nobody counts.

    >>> memory()["peak_host_gib"] > 0
    True
    """
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    process, device = _nvidia_smi("--query-compute-apps=pid,used_memory"), _nvidia_smi("--query-gpu=memory.used")
    return {
        "peak_device_gib": None if peak is None else peak / 2**30,
        "nvml_process_gib": own_memory(process, os.getpid()),
        "nvml_device_gib": float(device) / 2**10 if device.isdecimal() else None,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def own_memory(lines: str, process: int) -> float | None:
    r"""GiB of a process among nvidia-smi's lines of process ids and MiB; None if it is not there.

    >>> own_memory("17, 512\n18, 2048", 18)
    2.0
    """
    rows = (line.split(", ") for line in lines.splitlines())
    used = [row[1] for row in rows if len(row) == 2 and row[0] == str(process)]
    return sum(map(int, used)) / 2**10 if used and all(n.isdecimal() for n in used) else None


def _nvidia_smi(query: str) -> str:
    """What it answers, or nothing where it is not there. Several GPUs give several lines."""
    try:
        return run("nvidia-smi", ["nvidia-smi", query, "--format=csv,noheader,nounits"]).strip()
    except (OSError, RuntimeError):
        return ""


def new_file(path: str | Path | None) -> Path | None:
    """The path of a file to write when all is measured, checked before.

    Raises:
        ValueError: if its folder is not there.

    >>> new_file(None) is None
    True
    """
    if path is None:
        return None
    path = Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: expected a file in a folder that is there")
    return path
