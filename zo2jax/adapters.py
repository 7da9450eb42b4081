"""What a run trained beside its matrices (`zo2jax.lora`, `zo2jax.with_prefix`), as the folder that PEFT loads."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from zo2jax.directions import Direction
from zo2jax.models.blocks import Params, owned_shapes
from zo2jax.models.decoder import Decoder
from zo2jax.models.heads import CausalLM, Classification, QuestionAnswering
from zo2jax.models.hub import appearing
from zo2jax.models.model import Model
from zo2jax.pages import flat


def export_for_peft(
    model: Model,
    trained: Callable[[], Model],
    direction: Direction,
    beside: Callable[[str], Params],
    folder: str | Path,
    first_order: Sequence[str] = (),
) -> Path:
    """`export_prefix` of a model with a prefix, `export_adapter` of another one.

    Args:
        model: the one that a run was begun with.
        trained: gives it as it is now.
        direction: of the run.
        beside: see `export_adapter`.
        folder: to be made.
        first_order: names of leaves that backpropagation trained (`zo2jax.hybrid`).

    Raises:
        FileExistsError, ValueError: as these do; for what PEFT's files have no place for.

    >>> from zo2jax.demo import model_folder
    >>> from zo2jax import load, lora
    >>> export_for_peft(load(model_folder()), dict, lora(2), dict, "no/such/folder", ("head.norm.weight",))
    Traceback (most recent call last):
    ...
    ValueError: backpropagation trained head.norm.weight too, for which files of adapters have no place
    """
    if model.config is not None and model.config.prefix:
        return export_prefix(trained(), direction, folder, first_order)
    if first_order and direction.adapter is not None:
        raise ValueError(f"backpropagation trained {first_order[0]} too, for which files of adapters have no place")
    return export_adapter(model, direction, beside, folder)


def export_adapter(model: Model, direction: Direction, beside: Callable[[str], Params], folder: str | Path) -> Path:
    """Writes the adapters of a model as ``adapter_config.json`` and ``adapter_model.safetensors``; returns the folder.

    ``peft.PeftModel.from_pretrained(base, folder)`` gives W + alpha / rank B A of each matrix: of a linear layer B is
    ``lora_B`` [n_out, rank] and A ``lora_A`` [rank, n_in], of an embedding they are ``lora_embedding_A`` = B^T and
    ``lora_embedding_B`` = A^T, all float32. A matrix that embedding and head share has its adapter in both. (LoRA, Hu
    et al., arXiv 2106.09685.)

    Args:
        model: the one whose matrices they stand beside.
        direction: `zo2jax.lora` of the run.
        beside: what is beside the matrices of a block, as `zo2jax.stream.Stream.beside` gives it.
        folder: to be made.

    Raises:
        FileExistsError: if ``folder`` exists and is not empty.
        ValueError: for a direction without adapters, a model that has no Hugging Face names, or a matrix whose module
            PEFT puts no adapter on.

    >>> from zo2jax.directions import normal
    >>> export_adapter(None, normal, dict, "no/such/folder")
    Traceback (most recent call last):
    ...
    ValueError: the direction is normal, which trains no adapters: expected zo2jax.lora
    """
    if direction.adapter is None:
        raise ValueError(f"the direction is {direction}, which trains no adapters: expected zo2jax.lora")
    config = model.config
    if config is None:
        raise ValueError("a model of zo2jax.blocks has no Hugging Face names: take what is beside its matrices")
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for block in owned_shapes(model.blocks):
        held = beside(block)
        p, v = (flat(held.get(part, {})) for part in "pv")
        scale = np.float32(direction.adapter)
        found |= {f"{block}.{leaf}": (np.asarray(p[leaf]) / scale, np.asarray(v[leaf])) for leaf in p}
    if refused := sorted(config.unwrapped.intersection(found)):
        raise ValueError(
            f"PEFT puts no adapter on {', '.join(refused)} of {config.model_type}: export the model itself, or train "
            "with targets that leave them out"
        )
    tensors: dict[str, np.ndarray] = {}
    modules, hub = [], config.hub_names()
    for name, (b, a) in found.items():
        for module, looked_up in _modules_of(config, name, hub[name]):
            modules.append(module)
            base = f"base_model.model.{module}.lora"
            if looked_up:
                tensors |= {f"{base}_embedding_A": b.T, f"{base}_embedding_B": a}
            else:
                tensors |= {f"{base}_A.weight": a.T, f"{base}_B.weight": b}
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(config.head, CausalLM) else None,
        "base_model_name_or_path": None if model.folder is None else str(model.folder),
        "r": direction.rank,
        "lora_alpha": direction.adapter * direction.rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": any(map(config.transposed, found)),
        "bias": "none",
        "inference_mode": True,
    }
    return _write(folder, written, tensors)


def export_prefix(model: Model, direction: Direction, folder: str | Path, first_order: Sequence[str] = ()) -> Path:
    """Writes the prefix of a model (`zo2jax.with_prefix`) as PEFT's files of prefix tuning; returns the folder.

    ``prompt_embeddings`` is float32 [n, layers * 2 * kv_heads * head_size], of each layer the keys, then the values. A
    head other than a language model's goes with it, as PEFT has it.

    Args:
        model: the trained one.
        direction: of the run.
        folder: to be made.
        first_order: names of leaves that backpropagation trained.

    Raises:
        FileExistsError: if ``folder`` exists and is not empty.
        ValueError: for a run that trained something else as well, which the files have no place for.

    >>> import jax, zo2jax
    >>> from zo2jax.directions import normal
    >>> from zo2jax.models.llama import LlamaConfig
    >>> config = LlamaConfig(vocabulary=8, size=8, hidden=8, layers=1, heads=2, kv_heads=1, head_size=4, context=16)
    >>> export_prefix(zo2jax.with_prefix(config.init(jax.random.key(0)), [1]), normal, "no/such/folder")
    Traceback (most recent call last):
    ...
    ValueError: the direction is normal, which trains embed.weight beside the prefix: PEFT's files hold a prefix alone
    """
    config = model.config
    head = () if isinstance(config.head, CausalLM) else ("weight", "bias")[: 1 + config.head.bias]
    kept = {f"head.{leaf}" for leaf in head}
    shapes = {f"{b}.{n}": x for b, leaves in owned_shapes(model.blocks).items() for n, x in flat(leaves).items()}
    moved = {n for n, x in shapes.items() if direction.trains(n, x.ndim)} | {*first_order}
    others = [n for n in shapes if n in moved and ".prefix." not in n and n not in kept]
    if others or direction.adapter is not None:
        how = "backpropagation" if others and others[0] in first_order else f"the direction is {direction}, which"
        raise ValueError(f"{how} trains {(*others, 'adapters')[0]} beside the prefix: PEFT's files hold a prefix alone")
    layers = [flat(model.source[block.name]["prefix"]) for block in model.blocks if block.caches]
    rows = [np.asarray(layer[part]).reshape(config.prefix, -1) for layer in layers for part in "kv"]
    tensors = {"prompt_embeddings": np.concatenate(rows, axis=1)}
    own = model.source["head"] if head else {}
    tensors |= {f"base_model.{config.head.hub}.{leaf}": np.asarray(own[leaf], np.float32) for leaf in head}
    written = {
        "peft_type": "PREFIX_TUNING",
        "task_type": _TASKS[type(config.head)],
        "base_model_name_or_path": None if model.folder is None else str(model.folder),
        "num_virtual_tokens": config.prefix,
        "token_dim": rows[0].shape[1],
        "num_layers": config.layers,
        "num_attention_heads": config.kept_shape[0],
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "modules_to_save": [config.head.hub] if head else None,
        "inference_mode": True,
    }
    return _write(folder, written, tensors)


_TASKS = {CausalLM: "CAUSAL_LM", Classification: "SEQ_CLS", QuestionAnswering: "QUESTION_ANS"}


def _write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    with appearing(folder) as complete:
        whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        save_file(whole, complete / "adapter_model.safetensors", {"format": "pt"})
        (complete / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return Path(folder).expanduser()


def _modules_of(config: Decoder, name: str, tensor: str) -> list[tuple[str, bool]]:
    """The modules of transformers that have a matrix (``tensor`` there), and whether its rows are looked up in them."""
    modules = [(tensor.removesuffix(".weight"), name in ("embed.weight", "embed.positions"))]
    return modules + [(config.head.hub, False)] * (name == "embed.weight" and config.shares_matrix)
