"""The low-rank part of a product for all members of a population: a Mosaic GPU kernel beside its XLA reference.

Each member has factors of its own, so that cuBLAS would take two thin products a member and pass what the one with W
gave through memory twice more. The kernel reads x, y and the factors once, on the tensor cores: a program makes
h = x V for 64 rows of one member, and adds h F^T to their y, some columns at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.implementations import apart, choose
from pallas_kernels.kernel_parts import FLOATS

plgpu: Any = mosaic_gpu  # untyped: kernels need more of it than the oldest jax supported has

_ROWS = 64
"""Of one program: what the tensor cores of a warpgroup take at once."""
_COLUMNS = (128, 64)
"""Of x or y that are in shared memory at once: the first that divides them."""
_RANK = 8
"""The kernel's; smaller ones are filled up with zeros."""
_STAGES = 4  # tiles that are on their way from memory


def add_lowrank(
    y: jax.Array,
    x: jax.Array,
    v: jax.Array,
    f: jax.Array,
    scale: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """scale y[m] + (x[m] V[m]) F[m]^T of every member m, in float32 and rounded once to the dtype of y.

    The low-rank part of x (scale W + F V^T)^T, as of LoRA (Hu et al., arXiv 2106.09685), where y = x W^T.

    Args:
        y: [M, T, n_out], float32, bfloat16 or float16.
        x: [M, T, n_in], likewise.
        v: float32 [M, n_in, rank], or [1, n_in, rank] if all members share it. The kernel takes 16 of its bits.
        f: float32 [M, n_out, rank]. The kernel takes 16 of its bits, and 16 of those of x V.
        scale: float32 []; 1 if None.
        implementation: "mosaic" (NVIDIA GPUs of compute capability 9.0), "xla", "interpret" (the kernel on the CPU), or
            None for the first that applies.

    Raises:
        NotImplementedError: if the implementation named does not apply, with the reason.
        ValueError: for arguments that do not fit one another.

    >>> y, x = jnp.zeros((2, 1, 3)), jnp.ones((2, 1, 4))
    >>> add_lowrank(y, x, jnp.ones((1, 4, 1)), jnp.array([[[1.0]] * 3, [[2.0]] * 3])).tolist()
    [[[4.0, 4.0, 4.0]], [[8.0, 8.0, 8.0]]]
    """
    _check(y, x, v, f)
    chosen = choose("add_lowrank", implementation, None if implementation == "xla" else _unsuitable(y, x, v))
    if chosen == "mosaic_portable":  # other generations have other tensor cores
        if implementation is not None:
            raise NotImplementedError("add_lowrank by 'mosaic_portable': there is no portable kernel")
        chosen = "xla"
    scale = jnp.ones((), jnp.float32) if scale is None else scale
    if chosen == "xla":
        return _xla(y, x, v, f, scale)
    run = _differentiable(apart(partial(_launch, chosen == "interpret"), _xla))
    if implementation is not None:
        return run(y, x, v, f, scale)
    return lax.platform_dependent(y, x, v, f, scale, cuda=run, default=_xla)


def _differentiable(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same, with the derivative of the reference."""
    call = jax.custom_jvp(run)

    @call.defjvp
    def _(given: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        return call(*given), jax.jvp(_xla, given, tangents)[1]

    return call


def _check(y: jax.Array, x: jax.Array, v: jax.Array, f: jax.Array) -> None:
    shapes = ", ".join(f"{name}{list(a.shape)}" for name, a in zip("yxvf", (y, x, v, f), strict=True))
    if any(a.ndim != 3 for a in (y, x, v, f)):
        raise ValueError(f"add_lowrank of {shapes}: expected three axes each")
    (members, rows, n_out), n_in, rank = y.shape, x.shape[2], v.shape[2]
    fit = x.shape[:2] == (members, rows) and v.shape[1] == n_in and f.shape == (members, n_out, rank)
    if not fit or v.shape[0] not in (1, members):
        raise ValueError(
            f"add_lowrank of {shapes}: expected [M, T, n_out], [M, T, n_in], [M or 1, n_in, r], [M, n_out, r]"
        )
    if y.dtype not in FLOATS or x.dtype not in FLOATS or v.dtype != jnp.float32 or f.dtype != jnp.float32:
        raise ValueError(
            f"add_lowrank of y {y.dtype}, x {x.dtype}, v {v.dtype}, f {f.dtype}: expected y and x float32, bfloat16 or "
            "float16, v and f float32"
        )


def _unsuitable(y: jax.Array, x: jax.Array, v: jax.Array) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if x.dtype != jnp.bfloat16:  # x V and small parts of F leave the range of float16
        return f"x of {x.dtype}: the kernel takes bfloat16"
    if y.dtype == jnp.float32:  # as logits, and products of int8: XLA's sum is a part of what reads it, without a pass
        return "y of float32: the kernel takes 16 bits, tiles of which fit shared memory"
    if y.shape[1] % _ROWS or not y.size:
        return f"{y.shape[1]} rows a member: the kernel takes multiples of {_ROWS}"
    if any(n % _COLUMNS[-1] for n in (y.shape[2], x.shape[2])):
        return f"n_in {x.shape[2]}, n_out {y.shape[2]}: the kernel takes multiples of {_COLUMNS[-1]}"
    if not 0 < v.shape[2] <= _RANK:
        return f"rank {v.shape[2]}: the kernel takes 1 to {_RANK}"
    return None


def thin_product(x: jax.Array, v: jax.Array) -> jax.Array:
    """x V in float32: x [.., n_in], v float32 [n_in, rank], of which products of 16 bits take 16 -> [.., rank].

    >>> thin_product(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
    [[3.0], [3.0]]
    """
    both = v if x.dtype == jnp.float32 else jnp.concatenate(_halves(v, x.dtype), axis=1)
    precise: Any = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    h = jnp.einsum("...i,ir->...r", x, both, **precise)
    return h if v is both else h[..., : v.shape[1]] + h[..., v.shape[1] :]


def add_expanded(y: jax.Array, h: jax.Array, f: jax.Array, scale: jax.Array) -> jax.Array:
    """scale y + h F^T in float32, rounded once to the dtype of y: y [.., n_out], h [.., rank], f float32 [n_out, rank].

    A sum that becomes part of what reads it, not one more product.

    >>> add_expanded(jnp.ones((1, 2)), jnp.full((1, 1), 3.0), jnp.array([[1.0], [2.0]]), jnp.float32(1)).tolist()
    [[4.0, 7.0]]
    """
    wide = scale * y.astype(jnp.float32)
    for j in range(f.shape[1]):
        wide = wide + h[..., j, None] * f[:, j]
    return wide.astype(y.dtype)


def _xla(y: jax.Array, x: jax.Array, v: jax.Array, f: jax.Array, scale: jax.Array) -> jax.Array:
    h = jax.vmap(thin_product)(x, v) if len(v) > 1 else thin_product(x, v[0])  # one product where all share V
    return jax.vmap(add_expanded, (0, 0, 0, None))(y, h, f, scale)


# --- the kernel -------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _launch(interpret: bool, y: jax.Array, x: jax.Array, v: jax.Array, f: jax.Array, scale: jax.Array) -> jax.Array:
    """Brings the factors into the form that the tensor cores take, four copies of 8 columns, and launches the kernel.

    h F^T to 16 bits of each is h+ F+ + h- F+ + h+ F-, where + is a number's first 8 bits and - the next 8; h itself is
    x V+ + x V-. So the columns are x V+ (their h+), x V+ (their h-), x V+ and x V-, and those of F F+, F+, F- and F+.
    """
    (members, rows, n_out), n_in = y.shape, x.shape[2]
    v, f = (jnp.pad(a, ((0, 0), (0, 0), (0, _RANK - a.shape[2]))) for a in (v, f))
    v = lax.optimization_barrier(v.transpose(0, 2, 1))  # what is fused into a transposition reads slowly
    (v_high, v_low), (f_high, f_low) = (_halves(a, x.dtype) for a in (v, f))
    kernel = plgpu.kernel(
        partial(_body, rows // _ROWS, len(v) > 1),
        out_type=jax.ShapeDtypeStruct((members * rows, n_out), y.dtype),
        grid=(members * rows // _ROWS,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    of_x = jnp.concatenate([v_high, v_high, v_high, v_low], axis=1)
    of_y = jnp.concatenate([f_high, f_high, f_low, f_high], axis=2)
    flat = x.reshape(-1, n_in), of_x, of_y, y.reshape(-1, n_out), scale.reshape(1)
    return kernel(*flat).reshape(y.shape)


def _halves(a: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A number's first bits, and what they leave of it, both in ``dtype``."""
    high = lax.optimization_barrier(a.astype(dtype))  # XLA would take the rounding away
    return high, (a - high.astype(jnp.float32)).astype(dtype)


def _tiles(columns: int, dtype: Any) -> dict[str, Any]:
    """How so many columns lie in shared memory, as the tensor cores have them."""
    size = jnp.dtype(dtype).itemsize
    width = min(size * columns, 128)  # bytes
    return {"transforms": (plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width))}


def _body(a_member: int, own: bool, x: Any, of_x: Any, of_y: Any, y: Any, scale: Any, out: Any) -> None:
    """One program: 64 rows; ``a_member`` of them take a member, which has a V of its own if ``own``."""
    program = lax.axis_index("program")
    member, rows = lax.div(program, np.int32(a_member)), pl.ds(program * np.int32(_ROWS), _ROWS)
    of_x = of_x.at[member if own else 0]
    width = of_x.shape[0]
    h = pl.run_scoped(partial(_thin, x.at[rows], of_x), plgpu.ACC((_ROWS, width), jnp.float32))
    high = h.astype(x.dtype)
    low = (h - high.astype(jnp.float32)).astype(x.dtype)
    part = plgpu.broadcasted_iota(jnp.int32, h.shape, 1, layout=plgpu.Layout.WGMMA) // np.int32(_RANK)
    h = jnp.where(part == 1, low.astype(jnp.float32), high.astype(jnp.float32)).astype(x.dtype)
    columns = next(n for n in _COLUMNS if y.shape[1] % n == 0)

    def add(h_held: Any, done: Any) -> None:
        h_held[...] = h
        plgpu.commit_smem()
        factor = scale[0]

        def step(index: Any, f: Any, y: Any) -> None:
            def product(sum_: Any) -> jax.Array:
                plgpu.wgmma(sum_, h_held, f.transpose((1, 0)))
                return sum_[...]

            more = pl.run_scoped(product, plgpu.ACC((_ROWS, columns), jnp.float32))
            moved = (factor * y[...].astype(jnp.float32) + more).astype(out.dtype)
            slot = lax.rem(index[0], np.int32(2))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            done[slot] = moved
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(done.at[slot], out.at[rows, pl.ds(index[0] * np.int32(columns), columns)])

        plgpu.emit_pipeline(
            step,
            grid=(y.shape[1] // columns,),
            in_specs=[
                plgpu.BlockSpec((columns, width), lambda n: (n, 0), **_tiles(width, x.dtype)),
                plgpu.BlockSpec((_ROWS, columns), lambda n: (0, n), **_tiles(columns, y.dtype)),
            ],
            max_concurrent_steps=_STAGES,
        )(of_y.at[member], y.at[rows])
        plgpu.wait_smem_to_gmem(0)

    held = plgpu.SMEM((_ROWS, width), x.dtype, **_tiles(width, x.dtype))
    pl.run_scoped(add, held, plgpu.SMEM((2, _ROWS, columns), y.dtype, **_tiles(columns, y.dtype)))


def _thin(x: Any, of_x: Any, total: Any) -> jax.Array:
    """x V of a program's rows, float32 [64, columns of V]."""
    width, n_in = of_x.shape
    columns = next(n for n in _COLUMNS if n_in % n == 0)

    def step(_: Any, x: Any, v: Any) -> None:
        plgpu.wgmma(total, x, v.transpose((1, 0)))
        plgpu.wgmma_wait(0)

    plgpu.emit_pipeline(
        step,
        grid=(n_in // columns,),
        in_specs=[
            plgpu.BlockSpec((_ROWS, columns), lambda k: (0, k), **_tiles(columns, x.dtype)),
            plgpu.BlockSpec((width, columns), lambda k: (0, k), **_tiles(columns, x.dtype)),
        ],
        max_concurrent_steps=_STAGES,
    )(x, of_x)
    return total[...]
