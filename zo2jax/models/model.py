"""A model: blocks and their parameters, with a configuration and a tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from zo2jax.formats import Format
from zo2jax.models.blocks import (
    Block,
    LossOfOutputs,
    Params,
    Source,
    Stream,
    Visit,
    forward,
    owned_shapes,
    run_blocks,
    visits,
)
from zo2jax.models.generation import Choose, continuations, greedy
from zo2jax.models.heads import Classification, LanguageModelHead, PerExample, QuestionAnswering
from zo2jax.models.layers import Batch

_LOOK_BACK = 8


@dataclass(frozen=True, eq=False)
class Model:
    """Blocks and their parameters, with the configuration and the tokenizer they came with.

    ``source`` maps block names to nested dictionaries of arrays: matrices (n_out, n_in) in the model's dtype,
    one-dimensional leaves in float32; tied matrices stand once. It is one of three: a dictionary, whose arrays are
    there; a `zo2jax.models.blocks.Source`, which reads or makes a block when it is asked for; or the stream of a run,
    which carries batches through its blocks itself. ``folder`` is where the model was loaded from. A model of
    `zo2jax.blocks` has no configuration and no tokenizer.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> config.init(jax.random.key(0)).logits(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)
    """

    config: Any
    blocks: tuple[Block, ...]
    source: Mapping[str, Params]
    folder: Path | None = None
    tokenizer: Any = None
    format: Format | None = None
    """How a run keeps the matrices, a `zo2jax.formats.Format`; as they are if None."""

    @property
    def params(self) -> Params:
        """All parameters by block, on the default device: put there the first time, and kept in place of the source."""
        if not isinstance(self.source, dict):
            params = {block.name: _on_device(self.source[block.name]) for block in self.blocks}
            object.__setattr__(self, "source", params)  # so that copies with another head or tokenizer share the arrays
        assert isinstance(self.source, dict)
        return self.source

    def visits(self, blocks: Sequence[Block] | None = None) -> Visit:
        """What carries a batch through the blocks (or through these, which hold the same parameters).

        The visits of a run's stream if the source is one; else those of resident parameters (`params`).
        """
        blocks = self.blocks if blocks is None else blocks
        return self.source.visits(blocks) if isinstance(self.source, Stream) else visits(blocks, self.params)

    def replace(self, source: Mapping[str, Params]) -> "Model":
        """The same model with other parameters."""
        return replace(self, source=source)

    def with_format(self, format: Format | None) -> "Model":
        """The same model, whose matrices a run keeps in a format such as ``zo2jax.int8()``; nothing is read yet.

        The codes of a folder become those of another format by way of what they stand for.
        """
        source, own = self.source, self.format
        if isinstance(source, Source) and own is not None and format is not None:
            source = source if replace(format, compute=own.compute) == own else source.decoded()
        return replace(self, format=format, source=source)

    def with_loss(self, loss: Callable[[Any, Batch], jax.Array]) -> "Model":
        """The same model with another loss: ``loss(what the head gives, batch) -> float32 [examples]``.

        What the head gives are logits: [b, t, vocabulary] for language models ([b, p, vocabulary] at ``positions``, if
        the batch has them), [b, classes], or [b, t, 2]. For a model of `zo2jax.blocks` it is what the last stage gives,
        and the loss what is described there.
        """
        return self._with_objective(LossOfOutputs(loss) if self.config is None else PerExample(loss))

    def _with_objective(self, objective: Callable[..., Any] | None) -> "Model":
        *blocks, head = self.blocks
        return replace(self, blocks=(*blocks, replace(head, objective=objective)))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the matrices."""
        return next(leaf.dtype for leaf in jax.tree.leaves(owned_shapes(self.blocks)) if leaf.ndim >= 2)

    @property
    def parameter_count(self) -> int:
        """How many parameters the model has, tied ones counted once."""
        return sum(leaf.size for leaf in jax.tree.leaves(owned_shapes(self.blocks)))

    def check_tokens(self, length: int) -> None:
        """Raises ValueError if rows of ``length`` tokens do not fit the model's context, or it is none for tokens."""
        if self.config is None:
            raise ValueError(
                "a model of zo2jax.blocks knows no tokens: expected one of zo2jax.load, or use its outputs"
            )
        if length > self.config.context:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.config.context}: shorten them")

    def outputs(self, batch: Any) -> Any:
        """What the last block gives for a batch, as it is without the loss of `with_loss` or of `zo2jax.blocks`."""
        blocks = self._with_objective(None).blocks
        return forward(self.visits(blocks), blocks, jax.device_put(batch))

    def logits(self, ids: ArrayLike, lengths: ArrayLike | None = None) -> jax.Array:
        """What the head gives, in float32, for int32 ids [batch, time].

        Next-token logits [batch, time, vocabulary] for a language model, [batch, classes] for a classifier,
        [batch, time, 2] for extractive question answering. ``lengths`` int32 [batch] counts the real tokens of
        right-padded rows; logits beyond them are unspecified. Left-padded input is brought into this form by
        `zo2jax.realign(ids, attention_mask)`.
        """
        ids = jnp.asarray(ids, jnp.int32)
        batch = {"ids": ids} if lengths is None else {"ids": ids, "lengths": jnp.asarray(lengths, jnp.int32)}
        if ids.ndim != 2 or ("lengths" in batch and batch["lengths"].shape != ids.shape[:1]):
            shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in batch.items())
            raise ValueError(f"{shapes}: expected ids[batch, time] and lengths[batch]")
        self.check_tokens(ids.shape[1])
        return forward(self.visits(), self.blocks, batch)

    def token_log_probs(self, batch: Batch) -> jax.Array:
        """Log-probabilities of ``targets`` in nats, float32 of their shape: [b, t], or [b, p] at ``positions``."""
        self.check_tokens(batch["ids"].shape[1])
        blocks = self._with_objective(LanguageModelHead.log_probs).blocks
        return forward(self.visits(blocks), blocks, jax.device_put(batch))

    def loss_sum(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of losses in nats, number of tokens or examples), float32; what the head says of the batch.

        For language models: ids, targets [b, t]; weights, positions, labels as in
        `zo2jax.models.heads.LanguageModelHead`. See the other heads there.
        """
        return run_blocks(self.blocks, params, batch)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        """The mean loss in nats, float32 []; the loss function of `zo2jax.mezo`. See `loss_sum`."""
        total, count = self.loss_sum(params, batch)
        return total / jnp.where(count > 0, count, 1)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        tokens: int,
        *,
        stop: str | Sequence[str] = (),
        choose: Choose = greedy,
        cache: bool = True,
    ) -> Any:
        """Continues prompts by up to ``tokens`` tokens each; a str for one prompt, a list for several.

        Rows end at the model's end-of-text token, and before the first of the ``stop`` strings. Prompts are texts, or
        token ids as they are. ``choose`` is `zo2jax.models.generation.greedy` or ``sampling(key, ...)``; ``cache``
        False computes the same without keeping keys and values.

        Raises:
            ValueError: without a tokenizer or a language model's head, for an empty prompt, or beyond the context.
        """
        if self.tokenizer is None:
            raise ValueError(f"the model from {self.folder} has no tokenizer, which texts need")
        several = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.tokenizer.encode(p).ids if isinstance(p, str) else list(p) for p in several]
        texts = generate_texts(self, self.visits(), rows, tokens, stop=stop, choose=choose, cache=cache)
        return texts[0] if isinstance(prompts, str) else texts


def _on_device(leaves: Params) -> Params:
    """A block's leaves in the default device's own memory, when they are there: one block at a time is under way."""

    def put(leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            return jnp.array(leaf)  # a copy: arrays on the CPU would otherwise share the memory of a mapped file
        kind = next(iter(leaf.devices())).default_memory().kind
        return leaf if leaf.sharding.memory_kind == kind else jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.block_until_ready(jax.tree.map(put, leaves))


def generate_texts(
    model: Model,
    visit: Visit,
    rows: Sequence[Sequence[int]],
    tokens: int,
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """Texts that continue rows of token ids, by any kind of visit; see `Model.generate`.

    >>> import zo2jax
    >>> from zo2jax.demo import model_folder
    >>> model = zo2jax.load(model_folder())
    >>> len(generate_texts(model, model.visits(), [[5, 6], [7]], 3))
    2
    """
    if isinstance(head := getattr(model.config, "head", None), Classification | QuestionAnswering):
        raise ValueError(f"a model with the head {head} writes no text: expected a language model")
    stop = (stop,) if isinstance(stop, str) else stop
    if not rows or not all(rows):
        raise ValueError("a prompt is empty: give at least one token to continue")
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = max(map(len, rows))
    model.check_tokens(longest + tokens)
    ids = np.zeros((len(rows), min(bucket(longest), model.config.context - tokens)), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row

    def finished(row: int, written: list[int]) -> bool:
        if written[-1] in model.config.stop_ids:
            written.pop()
            return True
        return bool(stop) and _cut(_text(model.tokenizer, rows[row], written), stop)[1]

    written = continuations(visit, model.blocks, (ids, lengths), tokens, finished, **options)
    return [_cut(_text(model.tokenizer, row, new), stop)[0] for row, new in zip(rows, written, strict=True)]


def _text(tokenizer: Any, prompt: Sequence[int], written: Sequence[int]) -> str:
    """The text that new tokens add to a prompt; some tokenizers drop a space where a text begins."""
    before = list(prompt[-_LOOK_BACK:])
    start, whole = tokenizer.decode(before), tokenizer.decode([*before, *written])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(written)


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop string, whether there was one)."""
    ends = [at for at in map(text.find, stop) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def bucket(length: int, smallest: int = 8) -> int:
    """The next of few sizes, so that few programs are compiled: smallest x (1, 2, 3, 4, 6, 8, 12, 16, ...).

    >>> [bucket(n) for n in (1, 9, 17, 25, 33, 100)]
    [8, 16, 24, 32, 48, 128]
    """
    units = -(-length // smallest)
    power = 1 << max(units.bit_length() - 1, 0)
    return smallest * next(size for size in (power, power + power // 2, 2 * power) if size >= units)
