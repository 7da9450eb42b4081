"""Heads: what a decoder's last states are made into. Language modelling, classification, extractive answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from zo2jax.models.blocks import Batch
from zo2jax.models.layers import Linear, compute_dtype, cross_entropy, linear, vocabulary_losses, weighted

INPUTS = ("ids", "lengths", "positions")
"""What a model reads of a batch; the rest (targets, labels, ...) belongs to losses."""


class Head(nnx.Module):
    """Final norm, optional projection, then ``weight`` [outputs, size] and perhaps ``bias``; float32 results."""

    def __init__(self, norm: nnx.Module | None, project: nnx.Module | None, matrix: Linear):
        """A tied matrix is replaced by the embedding's."""
        self.norm, self.project = norm, project
        self.weight, self.bias = matrix.weight, matrix.bias

    def outputs(self, x: jax.Array) -> jax.Array:
        """X [..., size] -> float32 [..., outputs]."""
        return linear(*self._operands(x), dtype=jnp.float32)

    def losses(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        """-log softmax(outputs)[target], float32 of the targets' shape, without all outputs at once."""
        return vocabulary_losses(*self._operands(x), targets)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, Any, jax.Array | None]:
        for stage in (self.norm, self.project):
            x = x if stage is None else stage(x)
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        return x.astype(compute_dtype(weight.dtype)), weight, bias


class LanguageModelHead(Head):
    """Next-token logits, and losses of the tokens that a batch names."""

    def __call__(self, x: jax.Array, batch: Batch) -> Any:
        """Logits [b, t or p, vocabulary], or (loss sum, count) if the batch has ``targets``.

        Only ``positions`` [b, p] reach the matrix, if they are given. ``targets`` and ``weights`` have the shape of
        the logits; without weights every token counts once, or every one below ``lengths``. With ``labels`` int32 [n]
        the targets are the tokens of candidates, in the order of ``weights`` [n, candidates, tokens], and the ones
        of each of n examples are compared (see `candidates`).
        """
        if "targets" not in batch:
            return self.outputs(_at_positions(x, batch))
        if "labels" in batch:
            return candidates(self.log_probs(x, batch), batch["weights"], batch["labels"])
        return weighted(self.losses(_at_positions(x, batch), batch["targets"]), _weights(batch))

    def log_probs(self, x: jax.Array, batch: Batch) -> jax.Array:
        """Log-probabilities of the targets, in nats, float32 [b, t or p]."""
        return -self.losses(_at_positions(x, batch), batch["targets"])


class ClassificationHead(Head):
    """Class logits from the state of each row's last token."""

    def __call__(self, x: jax.Array, batch: Batch) -> Any:
        """Logits [b, classes], or (loss sum, count) if the batch has ``labels`` int32 [b]; negative ones count 0."""
        logits = self.outputs(_last(x, batch))
        if "labels" not in batch:
            return logits
        return _labelled(logits, batch["labels"])

    def features(self, x: jax.Array, batch: Batch) -> jax.Array:
        """What the matrix is multiplied by, float32 [b, size]."""
        return self._operands(_last(x, batch))[0].astype(jnp.float32)


class SpanHead(Head):
    """Logits of the first and of the last token of an answer (SQuAD, arXiv 1606.05250)."""

    def __call__(self, x: jax.Array, batch: Batch) -> Any:
        """Logits [b, t, 2], or (loss sum, count) with ``starts`` and ``ends`` int32 [b]: the mean of both losses.

        Padding is no answer: positions at or beyond ``lengths`` are left out of the softmax, and examples whose answer
        does not lie within the row count 0.
        """
        logits = self.outputs(x)
        if "starts" not in batch:
            return logits
        lengths = batch["lengths"] if "lengths" in batch else jnp.full(len(x), x.shape[1])
        real = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
        logits = jnp.where(real[:, :, None], logits, -jnp.inf)
        ends = jnp.stack([batch["starts"], batch["ends"]])
        ends = jnp.where(((ends >= 0) & (ends < lengths)).all(axis=0), ends, -1)
        (first, count), (last, _) = (_labelled(logits[:, :, i], ends[i]) for i in range(2))
        return 0.5 * (first + last), count


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction, with a matrix of the vocabulary's size that may be tied to the embedding.

    >>> CausalLM().outputs(100)
    100
    """

    module: ClassVar[type[Head]] = LanguageModelHead
    suffix: ClassVar[str] = "ForCausalLM"
    hub: ClassVar[str] = "lm_head"
    bias: ClassVar[bool] = False

    def outputs(self, vocabulary: int) -> int:
        """Rows of the matrix."""
        return vocabulary


@dataclass(frozen=True)
class Classification:
    """Sequence classification: one logit a label, from the last token of a row.

    >>> Classification(("negative", "positive")).outputs(100)
    2
    """

    labels: tuple[str, ...]
    module: ClassVar[type[Head]] = ClassificationHead
    suffix: ClassVar[str] = "ForSequenceClassification"
    hub: ClassVar[str] = "score"
    bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raises ValueError unless there are two different labels at least."""
        if len(set(self.labels)) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels are {self.labels!r}, expected two or more different names")

    def outputs(self, vocabulary: int) -> int:
        """Rows of the matrix."""
        return len(self.labels)


@dataclass(frozen=True)
class QuestionAnswering:
    """Extractive question answering: logits of the answer's first and last token.

    >>> QuestionAnswering().outputs(100)
    2
    """

    module: ClassVar[type[Head]] = SpanHead
    suffix: ClassVar[str] = "ForQuestionAnswering"
    hub: ClassVar[str] = "qa_outputs"
    bias: ClassVar[bool] = True

    def outputs(self, vocabulary: int) -> int:
        """Rows of the matrix."""
        return 2


HeadKind = CausalLM | Classification | QuestionAnswering


def candidates(log_probs: jax.Array, weights: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, number of examples): cross-entropy over candidates, compared by mean log-probability.

    MeZO (arXiv 2305.17333, appendix E.2). weights float32 [n, candidates, tokens], a candidate without weight is none;
    log_probs float32, as many and in this order, in any shape: candidates have rows of their own, or share one. labels
    int32 [n]; an example with a negative one counts 0.

    >>> total, count = candidates(jnp.log(jnp.array([[0.5, 0.25, 1.0]])), jnp.array([[[1.0], [1.0], [0.0]]]),
    ...                           jnp.array([0]))
    >>> round(float(total / count), 4)
    0.4055
    """
    return _labelled(candidate_scores(log_probs, weights), labels)


def candidate_scores(log_probs: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean log-probability of the tokens of each candidate, float32 [n, candidates]; -inf where there is none.

    >>> candidate_scores(jnp.array([[-1.0, -3.0], [0.0, 0.0]]), jnp.array([[[1.0, 1.0], [0.0, 0.0]]])).tolist()
    [[-2.0, -inf]]
    """
    count = jnp.sum(weights, axis=-1)
    total = jnp.sum(jnp.where(weights != 0, log_probs.reshape(weights.shape) * weights, 0.0), axis=-1)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), -jnp.inf)


@dataclass(frozen=True)
class PerExample:
    """A user's loss in the place of a head's: ``fn(what the model gives, batch) -> float32 [examples]``.

    The model is shown its inputs only (`INPUTS`), so that a head gives logits whatever else the batch holds.
    """

    fn: Callable[[Any, Batch], jax.Array]

    def __call__(self, module: Callable[..., Any], carry: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, number of examples); those with a negative label, or without any weight, count 0.

        Raises:
            TypeError: if the function's result is not float32 [examples].
        """
        losses = self.fn(module(carry, {name: batch[name] for name in INPUTS if name in batch}), batch)
        if getattr(losses, "ndim", None) != 1 or losses.dtype != jnp.float32:
            what = f"{losses.dtype}{list(losses.shape)}" if hasattr(losses, "dtype") else repr(losses)
            raise TypeError(f"the loss function returned {what}, expected float32 [examples]: one loss per example")
        counts = _counts(batch, len(losses))
        return jnp.sum(jnp.where(counts > 0, losses, 0.0)), jnp.sum(counts)


def _counts(batch: Batch, examples: int) -> jax.Array:
    """1 for each example, 0 for what only fills a batch up."""
    if "labels" in batch and batch["labels"].shape == (examples,):
        return (batch["labels"] >= 0).astype(jnp.float32)
    if "weights" in batch and len(batch["weights"]) == examples:
        return (batch["weights"] != 0).reshape(examples, -1).any(axis=1).astype(jnp.float32)
    return jnp.ones(examples, jnp.float32)


def _at_positions(x: jax.Array, batch: Batch) -> jax.Array:
    if "positions" not in batch:
        return x
    return jnp.take_along_axis(x, batch["positions"][:, :, None], axis=1)


def _last(x: jax.Array, batch: Batch) -> jax.Array:
    """The state of each row's last token, [b, size]."""
    last = batch["lengths"] - 1 if "lengths" in batch else jnp.full(len(x), x.shape[1] - 1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def _weights(batch: Batch) -> jax.Array:
    if "weights" in batch:
        return batch["weights"]
    shape = batch["targets"].shape
    if "lengths" not in batch or "positions" in batch:
        return jnp.ones(shape, jnp.float32)
    return (jnp.arange(shape[1])[None, :] < batch["lengths"][:, None]).astype(jnp.float32)


def _labelled(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of class logits [n, classes]; examples with a negative label are left out."""
    return cross_entropy(logits, jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32))
