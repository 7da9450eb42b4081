"""The command line: ``zo2jax train | eval | generate | export | replay | pack | apply | journal | demo | ..``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from zo2jax import __version__, demo, formats, planner, train
from zo2jax.bench import commands as bench
from zo2jax.config_files import load_config
from zo2jax.models.generation import Choose, greedy, sampling
from zo2jax.models.hub import export, load
from zo2jax.models.tokenizers import ChatTemplate
from zo2jax.quantize import quantize
from zo2jax.replay import base_of, pack, read_journal, replay
from zo2jax.trained import export_trained_adapter, trained_model

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

    sub = commands.add_parser("eval", help="held-out loss or task metric of a run, or of a config's untrained model")
    sub.add_argument("target", help="the directory of a run, or a config")
    add_overrides(sub)
    sub.add_argument("--best", action="store_true", help="the weights with the best held-out loss, not the last")

    sub = commands.add_parser("generate", help="continue prompts, by a model or by a run's weights")
    sub.add_argument("model", help="a Hugging Face folder or hub id, or the directory of a run")
    sub.add_argument("prompts", nargs="*", metavar="prompt", help="texts to continue; lines of standard input if none")
    sub.add_argument("--best", action="store_true", help="of a run: the checkpoint with the best held-out loss")
    sub.add_argument("--tokens", type=int, default=64, help="new tokens at most")
    sub.add_argument("--stop", action="append", default=[], help="a string that ends the text; may be repeated")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 for greedy generation")
    sub.add_argument("--top-k", type=int, default=0, help="draw from so many tokens; 0 for all")
    sub.add_argument("--top-p", type=float, default=1.0, help="draw from the tokens that make up this probability")
    sub.add_argument("--seed", type=int, default=0, help="of the draws")
    sub.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")

    sub = commands.add_parser("export", help="write a run's weights as a Hugging Face folder")
    sub.add_argument("run", help="the directory of a run")
    sub.add_argument("-o", "--output", required=True, help="the folder to make")
    sub.add_argument("--best", action="store_true", help="the weights with the best held-out loss, not the last")
    sub.add_argument(
        "--adapter", action="store_true", help="of a run with LoRA or a prefix: that alone, as peft loads it"
    )

    _add_journals(commands)

    sub = commands.add_parser("quantize", help="write a model with its matrices as int8 or int4 codes")
    sub.add_argument("model", help="a Hugging Face folder or hub id")
    sub.add_argument("--format", choices=("int8", "int4"), required=True, help="the codes")
    sub.add_argument("--group", type=int, help="columns that share a scale (a whole row of int8, 64 of int4)")
    sub.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="leaves that stay; may be repeated")
    sub.add_argument("--limit", type=float, default=float("inf"), help="leaves whose relative error is above it stay")
    sub.add_argument("-o", "--output", required=True, help="the folder to make")

    sub = commands.add_parser("demo", help="adapt the model that comes with the package; offline, a few minutes")
    add_overrides(sub)

    sub = commands.add_parser(
        "plan", help="what a config's run will need and take; from its shapes, before anything runs"
    )
    sub.add_argument("config", help="a config file, or the name of one that comes with the package")
    add_overrides(sub)
    _add_plan(sub)

    sub = commands.add_parser("machine", help="this machine's rates, on which plans rest; measured once and kept")
    sub.add_argument("--again", action="store_true", help="measure them anew")
    sub.add_argument("--json", metavar="FILE", help="write them here, for zo2jax plan --machine FILE elsewhere")

    sub = commands.add_parser("bench", help="time and peak memory of a step, on random weights of a real model's shape")
    bench.add_arguments(sub)
    return parser


def _add_plan(sub: argparse.ArgumentParser) -> None:
    machines = "rtx4090, a100, h100, h200, or a file of zo2jax machine --json; may be repeated"
    sub.add_argument("--machine", action="append", default=[], metavar="NAME", help=f"in place of this one: {machines}")
    sub.add_argument("--device-memory", default="", metavar="SIZE", help="the most that a step may take, such as 24GB")
    sub.add_argument("--host-memory", default="", metavar="SIZE", help="the most for blocks, buffers and the program")
    sub.add_argument("--disk-space", default="", metavar="SIZE", help="the most for page files")
    sub.add_argument("--formats", nargs="+", default=(), choices=("bf16", "int8", "int4"), help="that blocks may have")
    sub.add_argument("--json", metavar="FILE", help="write all numbers here")
    sub.add_argument("-o", "--output", metavar="FILE", help="the picture to make: .png, .svg or .pdf")


def _add_journals(commands: Any) -> None:
    """The commands that read journals."""
    for name, what in (("replay", "the weights of any step of a run"), ("apply", "a base with a .zo file")):
        sub = commands.add_parser(name, help=f"write {what} as a Hugging Face folder, from the base and a journal")
        sub.add_argument("base", help="a Hugging Face folder or hub id: the model that the run began with")
        sub.add_argument("journal", help="a journal, a .zo file, or the directory of a run")
        sub.add_argument("-o", "--output", required=True, help="the folder to make")
        sub.add_argument("--step", type=int, help="after so many steps; all if not given")

    sub = commands.add_parser("pack", help="write a run as a .zo file: with its base it is the trained model")
    sub.add_argument("journal", metavar="run", help="the directory of a run, or a journal")
    sub.add_argument("-o", "--output", required=True, help="the file to make")
    sub.add_argument("--step", type=int, help="leave out what comes after so many steps")

    sub = commands.add_parser("journal", help="show journals, and in what two of them differ")
    sub.add_argument("journals", nargs="+", metavar="journal", help="a journal, a .zo file, or the directory of a run")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        result = train.train(load_config(arguments.config, arguments.overrides))
        return 0 if result.finished else _INTERRUPTED
    if arguments.command == "demo":
        return 0 if demo.demo(arguments.overrides).finished else _INTERRUPTED
    if arguments.command == "eval":
        step, _, line = train.evaluate(arguments.target, arguments.overrides, best=arguments.best)
        print(f"step {step}  {line}")
    elif arguments.command == "generate":
        _generate(arguments)
    elif arguments.command == "quantize":
        format = formats.named(arguments.format, arguments.group, tuple(arguments.keep))
        print(quantize(load(arguments.model), format, arguments.output, limit=arguments.limit))
    elif arguments.command == "plan":
        asked = planner.Asked(
            tuple(arguments.machine), arguments.device_memory, arguments.host_memory, arguments.disk_space,
            tuple(arguments.formats),
        )  # fmt: skip
        config = load_config(arguments.config, arguments.overrides)
        planner.show(config, asked, file=arguments.json, picture=arguments.output)
    elif arguments.command == "machine":
        planner.machine(again=arguments.again, file=arguments.json)
    elif arguments.command == "bench":
        bench.run(arguments)
    elif arguments.command in ("replay", "apply"):
        journal = read_journal(arguments.journal)
        print(export(replay(base_of(arguments.base, journal), journal, step=arguments.step), arguments.output))
    elif arguments.command == "pack":
        print(pack(arguments.journal, arguments.output, step=arguments.step))
    elif arguments.command == "journal":
        _show(arguments.journals)
    else:
        _export(arguments)
    return 0


def _show(paths: Sequence[str]) -> None:
    journals = [read_journal(path) for path in paths]
    for journal in journals:
        print(journal)
    for other in journals[1:]:
        print(f"{journals[0].path} and {other.path}: {journals[0].differs(other)}")


def _export(arguments: argparse.Namespace) -> None:
    if arguments.adapter:
        print(export_trained_adapter(arguments.run, arguments.output, best=arguments.best))
    else:
        print(export(trained_model(arguments.run, best=arguments.best)[1], arguments.output))


def _generate(arguments: argparse.Namespace) -> None:
    is_run = (Path(arguments.model).expanduser() / "metrics.jsonl").is_file()
    model = trained_model(arguments.model, best=arguments.best)[1] if is_run else load(arguments.model)
    prompts = arguments.prompts or [line.rstrip("\n").replace("\\n", "\n") for line in sys.stdin]
    texts: list[Any] = prompts
    if arguments.chat:
        if model.folder is None or model.tokenizer is None:
            raise ValueError(f"{arguments.model} has no tokenizer, which --chat needs")
        template = ChatTemplate.from_folder(model.folder)
        asked = [template.render([{"role": "user", "content": p}], add_generation_prompt=True) for p in prompts]
        texts = [model.tokenizer.encode(text, add_special_tokens=False).ids for text in asked]
    choose: Choose = greedy
    if arguments.temperature:
        options = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
        choose = sampling(jax.random.key(arguments.seed), **options)
    for prompt, text in zip(
        prompts, model.generate(texts, arguments.tokens, stop=arguments.stop, choose=choose), strict=True
    ):
        print(text if arguments.chat else prompt + text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after flags, which argparse alone does not allow."""
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    unknown = [x for x in extra if x.startswith("-") or "=" not in x or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra:
        arguments.overrides = [*arguments.overrides, *extra]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for bad input, 2 for bad usage, 130 after Ctrl-C.

    >>> main(["eval", "no/such/run"])
    1
    """
    arguments = _parse(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if arguments.traceback:
            raise
        print(f"zo2jax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zo2jax: interrupted; a run goes on after its last step by the same command", file=sys.stderr)
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
