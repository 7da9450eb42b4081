"""The command line on a tiny model: train, stop, go on, evaluate, export; and its errors."""

import importlib.util
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import zo2jax as zo
from zo2jax import cli, demo, train
from zo2jax.checkpoint import Snapshots
from zo2jax.config_files import load_config
from zo2jax.metrics import read_metrics
from zo2jax.models.hub import export
from zo2jax.run import Run
from zo2jax.trained import load_model, trained_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def arguments(tiny_folder, text_file, tmp_path):
    def make(*extra, directory="run"):
        keys = {"model": tiny_folder, "data": text_file, "directory": tmp_path / directory, "steps": 6}
        keys |= {"batch": 4, "tokens": 16, "eval_every": 4, "learning_rate": 0.001, "eps": 0.01}
        return ["train", "stories260k_shakespeare", *(f"{k}={v}" for k, v in keys.items()), *extra]

    return make


def weights(directory):
    return trained_model(directory)[1].params


def test_train_evaluate_export(arguments, tmp_path, capsys):
    assert cli.main(arguments()) == 0
    run = tmp_path / "run"
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 6 and config["eps"] == 0.01 and "directory" not in config
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 4, 6]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()

    assert cli.main(["eval", str(run)]) == 0
    assert f"step 6  held-out loss {lines[-1]['eval/loss']:.4f}" in capsys.readouterr().out
    best = min((line for line in lines if "eval/loss" in line and line["step"]), key=lambda line: line["eval/loss"])
    assert cli.main(["eval", "--best", str(run)]) == 0
    assert f"step {best['step']}  held-out loss {best['eval/loss']:.4f}" in capsys.readouterr().out
    assert cli.main(["eval", *arguments()[1:]]) == 0
    assert f"step 0  held-out loss {lines[0]['eval/loss']:.4f}" in capsys.readouterr().out

    out = tmp_path / "exported"
    assert cli.main(["export", str(run), "-o", str(out)]) == 0
    jax.tree.map(np.testing.assert_array_equal, zo.load(out).params, weights(run))
    before = {p: p.read_bytes() for p in out.iterdir()}
    assert cli.main(["export", str(run), "-o", str(out)]) == 1
    assert "not empty" in capsys.readouterr().err and before == {p: p.read_bytes() for p in out.iterdir()}


def test_a_run_is_shared_as_one_small_file(arguments, tiny_folder, tmp_path, capsys):
    for directory, *more in (("run",), ("other", "learning_rate=0.002")):
        assert cli.main(arguments(*more, directory=directory)) == 0
    run, file, cut, base = (str(tmp_path / name) for name in ("run", "run.zo", "cut.zo", "base"))
    assert cli.main(["pack", run, "-o", file]) == 0 and cli.main(["pack", run, "-o", cut, "--step", "4"]) == 0
    assert Path(file).stat().st_size < 4000
    assert cli.main(["apply", str(tiny_folder), file, "-o", str(tmp_path / "applied")]) == 0
    jax.tree.map(np.testing.assert_array_equal, zo.load(tmp_path / "applied").params, weights(run))
    assert cli.main(["replay", str(tiny_folder), run, "-o", str(tmp_path / "four"), "--step", "4"]) == 0
    assert cli.main(["replay", str(tiny_folder), cut, "-o", str(tmp_path / "cut")]) == 0
    pair = (zo.load(tmp_path / name).params for name in ("four", "cut"))
    jax.tree.map(np.testing.assert_array_equal, *pair)
    capsys.readouterr()
    assert cli.main(["journal", file, cut, str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "steps     6" in out and "two_point(0.01" in out
    assert f"{file} and {cut}: the same 4 steps, of 6 and 4" in out
    assert "optimizer: sgd(0.001, weight_decay=0.0) and sgd(0.002, weight_decay=0.0); " in out
    assert "; the same 0 steps, of 6 and 6" in out

    assert cli.main(["pack", run, "-o", file]) == 1
    assert "run.zo exists" in capsys.readouterr().err
    assert cli.main(["pack", run, "-o", base, "--step", "7"]) == 1
    assert "has 6 steps: expected at most as many, not 7" in capsys.readouterr().err
    model = zo.load(tiny_folder)
    export(model.replace(jax.tree.map(lambda w: w * 1.5, model.params)), base)
    assert cli.main(["apply", base, file, "-o", str(tmp_path / "wrong")]) == 1
    assert re.search(r"block \S+ of the model is not what the run of .*run.zo began with", capsys.readouterr().err)
    assert not list(tmp_path.glob("wrong*/*"))


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_a_run_goes_on_without_the_files_of_the_model(tier, arguments, tiny_folder, tmp_path, capsys):
    """Its checkpoint is all that it needs; and evaluation and export need no more."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    command = [x if not x.startswith("model=") else f"model={folder}" for x in arguments(f"tier={tier}")]
    assert cli.main([*command, "directory=" + str(tmp_path / "whole")]) == 0
    assert cli.main([*command, "steps=4"]) == 0
    (folder / "model.safetensors").unlink()
    assert cli.main([*command, "directory=" + str(tmp_path / "other")]) == 1
    assert "has no model.safetensors" in capsys.readouterr().err
    assert cli.main(command) == 0
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert cli.main(["eval", str(tmp_path / "run"), f"tier={tier}"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 0
    jax.tree.map(np.testing.assert_array_equal, zo.load(tmp_path / "out").params, weights(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="weights=False"):
        _ = zo.load(folder, weights=False).params


def test_ctrl_c_finishes_the_step_and_the_same_command_goes_on(arguments, tmp_path, capsys, monkeypatch):
    assert cli.main(arguments(directory="whole")) == 0
    step = Run.step

    def interrupted_step(self, batch):
        if self.steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Run, "step", interrupted_step)
    assert cli.main(arguments()) == 130
    assert "stopped after step 3 of 6, saved; the same command goes on" in capsys.readouterr().out
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli.main(arguments()) == 0
    assert "going on after step 3" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_second_ctrl_c_interrupts(arguments, tmp_path, capsys, monkeypatch):
    step = Run.step

    def impatient_step(self, batch):
        if self.steps_done == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Run, "step", impatient_step)
    assert cli.main(arguments()) == 130
    assert "goes on after its last step" in capsys.readouterr().err
    assert trained_model(tmp_path / "run")[0] == 4


def test_steps_may_grow_and_nothing_else_changes(arguments, tmp_path, capsys):
    assert cli.main(arguments()) == 0
    assert cli.main(arguments("steps=8")) == 0
    assert cli.main(arguments("steps=8", directory="whole")) == 0
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"), weights(tmp_path / "whole"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert cli.main(arguments("steps=9", "eps=0.02", "seed=5")) == 1
    error = capsys.readouterr().err
    assert "eps: 0.01 there, 0.02 now; seed: 0 there, 5 now" in error and "Only steps may grow" in error
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_plan_is_for_the_members_that_a_run_was_begun_with(arguments, tmp_path, capsys):
    assert cli.main(arguments("directions=2", "steps=1")) == 0
    config = load_config("stories260k_shakespeare", arguments("directions=2", "device_memory=1GiB")[2:])
    assert train._members_at_once(config) == 4
    assert train._members_at_once(replace(config, directory=str(tmp_path / "new"))) == 0
    assert cli.main(arguments("directions=2", "steps=2", "tier=host", "device_memory=1GiB")) == 0
    assert "going on after step 1" in capsys.readouterr().out


def test_patience_ends_a_run_whose_held_out_loss_stays(arguments, tmp_path, capsys):
    """Without a step that changes anything no evaluation is lower than the first; the same command changes nothing."""
    options = "learning_rate=0", "eval_every=1", "patience=2"
    for _ in range(2):
        assert cli.main(arguments(*options)) == 0
        assert "stopped after step 2: 2 evaluations without a lower held-out loss" in capsys.readouterr().out
        lines = read_metrics(tmp_path / "run")
        assert [line["step"] for line in lines if "eval/loss" in line] == [0, 1, 2]
    assert cli.main(arguments(*options[:2], "patience=0")) == 0
    assert len(read_metrics(tmp_path / "run")) == 6 + 7


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_tiers_change_no_weights_and_no_evaluation(arguments, tmp_path, capsys, tier):
    """A run in a tier, one that goes on in another, and its evaluation in a third."""
    assert cli.main(arguments(directory="whole")) == 0
    assert "device memory" not in capsys.readouterr().out
    assert cli.main(arguments(f"tier={tier}", "prefetch=0")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"2 blocks on the device, 2 blocks (in host|on the)", out)  # a matrix that is shared
    assert cli.main(arguments("steps=8", "tier=host", "device_memory=1GiB")) == 0
    assert "4 blocks on the device; 0.00 of 1.00 GiB of device memory" in " ".join(capsys.readouterr().out.split())
    assert cli.main(arguments("steps=8", directory="whole")) == 0
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert read_metrics(tmp_path / "run")[-1]["eval/loss"] == read_metrics(tmp_path / "whole")[-1]["eval/loss"]
    capsys.readouterr()
    lines = set()
    for where in ([], ["tier=device", "device_memory=1GiB"], ["tier=host"], ["tier=disk", "prefetch=3"]):
        assert cli.main(["eval", str(tmp_path / "run"), *where]) == 0
        lines.add(capsys.readouterr().out)
    assert len(lines) == 1 and "step 8  held-out loss" in lines.pop()
    assert not list((tmp_path / "run").glob("**/*.page")) and not list((tmp_path / "run").glob("pages-*"))
    assert cli.main(["eval", *arguments("tier=disk", directory="none")[1:]]) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("format", "direction"),
    [
        ("int8", "lowrank"),
        *(pytest.param(x, d, marks=pytest.mark.slow) for x, d in (("", "lowrank"), ("int8", "rademacher"))),
    ],
)
def test_a_run_that_only_reads_is_evaluated_as_it_was_while_it_ran(arguments, tmp_path, capsys, format, direction):
    """Within a period, from its checkpoint alone and from its export."""
    how = [f"format={format}", f"direction={direction}", "refresh=3", "dtype=bfloat16", "learning_rate=0.01"]
    assert cli.main(arguments(*how)) == 0
    assert cli.main(arguments(*how, "steps=8", "tier=host")) == 0
    expected = read_metrics(tmp_path / "run")[-1]["eval/loss"]
    assert train.evaluate(str(tmp_path / "run"))[1]["loss"] == pytest.approx(expected, abs=2e-3)
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "model")]) == 0
    assert zo.load(tmp_path / "model").format is None


def test_a_folder_of_codes_says_its_format(arguments, tiny_folder, tmp_path):
    folder = zo.models.hub.export(zo.load(tiny_folder).with_format(zo.int4(group=8)), tmp_path / "codes")
    config = load_config("stories260k_shakespeare", [f"model={folder}", "direction=lowrank"])
    assert load_model(config).format == zo.load(folder, weights=False).format == zo.int4(group=8)


@pytest.mark.slow
def test_a_folder_of_codes_is_trained_where_it_is(arguments, tiny_folder, tmp_path, capsys):
    """The run has its format, and says how many blocks are not copied; it goes on without its files."""
    folder = zo.models.hub.export(zo.load(tiny_folder).with_format(zo.int8()), tmp_path / "codes")
    how = [f"model={folder}", "direction=lowrank", "refresh=0", "tier=disk", "steps=2"]
    assert cli.main(arguments(*how)) == 0
    assert "2 of the blocks on the disk are read from the model's own files" in capsys.readouterr().out
    expected = read_metrics(tmp_path / "run")[-1]["eval/loss"]
    assert train.evaluate(str(tmp_path / "run"))[1]["loss"] == pytest.approx(expected, abs=1e-5)
    (folder / "model.safetensors").unlink()
    assert cli.main(arguments(*how, "steps=3")) == 0
    assert "going on after step 2" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["candidates", "accuracy", "generated"])
def test_a_task_is_trained_and_evaluated_in_its_tier(objective, tiny_folder, tmp_path):
    examples = [{"sentence": "fine " * n, "label": n % 2} for n in range(1, 13)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    keys = [f"model={tiny_folder}", f"data={tmp_path}", "validation=train.jsonl", "task=sst2", "train_examples=8"]
    keys += ["dev_examples=4", "steps=2", "eval_every=1", "batch=2"]
    results = {}
    for tier in ("device", "host"):
        more = [f"objective={objective}", f"tier={tier}", f"directory={tmp_path / tier}", "dtype=float32"]
        result = train.train(load_config("mezo_sst2", [*keys, *more]))
        results[tier] = (result.first, result.last, result.metrics)
    assert results["device"] == results["host"] and results["host"][2]
    jax.tree.map(np.testing.assert_array_equal, *(weights(tmp_path / tier) for tier in results))


def test_too_little_device_memory_is_refused_before_anything_is_written(arguments, tmp_path, capsys):
    for tier, next_move in (("host", "fewer rows or tokens, or prefetch=0"), ("device", "tier='host', which needs")):
        assert cli.main(arguments(f"tier={tier}", "device_memory=10kB")) == 1
        error = capsys.readouterr().err
        assert "a batch of 4 x 16 needs" in error and next_move in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_trained_model_is_read_block_by_block(arguments, tmp_path, monkeypatch):
    assert cli.main(arguments()) == 0
    asked = []
    block = Snapshots.block
    monkeypatch.setattr(
        Snapshots, "block", lambda self, step, name, like: asked.append(name) or block(self, step, name, like)
    )
    _, model = trained_model(tmp_path / "run")
    assert asked == [] and set(model.source["layers.0.mlp"]) == {"down", "gate", "norm", "up"}
    assert asked == ["layers.0.mlp"]
    zo.models.hub.export(model, tmp_path / "exported")
    assert asked == [
        "layers.0.mlp",
        *(block.name for block in model.blocks if block.shapes and block.name != "head"),
        "head",
    ]
    assert not isinstance(model.source, dict)


def test_a_schedule_over_the_steps_may_not_grow(arguments, capsys):
    assert cli.main(arguments("schedule=linear")) == 0
    assert cli.main(arguments("schedule=linear", "steps=8")) == 1
    assert "steps: 6 there, 8 now" in capsys.readouterr().err


def test_a_diverging_run_stops_and_keeps_its_weights(arguments, tmp_path, capsys):
    """A huge eps makes the losses overflow: each step is skipped, and the run stops after max_skipped of them."""
    assert cli.main(arguments("eps=1e38", "max_skipped=2")) == 1
    assert "not finite in 2 steps in a row" in capsys.readouterr().err
    start = load_config(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"), zo.load(start.model).params)


BAD_INPUT = {
    "missing folder": ("model=no/such/folder/here", "no model folder at 'no/such/folder/here'"),
    "no model": ("model=", "no model folder at"),
    "missing data": ("data=no/such.txt", r"no file at no/such.txt"),
    "unknown key": ("stepz=5", "did you mean steps"),
    "context": ("tokens=65", "65 tokens do not fit the model's context of 64"),
    "short text": ("batch=4000", "one batch needs 4000"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_error(arguments, tmp_path, capsys, name):
    override, message = BAD_INPUT[name]
    assert cli.main(arguments(override)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_empty_data_and_unwritable_directory(arguments, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    assert cli.main(arguments(f"data={tmp_path / 'empty.txt'}")) == 1
    assert "empty.txt is empty" in capsys.readouterr().err
    assert cli.main(arguments(f"directory={tmp_path / 'empty.txt'}")) == 1
    assert "empty.txt cannot be written" in capsys.readouterr().err
    assert (tmp_path / "empty.txt").read_text() == "\n"


def test_directories_that_are_no_runs(tmp_path, capsys):
    for command in (["export", str(tmp_path), "-o", str(tmp_path / "x")], ["eval", str(tmp_path)]):
        assert cli.main(command) == 1
        assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model": str(demo.model_folder()), "data": "x"}))
    assert cli.main(["export", "--best", str(tmp_path), "-o", str(tmp_path / "x")]) == 1
    assert "has no checkpoint with a held-out loss yet" in capsys.readouterr().err


def test_options_that_do_not_apply_are_refused(arguments, tmp_path, capsys):
    assert cli.main(["eval", "--best", *arguments()[1:]]) == 1
    assert "is a config, expected the directory of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model": "m", "data": "x"}))
    assert cli.main(["eval", str(tmp_path), "dtype=bfloat16"]) == 1
    assert "whose model and dtype are its own" in capsys.readouterr().err


def test_traceback_is_shown_when_asked_for():
    with pytest.raises(ValueError, match="no config file"):
        cli.main(["--traceback", "train", "nothing"])


def test_demo_runs_offline(tmp_path, capsys, monkeypatch):
    """The whole demo for a few steps; that its loss falls by 0.3 is shown by the slow test below."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_CHARACTERS", 60_000)
    assert cli.main(["demo", "steps=2", "batch=2", "tokens=32"]) == 0
    out = capsys.readouterr().out
    assert "greedy sample before" in out and "greedy sample after" in out and "nats per token" in out
    assert (tmp_path / "runs" / "demo" / "loss.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_lowers_the_held_out_loss(tmp_path, seed):
    result = demo.demo([f"directory={tmp_path}", f"seed={seed}"])
    assert result.first - result.last >= 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("extra", "bound"), [((), 3.60), (("dtype=bfloat16",), 3.70)])
def test_shakespeare(stories, shakespeare, tmp_path, extra, bound):
    """The real Llama on Shakespeare: 5.05 to at most 3.60 nats per token in 7000 steps."""
    keys = [f"model={stories}", f"data={shakespeare}", f"directory={tmp_path}", *extra]
    result = train.train(load_config("stories260k_shakespeare", keys))
    assert result.first == pytest.approx(5.05, abs=0.01) and result.last <= bound


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3"])
def test_other_families_on_shakespeare(family, test_data, shakespeare, tmp_path):
    """Trained on a novel for about a minute by backpropagation, then by MeZO on Shakespeare."""
    spec = importlib.util.spec_from_file_location("pretrain_tiny", ROOT / "examples" / "pretrain_tiny.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    novel = test_data / "text" / "gutenberg" / "pg1342.txt"
    with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule needs it
        example.main(tmp_path / "model", family=family, size="small", text=novel, steps=250, batch=16)
    keys = [f"model={tmp_path / 'model'}", f"data={shakespeare}", f"directory={tmp_path / 'run'}", "steps=500"]
    result = train.train(load_config("stories260k_shakespeare", [*keys, "dtype=float32"]))
    assert result.first - result.last > 0.05
