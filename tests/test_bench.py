"""The benchmarks run, their arithmetic is right, and they say why if they do not."""

import importlib
import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from zo2jax import cli
from zo2jax.bench import (
    SHAPES,
    Work,
    ablation,
    commands,
    keeping,
    peers,
    process,
    random_model,
    rates,
    report,
    throughput,
)
from zo2jax.bench.ablation import rows
from zo2jax.bench.commands import run
from zo2jax.bench.peers import Peer, asked, measure_peer
from zo2jax.bench.step import WHAT, step
from zo2jax.bench.step import measure as measure_step
from zo2jax.bench.throughput import Setting, measure
from zo2jax.models.blocks import owned_shapes
from zo2jax.pages import Layout

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = Setting("opt-tiny", layers=1, tokens=8, steps=2)
MATRICES = 2 * (4 * 64 * 64 + 2 * 64 * 128 + 2 * 256 * 64 + 2050 * 64)
"""Bytes of opt-tiny's with one layer: attention, feed-forward, embedding and head, positions; bfloat16."""


@pytest.fixture
def in_this_process(monkeypatch):
    """Measurements are made here, where nothing is imported and compiled again."""

    def here(name, function, *arguments, env=None):
        return json.loads(json.dumps(function(*arguments)))

    for module in (ablation, commands):
        monkeypatch.setattr(module, "measured", here)


def arguments(*words):
    return cli._parse(["bench", *words])


# --- a step on the device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", WHAT)
def test_every_kind_of_step_is_measured(what):
    work = Work(tokens=8, steps=1)  # as in TINY, whose programs are compiled already
    if what in ("forward", "generate"):
        work = replace(work, rows=2, candidates=2)
    result = measure_step(what, "opt-tiny", 1, work)
    assert result["ms"] > 0 and result["first_call_s"] > 0
    assert result["parameters"] == 197568 and result["layers"] == 1
    json.dumps(result)


def test_shapes_have_the_parameters_of_their_models():
    """The published sizes, with an untied head."""
    for name, billions in {"llama-7b": 6.74, "opt-13b": 12.85 + 50272 * 5120 / 1e9}.items():
        config = SHAPES[name]
        shapes = owned_shapes(random_model(name, 1).blocks)
        layer = jax.tree.leaves((shapes["layers.0.attn"], shapes["layers.0.mlp"]))
        size = sum(leaf.size for leaf in layer) * config.layers + 2 * config.vocabulary * config.size
        assert size / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_table_of_steps_is_made_by_another_process(capsys):
    results = step("tiny", layers=1, work=Work(tokens=8, steps=1), what=("forward",))
    assert [r["what"] for r in results] == ["forward"]
    assert "forward" in capsys.readouterr().out


# --- other processes --------------------------------------------------------------------------------------------------


def test_a_measurement_that_breaks_off_shows_the_end_of_what_it_wrote():
    with pytest.raises(RuntimeError, match=r"(?s)'step' failed with status 1:.*ZeroDivisionError"):
        process.measured("step", divmod, 1, 0)


def test_the_environment_is_that_of_the_measurement():
    found = process.run("python", [sys.executable, "-c", "import os; print(os.environ['A'])"], env={"A": "7"})
    assert found == "7\n"


@pytest.mark.parametrize(
    ("lines", "gib"),
    [("", None), ("7, 1024", 1.0), ("7, 1024\n7, 512\n8, 9", 1.5), ("7, [N/A]", None), ("No running processes", None)],
)
def test_own_memory_among_the_processes_of_a_gpu(lines, gib):
    assert process.own_memory(lines, 7) == gib


# --- throughput -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tier", "moved", "on_disk"), [("host", MATRICES, 0), ("disk", MATRICES, MATRICES), ("device", 0, 0)]
)
def test_bytes_and_ratios_of_a_step(tmp_path, tier, moved, on_disk):
    found = measure(replace(TINY, tier=tier, directory=str(tmp_path)))
    assert found["up_gib"] * 2**30 == found["down_gib"] * 2**30
    assert found["up_gib"] * 2**30 == pytest.approx(moved, rel=0.02)  # matrices begin at multiples of 2048 elements
    assert sorted(found["times_ms"])[0] <= found["ms"] <= sorted(found["times_ms"])[-1]
    assert found["up_gib_s"] == pytest.approx(found["up_gib"] / found["ms"] * 1e3)
    assert found["tokens_per_s"] == pytest.approx(8 / found["ms"] * 1e3)
    for name, nbytes in (("link", moved), ("disk", on_disk)):
        if not nbytes:
            assert found[f"{name}_floor_ms"] is found[f"{name}_ratio"] is None
            continue
        floor = 2 * found["up_gib"] / found[f"{name}_both_gib_s"] * 1e3
        assert found[f"{name}_floor_ms"] == pytest.approx(floor)
        assert found[f"{name}_ratio"] == pytest.approx(found["ms"] / floor)
    operations = 2 * 2 * 8 * (4 * 64 * 64 + 2 * 64 * 128 + 256 * 64)  # two members, 8 tokens; but for attention
    assert found["compute_floor_ms"] * found["compute_tflops"] * 1e9 == pytest.approx(operations, rel=0.05)
    floors = {name: found[f"{name}_floor_ms"] or 0 for name in ("link", "disk", "compute")}
    assert found["floor_ms"] == floors[found["bound"]] == max(floors.values())
    assert found["floor_ratio"] == pytest.approx(found["ms"] / found["floor_ms"])
    assert not list(tmp_path.iterdir())


def test_throughput_prints_a_table_and_writes_all_numbers(tmp_path, capsys, in_this_process):
    words = ["--model", "opt-tiny", "--layers", "1", "--tokens", "8", "--steps", "2", "--prefetch", "2"]
    file = tmp_path / "found.json"
    run(arguments("throughput", *words, "--json", str(file)))
    found = json.loads(file.read_text())
    assert found["setting"] == vars(replace(TINY, prefetch=2))
    expected = {"device", "versions", "setting", "parameters", "kernels", "load_s", "first_step_s", "ms", "times_ms"}
    expected |= {"tokens_per_s", "peak_device_gib", "nvml_process_gib", "nvml_device_gib", "peak_host_gib"}
    expected |= {f"{way}_gib{per}" for way in ("up", "down") for per in ("", "_s")}
    expected |= {f"link_{name}" for name in ("up_gib_s", "down_gib_s", "both_gib_s", "floor_ms", "ratio", "share")}
    expected |= {f"disk_{name}" for name in ("read_gib_s", "both_gib_s", "floor_ms", "ratio")}
    expected |= {"compute_tflops", "compute_floor_ms", "compute_ratio", "floor_ms", "floor_ratio", "bound"}
    expected |= {f"expected_{name}" for name in ("ms", "peak_device_gib", "peak_host_gib")}
    expected |= {f"{name}_expected_ratio" for name in ("ms", "peak_device_gib", "peak_host_gib")}
    assert found["ms_expected_ratio"] == pytest.approx(found["expected_ms"] / found["ms"])
    assert set(found) == expected and len(found["times_ms"]) == 2
    assert "step / floor" in (out := capsys.readouterr().out) and "zo2" not in out.replace("zo2jax", "")


def test_a_factored_step_is_averaged_over_a_period():
    """The fold that is a part of it once in so many steps is every seventh of those that are timed."""
    times = [1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 8.0, 1.0]
    found = throughput._step_ms(times, replace(TINY, mode="factored", refresh=50))
    assert found == {"ms": 1.0 + 7.0 / 50, "plain_ms": 1.0, "fold_ms": 7.0}


@pytest.mark.slow
def test_a_factored_step_is_measured():
    found = measure(replace(TINY, mode="factored"), rates=False)
    assert found["up_gib"] > found["down_gib"] == 0 and len(found["times_ms"]) == 7
    assert found["ms"] == pytest.approx((49 * found["plain_ms"] + found["times_ms"][-1]) / 50)


def test_a_budget_is_left_to_the_plan(monkeypatch):
    asked_for = {}

    def plan(model, estimator, **options):
        asked_for.update(options)
        return throughput.Plan({"head": "host"}, options["prefetch"])

    monkeypatch.setattr(throughput, "plan", plan)
    setting = replace(TINY, device_memory="4GiB", prefetch=2, pinned=False)
    made = setting.plan(random_model("opt-tiny", 1))
    assert asked_for == {"tokens": 8, "rows": 1, "prefetch": 2, "tier": "host", "device_memory": "4GiB"}
    assert (made.tiers, made.prefetch, made.pinned, made.overlap) == ({"head": "host"}, 2, False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "opt-1b"}, "model is 'opt-1b', expected one of 1t, 500b, gpt-j-6b, gpt2"),
        ({"mode": "sparse"}, "mode is 'sparse', expected one of dense, factored"),
        ({"tier": "tape"}, "tier is 'tape', expected one of device, host, disk"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"layers": 0}, "layers is 0, expected 1 or more"),
        ({"prefetch": -1}, "prefetch is -1, expected 0 or more"),
        ({"directory": "no/such"}, "directory is no/such, expected a folder"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_the_mode_is_checked_by_the_command_line(capsys):
    with pytest.raises(SystemExit):
        arguments("throughput", "--model", "opt-tiny", "--mode", "sparse")
    assert "invalid choice: 'sparse'" in capsys.readouterr().err


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="4096 tokens do not fit"):
        measure(replace(TINY, tokens=4096))


def test_layouts_that_are_measured():
    """In order, until there are enough; a window of them at least; those without matrices take no part."""
    page = Layout((), (("float32", 2048),), ())
    sizes = [page, Layout((), (), ("bias",)), page, page, page]
    assert [len(rates.sample(sizes, total)) for total in (0, 2, 3 * 8192, 3 * 8192 + 1, 2**40)] == [3, 3, 3, 4, 4]
    assert rates.floor_ms(moved=3e9, rate=1.5e9) == 2000.0


# --- ablation ---------------------------------------------------------------------------------------------------------


def test_each_row_of_the_ablation_has_one_part_more():
    found = [row.setting for row in rows(replace(TINY, prefetch=2))]
    parts = [(one.pinned, one.prefetch, one.overlap, one.kernels) for one in found]
    assert parts[:5] == [
        (False, 0, False, False),
        (True, 0, False, False),
        (True, 2, False, False),
        (True, 2, True, False),
        (True, 2, True, True),
    ]
    assert rows(TINY)[4].setting == TINY and set(parts[5:]) == {parts[4]}


def test_rows_differ_from_the_one_that_they_are_compared_with_by_their_change():
    found = {row.name: row for row in rows(TINY)}
    changes = {}
    for row in list(found.values())[5:]:
        was = vars(found[row.against].setting)
        changes[row.name.strip()] = {key for key, value in vars(row.setting).items() if value != was[key]}
    assert changes == {
        "int8 codes instead": {"format", "refresh"},
        "low-rank directions instead": {"mode"},
        "low-rank, and int8 codes and products": {"format", "compute"},
    }
    assert [row.against for row in found.values()][5:7] == ["+ fused kernels"] * 2
    factored = replace(TINY, mode="factored", format="int8")
    assert [row.setting for row in rows(factored)][4:] == [factored]


def test_ablation_prints_a_table_and_writes_all_numbers(tmp_path, capsys, monkeypatch):
    found = measure(replace(TINY, steps=1), False)
    monkeypatch.setattr(ablation, "measured", lambda name, f, one, rates, env: found | {"setting": vars(one)})
    file = tmp_path / "found.json"
    words = ["--model", "opt-tiny", "--layers", "1", "--tokens", "8", "--steps", "1"]
    run(arguments("ablation", *words, "--json", str(file)))
    found = json.loads(file.read_text())
    assert [row["name"] for row in found["rows"]] == [row.name for row in rows(TINY)]
    assert found["setting"] == vars(replace(TINY, steps=1)) and found["rows"][-1]["setting"]["format"] == "int8"
    assert all(row["ms"] > 0 and "link_both_gib_s" not in row for row in found["rows"])
    assert found["device"] == jax.devices()[0].device_kind and found["setting"]["kernels"]
    out = capsys.readouterr().out
    assert "+ overlapped write-back" in out and "+ fused kernels" in out


@pytest.mark.slow
def test_every_row_of_the_ablation_runs():
    times = {row.name: measure(replace(row.setting, steps=1), False)["ms"] for row in rows(TINY)}
    assert len(times) == 8 and min(times.values()) > 0


def test_gains_are_against_the_row_without_the_change_and_the_first():
    given = (("a", 12.0, None), ("b", 6.0, "a"), ("c", 3.0, "b"), ("d", 4.0, "b"))
    times = [{"name": name, "ms": ms, "against": against} for name, ms, against in given]
    table = report.ablation_table(times, "title")
    assert [list(table.columns[i].cells) for i in (2, 3)] == [
        ["-", "2.00", "2.00", "1.50"],
        ["1.00", "2.00", "4.00", "3.00"],
    ]


def test_without_kernels_nothing_else_is_chosen(monkeypatch):
    module = importlib.import_module("pallas_kernels.perturb")
    monkeypatch.setattr(module, "choose", lambda operation, name, limit=None: name or "mosaic")
    with throughput._without_kernels():
        assert module.choose("perturb", None) == "xla" and module.choose("perturb", "interpret") == "interpret"
    assert module.choose("perturb", None) == "mosaic"


# --- peers ------------------------------------------------------------------------------------------------------------

TORCH = """
from types import SimpleNamespace
__version__, float16, float32 = "0", "half", "single"
taken = []
cuda = SimpleNamespace(
    is_available=lambda: True, synchronize=lambda: None, empty_cache=lambda: None,
    reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 3 * 2**30, max_memory_reserved=lambda: 4 * 2**30)
def get_default_dtype(): return "single"
def set_default_dtype(dtype): taken.append(dtype)
def randint(low, high, shape, device): return (high, shape)
"""
TRANSFORMERS = """
from types import SimpleNamespace
modeling_utils = SimpleNamespace()
def OPTConfig(**shape): return shape
"""
ZO2 = """
import torch
class OPTForCausalLM:
    def __init__(self, config):
        assert torch.taken == ["half"] and config["num_hidden_layers"] == 1 and not config["tie_word_embeddings"]
        self.steps = 0
    def named_parameters(self): return []
    def zo_init(self, config): self.ready = config["zo2"] and config["method"] == "mezo-sgd"
    def zo_train(self): self.training = self.ready
    def __call__(self, input_ids, labels):
        assert self.training and input_ids == labels == (256, (1, 8))
        self.steps += 1
        assert self.steps <= 1 + 3 + 2
        return 1.0
"""


@pytest.fixture
def checkout(tmp_path):
    """The surface of ZO2, PyTorch and transformers that the peer's script touches."""
    folder = tmp_path / "checkout"
    inner = folder / "zo2" / "model" / "huggingface" / "opt" / "mezo_sgd"
    inner.mkdir(parents=True)
    (folder / "zo2" / "__init__.py").write_text("def ZOConfig(**options): return options\n")
    (inner / "zo2.py").write_text(ZO2)
    (folder / "torch.py").write_text(TORCH)
    (folder / "transformers.py").write_text(TRANSFORMERS)
    return folder


def test_a_peer_is_run_on_the_same_shape_and_compared(tmp_path, checkout, capsys, monkeypatch):
    own = {"setting": vars(TINY), "parameters": 197568, "device": "d", "versions": {"jax": "0"}}
    own |= {"ms": 2.0, "tokens_per_s": 4000.0, "peak_device_gib": 1.5}
    monkeypatch.setattr(commands, "measured", lambda *arguments, env: own)
    file = tmp_path / "found.json"
    commands.throughput(TINY, Peer(str(checkout), sys.executable), str(file))
    peer = json.loads(file.read_text())["peer"]
    assert (peer["name"], peer["dtype"], len(peer["times_ms"])) == ("zo2", "float16", 2)
    assert (peer["peak_device_gib"], peer["reserved_gib"]) == (3.0, 4.0)
    lines = capsys.readouterr().out.splitlines()
    (memory,) = (line for line in lines if "peak device memory" in line)
    assert [cell.strip() for cell in memory.split("│")[2:5]] == ["1.50", "3.00", "2.00"]


def test_a_peer_that_fails_leaves_our_own_result(tmp_path, checkout, capsys, in_this_process):
    (checkout / "torch.py").write_text("raise ImportError('there is no PyTorch')")
    file = tmp_path / "found.json"
    words = ["--model", "opt-tiny", "--layers", "1", "--tokens", "8", "--steps", "1", "--json", str(file)]
    assert cli.main(["bench", "throughput", *words, "--peer", f"zo2={checkout}"]) == 1
    captured = capsys.readouterr()
    assert "step, ms" in captured.out
    assert "zo2jax: the peer zo2 failed with status 1" in captured.err and "there is no PyTorch" in captured.err
    found = json.loads(file.read_text())
    assert found["ms"] > 0 and "there is no PyTorch" in found["peer"]["error"]


@pytest.mark.parametrize(
    ("model", "peer", "message"),
    [
        ("opt-tiny", "zo2=/no/such/folder", "/no/such/folder holds no zo2/__init__.py"),
        ("opt-tiny", "zo3=/tmp", "peer 'zo3=/tmp': expected zo2=FOLDER"),
        ("opt-tiny", "zo2", "expected zo2=FOLDER"),
        ("tiny", "zo2={checkout}", "compared on OPT only, and the model is tiny"),
    ],
)
def test_peers_that_are_refused_before_anything_runs(checkout, capsys, model, peer, message):
    words = ["bench", "throughput", "--model", model, "--peer", peer.format(checkout=checkout)]
    assert cli.main(words) == 1
    assert message in capsys.readouterr().err


def test_a_peer_without_its_python(checkout):
    with pytest.raises(RuntimeError, match=r"cannot be run by no/such/python \(No such file"):
        measure_peer(Peer(str(checkout), "no/such/python"), TINY)
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float16"):
        Peer(str(checkout), "python", dtype="int8")


def test_the_peer_is_asked_for_the_published_shape():
    config = asked(Setting("opt-13b"))
    assert (config["hidden_size"], config["ffn_dim"], config["num_hidden_layers"]) == (5120, 20480, 40)
    assert (config["vocab_size"], config["num_attention_heads"], config["word_embed_proj_dim"]) == (50272, 40, 5120)
    assert asked(Setting("opt-13b", layers=2))["num_hidden_layers"] == 2
    assert peers.DTYPES[0] == "float16"


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    words = ["--model", "opt-tiny", "--json", str(tmp_path / "no" / "found.json")]
    for command in ("throughput", "ablation"):
        assert cli.main(["bench", command, *words]) == 1
        assert "expected a file in a folder that is there" in capsys.readouterr().err


# --- journal and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", pytest.param("factored", marks=pytest.mark.slow)])
def test_a_replay_is_measured_and_has_the_runs_bits(mode, tmp_path, capsys, in_this_process):
    command = ["replay", "--model", "opt-tiny", "--layers", "1", "--tokens", "8", "--mode", mode, "--refresh", "5"]
    run(arguments(*command, "--steps", "16", "--json", str(tmp_path / "numbers.json")))
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["differing"] == 0 and found["replay_s"] > 0
    once = 2 * found["parameters"] * 2 / found["copy_gib_s"] / 2**30 * 1e3
    assert found["memory_ms"] == pytest.approx(once / (5 if mode == "factored" else 64), rel=0.01)
    drawn = found["parameters"] / found["draws_per_s"] * 1e3
    assert found["generator_ms"] == (0 if mode == "factored" else pytest.approx(drawn))
    assert "steps replayed a second" in capsys.readouterr().out


def test_other_bits_are_counted():
    a = {"x": {"w": np.zeros(3, np.float32), "v": np.float32([0.0, np.nan])}}
    b = {"x": {"w": np.float32([0, -0.0, 0]), "v": np.float32([0.0, np.nan])}}
    assert (keeping._differing(a, a), keeping._differing(a, b)) == (0, 1)


def test_a_checkpoint_in_the_background_is_measured(tmp_path, capsys, in_this_process):
    command = ["checkpoint", "--model", "opt-tiny", "--layers", "1", "--tokens", "8", "--steps", "2"]
    run(arguments(*command, "--json", str(tmp_path / "numbers.json")))
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["during"] >= 6 and found["speed"] == found["ms"] / found["during_ms"]
    assert found["checkpoint_gib"] * 2**30 > found["parameters"] * 2
    assert "speed in that time" in capsys.readouterr().out
