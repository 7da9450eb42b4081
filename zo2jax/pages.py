"""Pages: the matrices of a block, packed so that one large transfer moves them all.

A page is one flat array of one dtype. Each matrix begins at a multiple of `pallas_kernels.perturb.ALIGNMENT` elements,
where kernels change it in place. Vectors (norms, biases: under 1 % of the bytes) are not packed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.perturb import ALIGNMENT
from zo2jax.directions import is_trained
from zo2jax.models.blocks import Block, Params, owned_shapes, set_leaf


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: the page's number, the first element, the shape.

    >>> Place(0, 2048, (3, 5)).size
    15
    """

    page: int
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the matrix."""
        return math.prod(self.shape)


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
    def of(cls, shapes: Params) -> "Layout":
        """The layout of leaves of these shapes (nested dictionaries), in pytree order."""
        lengths: dict[str, int] = {}
        matrices, rest = [], []
        for name, leaf in flat(shapes).items():
            if not (is_trained(leaf) and len(leaf.shape) >= 2):
                rest.append(name)
                continue
            dtype = str(jnp.dtype(leaf.dtype))
            offset = lengths.setdefault(dtype, 0)
            matrices.append((name, Place(list(lengths).index(dtype), offset, tuple(leaf.shape))))
            lengths[dtype] = offset + -(-math.prod(leaf.shape) // ALIGNMENT) * ALIGNMENT
        return cls(tuple(matrices), tuple(lengths.items()), tuple(rest))

    def residuals(self) -> "Layout":
        """That of the int16 beside each bfloat16 element (`zo2jax.updates.residual`), place for place.

        >>> layout = Layout.of({"w": jnp.ones((3, 5), jnp.bfloat16), "x": np.ones((1, 1), np.float32)})
        >>> layout.residuals().pages
        (('int16', 2048), ('int16', 0))
        """
        here = [dtype == "bfloat16" for dtype, _ in self.pages]
        pages = tuple(("int16", length * there) for there, (_, length) in zip(here, self.pages, strict=True))
        return Layout(tuple((name, place) for name, place in self.matrices if here[place.page]), pages, ())

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(length * jnp.dtype(dtype).itemsize for dtype, length in self.pages)

    def views(self, memory: np.ndarray) -> list[np.ndarray]:
        """The pages as views of uint8 [nbytes]."""
        ends = np.cumsum([0, *(n * jnp.dtype(d).itemsize for d, n in self.pages)])
        return [memory[a:b].view(jnp.dtype(d)) for (d, _), (a, b) in zip(self.pages, pairwise(ends), strict=True)]

    def pack(self, leaves: Params, pages: list[np.ndarray]) -> None:
        """Copies the matrices among ``leaves`` (NumPy or JAX arrays) into pages in host memory."""
        named = flat(leaves)
        for name, place in self.matrices:
            matrix = np.asarray(named[name]).reshape(-1)
            np.copyto(pages[place.page][place.offset : place.offset + place.size], matrix)

    def unpack(self, pages: Any, rest: Mapping[str, Any]) -> Params:
        """The nested leaves: of NumPy pages views, of JAX arrays slices."""
        leaves: Params = {}
        for name, place in self.matrices:
            end = place.offset + place.size
            page = pages[place.page]
            piece = (
                page[place.offset : end] if isinstance(page, np.ndarray) else lax.slice(page, (place.offset,), (end,))
            )
            set_leaf(leaves, name, piece.reshape(place.shape))
        for name in self.rest:
            set_leaf(leaves, name, rest[name])
        return leaves


def flat(leaves: Params) -> dict[str, Any]:
    """Dotted names -> leaves, in pytree order.

    >>> flat({"q": {"weight": 1}, "b": 2})
    {'b': 2, 'q.weight': 1}
    """
    paths = jax.tree_util.tree_leaves_with_path(leaves)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def layout_of(block: Block) -> Layout:
    """The layout of the leaves that a block owns.

    >>> from flax import nnx
    >>> layout_of(Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs))).rest
    ('bias', 'scale')
    """
    return Layout.of(owned_shapes([block])[block.name])
