"""The arguments of ``zo2jax bench step | throughput | ablation | trace | replay | checkpoint | population | ..``."""

import argparse
import sys
from dataclasses import fields
from typing import Any

from rich.console import Console

from zo2jax.bench import compare, suite
from zo2jax.bench.ablation import ablation
from zo2jax.bench.keeping import CHECKPOINT, REPLAY, measure_checkpoint, measure_replay
from zo2jax.bench.peers import DTYPES, Peer, asked, measure_peer, named
from zo2jax.bench.population import Population, population
from zo2jax.bench.process import measured, new_file
from zo2jax.bench.report import figures_table, save, throughput_table
from zo2jax.bench.shapes import DEFAULT, SHAPES, Work
from zo2jax.bench.step import WHAT, step
from zo2jax.bench.throughput import MODES, NO_PREALLOCATION, Setting, measure
from zo2jax.bench.trace import trace


def throughput(setting: Setting, peer: Peer | None = None, json: str | None = None) -> dict[str, Any]:
    """Measures a setting in a process of its own, then the peer; prints a table, and writes all numbers to ``json``.

    Raises:
        ValueError: for a file that cannot be written, or a model that the peer does not have; before anything is run.
        RuntimeError: if a measurement fails. If the peer's does, the own one was printed and written.

    >>> throughput(Setting("opt-tiny"), json="no/such/folder/numbers.json")
    Traceback (most recent call last):
    ValueError: no/such/folder/numbers.json cannot be written: expected a file in a folder that is there
    """
    path, failure = new_file(json), None
    if peer is not None:
        asked(setting)
    found = measured("throughput", measure, setting, env=NO_PREALLOCATION)
    if peer is not None:
        try:
            found["peer"] = measure_peer(peer, setting)
        except RuntimeError as error:
            found["peer"], failure = {"error": str(error)}, error
    Console().print(throughput_table(found))
    save(found, path)
    if failure is not None:
        raise failure
    return found


_KEEPING = {"replay": (measure_replay, REPLAY), "checkpoint": (measure_checkpoint, CHECKPOINT)}


def keeping(what: str, setting: Setting, json: str | None = None) -> dict[str, Any]:
    """Measures "replay" or "checkpoint" in a process of its own, prints a table, and writes all numbers to ``json``.

    Raises:
        ValueError: for a file that cannot be written, before anything is run.
        RuntimeError: if the measurement fails.
    """
    path, (measure, lines) = new_file(json), _KEEPING[what]
    found: dict[str, Any] = measured(what, measure, setting, env=NO_PREALLOCATION)
    Console().print(figures_table(found, lines))
    save(found, path)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands to the parser of ``zo2jax bench``.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> parser.parse_args(["throughput", "--model", "opt-13b", "--tier", "disk"]).tier
    'disk'
    """
    commands = parser.add_subparsers(dest="bench", required=True)
    _add_step(commands.add_parser("step", help="a step in its forms, and two forward passes, all on the device"))

    sub = commands.add_parser("throughput", help="a step with the model's blocks in a tier: time, memory, floor")
    _add_setting(sub)
    sub.add_argument("--peer", metavar="zo2=FOLDER", help="a checkout of the PyTorch ZO2, which is run as well")
    sub.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="a Python with its requirements")
    sub.add_argument("--peer-dtype", default="float16", choices=DTYPES, help="of its weights")

    sub = commands.add_parser("ablation", help="the same with one part of the stream more in each row")
    _add_setting(sub)

    sub = commands.add_parser("trace", help="a picture of what the GPU does at each moment of a step")
    _add_setting(sub, json=False)
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="the picture to make: .png, .svg or .pdf")
    sub.add_argument("--window", type=float, default=80.0, metavar="MS", help="so much of a step, from its middle")

    sub = commands.add_parser("replay", help="steps that are trained, then replayed from their journal on the device")
    _add_setting(sub)
    sub.set_defaults(steps=512, tier="device")

    sub = commands.add_parser("checkpoint", help="steps before, during and after a checkpoint in the background")
    _add_setting(sub)

    sub = commands.add_parser("population", help="adapters along many directions at once, and one after the other")
    _add_population(sub)

    suite.add_arguments(commands.add_parser("suite", help="many named measurements in a folder; the same goes on"))
    compare.add_arguments(commands.add_parser("compare", help="two files of numbers: what has become worse"))


def _add_population(sub: argparse.ArgumentParser) -> None:
    default = Population("tiny")
    sub.add_argument("--model", required=True, choices=sorted(SHAPES), help="the shape; its weights are random")
    sub.add_argument("--layers", type=int, help="cut the model to so many layers")
    sub.add_argument("--rows", type=int, default=default.rows, help="rows in a batch")
    sub.add_argument("--tokens", type=int, default=default.tokens, help="tokens in a row")
    sub.add_argument("--rank", type=int, default=default.rank, help="of the adapters")
    sub.add_argument("--directions", type=int, default=default.directions, help="each of which is taken both ways")
    sub.add_argument("--targets", nargs="*", default=default.targets, help="patterns of what has an adapter; none: all")
    sub.add_argument("--tier", choices=("device", "host"), default=default.tier, help="where blocks live")
    sub.add_argument("--steps", type=int, default=default.steps, help="steps that are timed, each by itself")
    sub.add_argument("--json", metavar="FILE", help="write all numbers here")


def _add_step(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("shape", choices=sorted(SHAPES), help="the model")
    sub.add_argument("--layers", type=int, help="cut the model to so many layers")
    sub.add_argument("--tokens", type=int, default=DEFAULT.tokens, help="tokens in a row")
    sub.add_argument("--rows", type=int, default=DEFAULT.rows, help="rows in a batch")
    sub.add_argument("--candidates", type=int, default=0, help="rows are examples of so many candidates (a task)")
    sub.add_argument("--steps", type=int, default=DEFAULT.steps, help="steps in each of three timed rounds")
    sub.add_argument("--what", choices=WHAT, nargs="+", default=WHAT[:3], help="what is measured")


def _add_setting(sub: argparse.ArgumentParser, json: bool = True) -> None:
    default = Setting("tiny")
    sub.add_argument("--model", required=True, choices=sorted(SHAPES), help="the shape; its weights are random")
    sub.add_argument("--layers", type=int, help="cut the model to so many layers")
    sub.add_argument("--batch", type=int, default=default.rows, dest="rows", help="rows in a batch")
    sub.add_argument("--tokens", type=int, default=default.tokens, help="tokens in a row")
    sub.add_argument("--mode", choices=MODES, default=default.mode, help="how weights are perturbed")
    sub.add_argument("--rank", type=int, default=default.rank, help="of directions in the factored mode")
    sub.add_argument("--refresh", type=int, default=default.refresh, help="steps between two folds; 0: none")
    sub.add_argument("--format", choices=("int8", "int4"), help="of the matrices")
    sub.add_argument("--compute", choices=("bf16", "int8"), default=default.compute, help="of products with codes")
    sub.add_argument("--group", type=int, help="columns that share a scale of codes")
    sub.add_argument("--tier", choices=("device", "host", "disk"), default=default.tier, help="where blocks live")
    sub.add_argument("--prefetch", type=int, default=default.prefetch, help="blocks that are uploaded ahead")
    sub.add_argument("--device-memory", metavar="SIZE", help="keep as many blocks on the device as fit, such as 4GiB")
    sub.add_argument("--directory", metavar="FOLDER", help="where page files are made (a temporary folder)")
    kernels = "updates and probes by XLA, as on GPUs older than Hopper"
    sub.add_argument("--no-kernels", action="store_false", dest="kernels", help=kernels)
    if json:
        sub.add_argument("--steps", type=int, default=default.steps, help="steps that are timed, each by itself")
        sub.add_argument("--warm-ups", type=int, default=default.warm_ups, help="steps before them, after the first")
        sub.add_argument("--json", metavar="FILE", help="write all numbers here")


def setting_from(arguments: argparse.Namespace) -> Setting:
    """What parsed arguments of ``zo2jax bench throughput`` describe.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> setting_from(parser.parse_args(["throughput", "--model", "opt-tiny", "--tier", "disk"])).tier
    'disk'
    """
    names = {field.name for field in fields(Setting)}
    return Setting(**{name: value for name, value in vars(arguments).items() if name in names})


def run(arguments: argparse.Namespace) -> None:
    """Does what parsed arguments say.

    >>> parser = argparse.ArgumentParser()
    >>> add_arguments(parser)
    >>> run(parser.parse_args(["throughput", "--model", "opt-tiny", "--tokens", "1"]))
    Traceback (most recent call last):
    ValueError: tokens is 1, expected 2 or more
    """
    if arguments.bench == "step":
        work = Work(**{name: getattr(arguments, name) for name in ("tokens", "rows", "candidates", "steps")})
        step(arguments.shape, layers=arguments.layers, work=work, what=arguments.what)
        return
    if arguments.bench == "population":
        names = {field.name for field in fields(Population)}
        given = {name: value for name, value in vars(arguments).items() if name in names}
        population(Population(**given | {"targets": tuple(arguments.targets)}), arguments.json)
        return
    if arguments.bench in ("suite", "compare"):
        (suite if arguments.bench == "suite" else compare).run(arguments)
        return
    setting = setting_from(arguments)
    if arguments.bench == "ablation":
        ablation(setting, arguments.json)
    elif arguments.bench == "trace":
        trace(setting, arguments.output, arguments.window)
    elif arguments.bench in _KEEPING:
        keeping(arguments.bench, setting, arguments.json)
    else:
        peer = None
        if arguments.peer is not None:
            peer = Peer(named(arguments.peer), arguments.peer_python, arguments.peer_dtype)
        throughput(setting, peer, arguments.json)
