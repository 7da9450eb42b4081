"""Objectives without a gradient: what a zeroth-order step can train on all the same (arXiv 2305.17333, section 3.3)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo2jax.models.blocks import Visit
from zo2jax.models.heads import candidate_scores
from zo2jax.models.layers import Batch, token_losses
from zo2jax.models.model import Model, generate_texts


def error_rate(logits: jax.Array, batch: Batch) -> jax.Array:
    """1 where the most probable candidate is not the right one, else 0: float32 [examples]; 1 - accuracy on average.

    A loss for ``zo.Run(..., loss=error_rate)``. For classification heads logits [n, classes]; for language models
    logits [rows, p, vocabulary] and a batch of candidates (``targets``, ``weights``, ``labels``; see
    `zo2jax.models.heads.candidates`).

    >>> error_rate(jnp.array([[0.0, 1.0], [0.0, 1.0]]), {"labels": jnp.array([1, 0])}).tolist()
    [0.0, 1.0]
    """
    labels = batch["labels"]
    if logits.ndim == 3:
        logits = candidate_scores(-token_losses(logits, batch["targets"]), batch["weights"])
    return (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)


@dataclass(frozen=True)
class Generated:
    """The loss -score(text, references), where the model writes the text: any function of what is generated.

    Batches hold ``ids`` int32 [b, t] and ``lengths`` int32 [b], right-padded prompts, and ``answers``: for each row,
    the references that the function is given; a row without any counts 0. Generation is greedy. The mean over the batch
    is the loss, as with token F1 in MeZO (appendix D.3).

    Args:
        score: ``(text, references) -> float``; larger is better.
        tokens: the most that is written.
        stop: strings at which a text ends.

    >>> Generated(lambda text, references: float(text in references), tokens=5).tokens
    5
    """

    score: Callable[[str, Sequence[str]], float]
    tokens: int = 50
    stop: tuple[str, ...] = ("\n",)

    def sums(self, model: Model, visit: Visit, batch: Any, members: int = 1) -> tuple[jax.Array, jax.Array]:
        """(sums of losses, numbers of examples), float32 [members]: visits carry rows member by member."""
        ids, lengths = np.asarray(batch["ids"]), np.asarray(batch["lengths"])
        answers = batch["answers"]
        if len(answers) != len(ids):
            raise ValueError(f"{len(answers)} answers for {len(ids)} prompts: expected a list of references for each")
        prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        texts = generate_texts(model, visit, prompts * members, self.tokens, stop=self.stop)
        pairs = zip(texts, list(answers) * members, strict=True)
        scores = [self.score(text.strip(), golds) if golds else 0.0 for text, golds in pairs]
        losses = -np.asarray(scores, np.float32).reshape(members, -1)
        return jnp.asarray(losses.sum(axis=1)), jnp.full(members, sum(map(bool, answers)), jnp.float32)


def mean_loss(loss_sum: Callable[[Any], tuple[Any, Any]], batches: Iterable[Any]) -> float:
    """Sum of losses over sum of counts, in nats per token for language models; ``loss_sum(batch)`` gives both.

    >>> mean_loss(lambda batch: (0.5 * batch, batch), [1.0, 2.0])
    0.5
    """
    return ratio([loss_sum(jax.device_put(batch)) for batch in batches])


def ratio(sums: Sequence[tuple[Any, Any]]) -> float:
    """Sum of losses over sum of counts.

    Raises:
        ValueError: for no batches.

    >>> ratio([(1.0, 2.0), (2.0, 2.0)])
    0.75
    """
    if not sums:
        raise ValueError("there are no batches to evaluate on")
    return float(np.sum([float(s) for s, _ in sums]) / np.sum([float(n) for _, n in sums]))
