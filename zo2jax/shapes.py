"""Models of real shapes with random weights."""

from dataclasses import replace
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.specs import MODELS, Spec
from zo2jax.formats import Format, encode
from zo2jax.models.blocks import Params, Source, set_leaf
from zo2jax.models.decoder import Decoder
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.model import Model
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.pages import flat

_CONTEXT = 2048


def _config(spec: Spec) -> Decoder:
    shape: dict[str, Any] = {"vocabulary": spec.vocabulary, "size": spec.hidden, "hidden": spec.ffn}
    shape |= {"layers": spec.layers, "heads": spec.heads, "context": _CONTEXT}
    if spec.biases:
        return OptConfig(**shape, token_size=spec.hidden, tied=False)
    family = Qwen3Config if spec.qk_norm else LlamaConfig
    return family(**shape, kv_heads=spec.kv_heads, head_size=spec.head_size)


_TINY: dict[str, Any] = {
    "vocabulary": 256,
    "hidden": 64,
    "ffn": 128,
    "layers": 2,
    "heads": 2,
    "kv_heads": 2,
    "head_size": 32,
}
SHAPES: dict[str, Decoder] = {name: _config(spec) for name, spec in MODELS.items()}
SHAPES["tiny"] = _config(MODELS["llama-7b"]._replace(**_TINY))
SHAPES["opt-tiny"] = _config(MODELS["opt-1.3b"]._replace(**_TINY))
_GPT2: dict[str, Any] = {"vocabulary": 50257, "hidden": 768, "layers": 12, "heads": 12, "ffn": 3072}
_GPT_J: dict[str, Any] = {"vocabulary": 50400, "hidden": 4096, "layers": 28, "heads": 16, "ffn": 16384}
_LARGE: dict[str, Any] = {"kv_heads": 8, "head_size": 128, "vocabulary": 128256}
_SIZES = {"llama-405b": (16384, 126, 53248), "500b": (18432, 124, 59904), "1t": (23040, 160, 74880)}
for _name, (_hidden, _layers, _ffn) in _SIZES.items():
    _sizes: dict[str, Any] = {"hidden": _hidden, "layers": _layers, "heads": _hidden // 128, "ffn": _ffn}
    SHAPES[_name] = _config(MODELS["llama-7b"]._replace(**_sizes, **_LARGE))
SHAPES["gpt2"], SHAPES["gpt-j-6b"] = (_config(MODELS["opt-1.3b"]._replace(**sizes)) for sizes in (_GPT2, _GPT_J))
"""Shapes by name: those of `pallas_kernels.specs`, two small ones, GPT-2's and GPT-J's sizes in the form of OPT, whose
head is untied, as in ZO2's benchmark, Llama 3 405B (arXiv 2407.21783),
and that form with 500 G and 1000 G parameters."""


def shaped(name: str, dtype: str = "") -> Model | None:
    """The model of a config's ``shape:NAME``, in bfloat16 if nothing is said; None for other names.

    Raises:
        ValueError: for a shape that is not known.

    >>> shaped("shape:opt-13b").dtype, shaped("folder")
    (dtype(bfloat16), None)
    """
    if not name.startswith("shape:"):
        return None
    if (shape := name.removeprefix("shape:")) not in SHAPES:
        raise ValueError(f"model={name}: expected shape: with one of {', '.join(SHAPES)}")
    return random_model(shape, dtype=jnp.dtype(dtype or jnp.bfloat16))


def random_model(
    shape: str, layers: int | None = None, dtype: Any = jnp.bfloat16, format: Format | None = None
) -> Model:
    """A model of a shape of `SHAPES` with random weights, cut to ``layers`` layers. All layers have those of the first.

    With a format its matrices are encoded when they are made, once for all layers.

    >>> random_model("tiny", 1).parameter_count
    73920
    """
    model = _cut(shape, layers).init(jax.random.key(0), dtype).with_format(format)
    made, one_at_a_time = dict[tuple[str, Format | None], Params](), Lock()

    def make(name: str, format: Format | None) -> Params:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the device's peak is that of what is measured
            leaves = jax.tree.map(np.array, model.source[name])
        return leaves if format is None else _coded(name, leaves, format)

    def read(name: str, format: Format | None) -> Params:
        with one_at_a_time:  # random numbers take several times the memory of what is made of them
            if not name.startswith("layers."):
                return make(name, format)
            first = f"layers.0.{name.split('.')[-1]}"
            if (first, format) not in made:
                made[first, format] = make(first, format)
            return made[first, format]

    plain, codes = ({b.name: partial(read, b.name, how) for b in model.blocks} for how in (None, format))
    return model.replace(Source(plain, concurrent=True, codes=codes))


def _coded(block: str, leaves: Params, format: Format) -> Params:
    """The same leaves, matrices as {"codes": .., "scale": ..}."""
    out: Params = {}
    for name, leaf in flat(leaves).items():
        group = format.group_of(f"{block}.{name}", leaf.shape)
        set_leaf(out, name, leaf if group is None else encode(leaf, format.bits, group)._asdict())
    return out


@lru_cache
def _cut(shape: str, layers: int | None) -> Decoder:
    """One object for each, by which JAX knows what it has compiled."""
    return SHAPES[shape] if layers is None else replace(SHAPES[shape], layers=layers)
