"""How matrices are kept: as they are, or as int8 or int4 codes with a scale for each row, or each group of columns."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized import Codes, decode, quantize


@dataclass(frozen=True)
class Format:
    """Symmetric codes of so many bits: w = code * scale, with a scale for each group of columns of a row.

    Made by `int8` and `int4`. Directions with which matrices are only read train a model in a format: `zo2jax.lowrank`,
    and `zo2jax.dense` with a refresh. Where there is a ``refresh``, a float32 master of every matrix is kept beside the
    codes in the same tier, touched at folds only, and the codes are made anew from it; without one the codes never
    change.

    >>> int4(group=32, keep=("embed.*", "head.*"))
    int4(group=32, keep=('embed.*', 'head.*'))
    """

    bits: int
    group: int | None
    """The most columns that share a scale; None for a whole row."""
    keep: tuple[str, ...] = ()
    """Patterns of leaves that stay as they are, such as ``*.attn.*``."""
    compute: str = "bf16"
    """How products are made: "bf16", by codes or decoded weights in the dtype of the activations; or "int8", of int8
    codes with a scale a row, by activations that become int8 codes too (`zo2jax.models.quantized.times_int8`)."""

    def __post_init__(self) -> None:
        """Checks that the parts fit."""
        if self.compute not in ("bf16", "int8"):
            raise ValueError(f"compute is {self.compute!r}, expected 'bf16' or 'int8'")
        if self.compute == "int8" and (self.bits != 8 or self.group):
            raise ValueError(f"compute is int8 with {replace(self, compute='bf16')}: expected int8 with a scale a row")

    def __repr__(self) -> str:
        said = [f"group={self.group}"] if self.bits == 4 else [f"'group', group={self.group}"] if self.group else []
        said += [f"keep={self.keep}"] * bool(self.keep) + [f"compute={self.compute!r}"] * (self.compute != "bf16")
        return f"int{self.bits}({', '.join(said)})"

    def group_of(self, leaf: str, shape: tuple[int, ...]) -> int | None:
        """The columns of this leaf that share a scale, a divisor of their number; None if it stays as it is.

        >>> int8(per="group", group=128).group_of("layers.0.mlp.down.weight", (64, 172))
        86
        """
        if len(shape) != 2 or shape[1] % (8 // self.bits) or any(fnmatch.fnmatchcase(leaf, p) for p in self.keep):
            return None
        most = min(self.group or shape[1], shape[1])
        return next(n for n in range(most, 0, -1) if shape[1] % n == 0)

    def keeping(self, leaves: Sequence[str]) -> "Format":
        """The same format, but for these leaves.

        >>> int8().keeping(["head.weight"])
        int8(keep=('head.weight',))
        """
        return replace(self, keep=(*self.keep, *leaves))

    def errors(self, block: str, leaves: Mapping[str, Any]) -> dict[str, float]:
        """By leaf that becomes codes, |W - decoded| / |W| in the Frobenius norm; ``leaves`` by dotted name.

        >>> int4(group=2).errors("head", {"weight": np.array([[7.0, 1.0, 0.0, 0.0]])})
        {'head.weight': 0.0}
        """
        found = {}
        for name, w in leaves.items():
            if (group := self.group_of(f"{block}.{name}", w.shape)) is not None:
                found[f"{block}.{name}"] = float(_error(jnp.asarray(w, jnp.float32), self.bits, group))
        return found

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads: how the weights are kept.

        >>> from_json(int4(group=32).as_json())
        int4(group=32)
        """
        return {"bits": self.bits, "group": self.group, "keep": list(self.keep)}


def int8(per: str = "channel", *, group: int = 128, keep: tuple[str, ...] = (), compute: str = "bf16") -> Format:
    """int8 codes: one byte a weight, a scale for each row ("channel"), or for each ``group`` of its columns.

    With ``compute="int8"`` activations are rounded to int8 as well, and products run at the rate of int8 matrix units.

    Raises:
        ValueError: for another ``per`` or ``compute``, a group below 1, or groups with ``compute="int8"``.

    >>> int8()
    int8()
    """
    if per not in ("channel", "group"):
        raise ValueError(f"per is {per!r}, expected 'channel' or 'group'")
    return Format(8, _positive(group) if per == "group" else None, tuple(keep), compute)


def int4(*, group: int = 64, keep: tuple[str, ...] = ()) -> Format:
    """int4 codes: half a byte a weight, and a float32 scale for each ``group`` of columns of a row.

    Raises:
        ValueError: for a group below 1.

    >>> int4().bits
    4
    """
    return Format(4, _positive(group), tuple(keep))


def named(name: str, group: int | None = None, keep: tuple[str, ...] = (), compute: str = "bf16") -> Format:
    """The format of a name, "int8" or "int4"; without a group, a scale for a whole row of int8, for 64 columns of int4.

    Raises:
        ValueError: for what does not fit together.

    >>> named("int8", 32), named("int4")
    (int8('group', group=32), int4(group=64))
    """
    if name == "int4":
        return replace(int4(group=64 if group is None else group, keep=keep), compute=compute)
    return int8("channel" if group is None else "group", group=group or 128, keep=keep, compute=compute)


def coded_shapes(shape: tuple[int, ...], bits: int, group: int) -> dict[str, Any]:
    """{"codes": .., "scale": ..} of a matrix of this shape, as ``jax.ShapeDtypeStruct``.

    >>> coded_shapes((3, 8), 4, 4)["codes"].shape, coded_shapes((3, 8), 4, 4)["scale"].shape
    ((3, 4), (3, 2))
    """
    rows, columns = shape
    codes = jax.ShapeDtypeStruct((rows, columns * bits // 8), jnp.int8 if bits == 8 else jnp.uint8)
    return {"codes": codes, "scale": jax.ShapeDtypeStruct((rows, columns // group), jnp.float32)}


def _positive(group: int) -> int:
    if group < 1:
        raise ValueError(f"group is {group}, expected at least 1 column (32 to 128 are usual)")
    return group


def from_json(values: Mapping[str, Any]) -> Format:
    """The format that `Format.as_json` described.

    Raises:
        ValueError: for anything else.

    >>> from_json({"bits": 8, "group": None, "keep": []})
    int8()
    """
    try:
        bits, group, keep = values["bits"], values["group"], tuple(map(str, values["keep"]))
        return {8: lambda: int8("group" if group else "channel", group=group or 1, keep=keep),
                4: lambda: int4(group=group, keep=keep)}[bits]()  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"format {values}: expected bits 8 or 4, group and keep") from error


@partial(jax.jit, static_argnums=(1, 2))
def _error(w: jax.Array, bits: int, group: int) -> jax.Array:
    off = w - decode(quantize(w, bits, group), jnp.float32)
    return jnp.linalg.norm(off) / jnp.maximum(jnp.linalg.norm(w), np.float32(1e-30))


@partial(jax.jit, static_argnums=(1, 2))
def _encode(w: jax.Array, bits: int, group: int) -> Codes:
    return quantize(w, bits, group)


_PIECE = 1 << 24
"""Weights of a matrix in host memory that are on the device at a time, in whole rows."""


def encode(matrix: Any, bits: int, group: int) -> Codes:
    """The codes of a matrix: on the device, or as NumPy arrays like the matrix, some rows at a time.

    >>> encode(np.ones((2, 4), np.float32), 4, 4).codes.tolist()
    [[119, 119], [119, 119]]
    """
    if isinstance(matrix, jax.Array):
        return _encode(matrix, bits, group)
    pieces = [_encode(jnp.asarray(matrix[at : at + n]), bits, group) for at, n in pieces_of(*matrix.shape)]
    joined: list[Any] = [np.concatenate([np.asarray(x) for x in parts]) for parts in zip(*pieces, strict=True)]
    return Codes(*joined)


def decoded(codes: Codes) -> Any:
    """What codes stand for, in float32: on the device, or as a NumPy array like the codes, some rows at a time.

    >>> decoded(encode(np.ones((1, 2), np.float32), 8, 2)).tolist()
    [[1.0, 1.0]]
    """
    if isinstance(codes.codes, jax.Array):
        return decode(codes, jnp.float32)
    pieces = (Codes(*(jnp.asarray(x[at : at + n]) for x in codes)) for at, n in pieces_of(*codes.shape))
    return np.concatenate([np.asarray(decode(piece, jnp.float32)) for piece in pieces])


def pieces_of(rows: int, columns: int) -> list[tuple[int, int]]:
    """(first row, count) of the pieces of a matrix in host memory, of equal size if its rows have a divisor for it.

    >>> pieces_of(5, 1 << 23)
    [(0, 2), (2, 2), (4, 1)]
    """
    most = min(max(1, _PIECE // columns), rows)
    count = next((n for n in range(most, most // 2, -1) if rows % n == 0), most)
    return [(start, min(count, rows - start)) for start in range(0, rows, count)]
