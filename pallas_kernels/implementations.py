"""Which implementation of an operation runs: one rule for all kernels.

``None`` means the best that applies; a name means that one, or NotImplementedError with the reason, never another.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

NAMES = ("mosaic", "mosaic_portable", "xla", "interpret")
"""Best first; "interpret" (a kernel on the CPU, for tests) is never chosen by itself."""


def problem(name: str) -> str | None:
    """Why an implementation does not run here, or None if it does.

    "mosaic" uses the GPU's approximate functions, whose results were checked on compute capability 9.0;
    "mosaic_portable" is the same kernel without them.

    Raises:
        ValueError: for an unknown name.

    >>> problem("xla") is None
    True
    """
    if name not in NAMES:
        raise ValueError(f"implementation is {name!r}, expected None or one of {', '.join(map(repr, NAMES))}")
    if name == "xla":
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"Mosaic GPU kernels need jax 0.11.1 or newer, and this is jax {jax.__version__}"
    if name == "interpret":
        return None
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the default device is {device}"
    capability = str(device.compute_capability)
    if float(capability) < 9:
        return f"it needs a GPU of compute capability 9.0 or more, and {device.device_kind} has {capability}"
    if name == "mosaic" and capability != "9.0":
        return f"its functions were checked on compute capability 9.0, and {device.device_kind} has {capability}"
    return None


def choose(operation: str, name: str | None, limit: str | None = None) -> str:
    """The implementation to use for an operation; ``limit`` says why kernels cannot take these arguments, if so.

    Raises:
        NotImplementedError: if ``name`` does not apply.

    >>> choose("perturb", None, limit="too large")
    'xla'
    """
    if name is None:
        return "xla" if limit else next(n for n in NAMES if problem(n) is None)
    reason = problem(name) or (limit if name != "xla" else None)
    if reason:
        raise NotImplementedError(f"{operation} by {name!r}: {reason}")
    return name


def apart(launch: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a kernel; under a vmap of its arguments ``instead``, which has the same bits, takes its place.

    Also keeps vmap from the kernel's reference, which it would take for one of each member.

    >>> double = apart(lambda x: x + x, lambda x: 2 * x)
    >>> jax.vmap(double)(jax.numpy.arange(3)).tolist()
    [0, 2, 4]
    """

    @jax.custom_batching.custom_vmap
    def run(*arguments: Any) -> Any:
        return launch(*arguments)

    @run.def_vmap
    def batched(size: int, in_batched: Any, *arguments: Any) -> Any:
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        outputs = jax.vmap(instead, in_axes=axes, axis_size=size)(*arguments)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return run
