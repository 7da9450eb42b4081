"""Hugging Face folders to models and back: config.json, (sharded) safetensors, tokenizer files."""

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory

from pallas_kernels.quantized import Codes, decode
from zo2jax.formats import coded_shapes, encode, from_json
from zo2jax.models.blocks import Params, Source, block_of, get_leaf, owned_shapes, set_leaf
from zo2jax.models.decoder import Decoder
from zo2jax.models.gpt2 import Gpt2Config
from zo2jax.models.heads import HeadKind
from zo2jax.models.layers import Linear
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.model import Model
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.models.tensors import FLOATS, CodedTensor, Extent, Tensor, Writer, byte_size, open_tensors
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
_SHARD_SIZE = "2GB"
_FORMAT = "zo2jax_format"
"""Of config.json: how matrices are kept. Those that are codes lie there as ``NAME.codes`` and ``NAME.scale``."""


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


_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|h\.\d+\.attn\.(masked_)?bias$|decoder\.version$")
"""Tensors that old files carry beside the weights: rotary frequencies, causal masks, a version number."""
_PREFIXES = ("model.", "transformer.", "")
_HEADS = ("lm_head.", "score.", "qa_outputs.")


def _find(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The tensor of this name, or of the same under another class's prefix: files of bare backbones have none."""
    bare = next(name.removeprefix(p) for p in _PREFIXES if name.startswith(p))
    return next((n for n in (name, *(p + bare for p in _PREFIXES)) if n in tensors), None)


def match(
    config: Decoder, tensors: Mapping[str, Tensor], *, new_head: bool = False, dtype: str | None = None
) -> dict[str, Tensor]:
    """The tensor of each leaf, by the leaf's name; nothing is read.

    With ``new_head`` the file may lack the head, whose leaves are left out then. Matrices may be there as codes, in two
    tensors; ``dtype`` is that of such a matrix.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor at once.

    >>> from zo2jax.demo import model_folder
    >>> config, _ = read_config(model_folder())
    >>> match(config, open_tensors(model_folder()))["layers.0.attn.q.weight"].shape
    (128, 128)
    """
    shapes, names = owned_shapes(config.blocks()), config.hub_names()
    tensors = _with_matrices(tensors, dtype or "float32")
    found = {ours: _find(theirs, tensors) for ours, theirs in names.items()}
    if new_head and not config.shares_matrix and found["head.weight"] is None:
        found = {ours: name for ours, name in found.items() if ours not in ("head.weight", "head.bias")}
    missing = [names[ours] for ours, name in found.items() if name is None]
    used = set(found.values())
    other_heads = _HEADS if new_head else ("lm_head.",) * (config.shares_matrix or config.head.hub != "lm_head")
    unexpected = [n for n in tensors if n not in used and not _NOT_WEIGHTS.search(n) and not n.startswith(other_heads)]
    matched = {ours: tensors[name] for ours, name in found.items() if name is not None}
    wrong = []
    for ours, tensor in matched.items():
        expected = get_leaf(shapes, ours).shape
        turned = config.transposed(ours) and not isinstance(tensor, CodedTensor)
        expected = expected[::-1] if turned else expected
        if tensor.shape != expected:
            wrong.append(f"{names[ours]} is {list(tensor.shape)}, expected {list(expected)}")
        elif tensor.dtype not in FLOATS:
            wrong.append(f"{names[ours]} is {tensor.dtype}, expected float32, float16 or bfloat16")
    problems = [f"missing: {', '.join(missing)}"] * bool(missing)
    problems += [f"unexpected: {', '.join(unexpected)}"] * bool(unexpected)
    problems += [f"wrong: {'; '.join(wrong)}"] * bool(wrong)
    if problems:
        raise ValueError("the weights do not fit config.json: " + "; ".join(problems))
    return matched


def _with_matrices(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of a file; what lies there as codes and scales, as one of the matrix's name."""
    found = {name: x for name, x in tensors.items() if not name.endswith((".codes", ".scale"))}
    for name in [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]:
        if (scale := tensors.get(f"{name}.scale")) is None:
            continue  # reported as missing
        codes = tensors[f"{name}.codes"]
        shape = codes.shape[0], codes.shape[1] * (1 if codes.dtype == "int8" else 2)
        found[name] = CodedTensor(shape, dtype, partial(_decode, codes, scale), {"codes": codes, "scale": scale})
    return found


def _decode(codes: Tensor, scale: Tensor) -> np.ndarray:
    return np.asarray(decode(Codes(jnp.asarray(codes.read()), jnp.asarray(scale.read())), jnp.float32))


def _new_head(config: Decoder, dtype: Any) -> Params:
    """A head for a new purpose: its matrix from N(0, 0.02^2), its bias of zeros."""
    outputs = config.head.outputs(config.vocabulary)
    rngs = nnx.Rngs(params=jax.random.key(0))
    matrix = Linear(config.head_size_in, outputs, bias=config.head.bias, dtype=dtype, rngs=rngs)
    made = {"weight": matrix.weight[...]}
    return made if matrix.bias is None else made | {"bias": matrix.bias[...]}


def _source(config: Decoder, matched: Mapping[str, Tensor], dtype: np.dtype) -> Source:
    """What reads the blocks: matrices in ``dtype``, one-dimensional leaves in float32."""
    blocks = [block.name for block in config.blocks()]
    new_head = "head.weight" not in matched and not config.shares_matrix
    leaves: dict[str, dict[str, Callable[[], Any]]] = {block: {} for block in blocks}
    codes: dict[str, dict[str, Callable[[], Any]]] = {block: {} for block in blocks}
    others: dict[str, dict[str, Callable[[], Any]]] = {block: {} for block in blocks}
    extents: dict[str, dict[str, Extent]] = {block: {} for block in blocks}
    for ours, tensor in matched.items():
        block, is_matrix = block_of(ours, blocks), len(tensor.shape) > 1
        kept = dtype if is_matrix else np.dtype(np.float32)
        leaves[block][ours] = partial(tensor.array, kept, transposed=config.transposed(ours))
        codes[block][ours] = tensor.codes if isinstance(tensor, CodedTensor) else leaves[block][ours]
        if is_matrix and (found := _extents(tensor, transposed=config.transposed(ours))):
            name = ours[len(block) + 1 :]
            extents[block] |= {f"{name}.{part}" if part else name: extent for part, extent in found.items()}
        else:
            others[block][ours] = leaves[block][ours]

    def read(block: str, leaves: Any) -> Params:
        params = _new_head(config, dtype) if block == "head" and new_head else {}
        for ours, leaf in leaves[block].items():
            set_leaf(params, ours[len(block) + 1 :], leaf())
        return params

    readers, coded, rest = ({block: partial(read, block, x) for block in blocks} for x in (leaves, codes, others))
    return Source(readers, concurrent=True, codes=coded, extents=extents, others=rest)


def _extents(tensor: Tensor, *, transposed: bool) -> dict[str, Extent]:
    """Where a matrix lies as it is in the model, under ""; of codes, under the names of their parts; or {}."""
    parts = tensor.parts if isinstance(tensor, CodedTensor) else {} if transposed else {"": tensor}
    return {name: part.extent for name, part in parts.items() if part.extent is not None}


def load(source: str | Path, *, dtype: Any = None, head: HeadKind | None = None, weights: bool = True) -> Model:
    """Loads a model from a Hugging Face folder (or hub id): config.json, weights, tokenizer if it is there.

    The weights are only looked at: their names, shapes and dtypes. They are read block by block, through a memory map
    of the files (leave these as they are as long as the model is used), when ``model.source`` is asked for one, or all
    at once by the first use of ``model.params``.

    Args:
        source: a local folder, or "org/name" where the hub can be reached.
        dtype: of the matrices: "float32", "bfloat16" or "float16"; None keeps the file's, or takes float32 where
            matrices differ. One-dimensional leaves (norms, biases) are always float32.
        head: what the model is for, where that is not what config.json says; for example
            ``zo.Classification(("negative", "positive"))``. What the file lacks of such a head is made: its matrix
            from N(0, 0.02^2).
        weights: False where they come from elsewhere, such as a checkpoint: their files need not be there, and the
            model cannot be used until it has others (``model.replace``). ``dtype`` None is float32 then.

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
    tokenizer = read_tokenizer(folder, raw["model_type"])
    try:
        format = from_json(raw[_FORMAT]) if _FORMAT in raw else None
        if not weights:
            blocks = config.blocks(dtype or jnp.float32)
            nothing = Source({block.name: partial(_without_weights, folder) for block in blocks})
            return Model(config, blocks, nothing, folder, tokenizer, format)
        matched = match(config, open_tensors(folder), new_head=head is not None, dtype=raw.get("torch_dtype"))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if dtype is None:
        stored = {tensor.dtype for tensor in matched.values() if len(tensor.shape) > 1}
        dtype = jnp.dtype(stored.pop() if len(stored) == 1 else jnp.float32)
    return Model(config, config.blocks(dtype), _source(config, matched, dtype), folder, tokenizer, format)


def _without_weights(folder: Path) -> Params:
    raise FileNotFoundError(f"the model of {folder} was loaded with weights=False: give it others by model.replace")


def _write_weights(model: Model, folder: Path) -> None:
    """Writes the weights, reading each block once and holding no other."""
    shapes, config = owned_shapes(model.blocks), model.config
    hub_names = config.hub_names()
    members: dict[str, list[str]] = {block: [] for block in shapes}
    for ours in hub_names:
        members[block_of(ours, shapes)].append(ours)
    tensors = {}
    for ours in itertools.chain(*members.values()):  # block by block, so that few have leaves in two shards
        leaf = get_leaf(shapes, ours)
        shape = leaf.shape[::-1] if config.transposed(ours) else leaf.shape
        if (coded := _coding(model, ours, leaf.shape)) is None:
            tensors[hub_names[ours]] = jax.ShapeDtypeStruct(shape, leaf.dtype)
            continue
        for part, x in coded_shapes(leaf.shape, *coded).items():
            tensors[f"{hub_names[ours]}.{part}"] = x
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=byte_size,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_SIZE,
    )
    writers = {
        file: Writer(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
        for file, names in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def write(block: str) -> None:
        leaves = {block: model.source[block]}
        for ours in members[block]:
            name, array = hub_names[ours], _on_host(get_leaf(leaves, ours))
            parts = {name: array.T if config.transposed(ours) else array}
            if (coded := _coding(model, ours, array.shape)) is not None:
                parts = {f"{name}.{part}": np.asarray(x) for part, x in encode(array, *coded)._asdict().items()}
            for part, x in parts.items():
                writers[split.tensor_to_filename[part]].write(part, x)

    for block in filter(members.get, members):
        write(block)


def _coding(model: Model, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(bits, the columns that share a scale) of a leaf that is written as codes."""
    if model.format is None:
        return None
    group = model.format.group_of(name, shape)
    return None if group is None else (model.format.bits, group)


def _on_host(leaf: Any) -> np.ndarray:
    """A leaf as a NumPy array that goes when it is done with: JAX keeps that of an array as long as the array lives."""
    if isinstance(leaf, jax.Array):
        kind = next(iter(leaf.devices())).default_memory().kind
        leaf = jax.device_put(leaf, leaf.sharding.with_memory_kind(kind), may_alias=False)
    return np.asarray(leaf)


def _write(model: Model, folder: Path) -> None:
    _write_weights(model, folder)
    raw = model.config.to_hub()
    if model.folder is not None and (model.folder / "config.json").is_file():
        known, read = read_config(model.folder)
        about_head = {"architectures", "id2label", "label2id"} if known.head != model.config.head else set()
        kept = {name: value for name, value in read.items() if name not in about_head}
        raw = kept | {name: raw[name] for name in raw.keys() & about_head}  # keeps what only other readers need
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(model.dtype)  # the name that transformers 4 and 5 both read
    raw.pop(_FORMAT, None)
    if model.format is not None:
        raw[_FORMAT] = model.format.as_json()
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    for name in _TOKENIZER_FILES:
        if model.folder is not None and (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    if model.tokenizer is not None and not (folder / "tokenizer.json").is_file():
        model.tokenizer.save(str(folder / "tokenizer.json"))


def export(model: Model, folder: str | Path) -> Path:
    """Writes a model as a Hugging Face folder that `load` and ``transformers`` read; returns the folder.

    Weights are written as they are (matrices in the model's dtype, one-dimensional leaves in float32), or, of a model
    with a format, as codes, which `load` alone reads; in shards of at most 2 GB, block by block: each is read once, and
    no two are held. The folder appears at once, complete, or not at all.

    Raises:
        FileExistsError: if ``folder`` exists and is not empty; nothing is overwritten.
        PermissionError: if its parent cannot be written.
        ValueError: for a model of `zo2jax.blocks`, or one with a prefix.
    """
    if model.config is None:
        raise ValueError("a model of zo2jax.blocks has no Hugging Face layout: take its params, or those of run.model")
    if model.config.prefix:
        raise ValueError(
            f"the model has a prefix of {model.config.prefix} tokens, for which a Hugging Face folder has no place: "
            "write it for PEFT instead (run.export(folder, adapter=True), zo2jax export RUN --adapter)"
        )
    with appearing(folder) as complete:
        _write(model, complete)
    return Path(folder).expanduser()


@contextmanager
def appearing(folder: str | Path) -> Iterator[Path]:
    """A folder to write to, which appears as ``folder`` when that is done: complete, or not at all.

    Raises:
        FileExistsError, PermissionError: as `export` says.

    >>> with tempfile.TemporaryDirectory() as place:
    ...     with appearing(Path(place) / "new") as complete:
    ...         _ = (complete / "file").write_text("whole")
    ...     (Path(place) / "new" / "file").read_text()
    'whole'
    """
    target = check_new(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        complete = Path(scratch) / "complete"
        complete.mkdir()
        yield complete
        os.replace(complete, target)


def check_new(folder: str | Path) -> Path:
    """The path of a folder that is not there yet, or empty.

    Raises:
        FileExistsError: if it is neither.

    >>> check_new("no/such/folder").name
    'folder'
    """
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: name a new folder to export to")
    return target
