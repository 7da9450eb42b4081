"""Linear probing: the matrix of a classifier, fitted to what the model says of examples as it is."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from zo2jax.models.blocks import Source, Stream, visits
from zo2jax.models.heads import Classification, ClassificationHead
from zo2jax.models.layers import Batch
from zo2jax.models.model import Model


def probed(model: Model, batches: Iterable[Batch], *, l2: float = 1e-3) -> Model:
    """The same classifier with another matrix W of its head: the one that fits the examples best, by a convex problem.

    W minimizes mean_i (logsumexp(W x_i) - (W x_i)[label_i]) + l2 / 2 |W|^2, where x_i is what the head multiplies by W
    (the last token's state, after the final norm): multinomial logistic regression, by L-BFGS in float64. All else
    stays. It is where zeroth-order steps then begin, or the baseline that they are compared with ("LP", MeZO, arXiv
    2305.17333, table 1).

    Blocks are read once, one at a time, and all batches go through each; their states wait in host memory.

    Args:
        model: with a head of `zo2jax.Classification`.
        batches: with ``ids`` [b, t], ``labels`` int32 [b] (examples with a negative one are left out) and, for padded
            rows, ``lengths`` [b].
        l2: positive; 1 / (n C) of scikit-learn's C, for n examples.

    Raises:
        ValueError: for a model with another head, no examples, or an l2 that is not positive.

    >>> import zo2jax as zo
    >>> from zo2jax.demo import model_folder
    >>> model = zo.load(model_folder(), head=zo.Classification(("low", "high")))
    >>> ids, labels = np.array([[1, 2], [9, 8], [2, 1], [8, 9]], np.int32), np.array([0, 1, 0, 1], np.int32)
    >>> probed(model, [{"ids": ids, "labels": labels}], l2=1e-4).logits(ids).argmax(axis=1).tolist()
    [0, 1, 0, 1]
    """
    head = getattr(model.config, "head", None)
    if not isinstance(head, Classification):
        raise ValueError(f"the model's head is {head}: expected one of zo2jax.Classification")
    if not 0 < l2 < float("inf"):
        raise ValueError(f"l2 is {l2}, expected a positive number, such as 1e-3")
    given = list(batches)
    if not all("labels" in batch for batch in given):
        raise ValueError("a batch has no labels: expected 'ids' and 'labels'")
    most = max((int(np.max(batch["labels"])) for batch in given), default=-1)
    if not 0 <= most < len(head.labels):
        raise ValueError(f"the largest label is {most}, expected one of 0 to {len(head.labels) - 1}, and some of each")
    x, labels = features(model, given)
    kept = labels >= 0
    weight = fitted(x[kept], labels[kept], len(head.labels), l2).astype(model.dtype)
    return model.replace(Source.of(model.source).having({"head": lambda: {"weight": weight}}, replacing=True))


def features(model: Model, batches: list[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """(x float32 [examples, size], labels [examples]): what a classifier's head multiplies by its matrix.

    >>> import zo2jax as zo
    >>> from zo2jax.demo import model_folder
    >>> model = zo.load(model_folder(), head=zo.Classification(("low", "high")))
    >>> features(model, [{"ids": np.ones((3, 4), np.int32), "labels": np.zeros(3, np.int32)}])[0].shape
    (3, 128)
    """
    *before, head = model.blocks
    objective: Callable[..., Any] = ClassificationHead.features
    blocks, source = (*before, replace(head, objective=objective)), model.source
    carries: list[Any] = [None] * len(batches)
    of_stream = source.visits(blocks) if isinstance(source, Stream) else None
    for block in blocks:
        visit = of_stream or visits([block], {block.name: jax.device_put(source[block.name])})
        for i, batch in enumerate(batches):
            carries[i] = np.asarray(visit(block, carries[i], jax.device_put(batch), None)[0])
    return np.concatenate(carries), np.concatenate([np.asarray(batch["labels"]) for batch in batches])


def fitted(x: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """The W, float64 [classes, size], that `probed` describes.

    >>> fitted(np.array([[1.0], [-1.0]]), np.array([0, 1]), 2, 1.0).round(3).tolist()
    [[0.337], [-0.337]]
    """
    x, rows = x.astype(np.float64), np.arange(len(x))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(classes, -1)
        log_probabilities = log_softmax(x @ w.T, axis=1)
        wrong = np.exp(log_probabilities)
        wrong[rows, labels] -= 1
        total = -log_probabilities[rows, labels].mean() + l2 / 2 * (flat @ flat)
        return total, (wrong.T @ x / len(x) + l2 * w).ravel()

    options: dict[str, Any] = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-14, "gtol": 1e-8}
    return minimize(loss, np.zeros(classes * x.shape[1]), jac=True, method="L-BFGS-B", options=options).x.reshape(
        classes, -1
    )
