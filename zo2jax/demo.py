"""`zo2jax demo`: adapts the small Llama that comes with the package from docstrings to source code, offline."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from zo2jax.config import Config
from zo2jax.config_files import find_config, packaged_configs, with_overrides
from zo2jax.metrics import write_atomically
from zo2jax.models.hub import load
from zo2jax.models.model import Model
from zo2jax.tasks.stdlib import docstrings, source_code
from zo2jax.tasks.text import TextData, load_text
from zo2jax.train import Result, train, trained_model

PROMPT = "def __init__(self, "
_CHARACTERS = 1_500_000


def model_folder() -> Path:
    """The folder of the model that comes with the package; its README.md says how it was made.

    >>> (model_folder() / "config.json").is_file()
    True
    """
    return Path(__file__).parent / "assets" / "tiny"


def load_text_or_docstrings(model: Model, data: str, *, tokens: int, batch: int) -> TextData:
    """`zo2jax.tasks.text.load_text`; of the documentation of Python's library if ``data`` is empty.

    >>> len(load_text_or_docstrings(load(model_folder()), "", tokens=64, batch=16).train) > 1000
    True
    """
    return load_text_or(docstrings, model, data, tokens=tokens, batch=batch)


def load_text_or(make: Callable[[], str], model: Model, data: str, *, tokens: int, batch: int) -> TextData:
    """`zo2jax.tasks.text.load_text`; of a text that is made if ``data`` is empty.

    >>> len(load_text_or(lambda: "All is well. " * 99, load(model_folder()), "", tokens=8, batch=2).train) > 8
    True
    """
    with tempfile.TemporaryDirectory() as folder:
        if not data:
            data = str(Path(folder) / "text.txt")
            Path(data).write_text(make(), encoding="utf-8")
        return load_text(model, data, tokens=tokens, batch=batch)


def demo_config(overrides: Sequence[str] = ()) -> Config:
    """The demo's config: ``configs/demo.py`` with the package's model, and a text made from the standard library."""
    path = next(str(path) for path in packaged_configs("demo.py") if path.is_file())
    config = with_overrides(find_config(path), overrides)
    if not config.model:
        config = replace(config, model=str(model_folder()))
    if not config.data:
        text = Path(config.directory).expanduser() / "stdlib_code.txt"
        if not text.is_file():
            text.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(text, source_code(_CHARACTERS))
        config = replace(config, data=str(text))
    return config


def demo(overrides: Sequence[str] = (), console: Console | None = None) -> Result:
    """Runs the demo: sample, train, sample; returns the result of `zo2jax.train.train`."""
    console = console or Console()
    config = demo_config(overrides)
    before = load(config.model, dtype=config.dtype or None).generate(PROMPT, 48)
    result = train(config, console)
    after = trained_model(config.directory)[1].generate(PROMPT, 48)
    for title, sample in (("before", before), ("after", after)):
        shown = "\n".join(line for line in (PROMPT + sample).splitlines() if line.strip())
        console.print(Panel(shown, title=f"greedy sample {title}", highlight=False))
    console.print(
        f"held-out loss {result.first:.3f} -> {result.last:.3f} nats per token ({result.first - result.last:.3f} less) "
        f"after {result.steps} steps of two forward passes; plot: {result.directory / 'loss.png'}",
        highlight=False,
    )
    return result
