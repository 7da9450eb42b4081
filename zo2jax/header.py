"""What the journal of a run is about: all that makes updates of coefficients, and the weights that they are of."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bits
from zo2jax.directions import normal
from zo2jax.estimators import Estimator
from zo2jax.models.blocks import Params, owned_shapes
from zo2jax.models.model import Model
from zo2jax.optimizers import Optimizer
from zo2jax.pages import flat, on_host
from zo2jax.updates import Rounding

_LATER: dict[str, Any] = {"anchor_directions": 0, "hybrid": ""}  # fields that headers lack where they say nothing


@dataclass(frozen=True)
class Header:
    """What the records of a journal are about: all that makes updates of coefficients, and the weights they are of.

    >>> Header.from_json(Header(key=(0, 7)).as_json()).key
    (0, 7)
    """

    key: tuple[int, int]
    """Of the run, the two words of a threefry key."""
    members: int = 2
    """M."""
    directions: int = 1
    """K."""
    direction: Mapping[str, Any] = dataclasses.field(default_factory=normal.as_json)
    """`zo2jax.directions.as_json`."""
    estimator: str = ""
    optimizer: str = ""
    momentum: float = 0.0
    probe_batch: int | None = None
    """Members that are evaluated at once; None: all. A run keeps to it, as another may change a loss's last bits."""
    rounding: str = "stochastic"
    """Of updates, or of folds."""
    dtype: str = "float32"
    """Of the matrices."""
    anchor_directions: int = 0
    """J of `zo2jax.svrg`, the last ones of K."""
    format: Mapping[str, Any] | None = None
    """`zo2jax.formats.Format.as_json` of what matrices are kept as."""
    model: str = ""
    """`structure` of it."""
    base: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The weights before the first step: the `digest` of each block."""
    generator: int = bits.GENERATOR
    """Of the noise: the same addresses have other values with another number."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the run was begun with, to be read by people."""
    hybrid: str = ""
    """What of the weights is not made of coefficients, as `zo2jax.hybrid` was told it; empty for nothing."""

    @classmethod
    def of(
        cls,
        model: Model,
        estimator: Estimator,
        optimizer: Optimizer,
        rounding: Rounding,
        key: jax.Array,
        probe_batch: int | None = None,
        hybrid: str = "",
    ) -> "Header":
        """That of a run with these, but for the base, which nobody has read yet, and the config."""
        first, second = jax.random.key_data(key).tolist()
        return cls(
            (first, second),
            estimator.members,
            estimator.directions,
            anchor_directions=0 if estimator.full is None else estimator.full.directions,
            direction=estimator.direction.as_json(),
            estimator=str(estimator),
            optimizer=optimizer.name,
            momentum=optimizer.momentum,
            probe_batch=probe_batch,
            rounding=rounding.name,
            dtype=str(model.dtype),
            format=None if model.format is None else model.format.as_json(),
            model=structure(model),
            hybrid=hybrid,
        )

    @property
    def members_at_once(self) -> int:
        """How many members are evaluated at once.

        >>> Header((0, 7), members=4).members_at_once, Header((0, 7), members=4, probe_batch=3).members_at_once
        (4, 3)
        """
        return self.probe_batch or self.members

    @property
    def present(self) -> int:
        """How many members, the first ones, are probes of the present weights in every step.

        >>> Header((0, 7), members=4).present, Header((0, 7), members=12, directions=7, anchor_directions=6).present
        (4, 2)
        """
        own = self.directions - self.anchor_directions
        return self.members * own // (self.anchor_directions or own)

    @property
    def typed_key(self) -> jax.Array:
        """The key as JAX has it."""
        return jax.random.wrap_key_data(jnp.array(self.key, jnp.uint32), impl="threefry2x32")

    def as_json(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        values = dataclasses.asdict(self)
        for name in _LATER:
            if not values[name]:  # as of versions that lack it
                del values[name]
        return json.loads(json.dumps(values))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Header":
        """What `as_json` gave.

        Raises:
            TypeError, KeyError: if it is something else.
        """
        return cls(**{**values, "key": tuple(values["key"])})

    def differences(self, other: "Header", said: str = "{} there, {} here") -> list[str]:
        """Where another header says something else; but for configs, and for a base that is not known ({}).

        >>> Header(key=(0, 7), momentum=0.9).differences(Header(key=(0, 7)))
        ['momentum: 0.9 there, 0.0 here']
        """
        mine, theirs = (_LATER | header.as_json() for header in (self, other))
        names = [name for name in mine if name not in ("config", "base") and mine[name] != theirs[name]]
        found = [f"{name}: {said.format(mine[name], theirs[name])}" for name in names]
        if self.base and other.base and self.base != other.base:
            blocks = [name for name in {**self.base, **other.base} if self.base.get(name) != other.base.get(name)]
            both = (f"{x.base.get(blocks[0], 'no such')[:8]}.." for x in (self, other))
            found.append(
                f"the weights before the first step, of {len(blocks)} blocks: {blocks[0]} {said.format(*both)}"
            )
        return found


def structure(model: Model) -> str:
    """The first 16 bytes of the SHA-256 of the names, shapes, dtypes and ties of a model's leaves, in hexadecimal.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> len(structure(config.init(jax.random.key(0))))
    32
    """
    leaves = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in flat(owned_shapes(model.blocks)).items()}
    ties = {block.name: dict(block.aliases) for block in model.blocks}
    return hashlib.sha256(json.dumps([leaves, ties], sort_keys=True).encode()).hexdigest()[:32]


_CHUNK = 2**26  # bytes that one thread hashes at a time


def digest(leaves: Params) -> str:
    """The first 16 bytes of the SHA-256 of a block's leaves, NumPy or JAX arrays, as hexadecimal digits.

    Of their names, dtypes and shapes, and of the SHA-256 of each 64 MiB of their bytes, which several threads take.

    >>> digest({"scale": np.ones(4, np.float32)})
    'ee4b36d3d31360e89731e52bb9c5902e'
    """
    found = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, leaf in flat(leaves).items():
            array = on_host(leaf)
            data = array.reshape(-1).view(np.uint8)
            parts = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            for part in threads.map(lambda x: hashlib.sha256(x).digest(), parts):
                found.update(part)
    return found.hexdigest()[:32]
