"""The leaves of a pytree of parameters: which are trained, their names, and the addresses of their noise."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def is_trained(leaf: Any) -> bool:
    """Whether a leaf takes part in training: floating-point arrays do; integers and keys pass through.

    >>> is_trained(np.zeros(3, np.float32)), is_trained(np.zeros(3, np.int32))
    (True, False)
    """
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf from its pytree path; the ``.value`` of a Flax variable is not part of it.

    >>> jax.tree_util.tree_map_with_path(lambda p, _: leaf_name(p), {"layers": [{"q": 0}]})
    {'layers': [{'q': 'layers.0.q'}]}
    """
    return plain_name(jax.tree_util.keystr(path, simple=True, separator="."))


def plain_name(name: str) -> str:
    """A name without the ``.value`` of a Flax variable.

    >>> plain_name("layers.0.w.value")
    'layers.0.w'
    """
    owner, _, last = name.rpartition(".")
    return owner if owner and last in ("value", "raw_value") else name


def leaf_id(name: str) -> int:
    """The uint32 address of a leaf: the first four bytes (big-endian) of SHA-256 of its name in UTF-8.

    The ``.value`` of a Flax variable is no part of the name.

    >>> hex(leaf_id("layers.3.attn.q.weight"))
    '0xd9e43a50'
    """
    return int.from_bytes(hashlib.sha256(plain_name(name).encode()).digest()[:4], "big")


def leaf_ids(params: PyTree) -> np.ndarray:
    """The ids of all leaves of ``params``, in pytree order: uint32[number of leaves].

    Raises:
        TypeError: for a trained leaf that is not float32, bfloat16 or float16.
        ValueError: if there is no trained leaf, or two leaves would share noise.

    >>> leaf_ids({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)}).dtype
    dtype('uint32')
    """
    seen: dict[int, str] = {}
    ids = []
    trained = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        ids.append(leaf_id(name))
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.complexfloating) or isinstance(leaf, float):
            raise TypeError(f"leaf {name!r} is {getattr(leaf, 'dtype', 'a Python float')}, expected a real array")
        if not is_trained(leaf):
            continue
        trained += 1
        if leaf.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise TypeError(f"leaf {name!r} is {leaf.dtype}, expected float32, bfloat16 or float16: cast it first")
        if ids[-1] in seen:
            raise ValueError(
                f"leaves {seen[ids[-1]]!r} and {name!r} have the same id {ids[-1]:#010x} and would share one z: "
                "rename one of them"
            )
        seen[ids[-1]] = name
    if not trained:
        raise ValueError("params has no floating-point leaf: there is nothing to train")
    return np.array(ids, np.uint32)
