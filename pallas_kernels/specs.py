"""Named shapes: the arrays of one transformer block of real models, and small ragged shapes for tests.

Tests and the benchmark share them, so that what is checked and what is timed is what is trained.
"""

import math
from typing import NamedTuple

Shape = tuple[int, ...]

RAGGED: tuple[Shape, ...] = (
    (),
    (1,),
    (3,),
    (127,),
    (513,),
    (1, 1),
    (33, 4),
    (7, 13),
    (5, 129),
    (3, 5, 6),
    (2, 257, 3),
)
"""Scalars, single elements, rows that are no multiple of four, and arrays that fill no whole program of a kernel."""


class Spec(NamedTuple):
    """A published model: the sizes in its config.

    >>> MODELS["opt-13b"].block_size
    314639360
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    positions: int = 0
    """Learned position embeddings; 0 for rotary ones."""
    biases: bool = False
    """Biases of all matrices and LayerNorms, as in OPT; else gated feed-forward layers and RMSNorms, as in Llama."""
    qk_norm: bool = False
    """RMSNorms of each head's queries and keys, as in Qwen3."""

    @property
    def embedding(self) -> Shape:
        """The shape of the token embeddings.

        >>> MODELS["llama-7b"].embedding
        (32000, 4096)
        """
        return self.vocabulary, self.hidden

    @property
    def block(self) -> dict[str, Shape]:
        """The arrays of one transformer block: matrices are (n_out, n_in).

        >>> MODELS["qwen3-8b"].block["k"]
        (1024, 4096)
        """
        inner, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        matrices = {
            "q": (inner, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "out": (self.hidden, inner),
        }
        if self.biases:
            matrices |= {"fc1": (self.ffn, self.hidden), "fc2": (self.hidden, self.ffn)}
        else:
            matrices |= {
                "gate": (self.ffn, self.hidden),
                "up": (self.ffn, self.hidden),
                "down": (self.hidden, self.ffn),
            }
        vectors = {"norm1": self.hidden, "norm2": self.hidden}
        if self.biases:
            vectors |= {f"{name}_bias": shape[0] for name, shape in matrices.items()}
            vectors |= {"norm1_bias": self.hidden, "norm2_bias": self.hidden}
        if self.qk_norm:
            vectors |= {"q_norm": self.head_size, "k_norm": self.head_size}
        return matrices | {name: (size,) for name, size in vectors.items()}

    @property
    def block_size(self) -> int:
        """The number of parameters of one block.

        >>> MODELS["llama-7b"].block_size
        202383360
        """
        return sum(math.prod(shape) for shape in self.block.values())

    @property
    def size(self) -> int:
        """The number of parameters of the model. OPT shares the embeddings with the head, the others do not.

        >>> MODELS["opt-1.3b"].size
        1315758080
        """
        ends = self.vocabulary * (1 if self.biases else 2) + self.positions + (2 if self.biases else 1)
        return self.layers * self.block_size + ends * self.hidden


def _opt(name: str, hidden: int, layers: int, heads: int) -> Spec:
    # 2050 positions: 2048 and two that are never used.
    return Spec(name, hidden, layers, heads, heads, hidden // heads, 4 * hidden, 50272, positions=2050, biases=True)


MODELS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _opt("opt-1.3b", 2048, 24, 32),
        _opt("opt-2.7b", 2560, 32, 32),
        _opt("opt-6.7b", 4096, 32, 32),
        _opt("opt-13b", 5120, 40, 40),
        _opt("opt-30b", 7168, 48, 56),
        _opt("opt-66b", 9216, 64, 72),
        _opt("opt-175b", 12288, 96, 96),
        Spec("llama-7b", 4096, 32, 32, 32, 128, 11008, 32000),
        Spec("qwen3-8b", 4096, 36, 32, 8, 128, 12288, 151936, qk_norm=True),
    )
}
"""By name: OPT (arXiv 2205.01068), Llama (arXiv 2302.13971) and Qwen3 (arXiv 2505.09388)."""


def shape_of(name: str) -> Shape:
    """The shape of an array of `MODELS` by its name, ``model.leaf`` or ``model.embedding``.

    Raises:
        ValueError: for an unknown name, with the known ones.

    >>> shape_of("opt-13b.fc1")
    (20480, 5120)
    """
    model, _, leaf = name.rpartition(".")
    if model not in MODELS:
        raise ValueError(f"shape {name!r}: expected MODEL.LEAF with a model of {', '.join(MODELS)}")
    leaves = MODELS[model].block | {"embedding": MODELS[model].embedding}
    if leaf not in leaves:
        raise ValueError(f"shape {name!r}: expected a leaf of {', '.join(leaves)}")
    return leaves[leaf]
