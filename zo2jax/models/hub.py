"""Hugging Face folders to models and back: config.json, (sharded) safetensors, tokenizer files."""

import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zo2jax.models.blocks import Params, get_leaf, owned_shapes, set_leaf
from zo2jax.models.decoder import Decoder
from zo2jax.models.gpt2 import Gpt2Config
from zo2jax.models.heads import HeadKind
from zo2jax.models.layers import Linear
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.model import Model
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.models.tokenizers import read_tokenizer

CONFIGS: dict[str, type[Decoder]] = {c.model_type: c for c in (LlamaConfig, Qwen3Config, OptConfig, Gpt2Config)}
"""Model families by the ``model_type`` of config.json."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_SHARD_SIZE = "5GB"

Tensors = dict[str, Callable[[], np.ndarray]]


def resolve(source: str | Path) -> Path:
    """The local folder of a model: ``source`` itself, or the download of a hub id such as "org/name".

    Raises:
        FileNotFoundError: if it is no folder and the hub does not have it or cannot be reached.
    """
    folder = Path(source).expanduser()
    if str(source) and folder.is_dir():
        return folder
    looks_like_id = str(source).count("/") == 1 and not str(source).startswith((".", "/", "~"))
    if not looks_like_id:
        raise FileNotFoundError(
            f"no model folder at {str(source)!r}: expected a folder with config.json, or a hub id org/name"
        )
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=patterns))
        if not any(found.glob("*.safetensors")):
            snapshot_download(str(source), allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub's client raises many kinds; each means that there is no model
        raise FileNotFoundError(
            f"no model folder at {str(source)!r}, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {error})"
        ) from error
    return found


def read_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the family's configuration, config.json as it is).

    Raises:
        FileNotFoundError: without config.json.
        ValueError: for JSON that does not parse, a family that is not known, or a value that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: expected a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download or export the model again") from error
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if family not in CONFIGS:
        raise ValueError(f"{path}: model_type is {family!r}, expected one of {sorted(CONFIGS)}")
    try:
        return CONFIGS[family].from_hub(raw), raw
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, from an index where there is one; safetensors before .bin."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{index} is no index of weight files ({error!r}): download or export it again"
                ) from error
            if missing := [n for n in names if not (folder / n).is_file()]:
                raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
            return [folder / n for n in names]
        if single.is_file():
            return [single]
    raise FileNotFoundError(f"{folder} has no model.safetensors (or its index) and no pytorch_model.bin")


def _bin_tensors(path: Path) -> Tensors:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file, and torch is not installed: pip install torch, or convert it to safetensors"
        ) from error

    def array(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.contiguous().numpy()

    try:  # files from before torch 1.6 are not zipped, and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged files
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is truncated or no PyTorch weights file ({error}): download it again"
        ) from error
    return {name: partial(array, tensor) for name, tensor in state.items()}


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """Tensor names -> functions that read one tensor through a memory map, over all weight files of a folder.

    Raises:
        FileNotFoundError: if there are no weight files, or an index names one that is not there.
        ValueError: for a file that is truncated or no safetensors file.
    """
    tensors: Tensors = {}
    with ExitStack() as stack:
        for path in _weight_files(folder):
            if path.suffix == ".bin":
                tensors |= _bin_tensors(path)
                continue
            try:
                handle = stack.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                size = path.stat().st_size
                raise ValueError(
                    f"{path} ({size} bytes) is truncated or no safetensors file ({error}): download or export it again"
                ) from error
            tensors |= {name: partial(handle.get_tensor, name) for name in handle.keys()}  # noqa: SIM118
        yield tensors


_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|h\.\d+\.attn\.(masked_)?bias$|decoder\.version$")
"""Tensors that old files carry beside the weights: rotary frequencies, causal masks, a version number."""
_PREFIXES = ("model.", "transformer.", "")
_HEADS = ("lm_head.", "score.", "qa_outputs.")


def _find(name: str, tensors: Tensors) -> str | None:
    """The tensor of this name, or of the same under another class's prefix: files of bare backbones have none."""
    bare = next(name.removeprefix(p) for p in _PREFIXES if name.startswith(p))
    return next((n for n in (name, *(p + bare for p in _PREFIXES)) if n in tensors), None)


def _new_head(config: Decoder, dtype: Any) -> dict[str, jax.Array]:
    """A head for a new purpose: its matrix from N(0, 0.02^2), its bias of zeros."""
    outputs = config.head.outputs(config.vocabulary)
    rngs = nnx.Rngs(params=jax.random.key(0))
    matrix = Linear(config.head_size_in, outputs, bias=config.head.bias, dtype=dtype, rngs=rngs)
    made = {"head.weight": matrix.weight[...]}
    return made if matrix.bias is None else made | {"head.bias": matrix.bias[...]}


def read_params(config: Decoder, tensors: Tensors, dtype: Any, *, new_head: bool = False) -> Params:
    """The parameters of a model, leaf by leaf; ``dtype`` None keeps each matrix as it is in the file.

    One-dimensional leaves become float32. With ``new_head`` a head that the file lacks is made.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor at once.
    """
    shapes = owned_shapes(config.blocks())
    found = {ours: (theirs, _find(theirs, tensors)) for ours, theirs in config.hub_names().items()}
    made: dict[str, jax.Array] = {}
    if new_head and not config.shares_matrix and found["head.weight"][1] is None:
        made = _new_head(config, dtype or jnp.float32)
    missing = [theirs for ours, (theirs, name) in found.items() if name is None and ours not in made]
    used = {name for _, name in found.values()}
    other_heads = _HEADS if new_head else ("lm_head.",) * (config.shares_matrix or config.head.hub != "lm_head")
    unexpected = [n for n in tensors if n not in used and not _NOT_WEIGHTS.search(n) and not n.startswith(other_heads)]
    params: Params = {block: {} for block in shapes}
    wrong = []
    for ours, (theirs, name) in found.items():
        if name is None and ours not in made:
            continue
        try:
            array = made[ours] if name is None else tensors[name]()
        except (SafetensorError, AttributeError, TypeError) as error:  # a dtype that NumPy lacks, such as float8
            wrong.append(f"{theirs} cannot be read ({error})")
            continue
        array = array.T if array.ndim == 2 and config.transposed(ours) else array
        expected = get_leaf(shapes, ours).shape
        if array.shape != expected:
            wrong.append(f"{theirs} is {list(array.shape)}, expected {list(expected)}")
        elif array.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            wrong.append(f"{theirs} is {array.dtype}, expected float32, float16 or bfloat16")
        elif not (missing or unexpected or wrong):
            block = max((b for b in shapes if ours.startswith(b + ".")), key=len)
            kept = jnp.float32 if array.ndim < 2 else dtype or array.dtype
            set_leaf(params[block], ours[len(block) + 1 :], jnp.asarray(array).astype(kept))
    problems = [f"missing: {', '.join(missing)}"] * bool(missing)
    problems += [f"unexpected: {', '.join(unexpected)}"] * bool(unexpected)
    problems += [f"wrong: {'; '.join(wrong)}"] * bool(wrong)
    if problems:
        raise ValueError("the weights do not fit config.json: " + "; ".join(problems))
    return params


def load(source: str | Path, *, dtype: Any = None, head: HeadKind | None = None) -> Model:
    """Loads a model from a Hugging Face folder (or hub id): config.json, weights, tokenizer if it is there.

    Args:
        source: a local folder, or "org/name" where the hub can be reached.
        dtype: of the matrices: "float32", "bfloat16" or "float16"; None keeps the file's. One-dimensional leaves
            (norms, biases) are always float32.
        head: what the model is for, where that is not what config.json says; for example
            ``zo.Classification(("negative", "positive"))``. What the file lacks of such a head is made: its matrix
            from N(0, 0.02^2).

    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: for files that are damaged or do not fit; all misfits are in one message.

    >>> from zo2jax.demo import model_folder
    >>> load(model_folder()).logits([[1, 2, 3]]).dtype
    dtype('float32')
    """
    folder = resolve(source)
    config, raw = read_config(folder)
    config = config if head is None else replace(config, head=head)
    dtype = None if dtype is None else jnp.dtype(dtype)
    if dtype not in (None, jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"dtype is {dtype}, expected float32, bfloat16 or float16")
    try:
        with open_tensors(folder) as tensors:
            params = read_params(config, tensors, dtype, new_head=head is not None)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    matrix_dtype = next(leaf.dtype for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    return Model(config, config.blocks(matrix_dtype), params, folder, read_tokenizer(folder, raw["model_type"]))


def _write(model: Model, folder: Path) -> None:
    leaves = {ours: get_leaf(model.params, ours) for ours in model.config.hub_names()}
    names = {
        theirs: leaves[ours].T if leaves[ours].ndim == 2 and model.config.transposed(ours) else leaves[ours]
        for ours, theirs in model.config.hub_names().items()
    }
    split = split_state_dict_into_shards_factory(
        names,
        get_storage_size=lambda leaf: leaf.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_SIZE,
    )
    os.umask(mask := os.umask(0))
    for file, members in split.filename_to_tensors.items():
        save_file({n: np.ascontiguousarray(names[n]) for n in members}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    raw = model.config.to_hub()
    if model.folder is not None and (model.folder / "config.json").is_file():
        known, read = read_config(model.folder)
        about_head = {"architectures", "id2label", "label2id"} if known.head != model.config.head else set()
        kept = {name: value for name, value in read.items() if name not in about_head}
        raw = kept | {name: raw[name] for name in raw.keys() & about_head}  # keeps what only other readers need
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(model.dtype)  # the name that transformers 4 and 5 both read
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    for name in _TOKENIZER_FILES:
        if model.folder is not None and (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    if model.tokenizer is not None and not (folder / "tokenizer.json").is_file():
        model.tokenizer.save(str(folder / "tokenizer.json"))


def export(model: Model, folder: str | Path) -> Path:
    """Writes a model as a Hugging Face folder that `load` and ``transformers`` read; returns the folder.

    Weights are written as they are (matrices in the model's dtype, one-dimensional leaves in float32), in shards
    of at most 5 GB. The folder appears at once, complete, or not at all.

    Raises:
        FileExistsError: if ``folder`` exists and is not empty; nothing is overwritten.
        PermissionError: if its parent cannot be written.
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: name a new folder to export to")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        _write(model, complete)
        os.replace(complete, target)
    return target
