"""A model is a list of blocks: named stages, each with its own parameters and a pure ``apply``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from zo2jax.models.layers import cross_entropy

Params = dict[str, Any]
Batch = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Block:
    """One stage: a name, the shapes of its leaves, tied leaves, and a pure function.

    ``aliases`` maps a leaf of this block to the leaf of another block that it shares, both as dotted names:
    ``{"weight": "embed.weight"}`` on a tied head. The structure (a Flax graph definition) is hashable, so equal
    blocks share one compiled program.

    >>> Block.define("norm", lambda rngs: nnx.LayerNorm(4, rngs=rngs)).shapes["scale"].shape
    (4,)
    """

    name: str
    graphdef: Any
    shapes: Params = field(hash=False)
    aliases: dict[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def define(cls, name: str, make: Any, aliases: dict[str, str] | None = None) -> "Block":
        """A block from ``make(rngs) -> nnx.Module``; no array is made."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        return cls(name, graphdef, nnx.to_pure_dict(state), aliases or {})

    def apply(self, params: Params, carry: Any, batch: Batch) -> Any:
        """The stage's function: (its parameters with tied leaves filled in, carry, batch) -> carry."""
        return nnx.merge(self.graphdef, params)(carry, batch)


def get_leaf(params: Params, name: str) -> Any:
    """The leaf of a dotted name, the block's name first.

    >>> get_leaf({"layers.0": {"attn": {"q": 1}}}, "layers.0.attn.q")
    1
    """
    block = max((b for b in params if name.startswith(b + ".")), key=len)
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


def tied_leaves(block: Block, params: Params) -> Params:
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


def run_blocks(blocks: Sequence[Block], params: Params, batch: Batch) -> Any:
    """Carries a batch through all blocks; the last one's result: logits, or (loss sum, count) with targets."""
    carry = None
    for block in blocks:
        carry = block.apply(with_tied(params[block.name], tied_leaves(block, params)), carry, batch)
    return carry


_logits = partial(jax.jit, static_argnums=0)(run_blocks)


@dataclass(frozen=True, eq=False)
class Model:
    """Blocks and their parameters, with the configuration and the tokenizer they came with.

    ``params`` maps block names to nested dictionaries of arrays: matrices (n_out, n_in) in the model's dtype,
    one-dimensional leaves in float32; tied matrices stand once. ``folder`` is where the model was loaded from.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> config.init(jax.random.key(0)).logits(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    config: Any
    blocks: tuple[Block, ...]
    params: Params
    folder: Path | None = None
    tokenizer: Any = None

    def replace(self, params: Params) -> "Model":
        """The same model with other parameters."""
        return replace(self, params=params)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the matrices."""
        return next(leaf.dtype for leaf in jax.tree.leaves(self.params) if leaf.ndim >= 2)

    @property
    def parameter_count(self) -> int:
        """How many parameters the model has, tied ones counted once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def check_tokens(self, length: int) -> None:
        """Raises ValueError if rows of ``length`` tokens do not fit the model's context."""
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.config.context}: shorten them")

    def logits(self, ids: ArrayLike, lengths: ArrayLike | None = None) -> jax.Array:
        """Next-token logits, float32 [batch, time, vocabulary], of int32 ids [batch, time].

        ``lengths`` int32 [batch] counts the real tokens of right-padded rows; logits beyond them are
        unspecified. Left-padded input is brought into this form by `zo2jax.realign(ids, attention_mask)`.
        """
        ids = jnp.asarray(ids, jnp.int32)
        batch = {"ids": ids} if lengths is None else {"ids": ids, "lengths": jnp.asarray(lengths, jnp.int32)}
        if ids.ndim != 2 or ("lengths" in batch and batch["lengths"].shape != ids.shape[:1]):
            shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in batch.items())
            raise ValueError(f"{shapes}: expected ids[batch, time] and lengths[batch]")
        self.check_tokens(ids.shape[1])
        return _logits(self.blocks, self.params, batch)

    def loss_sum(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of token losses in nats, number of tokens), float32: ids, targets [b, t]; weights [b, t] optional."""
        return run_blocks(self.blocks, params, batch)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """The mean loss in nats per token, float32 []; the loss function of `zo2jax.mezo`. See `loss_sum`."""
        total, count = self.loss_sum(params, batch)
        return total / jnp.where(count > 0, count, 1)

    def generate(self, prompt: str, tokens: int) -> str:
        """Greedy continuation of ``prompt`` by up to ``tokens`` tokens; stops at the end-of-text token.

        Raises:
            ValueError: without a tokenizer, for an empty prompt, or beyond the model's context.
        """
        if self.tokenizer is None:
            raise ValueError(f"the model from {self.folder} has no tokenizer.json, which text generation needs")
        ids = self.tokenizer.encode(prompt).ids
        if not ids:
            raise ValueError("the prompt is empty: give at least one token to continue")
        start, room = len(ids), len(ids) + tokens
        self.check_tokens(room)
        padded = np.zeros((1, room), np.int32)
        padded[0, :start] = ids
        for position in range(start, room):
            row = self.logits(padded, np.array([position], np.int32))[0, position - 1]
            padded[0, position] = int(jnp.argmax(row))
            if padded[0, position] in self.config.stop_ids:
                room = position
                break
        return self.tokenizer.decode(padded[0, start:room].tolist())


def head_result(logits: jax.Array, batch: Batch) -> Any:
    """What a language-model head returns: logits, or (loss sum, count) if the batch has ``targets``.

    Without ``weights`` every position below ``lengths`` (or every position) counts once.

    >>> head_result(jnp.zeros((1, 2, 4)), {"ids": jnp.zeros((1, 2), int)}).shape
    (1, 2, 4)
    """
    if "targets" not in batch:
        return logits
    targets = batch["targets"]
    weights = batch.get("weights")
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
        if "lengths" in batch:
            weights = (jnp.arange(targets.shape[1])[None, :] < batch["lengths"][:, None]).astype(jnp.float32)
    return cross_entropy(logits, targets, weights)
