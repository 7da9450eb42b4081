"""Every file in examples/ runs and does what it says."""

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import ipykernel.kernelspec
import jax
import nbclient
import nbformat
import numpy as np
import pytest

import zo2jax as zo
from zo2jax.tasks.stdlib import docstrings

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.usefixtures("quick_compilation")

FALLS = {"own_jit.py": 5, "linen_scan.py": 50, "nnx_donate.py": 20, "own_task.py": 2, "stream_any_model.py": 2.5}
"""Scripts that train something, and the factor by which the loss falls at least."""
FEWER = {"own_task.py": {"steps": 24, "count": 60}}
"""What is asked of the tests, where a script does more."""


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__ is not None and f"python examples/{name}" in module.__doc__
    return module


def test_every_example_is_tested():
    others = {"books_to_shakespeare.py", "compare_estimators.py", "compare_hybrid.py", "hybrid_memory.py"}
    others |= {"plot_runs.py", "pretrain_tiny.py", "quickstart.ipynb", "svrg_error.py"}
    assert {p.name for p in EXAMPLES.iterdir() if p.is_file()} == {*FALLS, *others}


@pytest.mark.parametrize("name", FALLS)
def test_loss_falls(name, capsys):
    before, after = load_example(name).main(**FEWER.get(name, {}))
    assert 0 < after < before / FALLS[name]
    assert f"loss {before:.3f} -> {after:.3f}" in capsys.readouterr().out


def test_pretrain_tiny(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = load_example("pretrain_tiny.py")
    text = example.docstrings()[:100_000]
    monkeypatch.setattr(example, "docstrings", lambda: text)
    with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule needs it
        example.main(tmp_path / "tiny", steps=3, batch=8, tokens=64)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    model = zo.load(tmp_path / "tiny")
    assert model.dtype == "bfloat16" and model.tokenizer is not None
    out = capsys.readouterr().out
    assert f"{model.parameter_count:,} parameters" in out
    assert (tmp_path / "tiny" / "README.md").read_text() in out


def test_compare_estimators(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    example = load_example("compare_estimators.py")
    monkeypatch.setattr(example, "ESTIMATORS", dict(list(example.ESTIMATORS.items())[::3]))
    options = {"steps": 40, "seeds": 2, "batch": 2, "tokens": 16, "output": tmp_path / "estimators.png"}
    with pytest.raises(ValueError, match="seconds has 1 numbers, expected one for each of two_point, one_sided"):
        example.main(seconds=(0.5,))
    few, many = example.expected("opt-1.3b", "h200", 1, 64)
    assert few <= many < 1.5 * few  # bound by the link
    found = example.main(str(tiny_folder), str(text_file), **options)
    assert list(found) == ["two_point", "one_sided(8)"] and all(x.shape == (2, 41) for x in found.values())
    assert all(np.isfinite(x).all() and (x[0] != x[1]).any() and (x[:, 0] == x[0, 0]).all() for x in found.values())
    assert (tmp_path / "estimators.png").read_bytes()[1:4] == b"PNG"
    assert f"-> {found['two_point'][:, -1].mean():.4f} (" in capsys.readouterr().out


def test_svrg_error(tmp_path, monkeypatch, capsys):
    example = load_example("svrg_error.py")
    monkeypatch.setattr(example, "REFRESH", 5)
    two_point = zo.two_point(1e-2, direction=zo.lowrank(2, refresh=5))
    few = {"pairs": (zo.averaged(two_point, 3), (1e-4,)), "svrg": (zo.svrg(two_point, 20), (1e-4,))}
    monkeypatch.setattr(example, "ESTIMATORS", few)
    pairs, mine = example.main(total=300, seeds=8, output=tmp_path / "svrg.png").values()
    assert pairs.shape == mine.shape == (5,) and 0 < mine.max() < pairs.mean() / 3
    assert (tmp_path / "svrg.png").read_bytes()[1:4] == b"PNG"
    assert "svrg, 11.2 passes a step, rate 0.0001" in capsys.readouterr().out


def test_compare_hybrid(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    example = load_example("compare_hybrid.py")
    choices = {name: example.CHOICES[name] for name in ("zeroth order", "hybrid, last_blocks(3)")}
    monkeypatch.setattr(example, "CHOICES", choices)
    options = {"seconds": 0.2, "points": 2, "batch": 2, "tokens": 16, "output": tmp_path / "hybrid.png"}
    found = example.main(str(tiny_folder), str(text_file), **options)
    assert list(found) == list(choices) and len(found) == 2
    for curve in found.values():
        assert len(curve.losses) == len(curve.steps) == len(curve.seconds) == 3 and curve.steps[0] == 0
        assert curve.seconds[1] >= 0.1 and curve.seconds[2] >= 0.2 and np.isfinite(curve.losses).all()
    plain, hybrid = found.values()
    assert plain.losses[0] == hybrid.losses[0] and plain.losses[-1] != hybrid.losses[-1]
    assert (tmp_path / "hybrid.png").read_bytes()[1:4] == b"PNG"
    assert f"-> {hybrid.losses[-1]:.4f} in" in capsys.readouterr().out


def test_hybrid_memory(capsys):
    found = load_example("hybrid_memory.py").main("opt-tiny", tokens=32, layers=1, steps=1)
    leaves, state, gradient, arguments, made, *peaks = found.values()
    head, layer = 256 * 64 + 2 * 64, 4 * 64 * 64 + 2 * 64 * 128 + 9 * 64 + 128  # matrices, biases and norms
    assert leaves == gradient == 4 * (head + layer) and state == 2 * leaves + 4
    assert arguments > leaves + gradient and made > 0 and len(peaks) == 2
    assert "MiB  state of AdamW" in capsys.readouterr().out


@pytest.mark.slow
def test_books_to_shakespeare(tmp_path, capsys):
    example = load_example("books_to_shakespeare.py")
    (tmp_path / "books").mkdir()
    text = docstrings()
    for i, name in enumerate(("one.txt", "two.txt")):
        book = f"A licence\n*** START OF THE BOOK ***\n{text[50_000 * i : 50_000 * (i + 1)]}*** END OF THE BOOK ***\n"
        (tmp_path / "books" / name).write_text(book, encoding="utf-8")
    (tmp_path / "plays.txt").write_text(text[-20_000:], encoding="utf-8")
    shape = {"vocabulary": 300, "size": 16, "hidden": 32, "layers": 1, "tokens": 16, "batch": 8, "pretrain_batch": 8}
    few = {
        "pretrain_steps": 30,
        "steps": 52,
        "every": 26,
        "rates": (1e-3,),
        "try_steps": 1,
        "adam_steps": 10,
        "pairs": 6,
    }
    only = (example.DENSE, "low-rank, int8")
    setting = example.Setting(tmp_path / "books", tmp_path / "plays.txt", tmp_path / "out", only=only, **shape, **few)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        results = example.main(setting)
    curves = {name: [point.step for point in curve] for name, curve in results.curves.items()}
    assert curves == {example.DENSE: [0, 26, 52], only[1]: [0, 26, 52], example.ADAMW: [0, 2, 4, 6, 8, 10]}
    starts, ends = ([curve[i].loss for curve in results.curves.values()] for i in (0, -1))
    assert starts == pytest.approx([starts[0]] * 3, rel=1e-3) and max(ends) < starts[0] < np.log(300)
    assert results.correlations == {only[1]: pytest.approx(1, abs=1e-3)}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["curves"][example.DENSE][-1][-1] == ends[0]
    assert (tmp_path / "out" / "losses.png").stat().st_size > 10_000
    assert f"{results.parameters:,} parameters" in capsys.readouterr().out
    assert "licence" not in zo.load(tmp_path / "out" / "model").tokenizer.get_vocab()


def test_plot_runs(tmp_path, capsys):
    for name, losses in (("a", [3.0, 2.5]), ("b", [4.0, 2.25])):
        (tmp_path / name).mkdir()
        lines = [{"step": 10 * i, "eval/loss": loss} for i, loss in enumerate(losses)] + [{"step": 11, "train/loss": 9}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {"first": tmp_path / "a", "second": tmp_path / "b"}
    assert load_example("plot_runs.py").main(runs, tmp_path / "losses.png") == {"first": 2.5, "second": 2.25}
    assert (tmp_path / "losses.png").read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().out.splitlines()[1] == "second: 4.0000 -> 2.2500 after 10 steps"


@pytest.fixture
def kernel(tmp_path_factory, monkeypatch):
    """Makes "python3" the interpreter of the tests, with nothing read from or written to the user's folders."""
    folder = tmp_path_factory.mktemp("jupyter")
    ipykernel.kernelspec.write_kernel_spec(folder / "kernels" / "python3")
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
    return "python3"


def read_notebook() -> nbformat.NotebookNode:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_notebook_is_stored_without_outputs():
    cells = [c for c in read_notebook().cells if c.cell_type == "code"]
    assert cells[0].source == "# %pip install zo2jax"
    assert all(c.outputs == [] and c.execution_count is None for c in cells)


def test_notebook(tmp_path, kernel, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = read_notebook()
    cells = {c.id: c for c in notebook.cells}
    shorter = {"steps = 600": "steps = 3", "batch, tokens = 16, 64": "batch, tokens = 8, 32", "500_000": "60_000"}
    for old, new in shorter.items():
        assert old in cells["parameters"].source
        cells["parameters"].source = cells["parameters"].source.replace(old, new)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name=kernel, resources=resources).execute()

    def shown(cell: str) -> str:
        return "".join(o.text for o in cells[cell].outputs if o.output_type == "stream" and o.name == "stdout")

    losses = re.fullmatch(r"held-out loss (.*) -> (.*) nats per token after 3 steps\n", shown("train"))
    assert losses is not None and all(1 < float(loss) < 7 for loss in losses.groups())
    assert any("image/png" in output.data for output in cells["plot"].outputs)
    assert "'model.safetensors'" in shown("export").splitlines()[0]
    assert shown("export").endswith(shown("sample"))  # the exported weights are the trained ones
