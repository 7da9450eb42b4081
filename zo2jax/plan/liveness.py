"""How much memory a block takes while it is computed, read off its program (a jaxpr) without running anything.

A value counts if it exists as an array when XLA is done: results of products, reductions, gathers and loops, and what
products and loops read. Elementwise operations are fused into their readers, which read what they were computed from.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant

from zo2jax.models.blocks import Block
from zo2jax.models.layers import Batch
from zo2jax.models.traced import backend
from zo2jax.pages import flat

_VIEWS: tuple[str, ...] = ("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "iota", "pad")
_VIEWS += ("optimization_barrier", "reshape", "rev", "slice", "split", "squeeze", "transpose")
_NEVER_FUSED = ("custom", "cum", "ffi", "fused_attention", "io_callback", "pure_callback", "scatter", "sort", "top_k")
_FUSES_OPERANDS = ("arg", "gather", "reduce")
_LOOPS = ("cond", "scan", "while")


Sums = Literal["", "float32", "int32"]
"""What products by matrices are made as: "float32" of int8 codes in 16 bits, whose scales come after; "int32" of int8
numbers; "" as they are."""


@dataclass(frozen=True)
class Needs:
    """What a block takes for one member of the population, in bytes, beside its parameters.

    >>> Needs(carry=8, activations=24, weight=4).weight
    4
    """

    carry: int
    """Of the block's result."""
    activations: int
    """The most that is alive at once, from the carry that comes to the one that goes."""
    weight: int
    """The largest matrix that one operation multiplies by: what a probe takes while it is used."""
    operations: float = 0.0
    """Floating-point operations of products."""
    attention: float = 0.0
    """Those of fused attention, half of whose scores are masked."""
    traffic: float = 0.0
    """Bytes that are read and written, of activations."""


def needs_of(
    block: Block, carry: Any, batch: Batch, *, sums: Sums = "", lowrank: Collection[str] = ()
) -> tuple[Needs, Any]:
    """(what a block takes, the shapes of its result) for the shapes of a carry and of a batch.

    ``sums`` says what products by its matrices are at first, and ``lowrank`` are its leaves with a low-rank part beside
    them, which is added to what products give.

    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> batch = {"ids": jax.ShapeDtypeStruct((1, 4), "int32")}
    >>> needs, x = needs_of(config.blocks()[0], None, batch)
    >>> x.shape, needs.carry, needs.weight
    ((1, 4, 8), 128, 0)
    """
    jaxpr, result = jax.make_jaxpr(partial(_apply, block), return_shape=True)(block.shapes, carry, batch)
    leaves = flat(block.shapes).items()
    parameters = [_Value(weight=len(x.shape) >= 2, lowrank=name in lowrank) for name, x in leaves]
    program = _Program(sums=sums)
    came = [program.make(_nbytes(x)) for x in jax.tree.leaves(carry)]
    values = [*parameters, *came, *[_Value(real=True) for _ in jax.tree.leaves(batch)]]
    program.finish(jaxpr.jaxpr, program.walk(jaxpr.jaxpr, values), came)
    if block.takes_weights:
        weight = program.weight
    else:  # all of its matrices are made before it is computed
        weight = sum(_nbytes(x) for x in jax.tree.leaves(block.shapes) if len(x.shape) >= 2)
    carried = sum(map(_nbytes, jax.tree.leaves(result)))
    return Needs(carried, program.peak(), weight, program.operations, program.attention, program.traffic), result


def in_place() -> bool:
    """Whether XLA writes what it computes elementwise over what it read: on GPUs (read off its buffer assignment).

    >>> in_place() == (jax.default_backend() == "gpu")
    True
    """
    return backend() == "gpu"


def _apply(block: Block, leaves: Any, carry: Any, batch: Batch) -> Any:
    return block.apply(leaves, carry, batch)


def _nbytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize if hasattr(x.dtype, "itemsize") else 0


@dataclass(frozen=True)
class _Value:
    """What a value is read from: buffers, a parameter, or something that is counted elsewhere."""

    buffers: frozenset[int] = frozenset()
    real: bool = False
    """Whether it is an array, not something that is fused into its readers."""
    weight: bool = False
    lowrank: bool = False
    """Whether it is a parameter with a low-rank part beside it."""


@dataclass
class _Program:
    """Operations in order: buffers with the first and the last operation that they are there for."""

    buffers: list[list[int]] = field(default_factory=list)
    """bytes, first, last."""
    inner: list[int] = field(default_factory=lambda: [0])
    """Bytes that an operation needs while it runs."""
    weight: int = 0
    operations: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    sums: Sums = ""

    def make(self, nbytes: int) -> _Value:
        """A buffer that is made now."""
        now = len(self.inner) - 1
        self.buffers.append([nbytes, now, now])
        self.traffic += nbytes
        return _Value(frozenset([len(self.buffers) - 1]), real=True)

    def replace(self, value: _Value, nbytes: int) -> _Value:
        """A buffer made of others elementwise: on GPUs in the place of one of its size, if that is free then."""
        same = next((i for i in value.buffers if self.buffers[i][0] == nbytes and in_place()), None)
        self.use(_Value(value.buffers - {same}))
        return self.make(nbytes)

    def use(self, value: _Value) -> None:
        """Keeps what a value is read from until now."""
        for i in value.buffers:
            self.buffers[i][2] = len(self.inner) - 1
            self.traffic += self.buffers[i][0]

    def walk(self, jaxpr: Jaxpr, values: Sequence[_Value]) -> list[_Value]:
        """Goes through the operations; values of the results."""
        known = dict(zip(jaxpr.invars, values, strict=True)) | {v: _Value(real=True) for v in jaxpr.constvars}

        def read(atom: Any) -> _Value:
            return _Value() if isinstance(atom, Constant) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            name, programs = eqn.primitive.name, _programs(eqn)
            if name not in _LOOPS and len(programs) == 1 and _same_signature(eqn, programs[0]):
                results = self.walk(programs[0], operands)
            elif not programs and _is_fused(eqn):
                buffers = frozenset().union(*(value.buffers for value in operands))
                weight, lowrank = (any(getattr(v, x) for v in operands) and not buffers for x in ("weight", "lowrank"))
                results = [_Value(buffers, weight=weight, lowrank=lowrank)] * len(eqn.outvars)
            else:
                results = self._run(eqn, known, programs if name in _LOOPS else [])
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _run(self, eqn: Any, known: dict[Any, _Value], programs: list[Jaxpr]) -> list[_Value]:
        """An operation whose results are arrays."""
        self.inner.append(0)
        fuses = eqn.primitive.name.startswith(_FUSES_OPERANDS)
        weights = 0
        for atom in {atom for atom in eqn.invars if not isinstance(atom, Constant)}:
            value = known[atom]
            if value.weight:
                weights += 0 if fuses or programs else _nbytes(atom.aval)
            elif not (value.real or fuses):
                value = known[atom] = self.replace(value, _nbytes(atom.aval))
            self.use(value)
        self.weight = max(self.weight, weights)
        if weights and eqn.primitive.name == "dot_general":
            self._beside(eqn, known)
        self.operations += _operations(eqn)
        self.attention += _attention(eqn)
        operands = [_Value(real=True) if isinstance(a, Constant) else known[a] for a in eqn.invars]
        for program in programs:
            one = _Program(sums=self.sums)
            outer = operands[len(operands) - len(program.invars) :]  # after a cond's index, a while's other constants
            inside = [replace(v, real=not v.weight, buffers=frozenset()) for v in outer]
            one.finish(program, one.walk(program, inside), [])
            self.inner[-1] = max(self.inner[-1], one.peak())
            self.weight = max(self.weight, one.weight)
            length = eqn.params.get("length", 1)
            self.operations += one.operations * length
            self.attention += one.attention * length
            self.traffic += one.traffic * length
        return [self.make(_nbytes(out.aval)) for out in eqn.outvars]

    def _beside(self, eqn: Any, known: dict[Any, _Value]) -> None:
        """What a product by a parameter needs beside its operands and its result, which is made after this.

        One of int8 numbers makes and reads codes of what it multiplies, and of these int32 sums, which are read beside
        those of another member. A low-rank part is added to 16-bit results by a kernel with a result of its own.
        """
        values = {a: known[a] for a in eqn.invars if not isinstance(a, Constant)}
        results = sum(_nbytes(out.aval) for out in eqn.outvars)
        count = sum(math.prod(out.aval.shape) for out in eqn.outvars)
        if self.sums == "int32":
            coded = sum(math.prod(a.aval.shape) for a, value in values.items() if not value.weight)
            self.inner[-1] += coded
            self.inner += [coded + 4 * count, 4 * count]  # codes are not needed until the result is there
            self.traffic += 2 * coded + 6 * count
        elif self.sums == "float32":
            self.inner[-1] += 4 * count + results
            self.inner.append(0)
        if self.sums != "int32" and results == 2 * count and any(value.lowrank for value in values.values()):
            self.inner[-1] += results
            for i in (i for value in values.values() for i in value.buffers):  # which it reads as well
                self.buffers[i][2] = len(self.inner) - 1

    def finish(self, jaxpr: Jaxpr, results: Sequence[_Value], kept: Sequence[_Value]) -> None:
        """Makes arrays of the results, beside what is kept to the end."""
        self.inner.append(0)
        for atom, value in zip(jaxpr.outvars, results, strict=True):
            if not (value.real or isinstance(atom, Constant)):
                value = self.replace(value, _nbytes(atom.aval))
            self.use(value)
        for value in kept:
            self.use(value)

    def peak(self) -> int:
        """The most bytes that are there at once."""
        alive = list(self.inner)
        for nbytes, first, last in self.buffers:
            for i in range(first, last + 1):
                alive[i] += nbytes
        return max(alive)


def _programs(eqn: Any) -> list[Jaxpr]:
    """The programs within an operation."""
    found = []
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                found.append(part.jaxpr if isinstance(part, ClosedJaxpr) else part)
    return found


def _operations(eqn: Any) -> float:
    """Multiplications and additions of a product or a convolution; 0 for anything else."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        terms = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    else:
        return 0.0
    return 2.0 * terms * math.prod(eqn.outvars[0].aval.shape)


def _attention(eqn: Any) -> float:
    """Of scores and of what they weigh: q [b, t, heads, size] against s keys; a causal kernel makes half of them."""
    if eqn.primitive.name != "fused_attention":
        return 0.0
    query, key = (atom.aval.shape for atom in eqn.invars[:2])
    return 2.0 * math.prod(query) * key[1]


def _same_signature(eqn: Any, program: Jaxpr) -> bool:
    """Whether an operation does no more than to call a program: a kernel's has other arguments."""
    inside, outside = ([getattr(v.aval, "shape", None) for v in vs] for vs in (program.invars, eqn.invars))
    return inside == outside and len(program.outvars) == len(eqn.outvars)


def _is_fused(eqn: Any) -> bool:
    """Whether an operation becomes part of those that read its result: elementwise ones, and other views."""
    name, shape = eqn.primitive.name, getattr(eqn.outvars[0].aval, "shape", ())
    if name in _VIEWS:
        return True
    if name.startswith((*_NEVER_FUSED, *_FUSES_OPERANDS)):
        return False
    operands = [getattr(atom.aval, "shape", ()) for atom in eqn.invars]
    return all(
        not operand or (len(operand) == len(shape) and all(n in (1, m) for n, m in zip(operand, shape, strict=True)))
        for operand in operands
    )
