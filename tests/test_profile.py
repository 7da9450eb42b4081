"""Where a step's time goes: the parts against a grid, programs' scopes against XLA's own text, runs on the CPU."""

import json
import math
import random
import re

import jax
import jax.numpy as jnp
import pytest

from zo2jax import cli
from zo2jax.bench import profile as profiling
from zo2jax.bench.planes import Operation, _programs, _scopes, operations, part_of
from zo2jax.bench.profile import draw, lanes_table, parts_table, profile, summary, traced
from zo2jax.bench.timeline import COMPUTE, PARTS, Event, Window, parts
from zo2jax.marks import STEP
from zo2jax.plan.machine import cache_file, known

# --- moments ----------------------------------------------------------------------------------------------------------


def by_grid(events, window):
    """Each unit of time by itself."""
    order = {lane: i for i, lane in enumerate(("upload", "write-back", "disk", "wait"))}
    total = dict.fromkeys(PARTS, 0.0)
    for at in range(window.start, window.end):
        here = [e for e in events if e.start <= at and e.start + e.duration >= at + 1]
        computed = [e for e in here if e.lane in COMPUTE]
        if computed:
            total[max(computed, key=lambda e: e.start).lane] += 1
        elif here:
            total[min(here, key=lambda e: order[e.lane]).lane] += 1
        else:
            total["Python"] += 1
    return total


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_those_of_each_moment_and_add_up(seed):
    draws = random.Random(seed)
    starts = draws.sample(range(120), 25)  # of operations that begin at once either may be the last one
    events = [Event(draws.choice(PARTS[:-1]), start, draws.choice([0, 1, 2, 5, 30])) for start in starts]
    window = Window(20, 100)
    found = parts(events, window)
    assert found == by_grid(events, window)
    assert math.isclose(sum(found.values()), 80)


def test_of_a_loop_and_what_is_in_it_the_inner_one_counts():
    events = [Event("perturb", 0.0, 10.0), Event("update", 2.0, 3.0), Event("forward", 6.0, 1.0)]
    found = parts(events, Window(0.0, 12.0))
    assert {part: ms for part, ms in found.items() if ms} == {"forward": 1, "perturb": 6, "update": 3, "Python": 2}


def test_a_step_without_events_is_python():
    assert parts([], Window(1.0, 3.0))["Python"] == 2.0


# --- traces -----------------------------------------------------------------------------------------------------------


def scoped(x):
    with jax.named_scope("perturb"):
        y = jnp.sin(x) + 1
        with jax.named_scope("update"):
            z = jax.lax.fori_loop(0, 3, lambda i, z: jnp.cos(z) * 0.5 + x, x)
    return y @ x, z


def number(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(field, value):
    return number(field << 3 | 2) + number(len(value)) + value


@pytest.fixture(scope="module")
def program():
    compiled = jax.jit(scoped).lower(jnp.ones((64, 64))).compile()
    (module,) = compiled.runtime_executable().hlo_modules()
    return compiled.as_text(), module.as_serialized_hlo_module_proto()


def test_scopes_of_instructions_are_those_that_xla_prints(program):
    text, proto = program
    found = _scopes(memoryview(proto))
    printed = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', text, re.MULTILINE))
    assert len(printed) > 5 and printed.items() <= found.items()
    assert {part_of(scope) for scope in found.values()} == {"forward", "perturb", "update"}
    instructions = re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = ", text, re.MULTILINE)
    assert set(instructions) == set(found)


def instruction(name, scope="", calls=None):
    fields = message(1, name) + (message(7, message(2, scope)) if scope else b"")
    return message(2, fields + (b"" if calls is None else message(38, number(calls))))


def test_a_fusion_without_a_scope_has_that_of_its_root():
    inner = instruction(b"a", b"f/update/mul") + instruction(b"b", b"f/perturb/add") + instruction(b"c")
    outer = instruction(b"fusion", calls=300) + instruction(b"known", b"f/dot", calls=300) + instruction(b"copy")
    inner, outer = (message(3, body + number(5 << 3) + number(at)) for body, at in ((inner, 300), (outer, 1)))
    found = _scopes(memoryview(message(1, b"jit_f") + inner + outer))
    assert (found["fusion"], found["known"], found["copy"]) == ("f/perturb/add", "f/dot", "")


def quoted(data):
    return "".join(f"\\{byte:03o}" for byte in data)


GPU = """
planes {{ name: "/host:CPU" lines {{ id: 1 name: "python" timestamp_ns: 1000000
    events {{ metadata_id: 1 duration_ps: 9000000000 }} events {{ metadata_id: 2 offset_ps: 1000000 duration_ps: 5 }}
    events {{ metadata_id: 3 offset_ps: 1000000 duration_ps: 5 stats {{ metadata_id: 1 str_value: "{op}" }} }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "zo2jax.step" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "wait" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "{op}" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }} }}
planes {{ name: "/host:metadata" event_metadata {{ key: 7 value {{ id: 7 name: "jit_scoped(7)"
    stats {{ metadata_id: 1 bytes_value: "{proto}" }} }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_proto" }} }} }}
planes {{ name: "/device:GPU:0"
  lines {{ id: 1 name: "Stream #13(MemcpyH2D)" timestamp_ns: 2000000 events {{ metadata_id: 1 duration_ps: 2000000 }} }}
  lines {{ id: 2 name: "Stream #14(Compute)" timestamp_ns: 3000000
    events {{ metadata_id: 2 duration_ps: 4000000 stats {{ metadata_id: 1 str_value: "{op}" }}
      stats {{ metadata_id: 2 int64_value: 7 }} }}
    events {{ metadata_id: 2 offset_ps: 5000000 duration_ps: 4000000 stats {{ metadata_id: 1 str_value: "{op}" }}
      stats {{ metadata_id: 3 str_value: "jit_scoped" }} stats {{ metadata_id: 2 str_value: "8" }} }}
    events {{ metadata_id: 3 offset_ps: 9000000 duration_ps: 4000000 }}
    events {{ metadata_id: 2 offset_ps: 14000000 duration_ps: 4000000
      stats {{ metadata_id: 4 str_value: "jit(f)/update/mul" }} }} }}
  lines {{ id: 3 name: "Stream #15" timestamp_ns: 4000000 events {{ metadata_id: 4 duration_ps: 1000000 }} }}
  lines {{ id: 4 name: "XLA Ops" timestamp_ns: 1 events {{ metadata_id: 2 duration_ps: 7 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "MemcpyH2D" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "a_kernel_of_cublas" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "{kernel}" }} }}
  event_metadata {{ key: 4 value {{ id: 4 name: "MemcpyD2H" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "program_id" }} }}
  stat_metadata {{ key: 3 value {{ id: 3 name: "hlo_module" }} }}
  stat_metadata {{ key: 4 value {{ id: 4 name: "tf_op" }} }} }}
"""


def test_kernels_of_a_gpu_are_what_their_instructions_are(program, tmp_path):
    """By the program's number, by its name, and by the kernel's own name; by the trace itself if there is no program.

    What the host does for an instruction is none of it.
    """
    proto = message(1, program[1])
    op = next(name for (_, name), scope in _programs(space(proto)).items() if "." in name and "update" in scope)
    text = GPU.format(op=op, proto=quoted(proto), kernel=re.sub(r"\W", "_", op))
    (tmp_path / "x.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    found = [(o.part, round(o.start, 6), round(o.duration, 6)) for o in operations(tmp_path / "x.pb")]
    assert found == [
        (STEP, 1.0, 9.0),
        ("wait", 1.001, 0.0),
        ("upload", 2.0, 0.002),
        *[("update", 3.0 + at, 0.004) for at in (0.0, 0.005, 0.009, 0.014)],
        ("write-back", 4.0, 0.001),
    ]


def space(proto):
    metadata = message(5, message(6, proto)) + number(1 << 3) + number(7)
    return memoryview(message(1, message(2, b"/host:metadata") + message(4, message(2, metadata))))


CPU = """
planes { name: "/host:CPU"
  lines { id: 1 name: "python" timestamp_ns: 1000000
    events { metadata_id: 1 duration_ps: 2000000000 stats { metadata_id: 1 str_value: "dot.1" }
      stats { metadata_id: 2 int64_value: 5 } }
    events { metadata_id: 1 offset_ps: 3000000000 duration_ps: 1000000000
      stats { metadata_id: 1 str_value: "dot.1" } stats { metadata_id: 2 int64_value: 6 } }
    events { metadata_id: 3 offset_ps: 5000000000 duration_ps: 2000000000
      stats { metadata_id: 4 int64_value: 4096 } } }
  lines { id: 2 name: "another thread" timestamp_ns: 4000000
    events { metadata_id: 2 duration_ps: 9 stats { metadata_id: 3 int64_value: 5 } } }
  event_metadata { key: 1 value { id: 1 name: "dot.1" } }
  event_metadata { key: 2 value { id: 2 name: "end: dot.1" } }
  event_metadata { key: 3 value { id: 3 name: "disk read" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } stat_metadata { key: 2 value { id: 2 name: "_p" } }
  stat_metadata { key: 3 value { id: 3 name: "_c" } } stat_metadata { key: 4 value { id: 4 name: "nbytes" } } }
"""


def test_operations_of_a_cpu_end_where_another_thread_ends_them(tmp_path):
    (tmp_path / "x.pb").write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(CPU))
    assert operations(tmp_path / "x.pb") == [
        Operation("forward", 1.0, 3.0, "dot.1"),
        Operation("forward", 4.0, 1.0, "dot.1"),
        Operation("disk read", 6.0, 2.0, "disk read", "", 4096),
    ]


def test_a_trace_in_which_nothing_ran_is_refused(tmp_path):
    (tmp_path / "x.pb").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing that ran on a device"):
        operations(tmp_path / "x.pb")


# --- numbers ----------------------------------------------------------------------------------------------------------


HAPPENED = [
    *[Operation(STEP, start, 10.0, STEP) for start in (0.0, 10.0)],
    Operation("forward", 1.0, 4.0, "dot", "f/dot"),
    Operation("upload", 4.0, 2.0, "MemcpyH2D"),
    Operation("write-back", 5.0, 2.0, "MemcpyD2H"),
    Operation("disk read", 8.0, 4.0, "disk read", nbytes=6),
    Operation("update", 13.0, 6.0, "fold", "f/update/fold"),
]


def test_numbers_are_those_of_an_average_step():
    found = summary(HAPPENED, [0.75, 0.25])
    expected = {"forward": 3.0, "update": 1.5, "upload": 0.75, "write-back": 0.75, "disk": 2.0, "wait": 0.0}
    assert {part: found["parts_ms"][part] for part in expected} == expected
    assert sum(found["parts_ms"].values()) == found["ms"] == 10.0
    busy = {lane: round(figures["busy_ms"], 6) for lane, figures in found["lanes"].items()}
    assert busy == {"upload": 1.5, "write-back": 1.5, "link": 2.25, "disk": 2.0, "compute": 4.5}
    assert found["operations"]["update"] == [{"name": "fold", "scope": "f/update/fold", "ms": 1.5, "count": 0.25}]
    assert [o["count"] for o in found["operations"]["disk"]] == [0.75]


def test_a_trace_that_lacks_a_step_is_refused():
    with pytest.raises(ValueError, match="shows 2 steps, expected 3"):
        summary(HAPPENED, [0.5, 0.25, 0.25])


def test_of_each_part_ten_operations_are_named():
    work = [Operation("forward", i, 0.01 * i, f"dot.{i}") for i in range(1, 15)]
    found = summary([Operation(STEP, 0.0, 20.0, STEP), *work], [1.0])["operations"]["forward"]
    assert [o["name"] for o in found] == [f"dot.{i}" for i in range(14, 4, -1)]


@pytest.mark.parametrize(
    ("overrides", "asked", "number", "refresh"),
    [
        (["direction=normal"], 3, 3, None),
        (["direction=lowrank", "refresh=0"], 3, 3, None),
        (["direction=lowrank", "refresh=50"], 1, 2, 2),
        (["direction=lowrank", "refresh=3"], 4, 6, 3),
        (["direction=normal", "format=int8", "refresh=8"], 3, 8, 8),
    ],
)
def test_steps_are_whole_periods_whose_folds_count_as_often_as_they_are(overrides, asked, number, refresh):
    config = profiling.load_config("stories260k_shakespeare_factored", ["model=m", *overrides])
    steps = profiling._steps(config, asked)
    assert (steps.number, steps.refresh, len(steps.weights)) == (number, refresh, number)
    assert math.isclose(sum(steps.weights), 1)
    if refresh is not None:
        folds = sum(weight for i, weight in enumerate(steps.weights) if (i + 1) % refresh == 0)
        assert math.isclose(folds, 1 / config.refresh)


FOUND = summary(HAPPENED, [0.5, 0.5]) | {
    "target": "config",
    "overrides": ["tier=disk"],
    "parameters": 10**9,
    "blocks": {"device": 1, "disk": 2},
    "device": "H200",
    "versions": {"jax": "0"},
    "steps": 2,
    "untraced_ms": 9.0,
}
for lane, amount, ceiling in (("upload", 2**20, 2**31), ("compute", 5e9, 2e12), ("link", None, 1.0)):
    FOUND["lanes"][lane] |= {"amount": amount, "ceiling_s": ceiling}


def test_tables_have_parts_rates_and_floors(capsys):
    console = profiling.Console(width=200)
    console.print(parts_table(FOUND), lanes_table(FOUND))
    rows = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    table = {row[0]: row[1:] for row in rows}
    assert table["forward"] == ["2.00", "20.0"] and table["all"] == ["10.00", "100.0"]
    assert table["compute"] == ["5.00", "50.0", "5 GFLOP", "1 TFLOP/s", "50.0", "25.0"]
    assert table["upload"][2:] == ["1 MiB", "1000 MiB/s", "48.8", "4.9"]
    assert table["link"][2:] == ["-"] * 4


def test_the_picture_is_in_the_format_that_its_name_says(tmp_path):
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        draw(FOUND, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


# --- runs -------------------------------------------------------------------------------------------------------------


PAGES = 7 * 2048 * 4
"""Bytes of the matrices of the layer, of 4 x 2048 each; the embedding, which is the head too, stays."""


@pytest.fixture
def h200(monkeypatch):
    """What the machine is taken for."""
    monkeypatch.setattr(profiling, "this_machine", lambda: known("h200"))
    return known("h200")


@pytest.fixture
def text(tiny_folder, text_file):
    return [f"model={tiny_folder}", f"data={text_file}", "tokens=16", "batch=2", "dtype=float32"]


@pytest.mark.usefixtures("quick_compilation")
def test_a_dense_run_perturbs_updates_and_moves_its_blocks(text, h200):
    found = traced("stories260k_shakespeare", [*text, "tier=host"], 2, None)
    assert min(found["parts_ms"][part] for part in (*COMPUTE, "upload", "write-back", "Python")) > 0
    assert found["parts_ms"]["disk"] == 0
    assert sum(found["parts_ms"].values()) == pytest.approx(found["ms"])
    lanes = found["lanes"]
    assert lanes["upload"]["amount"] == lanes["write-back"]["amount"] == PAGES
    assert lanes["link"]["busy_ms"] <= lanes["upload"]["busy_ms"] + lanes["write-back"]["busy_ms"] + 1e-9
    assert lanes["compute"]["amount"] > 2 * 2 * 32 * found["parameters"]  # two probes of 32 tokens
    assert [figures["ceiling_s"] for figures in lanes.values()] == [
        h200.up,
        h200.down,
        h200.both,
        h200.disk,
        h200.products,
    ]
    scopes = {part: [o["scope"] for o in found["operations"][part]] for part in COMPUTE}
    assert all(part_of(scope) == part for part in COMPUTE for scope in scopes[part])
    assert found["blocks"] == {"device": 2, "host": 2} and found["trace"] is None


@pytest.mark.usefixtures("quick_compilation")
def test_a_factored_run_reads_files_and_folds_as_seldom_as_it_does(text, h200, monkeypatch):
    monkeypatch.setattr(profiling, "_LARGEST", 1000)
    overrides = [*text, "tier=disk", "refresh=20"]
    found = traced("stories260k_shakespeare_factored", overrides, 2, None)
    assert min(found["parts_ms"][part] for part in COMPUTE) > 0
    assert sum(found["parts_ms"].values()) == pytest.approx(found["ms"])
    lanes = found["lanes"]
    assert "link" not in lanes and lanes["disk"]["busy_ms"] > 0 and lanes["disk"]["ceiling_s"] == h200.disk_read
    matrices = 4 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16)  # a fold moves them alone, but files as a whole
    again = 4 * 2048 * 4  # attention, which had been read ahead
    assert lanes["upload"]["amount"] == pytest.approx(PAGES + (matrices + again) / 20)
    assert lanes["disk"]["amount"] == pytest.approx(PAGES + (2 * PAGES + again) / 20)
    folds = [o["count"] for o in found["operations"]["update"] if "_folded" in o["scope"]]
    assert max(folds) == pytest.approx((7 + 1) / 20)  # once for each matrix


def test_bad_input_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "measured", lambda *_, **__: pytest.fail("something ran"))
    missing = str(tmp_path / "no" / "file")
    (tmp_path / "file").touch()
    for arguments, said in (
        (["nonsense"], "no config file 'nonsense'"),
        (["demo", "stepz=1"], "unknown config key 'stepz'"),
        (["demo", "--steps", "0"], "steps is 0, expected 1 or more"),
        (["demo", "--json", missing], f"{missing} cannot be written"),
        (["demo", "-o", missing], f"{missing} cannot be written"),
        (["demo", "--trace", missing], f"trace is {missing}: expected a folder"),
        (["demo", "--trace", str(tmp_path / "file")], "expected a folder"),
    ):
        assert cli.main(["profile", *arguments]) == 1
        assert said in capsys.readouterr().err


def test_what_the_run_refuses_is_said():
    with pytest.raises(RuntimeError, match=r"measurement of 'profile' failed: .*no/such/model"):
        profile("stories260k_shakespeare", ["model=no/such/model", "data=x"])


def test_the_command_line_from_a_config_to_its_files(text, tmp_path, monkeypatch, capsys):
    """In a process of its own; the config's directory is not touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZO2JAX_CACHE", str(tmp_path / "cache"))
    known("h200").save(cache_file(jax.devices()[0].device_kind))
    files = ["--trace", "trace", "--json", "a.json", "-o", "a.png"]
    assert cli.main(["profile", "stories260k_shakespeare", *text, "directory=mine", "--steps", "2", *files]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert sum(found["parts_ms"].values()) == pytest.approx(found["ms"]) and found["steps"] == 2
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert str(trace) in out and f"xprof --logdir {tmp_path / 'trace'}" in out and "picture: a.png" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "cache", "trace"]
