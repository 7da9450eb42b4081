"""Weight files against the safetensors package: the same bytes written, the same arrays read, casts as in JAX."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zo2jax.models.tensors import FLOATS, Writer, open_tensors

RNG = np.random.default_rng(0)
SHAPES = {"b": (3, 5), "a.weight": (7,), "é": (2, 3), "empty": (0, 4), "c": (4, 1)}


def make(*dtypes: str) -> dict[str, np.ndarray]:
    """Tensors of these dtypes in turn."""
    kinds = [dtypes[i % len(dtypes)] for i in range(len(SHAPES))]
    return {n: RNG.standard_normal(s).astype(FLOATS[k]) for (n, s), k in zip(SHAPES.items(), kinds, strict=True)}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float16", "float32"), tuple(FLOATS)])
def test_files_are_those_of_safetensors(dtypes, metadata, tmp_path):
    tensors = make(*dtypes)
    save_file(tensors, tmp_path / "theirs", metadata=metadata or None)
    writer = Writer(tmp_path / "ours", tensors, metadata)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_written_is_cast_and_made_contiguous(tmp_path):
    x = RNG.standard_normal((6, 4)).astype(np.float32)
    Writer(tmp_path / "x", {"x": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)}, {}).write("x", x.T)
    np.testing.assert_array_equal(load_file(tmp_path / "x")["x"], x.T.astype(ml_dtypes.bfloat16))


def test_another_shape_is_refused(tmp_path):
    writer = Writer(tmp_path / "x", {"w": np.zeros((2, 3), np.float32)}, {})
    with pytest.raises(ValueError, match=r"w is \[3, 2\], expected \[2, 3\]"):
        writer.write("w", np.zeros((3, 2), np.float32))


def test_tensors_are_views_of_the_file(tmp_path):
    tensors = make(*FLOATS)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = open_tensors(tmp_path)
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        array = tensor.array(FLOATS[tensor.dtype])
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, str(tensors[name].dtype))
        assert array.tobytes() == tensors[name].tobytes()
        assert not array.flags.owndata and not array.flags.writeable and array.flags.c_contiguous
    turned = read["b"].array(np.float16, transposed=True)
    assert turned.flags.c_contiguous and turned.flags.aligned
    np.testing.assert_array_equal(turned, tensors["b"].T.astype(np.float16))


def test_tensors_that_lie_askew_are_copied(tmp_path):
    """A byte before them in the file puts them at odd addresses."""
    x = RNG.standard_normal(5).astype(np.float32)
    entries = {"one": ("U8", [1], 0, 1), "x": ("F32", [5], 1, 21)}
    header = {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in entries.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + x.tobytes())
    read = open_tensors(tmp_path)["x"].array(np.float32)
    assert read.flags.aligned and read.tolist() == x.tolist()


def words(array) -> np.ndarray:
    """The bits, with one kind of NaN."""
    array = np.asarray(array)
    array = np.where(np.isnan(array.astype(np.float32)), np.array(np.nan, array.dtype), array)
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_casts_are_those_of_jax(stored, to, tmp_path):
    """All values of 16 bits; of 32 bits random ones, and those half way between two neighbours in 16 bits."""
    values = np.arange(1 << 16, dtype=np.uint16)
    if stored == "float32":
        near = (values.astype(np.uint32)[:, None] << 16) + np.array([0x7FFF, 0x8000, 0x8001, 0x1000, 0x3000], np.uint32)
        values = np.concatenate([near.ravel(), RNG.integers(0, 1 << 32, 1 << 17, np.uint32)])
    array = values.view(FLOATS[stored])
    save_file({"x": array}, tmp_path / "model.safetensors")
    ours = open_tensors(tmp_path)["x"].array(FLOATS[to])
    assert ours.dtype == FLOATS[to]
    np.testing.assert_array_equal(words(ours), words(jnp.asarray(array).astype(to)))
