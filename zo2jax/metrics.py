"""The numbers of a run: ``metrics.jsonl``, one JSON object a line, and the same for TensorBoard."""

import errno
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

_BOARD_EVERY = 10
"""Steps between two points of a training curve in TensorBoard; writing one takes a millisecond."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there complete, or as it was; durable on return.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder) / "a.txt", "text")
    ...     (Path(folder) / "a.txt").read_text()
    'text'
    """
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def number(value: Any) -> float | None:
    """A finite float, or None: JSON has no NaN.

    >>> number(float("nan")), number(np.float32(0.5))
    (None, 0.5)
    """
    return float(value) if np.isfinite(value) else None


def of_step(step: int, loss: Any, gradient: Any, skipped: bool) -> dict[str, Any]:
    """What the line of a step begins with: its loss, float32 [], and projected gradients, float32 [K].

    >>> of_step(1, 2.5, np.array([0.5]), False)
    {'step': 1, 'train/loss': 2.5, 'train/projected_gradient': 0.5}
    """
    g = [number(x) for x in np.asarray(gradient)]
    line = {"step": step, "train/loss": number(loss), "train/projected_gradient": g[0] if len(g) == 1 else g}
    return line | ({"train/skipped": True} if skipped else {})


def memory_peaks() -> dict[str, int]:
    """The most memory that this process has taken so far, in bytes: of the host, and of the device where it counts.

    >>> memory_peaks()["memory/host_peak"] > 2**20
    True
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peaks if device is None else peaks | {"memory/device_peak": device}


class Metrics:
    """The metrics of a run directory, appended line by line.

    Args:
        directory: of the run.
        last: the last step of the run's journal; lines of later steps will be written again, so they are dropped, as is
            a torn last line. -1 for a run that has not begun.
        tensorboard: whether events are written to ``tensorboard`` in the directory too: evaluations, and every tenth
            step.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metrics = Metrics(Path(folder), -1)
    ...     metrics.write({"step": 1, "train/loss": 2.5})
    ...     read_metrics(folder)
    [{'step': 1, 'train/loss': 2.5}]
    """

    def __init__(self, directory: Path, last: int, *, tensorboard: bool = False):
        """Drops what will be written again."""
        self._file = directory / "metrics.jsonl"
        kept = self._forget_after(last)
        self.trained = {line["step"] for line in kept if "train/loss" in line}
        """Steps that had a line when the file was opened."""
        self.evaluated = {line["step"]: line["eval/loss"] for line in kept if "eval/loss" in line}
        """Held-out losses by step, None for one that was not finite."""
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            suffix = f".{last + 1}.{os.getpid()}"  # names have the second only, and a second run would overwrite
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=last + 1, filename_suffix=suffix)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line: ``step``, and numbers or None by name; all of it, or nothing if the disk is full."""
        with self._file.open("ab", buffering=0) as file:
            before, text = file.tell(), f"{json.dumps(line)}\n".encode()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))
            except OSError:
                file.truncate(before)
                raise
        is_training = any(name.startswith("train/") for name in line)
        if self._board is not None and not (is_training and line["step"] % _BOARD_EVERY):
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, line["step"])

    def note(self, step: int, values: Mapping[str, float | str]) -> None:
        """Gives TensorBoard alone further numbers of a step, if it has that step; and texts, of any step."""
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, str):
                self._board.add_text(name, value, step)
            elif step % _BOARD_EVERY == 0:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what TensorBoard has not got yet."""
        if self._board is not None:
            self._board.close()

    def _forget_after(self, step: int) -> list[dict[str, Any]]:
        """The lines up to a step, which are those of the file then."""
        kept: list[dict[str, Any]] = []
        if not self._file.is_file():
            return kept
        for text in self._file.read_text().splitlines():
            try:
                line = json.loads(text)
                if line["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_atomically(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        return kept


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order.

    Raises:
        FileNotFoundError: if the directory holds no metrics.

    >>> read_metrics("no/such/run")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no/such/run holds no metrics.jsonl: expected the directory of a run
    """
    path = Path(directory).expanduser() / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no metrics.jsonl: expected the directory of a run")
    return [json.loads(line) for line in path.read_text().splitlines()]
