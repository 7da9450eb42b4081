"""Other implementations, run beside this one on the same shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo2jax.bench import zo2_step
from zo2jax.bench.process import run
from zo2jax.bench.shapes import SHAPES
from zo2jax.bench.throughput import Setting
from zo2jax.models.opt import OptConfig

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Peer:
    """A checkout of the PyTorch ZO2 (https://github.com/liangyuwang/zo2), and the Python that has what it needs.

    Raises:
        ValueError: for a folder without ``zo2``, or an unknown dtype.

    >>> Peer("no/such/folder", "python3")
    Traceback (most recent call last):
    ValueError: no/such/folder holds no zo2/__init__.py: expected a checkout of https://github.com/liangyuwang/zo2
    """

    folder: str
    python: str
    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Checks what can be checked without running it."""
        if not (Path(self.folder).expanduser() / "zo2" / "__init__.py").is_file():
            raise ValueError(
                f"{self.folder} holds no zo2/__init__.py: expected a checkout of https://github.com/liangyuwang/zo2"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")


def named(text: str) -> str:
    """The folder of ``zo2=FOLDER``.

    Raises:
        ValueError: for anything else.

    >>> named("zo2=../zo2")
    '../zo2'
    """
    name, _, folder = text.partition("=")
    if name != "zo2" or not folder:
        raise ValueError(f"peer {text!r}: expected zo2=FOLDER with a checkout of https://github.com/liangyuwang/zo2")
    return folder


def asked(setting: Setting) -> dict[str, Any]:
    """What the peer is told: the same shape, rows and steps.

    Raises:
        ValueError: for a model that is no OPT.

    >>> asked(Setting("opt-13b"))["hidden_size"]
    5120
    """
    config = SHAPES[setting.model]
    if not isinstance(config, OptConfig):
        raise ValueError(f"the peer zo2 is compared on OPT only, and the model is {setting.model}")
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.size,
        "word_embed_proj_dim": config.size,
        "ffn_dim": config.hidden,
        "num_hidden_layers": setting.layers or config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": False,
    }


def measure_peer(peer: Peer, setting: Setting, limit_s: float | None = None) -> dict[str, Any]:
    """Runs a peer in its own Python, with times and memory under the names of `zo2jax.bench.throughput.measure`.

    Its peak is that of PyTorch's allocator; what that had reserved stands beside it.

    Raises:
        RuntimeError: if it does not run, with the end of what it wrote, or takes longer than ``limit_s`` seconds.

    >>> import sys, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "zo2").mkdir()
    ...     _ = (Path(folder) / "zo2/__init__.py").write_text("")
    ...     _ = (Path(folder) / "torch.py").write_text("raise ImportError('this is no torch')")
    ...     try:
    ...         measure_peer(Peer(folder, sys.executable), Setting("opt-tiny"))
    ...     except RuntimeError as error:
    ...         "no torch" in str(error)
    True
    """
    work = {"rows": setting.rows, "tokens": setting.tokens, "dtype": peer.dtype}
    work |= {"warm_ups": setting.warm_ups, "steps": setting.steps}
    folder = Path(peer.folder).expanduser().resolve()
    # The script's text, since its folder holds modules whose names others have too.
    command = [peer.python, "-c", Path(zo2_step.__file__).read_text(), json.dumps({"config": asked(setting), **work})]
    try:
        output = run("peer zo2", command, env={"PYTHONPATH": str(folder)}, cwd=folder, limit_s=limit_s)
    except OSError as error:
        raise RuntimeError(f"the peer zo2 cannot be run by {peer.python} ({error.strerror})") from error
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    found |= {"name": "zo2", "dtype": peer.dtype}
    found["tokens_per_s"] = setting.rows * setting.tokens / found["ms"] * 1e3
    return found
