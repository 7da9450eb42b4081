"""Folders of codes: written by ``zo2jax quantize``, read by `zo2jax.load`, block by block, to the bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo2jax as zo
from pallas_kernels.quantized import decode, quantize
from zo2jax import cli, formats
from zo2jax.formats import from_json
from zo2jax.models.gpt2 import Gpt2Config
from zo2jax.models.hub import export
from zo2jax.models.llama import LlamaConfig
from zo2jax.pages import flat, layouts_of
from zo2jax.plan import Plan
from zo2jax.stream import Stream

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
    """A Hugging Face folder of random weights; GPT-2's matrices lie transposed in it."""
    shape = {"vocabulary": 67, "size": 32, "hidden": 48, "layers": 2, "heads": 4, "context": 64}
    configs = {"gpt2": lambda: Gpt2Config(**shape), "llama": lambda: LlamaConfig(**shape, kv_heads=2, head_size=8)}
    model = configs[request.param]().init(jax.random.key(2), jnp.bfloat16)
    return export(model, tmp_path_factory.mktemp("models") / "plain")


@pytest.mark.parametrize(("bits", "group"), [(8, 24), (4, 8)])
def test_matrices_in_host_memory_are_encoded_by_pieces(bits, group, monkeypatch):
    """To the same bits: no more than a piece of them is on the device."""
    w = np.random.default_rng(3).normal(size=(37, 24)).astype(np.float32)
    whole = formats.encode(jnp.asarray(w), bits, group)
    monkeypatch.setattr(formats, "_PIECE", 100)
    codes = formats.encode(w, bits, group)
    assert all(isinstance(part, np.ndarray) for part in codes)
    jax.tree.map(np.testing.assert_array_equal, codes, whole)
    np.testing.assert_array_equal(formats.decoded(codes), formats.decoded(whole))


def leaves(model):
    return {f"{block}.{name}": leaf for block in model.source for name, leaf in flat(model.source[block]).items()}


@pytest.mark.parametrize(
    ("words", "format"),
    [
        (["--format", "int8"], zo.int8()),
        (["--format", "int4", "--group", "16", "--keep", "embed.*"], zo.int4(group=16, keep=("embed.*",))),
    ],
)
def test_a_folder_of_codes_loads_as_what_they_stand_for(folder, words, format, tmp_path, capsys):
    assert cli.main(["quantize", str(folder), *words, "-o", str(tmp_path / "codes")]) == 0
    out = capsys.readouterr().out
    model, plain = zo.load(tmp_path / "codes"), zo.load(folder)
    assert model.format == format and model.dtype == plain.dtype == jnp.bfloat16
    expected, found, coded = leaves(plain), leaves(model), 0
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        group = None if w.ndim < 2 else format.group_of(name, w.shape)
        if group is not None:
            w = decode(quantize(jnp.asarray(w), format.bits, group), jnp.bfloat16)
            assert name in out
            coded += 1
        np.testing.assert_array_equal(found[name], w, err_msg=name)
    assert coded >= 5
    ids = np.arange(12).reshape(1, 12)
    np.testing.assert_allclose(model.logits(ids), plain.logits(ids), atol=0.5)
    size = [sum(f.stat().st_size for f in x.glob("*.safetensors")) for x in (tmp_path / "codes", folder)]
    assert size[0] < 0.75 * size[1]


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_stream_takes_the_codes_of_a_folder_as_they_are(folder, tmp_path):
    """Not those of the rounded matrices that they stand for."""
    format = zo.int4(group=16)
    made = export(zo.load(folder).with_format(format), tmp_path / "codes")
    streams = [
        Stream(m.blocks, m.source, zo.normal, zo.stochastic, Plan({"layers.0.mlp": "host"}), format=format)
        for m in (zo.load(made), zo.load(folder).with_format(format))
    ]
    for block in streams[0]:
        jax.tree.map(np.testing.assert_array_equal, *(s.stored(block) for s in streams))
        assert layouts_of(streams[0].blocks, format)[block] == streams[0].layouts[block]
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_codes_of_a_folder_become_those_of_another_format(folder, tmp_path):
    """By way of what they stand for; another kind of products leaves them as they are."""
    made = zo.load(export(zo.load(folder).with_format(zo.int8()), tmp_path / "codes"))
    plain, name = made.source["layers.0.mlp"], "down.weight"
    for format in (zo.int4(group=16), zo.int8(compute="int8")):
        model = made.with_format(format)
        stream = Stream(model.blocks, model.source, zo.normal, zo.stochastic, Plan(), format=format)
        codes = flat(stream.stored("layers.0.mlp"))
        w = flat(plain)[name]
        expected = formats.encode(jnp.asarray(w), format.bits, format.group_of(f"layers.0.mlp.{name}", w.shape))
        if format.bits == 4:
            np.testing.assert_array_equal(codes[f"{name}.codes"], expected.codes)
        else:
            np.testing.assert_array_equal(
                codes[f"{name}.codes"], flat(made.source.coded("layers.0.mlp"))[f"{name}.codes"]
            )
        stream.close()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_run_of_a_folder_of_codes(folder, tmp_path):
    """Its masters begin as what the codes stand for, so that the first fold makes the same codes again."""
    made = export(zo.load(folder).with_format(zo.int8()), tmp_path / "codes")
    estimator = zo.two_point(1e-3, direction=zo.lowrank(1, refresh=1))
    how = {"directory": tmp_path / "run", "key": jax.random.key(1)}
    batch = {"ids": np.arange(8, dtype=np.int32).reshape(1, 8), "targets": np.ones((1, 8), np.int32)}
    with zo.Run(zo.load(made), estimator, zo.sgd(0.0), **how) as run:
        for _ in range(3):
            run.step(batch)
        assert run.model.format is None
        jax.tree.map(np.testing.assert_array_equal, dict(run.model.source), dict(zo.load(made).source))


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_leaves_above_the_limit_stay(folder, tmp_path, capsys):
    """int4 codes are off by a tenth or so, but for a matrix of small integers."""
    model = zo.load(folder)
    params = {block: jax.tree.map(jnp.asarray, dict(model.source[block])) for block in model.source}
    integers = np.random.default_rng(1).integers(-7, 8, params["embed"]["weight"].shape)
    integers[:, 0] = 7
    params["embed"]["weight"] = jnp.asarray(integers, jnp.bfloat16)
    exact = export(model.replace(params), tmp_path / "exact")
    words = ["--format", "int4", "--limit", "0.01", "-o", str(tmp_path / "codes")]
    assert cli.main(["quantize", str(exact), *words]) == 0
    assert "stays as it is" in capsys.readouterr().out
    made = zo.load(tmp_path / "codes")
    kept = {name for name, leaf in leaves(zo.load(exact)).items() if leaf.ndim > 1} - {"embed.weight"}
    assert made.format is not None and set(made.format.keep) == kept
    jax.tree.map(np.testing.assert_array_equal, dict(made.source), params)  # what stays, and what is exact


def test_damaged_folders_are_refused(folder, tmp_path):
    made = export(zo.load(folder).with_format(zo.int8()), tmp_path / "codes")
    raw = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(raw | {"zo2jax_format": {"bits": 3}}))
    with pytest.raises(ValueError, match="expected bits 8 or 4, group and keep"):
        zo.load(made)
    with pytest.raises(FileExistsError, match="name a new folder"):
        export(zo.load(folder), made)


@pytest.mark.parametrize("format", [zo.int8(), zo.int8("group", group=32, keep=("a.*",)), zo.int4(group=8)])
def test_formats_are_described_in_json_and_in_python(format):
    assert from_json(json.loads(json.dumps(format.as_json()))) == format
    assert eval(repr(format), {"int8": zo.int8, "int4": zo.int4}) == format


@pytest.mark.parametrize(
    ("make", "message"), [(lambda: zo.int8("row"), "per is 'row'"), (lambda: zo.int4(group=0), "group is 0")]
)
def test_formats_check_their_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
