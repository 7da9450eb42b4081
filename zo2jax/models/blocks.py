"""A model is a list of blocks: named stages, each with its own parameters and a pure ``apply``."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from zo2jax.models.layers import Batch, Cache
from zo2jax.models.tensors import Extent

Params = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One stage: a name, the shapes of its leaves, tied leaves, and a pure function.

    ``aliases`` maps a leaf of this block to the leaf of another block that it shares, both as dotted names:
    ``{"weight": "embed.weight"}`` on a tied head. ``structure`` is a Flax graph definition, or a function
    ``(leaves, carry, batch) -> carry``. It is hashable, so equal blocks share one compiled program. ``caches``: whether
    the stage looks back at earlier tokens, and can keep their keys and values. ``takes_weights``: whether its modules
    use their matrices only through `zo2jax.models.layers`, so that a `Weight` may stand for one.
    ``objective(module, carry, batch)`` stands in for the stage itself, such as a loss of its result.

    >>> Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs)).shapes["scale"].shape
    (4,)
    """

    name: str
    structure: Any
    shapes: Params = field(hash=False)
    aliases: dict[str, str] = field(default_factory=dict, hash=False)
    caches: bool = False
    takes_weights: bool = False
    objective: Callable[[Callable[..., Any], Any, Batch], Any] | None = None

    @classmethod
    def define(
        cls, name: str, make: Callable[[nnx.Rngs], nnx.Module], aliases: dict[str, str] | None = None, **options: Any
    ) -> "Block":
        """A block from ``make(rngs) -> nnx.Module``; no array is made."""
        structure, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        return cls(name, structure, nnx.to_pure_dict(state), aliases or {}, **options)

    def module(self, params: Params) -> Callable[..., Any]:
        """The stage with its parameters, a function of (carry, batch)."""
        if isinstance(self.structure, nnx.GraphDef):
            return nnx.merge(self.structure, params)
        return partial(self.structure, params)

    def apply(self, params: Params, carry: Any, batch: Batch) -> Any:
        """The stage's function: (its parameters with tied leaves filled in, carry, batch) -> carry."""
        module = self.module(params)
        return module(carry, batch) if self.objective is None else self.objective(module, carry, batch)

    def extend(self, params: Params, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
        """Like `apply`, for rows that go on where ``cache`` ends; see `zo2jax.models.layers.attend`.

        Without a cache, as for all blocks that do not keep one, it is `apply` and None.
        """
        if cache is None:
            return self.apply(params, carry, batch), None
        return self.module(params)(carry, batch, cache)


@dataclass(frozen=True)
class LossOfOutputs:
    """An objective: a user's loss of what the last block gives. Without one, the last block gives the loss itself.

    ``loss(outputs, batch)`` is a pair (sum of losses, how many), a loss per example, or a mean loss; in float32.

    >>> LossOfOutputs(lambda x, batch: (x - batch) ** 2)(lambda carry, batch: 2 * batch, None, jax.numpy.ones(3))
    (Array(3., dtype=float32), Array(3., dtype=float32))
    """

    loss: Callable[[Any, Batch], Any] | None

    def __call__(self, module: Callable[..., Any], carry: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, how many): what a sweep ends with, float32 [] both.

        Raises:
            TypeError: for any other result.
        """
        given = module(carry, batch)
        given = given if self.loss is None else self.loss(given, batch)
        total, count = given if isinstance(given, tuple) and len(given) == 2 else (jnp.zeros(1), 0)
        if self.loss is not None and getattr(given, "ndim", None) in (0, 1):
            total, count = jnp.sum(given), given.size
        if getattr(total, "shape", None) != () or total.dtype != jnp.float32 or jnp.shape(count) != ():
            more = ": give blocks(...) a loss of the outputs" if self.loss is None else " or float32 [examples]"
            raise TypeError(f"the loss is {_described(given)}, expected (sum float32 [], count []){more}")
        return total, jnp.asarray(count).astype(jnp.float32)


def _described(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(map(_described, result))})"
    return f"{result.dtype}{list(result.shape)}" if hasattr(result, "shape") else repr(result)


class Source(Mapping[str, Params]):
    """The parameters of blocks, read or made each time that they are asked for, and not kept.

    Args:
        readers: by block, a function that gives its leaves: nested dictionaries of NumPy or JAX arrays.
        concurrent: whether several blocks may be read at once, as from files; those that are made take memory.
        codes: by block, what gives matrices that are kept as codes as {"codes": .., "scale": ..}; the others as well.
        extents: by block, where leaves lie in files as they are in the model, by dotted name within the block; those of
            codes are ``NAME.codes`` and ``NAME.scale``.
        others: by block, what gives the leaves that ``extents`` lacks.

    >>> source = Source({"norm": lambda: {"scale": jax.numpy.ones(4)}})
    >>> list(source), source["norm"]["scale"].shape
    (['norm'], (4,))
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], Params]],
        *,
        concurrent: bool = False,
        codes: Mapping[str, Callable[[], Params]] | None = None,
        extents: Mapping[str, Mapping[str, Extent]] | None = None,
        others: Mapping[str, Callable[[], Params]] | None = None,
    ):
        """Reads nothing."""
        self._readers, self.concurrent = dict(readers), concurrent
        self._codes = self._readers if codes is None else codes
        self._extents, self._others = extents or {}, dict(self._readers if others is None else others)

    @classmethod
    def of(cls, source: Mapping[str, Params]) -> "Source":
        """The source itself, or one that asks another mapping, which is read one block at a time.

        >>> Source.of({"norm": {"w": 2.0}})["norm"]
        {'w': 2.0}
        """
        return source if isinstance(source, cls) else cls({name: partial(source.__getitem__, name) for name in source})

    def coded(self, block: str) -> Params:
        """Reads one block, in which codes are as they are."""
        return self._codes[block]()

    def having(self, more: Mapping[str, Callable[[], Params]], *, replacing: bool = False) -> "Source":
        """The same with further leaves, or others in the place of its own: by block, what gives them by dotted name.

        >>> source = Source({"norm": lambda: {"w": 2.0}}).having({"norm": lambda: {"scale.v": 1.0}})
        >>> source["norm"], source.others("norm")
        ({'w': 2.0, 'scale': {'v': 1.0}}, {'w': 2.0, 'scale': {'v': 1.0}})
        """

        def read(block: str, own: Callable[[], Params]) -> Params:
            leaves = jax.tree.map(lambda x: x, own())
            for name, leaf in more[block]().items():
                set_leaf(leaves, name, leaf)
            return leaves

        readers, codes, others = (
            {n: partial(read, n, own) if n in more else own for n, own in of.items()}
            for of in (self._readers, self._codes, self._others)
        )
        extents = {n: x for n, x in self._extents.items() if not (replacing and n in more)}
        return Source(readers, concurrent=self.concurrent, codes=codes, extents=extents, others=others)

    def decoded(self) -> "Source":
        """The same, of which only arrays are known, and not how files keep them.

        >>> source = Source({"norm": lambda: {"w": 2.0}}, codes={"norm": lambda: {"w": {"codes": 1, "scale": 2.0}}})
        >>> source.coded("norm"), source.decoded().coded("norm")
        ({'w': {'codes': 1, 'scale': 2.0}}, {'w': 2.0})
        """
        return Source(self._readers, concurrent=self.concurrent)

    def observed(self, see: Callable[[str, Params], None]) -> "Source":
        """The same, which calls ``see(block, leaves)`` when a block has been read.

        >>> source, seen = Source({"norm": lambda: {"w": 2.0}}), []
        >>> source.observed(lambda *read: seen.append(read))["norm"], seen
        ({'w': 2.0}, [('norm', {'w': 2.0})])
        """

        def shown(block: str, read: Callable[[], Params]) -> Params:
            leaves = read()
            see(block, leaves)
            return leaves

        readers, codes = ({n: partial(shown, n, r) for n, r in of.items()} for of in (self._readers, self._codes))
        return Source(readers, concurrent=self.concurrent, codes=codes, extents=self._extents, others=self._others)

    def extents(self, block: str) -> Mapping[str, Extent]:
        """Where leaves of a block lie in files, by dotted name; reads nothing."""
        return self._extents.get(block, {})

    def others(self, block: str) -> Params:
        """Reads the leaves of a block that are not among its `extents`."""
        return self._others[block]()

    def __getitem__(self, block: str) -> Params:
        """Reads one block."""
        return self._readers[block]()

    def __contains__(self, block: object) -> bool:
        """Whether there is such a block; reads nothing."""
        return block in self._readers

    def __iter__(self) -> Iterator[str]:
        """The names of the blocks, in order."""
        return iter(self._readers)

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._readers)


def block_of(name: str, blocks: Iterable[str]) -> str:
    """The block that a leaf of a dotted name belongs to.

    >>> block_of("layers.1.attn.q.weight", ["layers.1.attn", "layers.11.attn"])
    'layers.1.attn'
    """
    return max((block for block in blocks if name.startswith(block + ".")), key=len)


def get_leaf(params: Mapping[str, Params], name: str) -> Any:
    """The leaf of a dotted name, the block's name first.

    >>> get_leaf({"layers.0.attn": {"q": {"weight": 1}}}, "layers.0.attn.q.weight")
    1
    """
    block = block_of(name, params)
    leaf = params[block]
    for part in name[len(block) + 1 :].split("."):
        leaf = leaf[part]
    return leaf


def set_leaf(tree: Params, name: str, value: Any) -> None:
    """Sets the leaf of a dotted name in a (nested) dictionary, making the dictionaries on the way.

    >>> tree = {}
    >>> set_leaf(tree, "attn.q", 1)
    >>> tree
    {'attn': {'q': 1}}
    """
    *parents, last = name.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def del_leaf(tree: Params, name: str) -> None:
    """Removes the leaf of a dotted name, and the dictionaries that it leaves empty.

    >>> tree = {"a": {"b": 1}, "c": 2}
    >>> del_leaf(tree, "a.b")
    >>> tree
    {'c': 2}
    """
    first, _, rest = name.partition(".")
    if rest:
        del_leaf(tree[first], rest)
    if not rest or not tree[first]:
        del tree[first]


def owned_shapes(blocks: Sequence[Block]) -> Params:
    """The leaves of a list of blocks as ``jax.ShapeDtypeStruct``, by block; a tied leaf stands with its owner only.

    >>> list(owned_shapes([Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs))]))
    ['norm']
    """
    shapes: Params = {}
    for block in blocks:
        leaves = jax.tree.map(lambda s: s, block.shapes)
        for name in block.aliases:
            del_leaf(leaves, name)
        shapes[block.name] = leaves
    return shapes


def tied_leaves(block: Block, params: Mapping[str, Params]) -> Params:
    """The leaves that a block shares with others, under their dotted names in this block; empty for most blocks.

    >>> block = Block.define("head", lambda rngs: nnx.LayerNorm(4, rngs=rngs), {"scale": "embed.weight"})
    >>> tied_leaves(block, {"embed": {"weight": 1}})
    {'scale': 1}
    """
    return {name: get_leaf(params, owner) for name, owner in block.aliases.items()}


def with_tied(leaves: Params, tied: Params) -> Params:
    """A block's leaves with those that it shares filled in; dictionaries are copied, arrays are not.

    >>> with_tied({"bias": 0}, {"scale": 1})
    {'bias': 0, 'scale': 1}
    """
    if tied:
        leaves = jax.tree.map(lambda x: x, leaves)
        for name, value in tied.items():
            set_leaf(leaves, name, value)
    return leaves


def run_blocks(blocks: Sequence[Block], params: Mapping[str, Params], batch: Batch) -> Any:
    """Carries a batch through all blocks; the last one's result: logits, or (loss sum, count) with targets."""
    carry = None
    for block in blocks:
        carry = block.apply(with_tied(params[block.name], tied_leaves(block, params)), carry, batch)
    return carry


class Kind:
    """What equal blocks share: all but the name. Compared by identity, since hashing a Flax graph takes long.

    >>> norm = Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs))
    >>> kinds([norm, replace(norm, name="other")])[0] is kinds([norm])[0]
    True
    """

    def __init__(self, block: Block):
        """Keeps a block without a name."""
        self.block = block


@lru_cache(maxsize=256)
def _kind_of(nameless: Block) -> Kind:
    return Kind(nameless)


def kinds(blocks: Sequence[Block]) -> list[Kind]:
    """The kind of each block, for programs that are compiled once a kind.

    >>> kinds([])
    []
    """
    # Blocks made by `replace` share their parts: one hash for all layers.
    known: dict[tuple[Any, ...], Kind] = {}
    found = []
    for block in blocks:
        parts = (block.structure, block.shapes, block.aliases, block.objective)
        same = (*map(id, parts), block.caches)
        if same not in known:
            known[same] = _kind_of(replace(block, name=""))
        found.append(known[same])
    return found


Visit = Callable[[Block, Any, Batch, Cache | None], tuple[Any, Cache | None]]
"""Carries a batch one block further: (block, carry, batch, cache) -> (carry, cache)."""


@runtime_checkable
class Stream(Protocol):
    """Parameters that are somewhere else, such as those of a run, and carry batches through their blocks themselves.

    >>> isinstance({}, Stream)
    False
    """

    def visits(self, blocks: Sequence[Block]) -> Visit:
        """The visit of these blocks, which hold the stream's parameters."""


@partial(jax.jit, static_argnums=0, donate_argnames="cache")
def _extend(kind: Kind, leaves: Params, tied: Params, carry: Any, batch: Batch, cache: Cache | None) -> Any:
    return kind.block.extend(with_tied(leaves, tied), carry, batch, cache)


def visits(blocks: Sequence[Block], params: Mapping[str, Params]) -> Visit:
    """The visit of resident blocks, compiled once for each kind of block.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=2, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model = config.init(jax.random.key(0))
    >>> visit = visits(model.blocks, model.params)
    >>> visit(model.blocks[0], None, {"ids": jax.numpy.array([[1, 2]])}, None)[0].shape
    (1, 2, 8)
    """
    kind_of = dict(zip((block.name for block in blocks), kinds(blocks), strict=True))

    def visit(block: Block, carry: Any, batch: Batch, cache: Cache | None) -> tuple[Any, Cache | None]:
        return _extend(kind_of[block.name], params[block.name], tied_leaves(block, params), carry, batch, cache)

    return visit


def forward(visit: Visit, blocks: Sequence[Block], batch: Batch) -> Any:
    """Carries a batch through all blocks by visits: the result of `run_blocks`, compiled block by block.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=2, heads=2, kv_heads=1, head_size=4, context=16)
    >>> model = config.init(jax.random.key(0))
    >>> forward(model.visits(), model.blocks, {"ids": jax.numpy.array([[1, 2, 3]])}).shape
    (1, 3, 8)
    """
    carry = None
    for block in blocks:
        carry, _ = visit(block, carry, batch, None)
    return carry
