"""Pages: the matrices of a block, packed so that one large transfer moves them all.

A page is one flat array of one dtype; large matrices that are only read have one each, since a product takes a whole
page without a copy. Each matrix begins at a multiple of `pallas_kernels.perturb.ALIGNMENT` elements,
where kernels change it in place. Vectors (norms, biases: under 1 % of the bytes) are not packed.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.perturb import ALIGNMENT
from pallas_kernels.quantized import Codes
from zo2jax.formats import Format, encode
from zo2jax.leaves import is_trained, leaf_ids
from zo2jax.models.blocks import Block, Params, owned_shapes, set_leaf
from zo2jax.models.quantized import Quantized
from zo2jax.models.tensors import Extent


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: the page's number, the first element, the shape; and where its scales lie, if it is codes.

    >>> Place(0, 2048, (3, 5)).size, Place(0, 0, (3, 4), packed=2, scale=Place(1, 0, (3, 1))).size
    (15, 6)
    """

    page: int
    offset: int
    shape: tuple[int, ...]
    packed: int = 1
    """Codes in an element of the page: 2 of int4."""
    scale: "Place | None" = None
    dtype: str = ""
    """Of the matrix, if it is codes."""
    compute: str = ""
    """How products with codes are made, as `zo2jax.formats.Format` says."""

    @property
    def size(self) -> int:
        """Elements of the page."""
        return math.prod(self.shape) // self.packed

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 // self.packed

    @property
    def group(self) -> int:
        """Columns that share a scale of codes."""
        assert self.scale is not None, "only codes have scales"
        return self.shape[1] // self.scale.shape[1]

    def of(self, pages: Sequence[Any]) -> Any:
        """The matrix, or its `Codes`: of NumPy pages views, of JAX arrays slices."""
        page, end = pages[self.page], self.offset + self.size
        piece = page[self.offset : end] if isinstance(page, np.ndarray) else lax.slice(page, (self.offset,), (end,))
        if self.scale is None:
            return piece.reshape(self.shape)
        codes: Any = piece.reshape(self.shape[0], -1)
        return Codes(codes, self.scale.of(pages))

    def weight(self, pages: Sequence[jax.Array]) -> Quantized | jax.Array:
        """The matrix as products take it, of codes a `zo2jax.models.quantized.Quantized`."""
        matrix = self.of(pages)
        return Quantized(matrix, self.dtype, self.compute) if isinstance(matrix, Codes) else matrix


@dataclass(frozen=True)
class Layout:
    """How the leaves of a block lie: matrices in one page for each dtype, the rest by itself. Hashable.

    >>> layout = Layout.of({"w": np.zeros((3, 5), np.float32), "b": np.zeros(3, np.float32)})
    >>> layout.pages, layout.rest
    ((('float32', 2048),), ('b',))
    """

    matrices: tuple[tuple[str, Place], ...]
    pages: tuple[tuple[str, int], ...]
    """dtype and length of each page."""
    rest: tuple[str, ...]
    """Dotted names of the leaves that are not packed."""

    @classmethod
    def of(cls, shapes: Params, format: Format | None = None, block: str = "", *, apart: bool = False) -> "Layout":
        """The layout of leaves of these shapes (nested dictionaries), in pytree order; ``block`` is whose they are.

        With ``apart`` each matrix of `APART` weights or more has a page of its own.
        """
        pages = _Pages(apart)
        matrices, rest = [], []
        for name, leaf in flat(shapes).items():
            if not (is_trained(leaf) and len(leaf.shape) >= 2):
                rest.append(name)
                continue
            shape, dtype = tuple(leaf.shape), str(jnp.dtype(leaf.dtype))
            group = None if format is None else format.group_of(f"{block}.{name}", shape)
            if format is None or group is None:
                matrices.append((name, pages.place(shape, dtype)))
                continue
            scale = pages.place((shape[0], shape[1] // group), "float32")
            codes = "int8" if format.bits == 8 else "uint8"
            how = {"packed": 8 // format.bits, "scale": scale, "dtype": dtype, "compute": format.compute}
            matrices.append((name, pages.place(shape, codes, **how)))
        return cls(tuple(matrices), tuple(pages.pages), tuple(rest))

    def masters(self, residuals: bool, trained: Callable[[str], bool] = lambda name: True) -> "Layout":
        """That of what is kept beside matrices for folds: float32 of codes; with ``residuals``, int16 of bfloat16.

        ``trained`` says of which matrices, by their names here.

        >>> layout = Layout.of({"w": jnp.ones((3, 5), jnp.bfloat16), "x": np.ones((1, 1), np.float32)})
        >>> layout.masters(True).pages, layout.masters(False).pages
        ((('int16', 2048),), ())
        """
        pages, matrices = _Pages(), []
        for name, place in self.matrices:
            if not trained(name):
                continue
            if place.scale is not None:
                matrices.append((name, pages.place(place.shape, "float32")))
            elif residuals and self.pages[place.page][0] == "bfloat16":
                matrices.append((name, pages.place(place.shape, "int16")))
        return Layout(tuple(matrices), tuple(pages.pages), ())

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._begins[-1]

    @property
    def _begins(self) -> list[int]:
        """Where pages begin in uint8 [nbytes], at multiples of `ALIGNMENT`; and nbytes."""
        sizes = (n * jnp.dtype(d).itemsize for d, n in self.pages)
        return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))

    def views(self, memory: np.ndarray) -> list[np.ndarray]:
        """The pages as views of uint8 [nbytes]."""
        dtypes = [(jnp.dtype(d), n) for d, n in self.pages]
        return [memory[a : a + n * d.itemsize].view(d) for a, (d, n) in zip(self._begins, dtypes, strict=False)]

    def pieces(self, extents: Mapping[str, Extent]) -> list[tuple[int, Extent]] | None:
        """What to read from files so that the pages, as uint8 [nbytes], hold the matrices: (the first byte, an extent).

        None if a matrix, or of codes one of the two parts, is not among the extents in the shape and dtype that it has
        here.

        >>> from pathlib import Path
        >>> from zo2jax.models.tensors import Stamp
        >>> layout = Layout.of({"w": np.ones((2, 3), np.float32), "x": np.ones((1, 1), np.float32)})
        >>> extents = {n: Extent(Path("m"), Stamp(99, 0), 8, s, "float32") for n, s in (("w", (2, 3)), ("x", (1, 1)))}
        >>> [start for start, _ in layout.pieces(extents)], layout.pieces({"w": extents["w"]})
        ([0, 8192], None)
        """
        begin, found = self._begins, []
        for name, whole in self.matrices:
            parts = (
                [(name, whole)] if whole.scale is None else [(f"{name}.codes", whole), (f"{name}.scale", whole.scale)]
            )
            for part, place in parts:
                dtype = self.pages[place.page][0]
                shape = (*place.shape[:-1], place.shape[-1] // place.packed)
                extent = extents.get(part)
                if extent is None or (extent.shape, extent.dtype) != (shape, dtype):
                    return None
                found.append((begin[place.page] + place.offset * jnp.dtype(dtype).itemsize, extent))
        return found

    def pack(self, leaves: Params, pages: list[np.ndarray]) -> None:
        """Copies the matrices among ``leaves`` (NumPy or JAX arrays) into pages in host memory.

        Of codes, the leaf is the matrix, or {"codes": .., "scale": ..}.
        """
        named = flat(leaves)
        for name, place in self.matrices:
            if place.scale is None:
                _copy(named[name], place, pages)
                continue
            codes, scale = encoded(named[name], place) if name in named else codes_in(named, name)
            _copy(codes, place, pages)
            _copy(scale, place.scale, pages)

    def unpack(self, pages: Any, rest: Mapping[str, Any]) -> Params:
        """The nested leaves: of NumPy pages views, of JAX arrays slices, of codes `Codes` of either."""
        leaves: Params = {}
        for name, place in self.matrices:
            set_leaf(leaves, name, place.of(pages))
        for name in self.rest:
            set_leaf(leaves, name, rest[name])
        return leaves


APART = 1 << 20
"""Weights from which on a matrix that is only read has a page of its own."""


class _Pages:
    """Lays matrices out, one after the other, in a page for each dtype; with ``apart``, large ones in their own."""

    def __init__(self, apart: bool = False) -> None:
        self._apart = apart
        self.pages: list[tuple[str, int]] = []
        """dtype and length."""
        self._shared: dict[str, int] = {}  # by dtype, the page's number

    def place(self, shape: tuple[int, ...], of: str, **of_codes: Any) -> Place:
        alone = self._apart and math.prod(shape) >= APART
        number = len(self.pages) if alone else self._shared.setdefault(of, len(self.pages))
        if number == len(self.pages):
            self.pages.append((of, 0))
        offset = self.pages[number][1]
        place = Place(number, offset, shape, **of_codes)
        end = offset + place.size
        self.pages[number] = of, end if alone else -(-end // ALIGNMENT) * ALIGNMENT
        return place


def encoded(matrix: Any, place: Place) -> Codes:
    """The codes of a matrix for a place that holds codes: on the device, or in host memory like the matrix.

    >>> from zo2jax.formats import int4
    >>> layout = Layout.of({"w": jax.ShapeDtypeStruct((2, 4), jnp.float32)}, int4())
    >>> encoded(jnp.ones((2, 4)), layout.matrices[0][1]).codes.tolist()
    [[119, 119], [119, 119]]
    """
    return encode(matrix, place.bits, place.group)


def codes_in(named: Mapping[str, Any], name: str) -> Codes:
    """The codes of a matrix among leaves by dotted name, which has ``NAME.codes`` and ``NAME.scale``.

    >>> codes_in({"w.codes": 1, "w.scale": 2}, "w")
    Codes(codes=1, scale=2)
    """
    return Codes(*(named[f"{name}.{part}"] for part in Codes._fields))


def _copy(leaf: Any, place: Place, pages: list[np.ndarray]) -> None:
    there = pages[place.page][place.offset : place.offset + place.size]
    np.copyto(there, np.asarray(leaf).reshape(-1), casting="unsafe")  # without an array of the other dtype in between


def layouts_of(blocks: Sequence[Block], format: Format | None = None, *, apart: bool = False) -> dict[str, Layout]:
    """The layout of each block's own leaves, as `Layout.of` gives it.

    >>> from flax import nnx
    >>> layouts_of([Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs))])["norm"].rest
    ('bias', 'scale')
    """
    return {name: Layout.of(leaves, format, name, apart=apart) for name, leaves in owned_shapes(blocks).items()}


def ids_of(blocks: Sequence[Block], layouts: Mapping[str, Layout]) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """The ids of each block's leaves, uint32, on the device: (of its matrices, of the others, of those that it shares).

    Raises:
        TypeError, ValueError: see `zo2jax.leaves.leaf_ids`.

    >>> from flax import nnx
    >>> blocks = [Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs))]
    >>> [ids.shape for ids in ids_of(blocks, layouts_of(blocks))[0]]
    [(0,), (2,), (0,)]
    """
    shapes = owned_shapes(blocks)
    named = jax.tree.unflatten(jax.tree.structure(shapes), list(leaf_ids(shapes)))
    known = {f"{block}.{name}": i for block, leaves in named.items() for name, i in flat(leaves).items()}

    def ids(names: Iterable[str]) -> jax.Array:  # on the device: an upload would wait for pages
        return jnp.array([known[name] for name in names], jnp.uint32)

    found = []
    for block in blocks:
        layout = layouts[block.name]
        parts = [name for name, _ in layout.matrices], sorted(layout.rest)
        matrices, rest = ([f"{block.name}.{name}" for name in part] for part in parts)
        found.append((ids(matrices), ids(rest), ids(block.aliases.values())))
    return found


def flat(leaves: Params) -> dict[str, Any]:
    """Dotted names -> leaves, in pytree order.

    >>> flat({"q": {"weight": 1}, "b": 2})
    {'b': 2, 'q.weight': 1}
    """
    paths = jax.tree_util.tree_leaves_with_path(leaves)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def on_host(leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array; of memory of the host, without a copy.

    >>> on_host(jnp.ones(2, jnp.bfloat16)).dtype
    dtype(bfloat16)
    """
    if isinstance(leaf, jax.Array):
        # An array keeps the copy that NumPy is given, and would keep the whole model on the host in the end. This one
        # shares the memory of the leaf on the device, and is gone together with its copy.
        shards = [leaf.addressable_data(i) for i in range(len(leaf.sharding.addressable_devices))]
        leaf = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return np.asarray(leaf)
