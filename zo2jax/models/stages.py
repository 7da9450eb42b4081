"""Any model as blocks: Flax NNX modules, Flax Linen modules and plain functions become the stages of a `Model`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from zo2jax.models.blocks import Block, LossOfOutputs, Params, Source, set_leaf
from zo2jax.models.layers import Batch
from zo2jax.models.model import Model

Stage = nnx.Module | tuple[Any, Any] | Callable[[Any], Any]
"""A Flax NNX module; (Flax Linen module, its parameters); (function of (parameters, x), parameters); function of x."""

_ARRAYS = (jax.Array, np.ndarray, np.generic)


def blocks(
    stages: Sequence[Stage] | Mapping[str, Stage],
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Model:
    """A model of stages that are called one after the other, for `zo2jax.Run` to train from any tier.

    A stage is what is in device memory at a time: its matrices, and as many copies of them as the estimator has probes.
    The first stage is called with the batch, each later one with what the stage before it returned: any pytree of
    arrays, with what else of the batch is needed later. Stages are pure; equal ones are compiled once. Members of the
    population are put in front by ``jax.vmap``. Products of float32 should be in float32 (on GPUs,
    ``jax.default_matmul_precision("highest")``). `Model.outputs` gives what the last stage returns.

    Args:
        stages: each one of

            - a Flax NNX module, whose parameters are taken as they are now; called as ``module(x)``;
            - ``(module, params)``, a Flax Linen module and its "params" collection; called as
              ``module.apply({"params": params}, x)``;
            - ``(function, params)`` with any pytree of arrays; called as ``function(params, x)``;
            - a function of ``x``, without parameters.

            Instead of ``params``, a function without arguments that makes them: it is traced for their shapes, and
            called whenever they are read. A mapping gives the stages names; else they are called "0", "1", ...
        loss: ``loss(what the last stage returns, batch)`` -> (sum of losses float32 [], how many []), or a loss of each
            example float32 [examples], or a mean loss float32 []. None if the last stage returns the first of these.
        tied: matrices that are those of an earlier stage, by dotted names: ``{"head.kernel": "embed.embedding"}``. The
            earlier stage's is the one that counts.

    Raises:
        TypeError: for what is no stage, and for parameters that are no arrays.
        ValueError: for a stage with a state besides its parameters (batch statistics, random numbers for dropout),
            names that cannot be told apart, leaves without elements, and matrices that cannot be tied.

    >>> model = blocks([(lambda w, batch: batch["x"] @ w, np.ones((3, 1), np.float32))],
    ...                loss=lambda y, batch: (y[:, 0] - batch["y"]) ** 2)
    >>> batch = {"x": jax.numpy.ones((2, 3)), "y": jax.numpy.array([3.0, 1.0])}
    >>> model.outputs(batch).tolist(), float(model.loss(model.params, batch))
    ([[3.0], [3.0]], 2.0)
    """
    named = dict(stages) if isinstance(stages, Mapping) else {str(i): stage for i, stage in enumerate(stages)}
    _check_names([*named])
    _check_shared(named)
    parts = {name: _part(name, stage) for name, stage in named.items()}
    aliases = _aliases({name: part.shapes for name, part in parts.items()}, tied or {})
    made, last = [], list(parts)[-1]
    for i, (name, part) in enumerate(parts.items()):
        structure = _Structure(part.call, part.treedef, tuple(part.shapes), first=i == 0)
        objective = LossOfOutputs(loss) if name == last else None
        made.append(Block(name, structure, _nested(part.shapes), aliases[name], objective=objective))
    return Model(None, tuple(made), Source({n: partial(_read, p, frozenset(aliases[n])) for n, p in parts.items()}))


@dataclass(frozen=True)
class _Structure:
    """How a stage is called: its leaves come as nested dictionaries, by dotted name, and go in the user's own tree."""

    call: Callable[[Any, Any], Any]
    treedef: Any
    names: tuple[str, ...]
    first: bool

    def __call__(self, leaves: Params, carry: Any, batch: Batch) -> Any:
        found = [_at(leaves, name) for name in self.names]
        return self.call(jax.tree.unflatten(self.treedef, found), batch if self.first else carry)


@dataclass(frozen=True)
class _Part:
    """A stage taken apart: its call, and where its parameters come from."""

    name: str
    call: Callable[[Any, Any], Any]
    make: Callable[[], Any]
    treedef: Any
    shapes: dict[str, jax.ShapeDtypeStruct]
    """By dotted name, in the order of the tree."""


@dataclass(frozen=True)
class _Nnx:
    graphdef: Any

    def __call__(self, params: Any, x: Any) -> Any:
        return nnx.merge(self.graphdef, params)(x)


@dataclass(frozen=True)
class _Linen:
    module: linen.Module

    def __call__(self, params: Any, x: Any) -> Any:
        return self.module.apply({"params": params}, x)


@dataclass(frozen=True)
class _Bare:
    function: Callable[[Any], Any]

    def __call__(self, params: Any, x: Any) -> Any:
        return self.function(x)


def _part(name: str, stage: Stage) -> _Part:
    call, params = _call_and_params(name, stage)
    try:
        hash(call)
    except TypeError as error:
        raise TypeError(
            f"stage {name!r} cannot be hashed, so equal stages cannot be told: keep arrays among its parameters, and "
            f"settings in tuples rather than lists ({error})"
        ) from error
    lazy = callable(params) and jax.tree_util.all_leaves([params])
    make = params if lazy else lambda: params
    shapes, treedef = _shapes(name, jax.eval_shape(make)) if lazy else _shapes(name, params, _ARRAYS)
    return _Part(name, call, make, treedef, shapes)


def _call_and_params(name: str, stage: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """A function of (parameters, x), and the parameters or what makes them."""
    if isinstance(stage, nnx.Module):
        graphdef, *groups = nnx.split(stage, nnx.Param, ...)
        own, rest = groups
        if state := {".".join(map(str, path)): type(x).__name__ for path, x in nnx.to_flat_state(rest)}:
            listed = ", ".join(f"{path} ({kind})" for path, kind in state.items())
            raise ValueError(
                f"stage {name!r} has a state besides its parameters: {listed}. A stage is a function of its nnx.Param "
                "and x alone: make the module without dropout's random numbers and batch statistics, or give a "
                "(function, params) that closes over them"
            )
        return _Nnx(graphdef), nnx.to_pure_dict(own)
    call, params = stage if isinstance(stage, tuple) and len(stage) == 2 else (None, None)
    if callable(call) and not isinstance(call, nnx.Module):
        if not isinstance(call, linen.Module):
            return call, params
        if isinstance(params, Mapping) and "params" in params:
            raise ValueError(
                f"stage {name!r} was given the variables {sorted(params)}, expected the collection of parameters: "
                '(module, variables["params"]). A module that needs another one has a state besides its parameters'
            )
        return _Linen(call), params
    if callable(stage) and not isinstance(stage, linen.Module):
        return _Bare(stage), {}
    members = ", ".join(type(member).__name__ for member in stage) if isinstance(stage, tuple) else ""
    raise TypeError(
        f"stage {name!r} is {type(stage).__name__}({members}), expected a Flax NNX module, (Linen module, params), "
        "(function, params), or a function"
    )


def _shapes(name: str, params: Any, kinds: Any = jax.ShapeDtypeStruct) -> tuple[dict[str, jax.ShapeDtypeStruct], Any]:
    """(the shapes of the leaves by dotted name, the tree), once the leaves are known to be arrays of numbers."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in leaves:
        leaf_name = jax.tree_util.keystr(path, simple=True, separator=".") or "weight"
        if not isinstance(leaf, kinds) or not (leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number)):
            what = f"{type(leaf).__name__} of {leaf.dtype}" if hasattr(leaf, "dtype") else repr(leaf)
            raise TypeError(f"leaf {leaf_name!r} of stage {name!r} is {what}, expected an array of numbers")
        if leaf.dtype != (narrow := jax.dtypes.canonicalize_dtype(leaf.dtype)):
            raise TypeError(f"leaf {leaf_name!r} of stage {name!r} is {leaf.dtype}: cast it to {narrow} first")
        if 0 in leaf.shape:
            raise ValueError(f"leaf {leaf_name!r} of stage {name!r} has the shape {leaf.shape}: leave it out")
        if leaf_name in shapes:
            raise ValueError(f"stage {name!r} has two leaves of the name {leaf_name!r}: rename one")
        shapes[leaf_name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    _check_apart(shapes, f"leaves of stage {name!r}")
    return shapes, treedef


def _read(part: _Part, tied: frozenset[str]) -> Params:
    """The leaves that a stage owns, nested by dotted name."""
    params = part.make()
    shapes, treedef = _shapes(part.name, params, _ARRAYS)
    if (shapes, treedef) != (part.shapes, part.treedef):
        raise ValueError(f"the parameters of stage {part.name!r} are {shapes} now, expected {part.shapes} as before")
    return _nested({n: leaf for n, leaf in zip(shapes, jax.tree.leaves(params), strict=True) if n not in tied})


def _nested(named: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for name, value in named.items():
        set_leaf(tree, name, value)
    return tree


def _at(leaves: Params, name: str) -> Any:
    return reduce(getitem, name.split("."), leaves)


def _check_names(names: Sequence[Any]) -> None:
    if not names:
        raise ValueError("there are no stages: a model has one at least")
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise ValueError(f"a stage is named {name!r}, expected a text that can be a folder's name")
    _check_apart(names, "stages")


def _check_apart(names: Iterable[str], what: str) -> None:
    """Raises ValueError for dotted names of which one begins with another: they would be one place in a tree."""
    known = {*names}
    for name in known:
        parts = name.split(".")
        if "" in parts:
            raise ValueError(f"{what} are named {name!r}, expected no part of it to be empty")
        if above := known & {".".join(parts[:n]) for n in range(1, len(parts))}:
            raise ValueError(
                f"{what} are named {name!r} and {above.pop()!r}: rename one, so that no name holds another"
            )


def _check_shared(stages: Mapping[str, Stage]) -> None:
    """Raises ValueError if two NNX modules share a variable, which as blocks they would not."""
    owner: dict[int, str] = {}
    for name, stage in stages.items():
        variables = nnx.iter_graph(stage) if isinstance(stage, nnx.Module) else ()
        for path, variable in variables:
            if isinstance(variable, nnx.Variable) and (first := owner.setdefault(id(variable), name)) != name:
                leaf = ".".join(map(str, path))
                raise ValueError(
                    f"stages {first!r} and {name!r} share the variable {leaf!r}: give each its own, and tie a matrix "
                    f'by tied={{"{name}.{leaf}": ...}}'
                )


def _aliases(shapes: Mapping[str, Mapping[str, Any]], tied: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """By stage, what of it is tied to which leaf of an earlier stage."""
    order = list(shapes)
    aliases: dict[str, dict[str, str]] = {name: {} for name in shapes}
    for leaf, owner in tied.items():
        at, home = _stage_of(leaf, shapes), _stage_of(owner, shapes)
        here, there = (shapes[s][name[len(s) + 1 :]] for s, name in ((at, leaf), (home, owner)))
        if order.index(home) >= order.index(at) or owner in tied:
            raise ValueError(f"{leaf!r} is tied to {owner!r}, expected a leaf that an earlier stage owns")
        if here != there or len(here.shape) < 2 or not jnp.issubdtype(here.dtype, jnp.floating):
            raise ValueError(f"{leaf!r}, {here}, is tied to {owner!r}, {there}: expected two matrices that are alike")
        aliases[at][leaf[len(at) + 1 :]] = owner
    return aliases


def _stage_of(leaf: str, shapes: Mapping[str, Mapping[str, Any]]) -> str:
    for name, leaves in shapes.items():
        if leaf.startswith(name + ".") and leaf[len(name) + 1 :] in leaves:
            return name
    known = ", ".join(f"{name}.{leaf}" for name, leaves in shapes.items() for leaf in leaves)
    raise ValueError(f"there is no leaf {leaf!r} to tie, only {known}")
