"""``zo2jax quantize``: a model's matrices as codes, in a folder that loads again."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zo2jax.formats import Format
from zo2jax.models.blocks import owned_shapes
from zo2jax.models.hub import check_new, export
from zo2jax.models.model import Model
from zo2jax.pages import flat


def quantize(model: Model, format: Format, folder: str | Path, *, limit: float = math.inf) -> Path:
    """Writes a model with its matrices as codes, and prints the relative error of each; returns the folder.

    The error is |W - decoded| / |W| in the Frobenius norm. Leaves whose error is above ``limit`` stay as they are. The
    model is read twice, block by block.

    Raises:
        FileExistsError: if ``folder`` exists and is not empty; nothing is overwritten. Else what `export` raises.

    >>> from zo2jax.formats import int8
    >>> quantize(None, int8(), "/")
    Traceback (most recent call last):
    FileExistsError: / exists and is not empty: name a new folder to export to
    """
    target = check_new(folder)
    errors: dict[str, float] = {}
    for block in owned_shapes(model.blocks):
        errors |= format.errors(block, flat(model.source[block]))
    stay = [name for name, error in errors.items() if error > limit]
    table = Table(title=f"{format}: |W - decoded| / |W|")
    for column in ("leaf", "error", ""):
        table.add_column(column)
    for name, error in errors.items():
        table.add_row(name, f"{error:.2e}", "stays as it is" * (name in stay))
    Console().print(table)
    return export(model.with_format(format.keeping(stay)), target)
