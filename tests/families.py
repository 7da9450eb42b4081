"""Small random models of every family and head: on transformers, and our own."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.gpt2 import Gpt2Config
from zo2jax.models.heads import CausalLM
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config

LABELS = ("no", "maybe", "yes")
HEADS = {"CausalLM": CausalLM(), "SequenceClassification": zo.Classification(LABELS)}
HEADS |= {"QuestionAnswering": zo.QuestionAnswering()}
VOCABULARY, PAD = 67, 0

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
_OPT = {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 32}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
# name -> (transformers' class, what it is asked for)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 12, "tie_word_embeddings": True}),
    "opt 125m": ("OPT", _OPT),
    "opt 350m": ("OPT", _OPT | {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "gpt2": ("GPT2", _GPT2),
    "qwen3 untied": ("Qwen3", _LLAMA | {"head_dim": 6, "attention_bias": True, "rms_norm_eps": 0.05}),
    "opt bare": ("OPT", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt untied": ("OPT", _OPT | {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "gpt2 untied": ("GPT2", _GPT2 | {"n_inner": 40, "tie_word_embeddings": False, "layer_norm_epsilon": 0.1}),
}
MAIN = ("llama", "qwen3", "opt 125m", "opt 350m", "gpt2")
"""One of each kind of architecture."""


def make_reference(case: str, head: str, folder: Path) -> Any:
    """A transformers model with random weights (norms and biases too), saved to ``folder``."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)  # models this small only lose time with more
    family, shape = CASES[case]
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    labels = labels if head == "SequenceClassification" else {}
    config = getattr(transformers, f"{family}Config")(**_COMMON | shape | labels)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            scale = 1.0 if "wpe" in name or "embed_positions" in name else 0.2  # so that positions tell
            norm = name.endswith("weight") and leaf.ndim == 1
            leaf.copy_(torch.tensor(scale * rng.standard_normal(tuple(leaf.shape)) + norm))
    model.save_pretrained(folder)
    return model


def reference_logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """[b, t, vocabulary], [b, classes] or [b, t, 2], as ours."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        result = model(torch.tensor(ids), **masked(model, mask))
    if "logits" in result:
        return result.logits.numpy()
    return torch.stack([result.start_logits, result.end_logits], dim=-1).numpy()


def masked(model: Any, mask: np.ndarray | None) -> dict[str, Any]:
    """The arguments that say where the padding is: a mask, and positions if the class takes them."""
    torch = pytest.importorskip("torch")
    if mask is None:
        return {}
    more = {"attention_mask": torch.tensor(mask)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    return more


@contextmanager
def optimization(on: bool) -> Iterator[None]:
    """Whether XLA optimizes what it compiles; without, compiling takes a third of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not on)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def random_ids(seed: int, shape: tuple[int, int], vocabulary: int = VOCABULARY) -> np.ndarray:
    """Token ids, none of them the padding's."""
    return np.random.default_rng(seed).integers(PAD + 1, vocabulary, size=shape)


_SHAPE = {"vocabulary": 31, "size": 24, "hidden": 20, "layers": 2, "heads": 3, "context": 64}
_KEYS = {"kv_heads": 1, "head_size": 8}
CONFIGS = {
    "llama": (LlamaConfig, _KEYS),
    "qwen3": (Qwen3Config, _KEYS | {"tied": True}),
    "opt 125m": (OptConfig, {"token_size": 24}),
    "opt 350m": (OptConfig, {"token_size": 16, "pre_norm": False, "final_norm": False}),
    "gpt2": (Gpt2Config, {}),
}


@cache
def make_model(case: str, dtype: str = "float32", **changes: Any) -> zo.Model:
    """A random model of ours, its weights ten times larger than those of init; needs no torch."""
    family, more = CONFIGS[case]
    config, rng = family(**_SHAPE | more | changes), np.random.default_rng(0)
    blocks = config.blocks(dtype)
    leaves = jax.tree.map(
        lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape) + (s.ndim == 1), s.dtype), owned_shapes(blocks)
    )
    return zo.Model(config, blocks, leaves)
