"""The benchmark of a step runs, and says why if it does not."""

import json

import jax
import pytest

from zo2jax import bench
from zo2jax.models.blocks import owned_shapes


@pytest.mark.parametrize("what", bench.WHAT)
def test_every_kind_of_step_is_measured(what):
    result = bench.measure(what, "opt-tiny", 1, bench.Work(tokens=8, rows=2, candidates=2, steps=1))
    assert result["ms"] > 0 and result["first_call_s"] > 0
    assert result["parameters"] == 197568 and result["layers"] == 1
    json.dumps(result)


def test_shapes_have_the_parameters_of_their_models():
    """The published sizes, with an untied head."""
    for name, billions in {"llama-7b": 6.74, "opt-13b": 12.85 + 50272 * 5120 / 1e9}.items():
        config = bench.SHAPES[name]
        shapes = owned_shapes(bench.random_model(name, 1).blocks)
        layer = jax.tree.leaves((shapes["layers.0.attn"], shapes["layers.0.mlp"]))
        size = sum(leaf.size for leaf in layer) * config.layers + 2 * config.vocabulary * config.size
        assert size / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_table(capsys):
    results = bench.bench("tiny", layers=1, work=bench.Work(tokens=8, steps=1), what=("forward",))
    assert [r["what"] for r in results] == ["forward"]
    assert "forward" in capsys.readouterr().out


def test_a_failed_measurement_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)'forward' failed.*context"):
        bench.bench("tiny", layers=1, work=bench.Work(tokens=4096), what=("forward",))
