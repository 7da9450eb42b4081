"""The suite goes on where it stopped, says what it leaves out, repeats a row by its command; comparisons of files."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from zo2jax import cli
from zo2jax.bench import cells, process, suite
from zo2jax.bench.baselines import Baseline
from zo2jax.bench.cells import Cell, all_cells, chosen_cells, flags_of, needs_of, setting_of
from zo2jax.bench.commands import setting_from
from zo2jax.bench.compare import compare
from zo2jax.bench.goal import Goal, measure_goal
from zo2jax.bench.peers import Peer
from zo2jax.bench.suite_report import line, markdown
from zo2jax.bench.throughput import Setting
from zo2jax.models.hub import load
from zo2jax.tasks.text import HeldOut, TextBatches

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = Setting("opt-tiny", layers=1, tokens=8, steps=2)
CELLS = [
    Cell("tiny/host", TINY),
    Cell("tiny/disk", replace(TINY, tier="disk")),
    Cell("tiny/adam", Baseline("opt-tiny", "adam", layers=1, tokens=8)),
    Cell("tiny/goal", Goal("dense")),
]
VERSIONS = {"jax": "1", "zo2jax": "2"}
PLENTY = {"device": 2**40, "host": 2**40, "disk": 0}


def found_of(what):
    """Numbers of the form that measurements have."""
    found = {"device": "gpu", "versions": VERSIONS, "setting": json.loads(json.dumps(asdict(what))), "ms": 4.0}
    if isinstance(what, Goal):
        goal = {"first_loss": 5.0, "target": 4.7, "loss": 4.6, "steps": 40, "seconds": 2.5, "curve": [[40, 2.5, 4.6]]}
        return found | goal
    found |= {"tokens_per_s": 2000.0, "peak_device_gib": 1.5, "peak_host_gib": 3.0}
    return found | ({"floor_ms": 2.0, "floor_ratio": 2.0, "bound": "link", "link_share": 0.5} if what == TINY else {})


@pytest.fixture
def machine(monkeypatch):
    """One that has plenty; what it measures is in a list of names, and may be an error."""

    class Machine:
        def __init__(self):
            self.says = {"device": "gpu", "versions": VERSIONS, "has": PLENTY}
            self.measured, self.errors, self.left = [], {}, []

        def look(self, name, function, asked, *, env):
            assert function is cells.look
            return self.says | {"needs": {name: asdict(needs_of(what)) for name, what in asked}, "env": {}}

        def measure(self, name, function, what, *, env, limit_s):
            assert Path(env["TMPDIR"]).is_dir() and env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
            self.measured.append(name)
            self.left.append(Path(env["TMPDIR"]) / "page")
            self.left[-1].write_text("as of a run that was ended")
            if name in self.errors:
                raise self.errors[name]
            return found_of(what) | {"versions": self.says["versions"]}

    made = Machine()
    monkeypatch.setattr(suite, "measured", made.look)
    monkeypatch.setattr(cells, "measured", made.measure)
    return made


def run(folder, *more, which=CELLS, **options):
    return suite.suite(which, folder, **options)


# --- what is measured, once -------------------------------------------------------------------------------------------


def test_all_is_measured_once_and_written(tmp_path, machine, capsys):
    found = run(tmp_path)
    assert machine.measured == [cell.name for cell in CELLS]
    assert found == json.loads((tmp_path / "suite.json").read_text())
    assert found["cells"]["tiny/host"].items() >= found_of(TINY).items()
    written = {"suite.json", "suite.md", "speed.png", "memory.png", "cells", "lock"}
    assert {file.name for file in tmp_path.iterdir()} == written
    assert not any(page.exists() for page in machine.left)
    out = capsys.readouterr().out
    assert "tiny/host: 4.0 ms, 2000 tokens/s, device 1.50 GiB, host 3.0 GiB, link 50%, 2.00 of the floor (link" in out
    assert "tiny/goal: 40 steps, 2.5 s, 5.000 to 4.600" in out and "measured before" not in out
    assert run(tmp_path) == found and len(machine.measured) == 4
    assert capsys.readouterr().out.count("(measured before)") == 4


def test_it_goes_on_after_an_interrupt(tmp_path, machine):
    machine.errors["tiny/adam"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert list(json.loads((tmp_path / "suite.json").read_text())["cells"]) == ["tiny/host", "tiny/disk"]
    assert "| tiny/disk | 4.0 |" in (tmp_path / "suite.md").read_text()
    (tmp_path / f"{suite._SCRATCH}left").mkdir()  # as after a kill
    (tmp_path / "cells" / "tiny" / "disk.json").write_text('{"torn')
    machine.errors.clear()
    machine.measured.clear()
    assert list(run(tmp_path)["cells"]) == [cell.name for cell in CELLS]
    assert machine.measured == ["tiny/disk", "tiny/adam", "tiny/goal"]
    assert not list(tmp_path.glob(f"{suite._SCRATCH}*"))


def test_a_second_suite_in_the_folder_is_refused(tmp_path, machine):
    with suite._alone(tmp_path), pytest.raises(BlockingIOError, match="another suite measures in"):
        run(tmp_path)
    assert len(run(tmp_path)["cells"]) == 4


@pytest.mark.parametrize(
    ("changes", "which", "message"),
    [
        ({"device": "other"}, CELLS, "tiny/host: measured again, since device was gpu, and is other"),
        ({"versions": VERSIONS | {"jax": "3"}}, CELLS, "measured again, since jax was 1, and is 3"),
        ({}, [Cell("tiny/host", replace(TINY, steps=9)), *CELLS[1:]], "since steps was 2, and is 9"),
    ],
)
def test_other_machines_and_settings_are_measured_again(tmp_path, machine, capsys, changes, which, message):
    run(tmp_path)
    machine.says, before = machine.says | changes, len(machine.measured)
    run(tmp_path, which=which, only=["tiny/host"])
    assert machine.measured[before:] == ["tiny/host"] and message in capsys.readouterr().out
    kept = json.loads((tmp_path / "suite.json").read_text())["cells"]
    assert list(kept) == (["tiny/host"] if changes else [cell.name for cell in CELLS])


def test_a_cell_that_fails_leaves_the_others(tmp_path, machine, capsys, monkeypatch):
    machine.errors["tiny/disk"] = RuntimeError("the measurement of 'tiny/disk' failed: no room\nfor it")
    monkeypatch.setattr(suite, "all_cells", lambda *arguments: CELLS)
    assert cli.main(["bench", "suite", "--directory", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "1 of 4 cells failed: tiny/disk; the same command tries again" in captured.err
    assert "tiny/disk: error: the measurement of 'tiny/disk' failed: no room" in captured.out
    assert (
        "- tiny/disk: error: the measurement of 'tiny/disk' failed: no room for it"
        in (tmp_path / "suite.md").read_text()
    )
    assert json.loads((tmp_path / "suite.json").read_text())["cells"]["tiny/goal"]["steps"] == 40
    machine.errors.clear()
    machine.measured.clear()
    assert cli.main(["bench", "suite", "--directory", str(tmp_path)]) == 0 and machine.measured == ["tiny/disk"]


def test_what_does_not_fit_is_skipped_with_the_reason(tmp_path, machine, capsys):
    needed = needs_of(CELLS[0].what)
    machine.says |= {"has": PLENTY | {"host": needed.host - 1}}
    given = [*CELLS[:1], Cell("tiny/goal", None, "no data")]
    found = run(tmp_path, which=given)["cells"]
    assert found["tiny/host"]["skipped"].endswith("GiB are there") and "host memory" in found["tiny/host"]["skipped"]
    assert found["tiny/goal"]["skipped"] == "no data" and machine.measured == []
    out = capsys.readouterr().out
    assert "tiny/host: skipped: needs " in out and "tiny/goal: skipped: no data" in out
    assert "- tiny/goal: skipped: no data" in (tmp_path / "suite.md").read_text()
    machine.says |= {"has": PLENTY}
    run(tmp_path, which=CELLS)
    kept = run(tmp_path, which=given)["cells"]  # measured when the data were given
    assert kept["tiny/goal"]["steps"] == 40


def test_disk_and_masters_are_counted(machine, tmp_path, monkeypatch):
    plain, disk = needs_of(TINY), needs_of(replace(TINY, tier="disk"))
    assert disk.disk > 0 == plain.disk and plain.device == 0
    folded, fixed = (needs_of(replace(TINY, mode="factored", format="int8", refresh=n)) for n in (50, 0))
    coded = 4 * 64 * 64 + 2 * 64 * 128 + 2 * 256 * 64 + 2050 * 64
    assert folded.host - fixed.host == pytest.approx(4 * coded, rel=0.02)
    monkeypatch.setattr(suite.shutil, "disk_usage", lambda folder: suite.shutil._ntuple_diskusage(9, 9, disk.disk - 1))
    reason = run(tmp_path, which=[CELLS[1]])["cells"]["tiny/disk"]["skipped"]
    assert reason.startswith("needs ") and "of disk" in reason


def test_a_cell_has_a_limit_of_time():
    with pytest.raises(RuntimeError, match=r"of 'sleep' took longer than its limit of 0\.5 s, and was ended"):
        process.measured("sleep", time.sleep, 60, limit_s=0.5)


def test_a_measurement_ends_with_the_process_that_asked_for_it(tmp_path):
    code = """if True:
        import sys
        from zo2jax.bench import process
        process.run("child", ["sh", "-c", f"echo $$ > {sys.argv[1]}; exec sleep 60"])
    """
    file = tmp_path / "pid"
    asking = subprocess.Popen([sys.executable, "-c", code, str(file)])
    while not (file.exists() and file.read_text().strip()):
        assert asking.poll() is None
        time.sleep(0.05)
    asking.terminate()
    assert asking.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_the_suite_itself_leaves_the_device_to_its_cells(tmp_path):
    """JAX would take most of a GPU's memory; on a platform that is not there it fails as soon as it looks for it."""
    code = """if True:
        import sys
        from zo2jax.bench import cells, suite
        machine = {"device": "d", "versions": {}, "has": dict.fromkeys(("device", "host"), 0), "needs": {}, "env": {}}
        suite.measured = lambda *arguments, env: machine
        found = {"ms": 1.0, "tokens_per_s": 1.0, "versions": {}}
        cells.measured = lambda name, function, what, env, limit_s: found
        suite.suite(cells.all_cells(), sys.argv[1])
    """
    command = [sys.executable, "-c", code, str(tmp_path / "suite")]
    out = process.run("suite", command, env={"JAX_PLATFORMS": "none"})
    assert "opt-30b/factored/host/16: 1.0 ms" in out and "baseline/opt-6.7b/adam-offload: 1.0 ms" in out


def test_environments_come_from_the_process_that_looks(tmp_path, machine, monkeypatch):
    baseline = Baseline("opt-tiny", "adam-offload", layers=1, tokens=8)
    given = cells.look([("a", baseline), ("b", TINY)])["env"]
    assert given == {"a": {"XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "1"}}
    seen = {}
    monkeypatch.setattr(machine, "look", lambda *_, env: machine.says | {"needs": {}, "env": given})
    monkeypatch.setattr(suite, "measured", machine.look)
    monkeypatch.setattr(cells, "measured", lambda name, f, what, env, limit_s: seen.update(env) or found_of(what))
    run(tmp_path, which=[Cell("a", baseline)])
    assert seen["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "1" and Path(seen["JAX_COMPILATION_CACHE_DIR"]).is_absolute()


@pytest.mark.slow
def test_tiny_cells_in_processes_of_their_own(tmp_path):
    names = ["opt-tiny/dense/host/1", "opt-tiny/factored-int8/disk/2", "opt-tiny/dense-int8/device/1"]
    given = [Cell(name, replace(setting_of(name, 2), tokens=16)) for name in names]
    given += [
        Cell("adam", Baseline("opt-tiny", "adam-offload", tokens=16, steps=2)),
        Cell("goal", Goal("adam", every=1)),
    ]
    found = suite.suite(given, tmp_path)
    assert all(cell["ms"] > 0 for cell in found["cells"].values()) and len(found["cells"]) == 5
    assert suite.suite(given, tmp_path) == found


# --- the cells --------------------------------------------------------------------------------------------------------


def test_the_cells_cover_models_formats_tiers_and_batches():
    names = [cell.name for cell in all_cells()]
    parts = [name.split("/") for name in names if name.startswith("opt-")]
    assert len(parts) == 24 and len(set(names)) == len(names)
    models, modes, tiers, rows = (set(values) for values in zip(*parts, strict=True))
    assert models == {"opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b"} and rows == {"1", "4", "16"}
    assert tiers == {"device", "host", "disk"} and {"dense", "factored", "factored-int8", "factored-int4"} < modes
    for model in models:
        assert len({part[1] for part in parts if part[0] == model}) >= 2
    baselines = {name.split("/")[2] for name in names if name.startswith("baseline/")}
    assert baselines == {"mezo", "lora", "adam", "adam-offload", "zo2"}


def test_an_h200_with_128_gib_of_host_and_64_of_disk_holds_them():
    """By what a CPU needs, on which device memory is host memory, and attention has arrays of its scores."""
    for cell in all_cells():
        needed = needs_of(cell.what)
        assert needed.host < 128 * 2**30 and needed.disk < 64 * 2**30, cell.name


def test_names_say_what_is_measured():
    assert setting_of("opt-13b/factored-int8/host/4").compute == "int8"
    assert setting_of("opt-13b/factored-int4/host/1").refresh == 50
    assert setting_of("opt-6.7b/factored/disk/1").refresh == setting_of("opt-30b/factored-int4/host/1").refresh == 0
    assert setting_of("opt-1.3b/dense/device/16", 7) == Setting("opt-1.3b", tier="device", rows=16, steps=7)
    for wrong in ("opt-1b/dense/host/1", "opt-13b/dense/host", "opt-13b/dense-int3/host/1"):
        with pytest.raises(ValueError, match=f"cell '{wrong}'.*expected SHAPE/MODE"):
            setting_of(wrong)


def test_data_and_peers_are_asked_for(tmp_path):
    by_name = {cell.name: cell for cell in all_cells()}
    assert "--data FOLDER" in by_name["loss/shakespeare/adam"].missing and by_name["loss/code/adam"].missing == ""
    assert "--peer zo2=FOLDER" in by_name["baseline/opt-1.3b/zo2"].missing
    assert (
        "lacks models/stories260K"
        in {c.name: c for c in all_cells(data=str(tmp_path))}["loss/shakespeare/adam"].missing
    )
    (tmp_path / "zo2").mkdir()
    (tmp_path / "zo2" / "__init__.py").write_text("")
    (tmp_path / "models" / "stories260K").mkdir(parents=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("")
    given = {cell.name: cell for cell in all_cells(3, str(tmp_path), Peer(str(tmp_path), "python"))}
    assert not any(cell.missing for cell in given.values())
    for name in ("loss/shakespeare/adam", "baseline/opt-1.3b/zo2"):
        words = shlex.split(given[name].command)[1:]
        (again,) = chosen_cells(_cells_of(cli._parse(words)), [name])
        assert again == given[name]


def _cells_of(arguments):
    peer = Peer(arguments.peer[4:], arguments.peer_python, arguments.peer_dtype) if arguments.peer else None
    return all_cells(3, arguments.data, peer)


def test_a_peer_is_run_with_its_sizes(tmp_path, machine, monkeypatch):
    (tmp_path / "zo2").mkdir()
    (tmp_path / "zo2" / "__init__.py").write_text("")
    cell = Cell("zo2", TINY, peer=Peer(str(tmp_path), "python"))
    theirs = {"ms": 7.0, "tokens_per_s": 9.0, "peak_device_gib": 2.0, "versions": {"torch": "0"}}
    monkeypatch.setattr(cells, "measure_peer", lambda peer, setting, limit_s: theirs | {"of": setting.model})
    found = run(tmp_path / "suite", which=[cell])["cells"]["zo2"]
    assert (found["ms"], found["of"], found["device"]) == (7.0, "opt-tiny", "gpu")
    assert found["versions"] == VERSIONS | {"torch": "0"} and machine.measured == []
    monkeypatch.setattr(cells, "measure_peer", None)
    assert run(tmp_path / "suite", which=[cell])["cells"]["zo2"] == found


def test_each_row_has_a_command_that_is_read_back_to_its_setting():
    measured = {cell.name: found_of(cell.what) | {"command": cell.command} for cell in all_cells(3) if cell.what}
    rows = [row.split(" | ") for row in markdown({"device": "d", "versions": {}, "cells": measured}).splitlines()]
    commands = {row[0].strip("| "): row[-1].strip("`| ") for row in rows if row[-1].endswith("` |")}
    assert commands.keys() == measured.keys()
    for cell in all_cells(3):
        if cell.name.startswith("opt-"):
            arguments = cli._parse(shlex.split(commands[cell.name])[1:])
            assert arguments.bench == "throughput" and setting_from(arguments) == cell.what
    full = replace(TINY, rank=3, prefetch=2, device_memory="4GiB", format="int8", group=32, refresh=7, warm_ups=0)
    full = replace(full, kernels=False)
    assert setting_from(cli._parse(["bench", "throughput", *flags_of(full)])) == full


def test_patterns_and_the_list(capsys):
    assert cli.main(["bench", "suite", "--list", "--only", "opt-30b/*/disk/*", "loss/shakespeare/adam"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and "--refresh 0 --format int4" in out[0]
    assert cli.main(["bench", "suite", "--only", "opt-1b/*"]) == 1
    assert "--only 'opt-1b/*' names no cell" in capsys.readouterr().err


# --- time to a loss ---------------------------------------------------------------------------------------------------


def test_adam_reaches_the_loss_that_plain_optax_does(tiny_folder, text_file):
    goal = Goal("adam", str(tiny_folder), str(text_file), fall=0.05, every=1, most=30, rows=4, tokens=16)
    found = measure_goal(goal)
    model = load(tiny_folder, dtype="float32")
    data, params = goal.data(model), model.params
    kept = data.held_out[:: max(1, len(data.held_out) // 128)][:128]
    (held_out,) = HeldOut(kept, 128)
    look, slope = jax.jit(model.loss), jax.jit(jax.grad(model.loss))
    losses = [float(look(params, held_out))]
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.adam(1e-3)
        state = optimizer.init(params)
        for batch in TextBatches(data.train, 4, 30, 0)[: found["steps"]]:
            updates, state = optimizer.update(slope(params, batch), state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(look(params, held_out)))
    np.testing.assert_allclose([loss for _, _, loss in found["curve"]], losses, rtol=1e-5)
    assert found["target"] == pytest.approx(losses[0] - 0.05) and losses[-1] <= found["target"] < losses[-2]
    assert found["seconds"] == found["curve"][-1][1] > 0 and found["steps"] == len(losses) - 1


def test_a_loss_that_is_not_reached(tiny_folder, text_file):
    found = measure_goal(Goal("dense", str(tiny_folder), str(text_file), fall=4.0, every=2, most=3, rows=4, tokens=16))
    assert found["steps"] is found["seconds"] is None and [steps for steps, *_ in found["curve"]] == [0, 2, 3]
    assert found["target"] == found["curve"][0][2] - 4 and found["loss"] != found["first_loss"]
    assert "not reached in 3 steps" in line("x", found)
    row = markdown({"device": "d", "versions": {}, "cells": {"x": found | {"command": "c"}}}).splitlines()[4]
    assert row.split(" | ")[2:4] == ["not in 3", "-"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sgd"}, "method is 'sgd', expected one of dense, factored, one_sided, adam"),
        ({"fall": 0.0}, "fall is 0.0, expected more than 0"),
        ({"every": 0}, "every is 0, expected 1 or more"),
    ],
)
def test_goals_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Goal(**{"method": "dense"} | changes)


# --- comparisons ------------------------------------------------------------------------------------------------------


def file_of(cells, device="gpu", **versions):
    return {"device": device, "versions": VERSIONS | versions, "cells": cells}


HOST = {"setting": {"steps": 2}, "ms": 100.0, "tokens_per_s": 20.0, "peak_device_gib": 2.0, "link_both_gib_s": 80.0}
GOAL = {"setting": {}, "ms": 1.0, "target": 4.0, "steps": 40, "seconds": 3.0}


def compared(tmp_path, capsys, a, b, *more):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, found in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(found))
    status = cli.main(["bench", "compare", *map(str, paths), *more])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_regressions_are_marked_and_make_the_status(tmp_path, capsys):
    worse = HOST | {"ms": 106.0, "tokens_per_s": 20 / 1.06, "peak_device_gib": 1.0, "link_both_gib_s": 40.0}
    status, out, err = compared(tmp_path, capsys, file_of({"x": HOST}), file_of({"x": worse}))
    assert status == 1 and "2 figures are worse by more than 5%: x ms, x tokens_per_s" in err
    lines = {row.split("│")[2].strip(): row for row in out.splitlines() if row.count("│") > 5}
    assert "1.060" in lines["ms"] and "worse" in lines["ms"] and "0.943" in lines["tokens_per_s"]
    assert "0.500" in lines["peak_device_gib"] and "worse" not in lines["peak_device_gib"]
    assert "0.500" in lines["link_both_gib_s"] and "(machine)" in lines["link_both_gib_s"]
    assert compared(tmp_path, capsys, file_of({"x": HOST}), file_of({"x": worse}), "--tolerance", "0.07")[0] == 0
    assert compared(tmp_path, capsys, file_of({"x": worse}), file_of({"x": HOST}))[0] == 1  # memory
    assert compared(tmp_path, capsys, file_of({"x": HOST}), file_of({"x": HOST}))[0] == 0


def test_what_differs_and_what_only_one_file_has(tmp_path, capsys):
    a = file_of({"x": HOST, "y": HOST, "s": {"skipped": "no data"}, "g": GOAL})
    b = file_of({"x": HOST | {"setting": {"steps": 3}}, "z": HOST, "s": HOST, "g": GOAL}, device="other", jax="9")
    status, out, _ = compared(tmp_path, capsys, a, b)
    assert status == 0
    for text in (
        "device: 'gpu' in the first, 'other' in the second",
        "jax: '1' in the first, '9' in the second",
        "x steps: 2 in the first, 3 in the second",
        "only in the first: y",
        "only in the second: z, s",
    ):
        assert text in out


def test_a_cell_that_fails_or_misses_its_loss_has_regressed(tmp_path, capsys):
    missed = GOAL | {"steps": None, "seconds": None}
    a, b = file_of({"x": HOST, "y": HOST, "g": GOAL}), file_of({"x": {"error": "no"}, "y": HOST, "g": missed})
    status, _, err = compared(tmp_path, capsys, a, b)
    assert status == 1 and "failed in the second: x, g" in err
    assert compared(tmp_path, capsys, b, a)[0] == 0


def test_files_of_other_commands_are_compared(tmp_path, capsys):
    assert compared(tmp_path, capsys, HOST | {"device": "d"}, HOST | {"device": "d", "ms": 200.0})[0] == 1
    rows = {"rows": [{"name": "a", "ms": 2.0}, {"name": "b", "ms": 1.0}]}
    slower = {"rows": [{"name": "a", "ms": 1.0}, {"name": "b", "ms": 1.2}]}
    status, _, err = compared(tmp_path, capsys, rows, slower)
    assert status == 1 and err.endswith("5%: b ms\n")
    assert [change.ratio for change in compare(rows, slower).changes] == [0.5, 1.2]


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "holds list"), ("{", "cannot be read"), ('{"device": "d"}', "no figure of a cell in")]
)
def test_files_that_cannot_be_compared(tmp_path, capsys, text, message):
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps(HOST))
    assert cli.main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert message in capsys.readouterr().err
    assert cli.main(["bench", "compare", "a", "b", "--tolerance", "-1"]) == 1
