"""Weight files: tensors by name, read one by one through a memory map, and safetensors written one tensor at a time."""

import json
import math
import mmap
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""The dtypes of weights by name. Safetensors keep the tensors of a file in this order, those of one dtype by name."""

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "uint8": "U8"}
_NAMES = {code: name for name, code in _CODES.items()}
_DTYPES = FLOATS | {"int8": np.int8, "uint8": np.uint8}
_NAMES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {"F64": "float64", "BOOL": "bool"}


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was looked at.

    >>> Stamp.of(os.stat(__file__)) == Stamp.of(os.stat(__file__))
    True
    """

    nbytes: int
    changed: int
    """Nanoseconds, when the file's contents last were."""

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """That of a file with this status."""
        return cls(status.st_size, status.st_mtime_ns)


class Extent(NamedTuple):
    """Where a tensor lies in a file, row by row and without gaps.

    >>> Extent(Path("x"), Stamp(4096, 0), 64, (3, 2), "bfloat16").nbytes
    12
    """

    path: Path
    stamp: Stamp
    """Of the file when its header was read."""
    offset: int
    """The first byte."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class Tensor:
    """A tensor of a weight file: what the file says of it, and the function that reads it.

    >>> Tensor((2,), "float32", lambda: np.ones(2, np.float32)).read().tolist()
    [1.0, 1.0]
    """

    shape: tuple[int, ...]
    dtype: str
    """The name of the dtype, also of those that NumPy lacks."""
    read: Callable[[], np.ndarray]
    extent: Extent | None = field(default=None, kw_only=True)
    """Where it lies, if that is known."""

    def array(self, dtype: Any, *, transposed: bool = False) -> np.ndarray:
        """The tensor in ``dtype``, contiguous, perhaps transposed: as it lies in the file where it fits, else a copy.

        What float16 cannot hold becomes infinite.
        """
        array = self.read()
        with np.errstate(over="ignore", invalid="ignore"):
            return np.require(array.T if transposed else array, dtype, ["C", "A"])


@dataclass(frozen=True)
class CodedTensor(Tensor):
    """A matrix whose file holds its codes and their scales, both as the matrix lies in the model.

    >>> CodedTensor((1, 2), "float32", lambda: np.ones((1, 2)), {}).array(np.float32, transposed=True).shape
    (1, 2)
    """

    parts: Mapping[str, Tensor]
    """The tensors of the file, "codes" and "scale"."""

    def codes(self) -> dict[str, np.ndarray]:
        """Reads {"codes": .., "scale": ..}."""
        return {name: part.read() for name, part in self.parts.items()}

    def array(self, dtype: Any, *, transposed: bool = False) -> np.ndarray:
        """The matrix that the codes stand for, which is never transposed."""
        return super().array(dtype)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, from an index where there is one; safetensors before .bin.

    Raises:
        FileNotFoundError: if there are none, or an index names one that is not there.
        ValueError: for an index that is damaged.

    >>> from zo2jax.demo import model_folder
    >>> [path.name for path in weight_files(model_folder())]
    ['model.safetensors']
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{index} is no index of weight files ({error!r}): download or export it again"
                ) from error
            if missing := [n for n in names if not (folder / n).is_file()]:
                raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
            return [folder / n for n in names]
        if single.is_file():
            return [single]
    raise FileNotFoundError(f"{folder} has no model.safetensors (or its index) and no pytorch_model.bin")


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all weight files of a folder by name; none is read, and each is mapped while it is used.

    Raises:
        FileNotFoundError: if there are no weight files, or an index names one that is not there.
        ValueError: for a file that is truncated or no weight file.

    >>> from zo2jax.demo import model_folder
    >>> open_tensors(model_folder())["model.norm.weight"].dtype
    'float32'
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= _pytorch(path) if path.suffix == ".bin" else _safetensors(path)
    return tensors


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="numpy"):  # checks the header, and that the file has all of its bytes
            pass
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is truncated or no safetensors file ({error}): download or export it again"
        ) from error
    with path.open("rb") as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
    header.pop("__metadata__", None)

    def read(entry: dict[str, Any]) -> np.ndarray:
        start, end = (begin + offset for offset in entry["data_offsets"])
        dtype, shape = _DTYPES[_NAMES[entry["dtype"]]], entry["shape"]
        if start == end:
            return np.frombuffer(b"", dtype).reshape(shape)
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), end - first, access=mmap.ACCESS_READ, offset=first)
        mapped.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(mapped, np.uint8, end - start, start - first).view(dtype).reshape(shape)

    found = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), _NAMES.get(entry["dtype"], entry["dtype"])
        extent = Extent(path, stamp, begin + entry["data_offsets"][0], shape, dtype) if dtype in _DTYPES else None
        found[name] = Tensor(shape, dtype, partial(read, entry), extent=extent)
    return found


def _pytorch(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file, and torch is not installed: pip install torch, or convert it to safetensors"
        ) from error

    def read(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy()

    try:  # files from before torch 1.6 are not zipped, and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged files
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is truncated or no PyTorch weights file ({error}): download it again"
        ) from error
    return {
        name: Tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), partial(read, tensor))
        if isinstance(tensor, torch.Tensor)
        else Tensor((), type(tensor).__name__, partial(read, tensor))
        for name, tensor in state.items()
    }


def byte_size(like: Any) -> int:
    """The bytes of what has a ``shape`` and a ``dtype``.

    >>> byte_size(np.zeros((2, 3), np.float32))
    24
    """
    return math.prod(like.shape) * like.dtype.itemsize


class Writer:
    """A safetensors file whose tensors are written one by one, in any order; each must be written once.

    Its bytes are those that the ``safetensors`` package writes, which needs all tensors of a file at once.

    Args:
        path: the file; it is made anew, at its full size.
        shapes: by name, what has the ``shape`` and ``dtype`` of a tensor; tensors are cast to it.
        metadata: texts in the header.

    >>> import tempfile
    >>> from safetensors.numpy import load_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Writer(Path(folder) / "x", {"a": np.zeros(2, np.float32)}, {}).write("a", np.ones(2, np.float32))
    ...     load_file(Path(folder) / "x")["a"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, path: Path, shapes: Mapping[str, Any], metadata: Mapping[str, str]):
        """Writes the header."""
        self._path, self._shapes, self._starts = path, dict(shapes), {}
        order, end = list(_CODES), 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        for name, like in sorted(shapes.items(), key=lambda item: (order.index(str(item[1].dtype)), item[0])):
            self._starts[name], end = end, end + byte_size(like)
            offsets = [self._starts[name], end]
            header[name] = {"dtype": _CODES[str(like.dtype)], "shape": list(like.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._begin + end)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor.

        Raises:
            ValueError: if it has not the shape that was announced.
        """
        like = self._shapes[name]
        if array.shape != like.shape:
            raise ValueError(f"{name} is {list(array.shape)}, expected {list(like.shape)}")
        with self._path.open("r+b") as file:
            file.seek(self._begin + self._starts[name])
            file.write(np.ascontiguousarray(array, like.dtype).reshape(-1).view(np.uint8).data)
