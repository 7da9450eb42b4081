"""The package as a whole: import direction, public names, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import zo2jax

ROOT = Path(zo2jax.__file__).parent.parent
PUBLIC = sorted(
    name for name in vars(zo2jax) if not name.startswith("_") and getattr(zo2jax, name).__class__ is not type(ast)
)

# Each module may import from those before it.
LAYERS = [
    {"leaves", "marks"},
    {"directions", "formats"},
    {"updates", "estimators", "optimizers"},
    {"mezo"},
    {"models"},
    {"pages", "metrics"},
    {"header", "journal", "shapes"},
    {"probes", "pending", "factored", "link", "files", "stores", "plan"},
    {"visits", "folding", "conveyor"},
    {"masters", "tail"},
    {"accumulated", "listed"},
    {"resident"},
    {"stream", "objectives", "adapters"},
    {"first_order", "sensitivity"},
    {"checkpoint", "kept", "weights", "directory", "restored", "saver", "rule", "recorder", "run", "replay"},
    {"monitor"},
    {"tasks", "config", "config_files"},
    {"train", "trained", "selected", "quantize", "planner"},
    {"demo", "bench"},
    {"cli"},
]


def imported(path: Path) -> set[str]:
    """The zo2jax modules that a file imports, by the first part of their names; inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "zo2jax" else {node.module}
            )
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("zo2jax.")} - {"__version__"}


@pytest.mark.parametrize("path", sorted((ROOT / "zo2jax").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    module = path.relative_to(ROOT / "zo2jax").with_suffix("").parts[0]
    if module == "__init__":
        pytest.skip("the package itself gathers the public names")
    level = next(i for i, layer in enumerate(LAYERS) if module in layer)
    allowed = set().union(*LAYERS[: level + 1]) - (
        {"mezo", "directions", "updates", "estimators", "optimizers"} if module == "models" else set()
    )
    assert imported(path) <= allowed


def test_kernels_import_only_jax():
    """And what comes with Python; the benchmark draws its plot with matplotlib, if asked to."""
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels"} | sys.stdlib_module_names
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            extra = {"matplotlib"} if path.name == "bench.py" else set()
            assert {name.split(".")[0] for name in names if name} <= allowed | extra


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(zo2jax, name)
    assert value.__doc__ and len(value.__doc__) > 20


def test_there_are_about_fifty_public_names():
    assert 15 <= len(PUBLIC) <= 55


def test_help():
    code = (
        "import sys; sys.argv = ['zo2jax', '--help']; import runpy; runpy.run_module('zo2jax.cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "train" in done.stdout


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_empty_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("zo2jax/assets/tiny/model.safetensors", "zo2jax/configs/demo.py", "pallas_kernels/bits.py"):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests", "examples"))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
    command = [tmp_path / "venv" / "bin" / "zo2jax", "demo", "steps=20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "nats per token" in done.stdout
