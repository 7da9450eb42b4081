"""One battery for every implementation: against NumPy, against one another in every bit, and lowered for CUDA."""

import importlib
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from kernel_marks import DTYPES, KERNELS, NEEDS_KERNELS, ON_GPU, each_implementation

from pallas_kernels import bench, bits, implementations, specs
from pallas_kernels.bench_operations import no_noise
from pallas_kernels.perturb import ALIGNMENT, perturb, perturb_in_page
from pallas_kernels.reference import Probes, Shard, Terms

RNG = np.random.default_rng(20251103)
PAIRS = [bits.normal_pair, bits.rademacher_pair]
ROUNDINGS = [bits.round_to_nearest, bits.round_stochastically]


def weights(shape, dtype=jnp.float32, scale=0.02):
    return jnp.asarray(RNG.normal(size=shape) * scale, dtype)


def keys(*shape):
    return jnp.asarray(RNG.integers(0, 2**32, (*shape, 2), dtype=np.uint32))


def coefficients(*shape, scale=1e-2):
    return bits.cut12(jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32))


def random_terms(updates, directions, decay=True):
    fraction = bits.cut12(jnp.asarray(RNG.uniform(0.01, 0.2, updates), jnp.float32)) if decay else None
    return Terms(keys(updates, directions), coefficients(updates, directions), fraction)


def random_probes(members, directions):
    return Probes(keys(directions), coefficients(members, directions))


run = jax.jit(perturb, static_argnames=("pair", "rounding", "shard", "implementation"))


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(*(np.asarray(v).view(f"u{v.dtype.itemsize}") for v in (x, y)))


# --- against NumPy ----------------------------------------------------------------------------------------------------


def words(key, shape, start=(0, 0)):
    """The word of each element of an array whose first is (row, column) ``start``, and which half of it is its own."""
    c = start[1] + np.arange(shape[-1] if shape else 1)
    r = start[0] + np.arange(int(np.prod(shape[:-1])))
    row, group = np.broadcast_arrays(r[:, None].astype(np.uint32), (c // 4).astype(np.uint32))
    pair = np.asarray(threefry_2x32(key, np.concatenate([row.ravel(), group.ravel()]))).reshape(2, *row.shape)
    return np.where(c % 4 < 2, *pair).reshape(shape), np.broadcast_to(c % 2 == 1, row.shape).reshape(shape)


def noise(pair, key, shape, start=(0, 0)):
    """z in float64, by the address rule of `bits.draw` and the formulas of the maps' docstrings."""
    word, second = words(key, shape, start)
    if pair is bits.rademacher_pair:
        return np.where(word >> np.where(second, 15, 31).astype(np.uint32) & 1, -1.0, 1.0)
    radius = np.sqrt(-2 * np.log(((word >> 16) + 0.5) / 65536)) * bits.RADIUS_SCALE
    angle = (word & 0xFFFF).astype(np.uint16).view(np.int16) * (2 * np.pi / 65536)
    point = np.where(second, np.sin(angle), np.cos(angle)) * float(np.float32(bits._CIRCLE_SCALE))
    z = (np.rint(radius * 2**9) / 2**9 * np.rint(point * 2**10) / 2**10).astype(np.float32)
    return (z.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32).astype(np.float64)


def assert_rounded_once(ours, exact, moved):
    """Each element within half a unit in the last place, but for what float32 sums of ``moved`` add to that."""
    unit = np.spacing(np.abs(exact).astype(ours.dtype)).astype(np.float64)
    assert (np.abs(np.asarray(ours, np.float64) - exact) <= 0.505 * unit + 2e-7 * moved).all()


@each_implementation
@pytest.mark.parametrize(
    ("shape", "dtype", "pair"), [(shape, DTYPES[i % 3], PAIRS[i % 2]) for i, shape in enumerate(specs.RAGGED)]
)
def test_against_float64(implementation, shape, dtype, pair):
    w, terms, probes = weights(shape, dtype), random_terms(1, 2), random_probes(3, 2)
    moved, members = run(w, terms, probes, pair=pair, implementation=implementation)
    assert moved.shape == shape and members.shape == (3, *shape) and moved.dtype == members.dtype == dtype
    w64, decay = np.asarray(w, np.float64), float(terms.decay[0])
    sums = [
        c * noise(pair, key, shape) for c, key in zip(np.asarray(terms.coefs[0], float), terms.keys[0], strict=True)
    ]
    assert_rounded_once(moved, w64 - decay * w64 + sum(sums), sum(np.abs(x) for x in [decay * w64, *sums]))
    zs = [noise(pair, key, shape) for key in probes.keys]
    for row, member in zip(np.asarray(probes.matrix, float), members, strict=True):
        sums = [c * z for c, z in zip(row, zs, strict=True)]
        assert_rounded_once(member, np.asarray(moved, np.float64) + sum(sums), sum(np.abs(x) for x in sums))


@each_implementation
def test_stochastic_rounding_takes_its_bits_from_the_first_key(implementation):
    w, terms = weights((7, 13), jnp.bfloat16), random_terms(1, 2)
    wide, _ = run(w.astype(jnp.float32), terms, implementation=implementation)
    word, second = words(terms.keys[0, 0], w.shape)
    high, low = (np.asarray(half) for half in bits.rounding_pair(jnp.asarray(word)))
    expected = (np.asarray(wide).view(np.uint32) + np.where(second, low, high)) >> 16
    rounded, _ = run(w, terms, rounding=bits.round_stochastically, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(rounded).view(np.uint16), expected)


@each_implementation
@pytest.mark.parametrize("shape", [(4, 512), (2, 3, 8), (5, 129)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_a_page_as_on_its_own(implementation, shape, dtype):
    size, offset = int(np.prod(shape)), 2 * ALIGNMENT
    page = weights((6 * ALIGNMENT,), dtype)
    options = {"rounding": bits.round_stochastically, "implementation": implementation}
    terms, probes = random_terms(1, 2), random_probes(2, 1)
    on_its_own = run(page[offset : offset + size].reshape(shape), terms, probes, **options)
    after = jax.jit(partial(perturb_in_page, offset=offset, shape=shape, **options))
    moved, members = after(page, terms=terms, probes=probes)
    assert_same_bits((moved[offset : offset + size].reshape(shape), members), on_its_own)
    room = -(-size // ALIGNMENT) * ALIGNMENT
    assert_same_bits(moved[:offset], page[:offset])
    assert_same_bits(moved[offset + room :], page[offset + room :])
    same, only_probes = after(moved, terms=None, probes=probes)
    assert_same_bits((same, only_probes), (moved, members))
    only_moved, none = after(page, terms=terms, probes=None)
    assert none is None
    assert_same_bits(only_moved[offset : offset + size], moved[offset : offset + size])


def test_offsets_beyond_two_billion_elements_do_not_wrap():
    """Looked at in the program: such a page has 4 GB."""
    page = jax.ShapeDtypeStruct(((1 << 31) + 4 * ALIGNMENT,), jnp.bfloat16)
    after = partial(perturb_in_page, offset=(1 << 31) + ALIGNMENT, shape=(8, 256), implementation="xla")
    program = jax.make_jaxpr(lambda page, terms: after(page, terms=terms)[0])(page, random_terms(1, 1))
    (write,) = (eqn for eqn in program.eqns if eqn.primitive.name == "dynamic_update_slice")
    assert [int(start.val) for start in write.invars[2:]] == [(1 << 31) // ALIGNMENT + 1, 0]


@each_implementation
def test_a_page_within_vmap_stays_one_page(implementation):
    """As in a visit: members are counted by vmap, and the page is moved once for all of them."""
    page, terms, probes = weights((2 * ALIGNMENT,)), random_terms(1, 1), random_probes(2, 1)
    after = partial(perturb_in_page, page, 0, (4, 512), terms, probes, implementation=implementation)

    def one(member):
        moved, members = after()
        return members[member], moved

    members, moved = jax.jit(jax.vmap(one, out_axes=(0, None)))(jnp.arange(2))
    assert_same_bits((moved, members), after())


@pytest.mark.parametrize(("offset", "length"), [(100, 4096), (2048, 4096), (0, 4095)])
def test_an_array_that_does_not_lie_in_its_page_is_refused(offset, length):
    with pytest.raises(ValueError, match="multiples of 2048"):
        perturb_in_page(jnp.zeros(length), offset, (3, 1000), random_terms(1, 1))


# --- against one another ----------------------------------------------------------------------------------------------

CASES = [  # a padded array, one of three whole programs, a scalar's; updates, directions and members
    ((5, 129), 1, 1, 2),
    ((3, 512), 2, 3, 3),
    ((2, 3, 6), 1, 2, 9),
]


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("case", "dtype", "pair", "rounding"),
    [
        (CASES[i % 3], *rest)
        for i, rest in enumerate(itertools.product(DTYPES, PAIRS, ROUNDINGS))
        if rest[0] != jnp.float32 or rest[2] is bits.round_to_nearest  # float32 is not rounded
    ],
)
def test_kernel_equals_xla_in_every_bit(implementation, case, dtype, pair, rounding):
    shape, updates, directions, members = case
    w = jnp.asarray(RNG.normal(size=shape) * 10.0 ** RNG.uniform(-7, 1, shape), dtype)  # fp16 subnormals among them
    arguments = w, random_terms(updates, directions, decay=pair is bits.normal_pair), random_probes(members, directions)
    of = {"pair": pair, "rounding": rounding}
    assert_same_bits(run(*arguments, **of, implementation=implementation), run(*arguments, **of, implementation="xla"))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("implementation", ["mosaic", "mosaic_portable"])
@pytest.mark.parametrize("pair", PAIRS)
def test_kernel_equals_xla_on_sixteen_million_words(implementation, pair):
    """Every radius and every angle more than a hundred times."""
    w, probes = jnp.zeros((16384, 2048)), Probes(keys(1), jnp.ones((1, 1)))
    assert_same_bits(*(run(w, None, probes, pair=pair, implementation=name) for name in (implementation, "xla")))


# --- laws -------------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_and_probes_at_once_equal_one_by_one(implementation, dtype):
    w, terms, probes = weights((7, 13), dtype), random_terms(3, 2), random_probes(2, 2)
    step = partial(run, rounding=bits.round_stochastically, implementation=implementation)
    at_once = step(w, terms, probes)
    moved = w
    for u in range(3):
        assert_same_bits(moved, step(w, terms._replace(used=jnp.int32(u)))[0])  # the first so many
        moved, none = step(moved, jax.tree.map(lambda x, u=u: x[u : u + 1], terms))
        assert none is None
    assert_same_bits(at_once, step(moved, None, probes))


@each_implementation
@pytest.mark.parametrize(
    ("shape", "axis", "cuts"),
    [((11, 23), 0, (0, 4, 11)), ((11, 23), 1, (0, 5, 14, 23)), ((3, 7, 6), 1, (0, 2, 7)), ((13,), 0, (0, 3, 13))],
)
def test_shards_equal_the_whole(implementation, shape, axis, cuts):
    w, terms, probes = weights(shape, jnp.bfloat16), random_terms(1, 2), random_probes(2, 2)
    step = partial(run, terms=terms, probes=probes, pair=bits.rademacher_pair, rounding=bits.round_stochastically)
    pieces = []
    for start, end in itertools.pairwise(cuts):
        offset = tuple(start if a == axis else 0 for a in range(len(shape)))
        piece = jax.lax.slice_in_dim(w, start, end, axis=axis)
        pieces.append(step(piece, shard=Shard(offset, shape), implementation=implementation))
    moved, members = zip(*pieces, strict=True)
    whole = step(w, implementation="xla")
    assert_same_bits(whole, (jnp.concatenate(moved, axis), jnp.concatenate(members, axis + 1)))


@each_implementation
def test_shards_at_traced_offsets_share_one_program(implementation):
    """As inside shard_map; a traced offset along the last axis is a multiple of 4."""
    w, terms = weights((3, 8, 16)), random_terms(1, 2)
    whole, _ = run(w, terms, implementation="xla")
    run(w, terms, implementation=implementation)  # the first interpreted kernel changes JAX's configuration
    traces = []

    @jax.jit
    def piece(row, column):
        traces.append(1)
        part = jax.lax.dynamic_slice(w, (0, row, column), (3, 3, 6))
        return perturb(part, terms, shard=Shard((0, row, column), w.shape), implementation=implementation)[0]

    for row, column in ((0, 8), (5, 4)):
        expected = whole[:, row : row + 3, column : column + 6]
        assert_same_bits(piece(jnp.int32(row), jnp.int32(column)), expected)
    assert len(traces) == 1


@each_implementation
def test_an_address_beyond_4_billion_elements(implementation):
    shard = Shard((2**25, 64), (2**26, 4096))
    probes = Probes(keys(1), jnp.ones((1, 1)))
    _, members = run(jnp.zeros((3, 9)), None, probes, shard=shard, implementation=implementation)
    np.testing.assert_array_equal(members[0], noise(bits.normal_pair, probes.keys[0], (3, 9), start=shard.start))


@each_implementation
@pytest.mark.parametrize("shape", [(9, 131), (129,)])
def test_nothing_leaks_from_element_to_element(implementation, shape):
    """What is not finite stays where it is, and memory that held NaN does not show in padded programs."""
    terms, probes = random_terms(1, 2), random_probes(2, 2)
    jax.block_until_ready(jnp.full((3, 8192), jnp.nan, jnp.bfloat16))  # freed here, and so the next to be used
    w = weights(shape, jnp.bfloat16)
    poisoned = w.at[(-1,) * w.ndim].set(jnp.nan).at[(2,) * w.ndim].set(jnp.inf)
    clean, dirty = (run(x, terms, probes, implementation=implementation) for x in (w, poisoned))
    hit = np.asarray(~jnp.isfinite(poisoned))
    assert hit.sum() == 2
    for x, y in zip(clean, dirty, strict=True):
        assert np.isfinite(np.asarray(x, np.float32)).all()
        np.testing.assert_array_equal(~np.isfinite(np.asarray(y, np.float32)), np.broadcast_to(hit, y.shape))
        assert_same_bits(x[..., ~hit], y[..., ~hit])


@each_implementation
def test_vmap_equals_a_loop(implementation):
    w, terms, probes = weights((2, 5, 7), jnp.bfloat16), random_terms(1, 2), random_probes(2, 2)
    terms = terms._replace(keys=keys(2, 1, 2))  # other keys for each array, the same coefficients
    axes = (0, Terms(0, None, None), None)
    step = partial(run, rounding=bits.round_stochastically, implementation=implementation)
    batched = jax.vmap(step, in_axes=axes)(w, terms, probes)
    for i in range(2):
        alone = step(w[i], terms._replace(keys=terms.keys[i]), probes)
        assert_same_bits(alone, jax.tree.map(lambda x, i=i: x[i], batched))


@each_implementation
def test_zero_keeps_its_sign_in_every_program(implementation):
    """Where both the weight and its change are zeros of either sign."""
    w, probes = jnp.array([-0.0, 0.0] * 8), Probes(keys(1), jnp.zeros((2, 1)))
    eager = perturb(w, None, probes, pair=bits.rademacher_pair, implementation="xla")
    assert_same_bits(eager, run(w, None, probes, pair=bits.rademacher_pair, implementation=implementation))


def test_the_automatic_choice_equals_xla():
    arguments = weights((7, 13), jnp.bfloat16), random_terms(2, 2), random_probes(2, 2)
    assert_same_bits(run(*arguments), run(*arguments, implementation="xla"))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_arrays(shape):
    moved, members = run(weights(shape), random_terms(1, 1), random_probes(2, 1))
    assert moved.shape == shape and members.shape == (2, *shape)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((jnp.zeros(2, jnp.int32),), {}, NotImplementedError, r"int32\[2\]"),
        ((jnp.zeros(2), Terms(keys(1, 2), jnp.ones((1, 3)))), {}, ValueError, r"keys\[1, 2, 2\], coefs\[1, 3\]"),
        ((jnp.zeros(2), Terms(keys(2), jnp.ones(2))), {}, ValueError, r"expected \[U, K, 2\]"),
        ((jnp.zeros(2), Terms(keys(0, 1), jnp.ones((0, 1)))), {}, ValueError, "none of them empty"),
        ((jnp.zeros(2), Terms(keys(1, 1), jnp.ones((1, 1)), jnp.ones(2))), {}, ValueError, r"decay\[2\]"),
        ((jnp.zeros(2), Terms(keys(1, 1), jnp.ones((1, 1)), None, jnp.ones(2))), {}, ValueError, r"used\[2\]"),
        ((jnp.zeros(2), None, Probes(keys(2), jnp.ones((2, 1)))), {}, ValueError, r"keys\[2, 2\], matrix\[2, 1\]"),
        ((jnp.zeros(2), None, Probes(keys(1), jnp.ones((0, 1)))), {}, ValueError, "neither of them empty"),
        ((jnp.zeros(2),), {"implementation": "cuda"}, ValueError, "'cuda', expected None or one of 'mosaic'"),
        ((jnp.zeros((2, 4)),), {"shard": Shard((3, 0), (4, 4))}, ValueError, r"at \(3, 0\) does not lie within"),
        ((jnp.zeros((2, 4)),), {"shard": Shard((0, -4), (4, 8))}, ValueError, "does not lie within"),
        ((jnp.zeros((2, 4)),), {"shard": Shard((0,), (8,))}, ValueError, "expected one offset"),
        ((jnp.zeros((1, 1)),), {"shard": Shard((0, 0), (2**32, 1))}, ValueError, "too many rows"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=message):
        perturb(*arguments, **options)


@pytest.mark.skipif(ON_GPU, reason="a GPU has them")
@pytest.mark.parametrize("name", ["mosaic", "mosaic_portable"])
def test_a_kernel_asked_for_by_name_is_refused_with_the_reason(name):
    reason = "an NVIDIA GPU.* is .*cpu" if implementations.problem("interpret") is None else "jax 0.11.1"
    with pytest.raises(NotImplementedError, match=f"perturb by '{name}'.*({reason})"):
        perturb(jnp.zeros(3), random_terms(1, 1), implementation=name)


# --- without a GPU ----------------------------------------------------------------------------------------------------


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("name", "dtype", "pair", "rounding", "shape", "counts"),
    [  # updates, directions, members
        ("mosaic", jnp.bfloat16, bits.normal_pair, bits.round_stochastically, (64, 1024), (1, 1, 2)),
        ("mosaic", jnp.bfloat16, bits.normal_pair, bits.round_to_nearest, (5, 129), (2, 3, 9)),
        ("mosaic", jnp.float16, bits.rademacher_pair, bits.round_stochastically, (3, 512), (1, 1, 0)),
        ("mosaic", jnp.float32, bits.normal_pair, bits.round_to_nearest, (), (0, 1, 2)),
        ("mosaic_portable", jnp.bfloat16, bits.normal_pair, bits.round_stochastically, (3, 5, 6), (2, 1, 2)),
        ("mosaic_portable", jnp.float32, bits.rademacher_pair, bits.round_to_nearest, (64, 1024), (0, 2, 3)),
        ("mosaic", jnp.bfloat16, no_noise, bits.round_to_nearest, (64, 1024), (1, 1, 2)),
    ],
)
def test_kernels_lower_for_cuda(monkeypatch, name, dtype, pair, rounding, shape, counts):
    updates, directions, members = counts
    terms = random_terms(updates, directions) if updates else None
    terms = terms._replace(used=jnp.int32(2)) if updates > 1 else terms
    probes = random_probes(members, directions) if members else None
    monkeypatch.setattr(importlib.import_module("pallas_kernels.perturb"), "choose", lambda *_: name)
    program = jax.jit(partial(perturb, pair=pair, rounding=rounding, implementation=name))
    lowered = program.trace(weights(shape, dtype), terms, probes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 1


@pytest.mark.parametrize("implementation", KERNELS)
def test_slices_of_an_array_are_moved_apart(implementation):
    """In one program, which could give the kernel a part of the whole array's memory to change."""
    w, parts = weights((1200, 8)), [(0, 512), (512, 1200)]
    terms, probes = random_terms(1, 3), Probes(keys(3), coefficients(12, 3) * np.repeat(np.eye(3), 4, 0).astype("f4"))

    def moved(w, implementation):
        found = [
            perturb(w[a:b], terms, shard=Shard((a, 0), w.shape), implementation=implementation)[0] for a, b in parts
        ]
        members = [perturb(part, probes=probes, implementation=implementation)[1] for part in found]
        return w, jnp.concatenate(found), members

    assert_same_bits(*(jax.jit(moved, static_argnums=1)(w, name) for name in (implementation, "xla")))


# --- shapes and benchmark ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "size"),  # millions in a block, billions in all
    [
        ("opt-1.3b", 50.36, 1.316),
        ("opt-13b", 314.6, 12.85),
        ("opt-30b", 616.7, 29.97),
        ("opt-66b", 1019.3, 65.72),
        ("opt-175b", 1812.1, 174.6),
        ("llama-7b", 202.4, 6.738),
        ("qwen3-8b", 192.9, 8.191),
    ],
)
def test_specs_have_the_published_sizes(name, block, size):
    spec = specs.MODELS[name]
    assert spec.name == name and spec.heads * spec.head_size == spec.hidden
    assert spec.block_size == pytest.approx(block * 1e6, rel=5e-4)
    assert spec.size == pytest.approx(size * 1e9, rel=5e-4)


def test_a_shape_by_name():
    assert specs.shape_of("opt-1.3b.embedding") == (50272, 2048)
    for name, known in (("gpt-2.fc1", "opt-1.3b, opt-2.7b"), ("llama-7b.fc1", "gate, up, down")):
        with pytest.raises(ValueError, match=f"'{name}'.*{known}"):
            specs.shape_of(name)


def test_the_benchmark_writes_a_table(tmp_path, capsys):
    path = tmp_path / "bench.json"
    files = ["--json", str(path), "--plot", str(path.with_suffix(".png"))]
    ops = {"dual": 6, "codes_1_dual_rademacher": 5, "decode_int8": 3, "rows_2_members": 3}  # with bytes a weight
    bench.main(["--op", *ops, "--size", "8192", "--calls", "1", *files])
    printed, measured = capsys.readouterr().out, json.loads(path.read_text())
    for row in measured["rows"]:
        assert row["bytes"] == ops[row["op"]] * 8192 and (row["differ"] == 0 or row["implementation"] == "textbook")
    assert {row["op"] for row in measured["rows"]} == set(ops)
    rows = {row["implementation"]: row for row in measured["rows"] if row["op"] == "dual"}
    assert {"xla", "textbook"} <= set(rows) and rows["xla"]["differ"] == 0
    assert all(row["ms"] > 0 and row["compile_s"] > 0 for row in rows.values())
    assert measured["versions"]["jax"] == jax.__version__ and "dual" in printed and jax.__version__ in printed
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("option", [["--op", "triple"], ["--shape", "opt-13b.up"], ["--size", "0"]])
def test_the_benchmark_refuses_what_it_does_not_know(option, capsys):
    with pytest.raises(SystemExit):
        bench.main(option)
    assert option[1] in capsys.readouterr().err
