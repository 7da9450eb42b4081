"""The command line: ``zo2jax train | eval | export | demo | bench``."""

import argparse
import sys
from collections.abc import Sequence

from zo2jax import __version__, bench, demo, train
from zo2jax.config import load_config
from zo2jax.models.hub import export

_INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zo2jax", description="Zeroth-order fine-tuning of language models in JAX.")
    parser.add_argument("--version", action="version", version=f"zo2jax {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config's fields")

    sub = commands.add_parser("train", help="train by a config; the same command goes on where it stopped")
    sub.add_argument("config", help="a config file, or the name of one that comes with the package")
    add_overrides(sub)

    sub = commands.add_parser("eval", help="held-out loss of a run's weights, or of a config's untrained model")
    sub.add_argument("target", help="the directory of a run, or a config")
    add_overrides(sub)
    sub.add_argument("--best", action="store_true", help="the checkpoint with the best held-out loss, not the last")

    sub = commands.add_parser("export", help="write a run's weights as a Hugging Face folder")
    sub.add_argument("run", help="the directory of a run")
    sub.add_argument("-o", "--output", required=True, help="the folder to make")
    sub.add_argument("--best", action="store_true", help="the checkpoint with the best held-out loss, not the last")

    sub = commands.add_parser("demo", help="adapt the model that comes with the package; offline, a few minutes")
    add_overrides(sub)

    sub = commands.add_parser("bench", help="time and peak memory of a step, on random weights of a real model's shape")
    sub.add_argument("shape", choices=sorted(bench.SHAPES), help="the model")
    sub.add_argument("--layers", type=int, help="cut the model to so many layers")
    sub.add_argument("--tokens", type=int, default=2048, help="tokens in a row")
    sub.add_argument("--rows", type=int, default=1, help="rows in a batch")
    sub.add_argument("--steps", type=int, default=10, help="steps in each of three timed rounds")
    sub.add_argument("--what", choices=bench.WHAT, nargs="+", default=bench.WHAT, help="what is measured")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        result = train.train(load_config(arguments.config, arguments.overrides))
        return 0 if result.finished else _INTERRUPTED
    if arguments.command == "demo":
        return 0 if demo.demo(arguments.overrides).finished else _INTERRUPTED
    if arguments.command == "eval":
        step, loss = train.evaluate(arguments.target, arguments.overrides, best=arguments.best)
        print(f"step {step}  held-out loss {loss:.4f} nats/token")
    elif arguments.command == "bench":
        options = {name: getattr(arguments, name) for name in ("layers", "tokens", "rows", "steps", "what")}
        bench.bench(arguments.shape, **options)
    else:
        _, model = train.trained_model(arguments.run, best=arguments.best)
        print(export(model, arguments.output))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for bad input, 2 for bad usage, 130 after Ctrl-C.

    >>> main(["eval", "no/such/run"])
    1
    """
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"zo2jax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zo2jax: interrupted; a run goes on from its last checkpoint by the same command", file=sys.stderr)
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
