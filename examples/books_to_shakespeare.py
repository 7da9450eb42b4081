"""A Llama that has read a few novels is adapted to Shakespeare's plays, in every way that there is, side by side.

    python examples/books_to_shakespeare.py --books gutenberg --plays tinyshakespeare.txt --output runs/books
    python examples/books_to_shakespeare.py --books gutenberg --plays tinyshakespeare.txt --tiny  # 2 minutes on a CPU

The model (32 M parameters) is made by backpropagation from a folder of Project Gutenberg texts. Then each `Variant`
trains the same bfloat16 weights on the plays from forward passes alone, as many as every other one: dense directions,
low-rank ones over bfloat16, int8 and int4 matrices. The projected gradients of each low-rank variant are correlated
with those of float32 products of the same matrices. A run of AdamW says what backpropagation would do.

The output folder gets the model, results.json (all curves) and losses.png; both are written anew after each variant. If
the model is there already, it is taken as it is. A variant of your own is one more row in `variants`.
"""

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import zo2jax as zo
from zo2jax.formats import Format
from zo2jax.models.hub import export
from zo2jax.models.llama import LlamaConfig
from zo2jax.objectives import mean_loss
from zo2jax.tasks.text import HeldOut, TextBatches, TextData, load_text

BEGINNING, END = r"\*\*\* ?START OF.*\*\*\*\n", r"\*\*\* ?END OF"
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long."""

    books: Path
    """A folder of Project Gutenberg texts, for pretraining."""
    plays: Path
    """The text to adapt to; its last tenth is held out."""
    output: Path = Path("runs/books_to_shakespeare")
    tiny: bool = False
    """A model of 0.1 M parameters, few steps and two variants, to try the script out."""
    only: tuple[str, ...] = ()
    """Names of variants; if there are none, all but the slow one in float32."""
    vocabulary: int = 4096
    size: int = 640
    hidden: int = 1664
    layers: int = 6
    tokens: int = 256
    """Of a row."""
    batch: int = 32
    pretrain_steps: int = 1000
    """At most: pretraining ends where the held-out loss has not fallen three times in a row."""
    pretrain_batch: int = 64
    pretrain_rate: float = 1e-3
    steps: int = 3000
    """Of each variant, two forward passes each."""
    every: int = 100
    """Steps between two held-out losses."""
    eps: float = 1e-3
    rates: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4)
    """Learning rates that dense directions try; all variants take the best one."""
    try_steps: int = 300
    adam_steps: int = 200
    adam_rate: float = 3e-4
    pairs: int = 64
    """How many projected gradients are compared."""


TINY: dict[str, Any] = {
    "vocabulary": 512, "size": 64, "hidden": 160, "layers": 1, "tokens": 32, "batch": 16, "pretrain_steps": 150,
    "pretrain_batch": 16, "pretrain_rate": 3e-3, "steps": 120, "every": 60, "rates": (1e-4, 3e-4), "try_steps": 40,
    "adam_steps": 40, "adam_rate": 1e-3, "pairs": 8, "only": ("dense, bf16", "low-rank, int8"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to adapt a model without a backward pass; ``rate`` is its learning rate, relative to dense directions."""

    name: str
    direction: zo.Direction
    format: Format | None = None
    rate: float = 1.0
    dtype: str = "bfloat16"
    same: Format | None = None
    """The format that stands for the same matrices, where the variant's own also says how to multiply with them."""


DENSE, LOWRANK, ADAMW = "dense, bf16", "low-rank, bf16", "AdamW"
"""The variants that the others are compared with, and backpropagation."""


def variants() -> list[Variant]:
    """All of them."""
    lowrank = zo.lowrank(2, refresh=50)
    return [
        Variant("dense, float32", zo.normal, dtype="float32"),
        Variant(DENSE, zo.normal),
        Variant(LOWRANK, lowrank),
        Variant("low-rank, int8", lowrank, zo.int8()),
        Variant("low-rank, int8 products", lowrank, zo.int8(compute="int8"), same=zo.int8()),
        Variant("low-rank, int4", lowrank, zo.int4(group=32)),
        Variant("LoRA, bf16", zo.lora(8), rate=10.0),
    ]


class Point(NamedTuple):
    """A point of a curve: steps done, seconds of training (without evaluating and compiling), held-out loss."""

    step: int
    seconds: float
    loss: float


@dataclass
class Results:
    """All that is measured; what results.json holds."""

    setting: dict[str, Any]
    device: str
    parameters: int
    pretraining: dict[str, Any] = field(default_factory=dict)
    held_out_by_rate: dict[float, float] = field(default_factory=dict)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    correlations: dict[str, float] = field(default_factory=dict)


def read_books(folder: Path, to: Path) -> list[Path]:
    """Copies books without what Project Gutenberg says around them, and with the plays' plain quotes."""
    paths = []
    for path in sorted(folder.glob("*.txt")):
        text = re.split(BEGINNING, path.read_text(encoding="utf-8-sig"), maxsplit=1)[-1]
        paths.append(to / path.name)
        paths[-1].write_text(re.split(END, text, maxsplit=1)[0].translate(QUOTES), encoding="utf-8")
    return paths


def make_tokenizer(paths: Sequence[Path], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with the special tokens <s> (0) and </s> (1)."""
    tokenizer = ByteLevelBPETokenizer()
    files, special = [str(path) for path in paths], ["<s>", "</s>"]
    tokenizer.train(files, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())


class Backpropagation:
    """AdamW on float32 weights, with products in bfloat16; its methods are those of `zo.Run`."""

    def __init__(self, model: zo.Model, optimizer: optax.GradientTransformation):
        """Begins with the weights of a bfloat16 model."""
        self.model, self._optimizer = model, optimizer
        self._params = jax.tree.map(lambda w: w.astype(jnp.float32), model.params)
        self._state = optimizer.init(self._params)

    def step(self, batch: Any) -> jax.Array:
        """One step; gives the loss."""
        self._params, self._state, loss = adam_step(self.model, self._optimizer, self._params, self._state, batch)
        return loss

    def flush(self) -> None:
        """Waits for the last step."""
        jax.block_until_ready(self._params)

    def evaluate(self, batches: Any) -> float:
        """The mean loss in nats per token."""
        return mean_loss(partial(loss_sum, self.model, self._params), batches)

    @property
    def trained(self) -> zo.Model:
        """The model with the present weights, in bfloat16."""
        return self.model.replace(in_bfloat16(self._params))


@contextlib.contextmanager
def first_order(model: zo.Model, optimizer: optax.GradientTransformation) -> Iterator[Backpropagation]:
    """A run of backpropagation, as `adapting` gives one without."""
    yield Backpropagation(model, optimizer)


def in_bfloat16(params: Any) -> Any:
    """The matrices in bfloat16."""
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim >= 2 else w, params)


@partial(jax.jit, static_argnums=(0, 1))
def adam_step(model: zo.Model, optimizer: Any, params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
    """(parameters, state of the optimizer, loss) after a step."""
    loss, gradient = jax.value_and_grad(lambda params: model.loss(in_bfloat16(params), batch))(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


@partial(jax.jit, static_argnums=0)
def loss_sum(model: zo.Model, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, number of tokens) in bfloat16."""
    return model.loss_sum(in_bfloat16(params), batch)


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up, and a cosine that ends at a tenth of the rate."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps, rate / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


def follow(run: zo.Run | Backpropagation, batches: TextBatches, held_out: HeldOut, every: int) -> Iterator[Point]:
    """Trains, and gives a point every so many steps; the clock stands still while one is taken."""
    yield Point(0, seconds := 0.0, run.evaluate(held_out))
    start = time.perf_counter()
    for step, batch in enumerate(batches, 1):
        run.step(batch)
        if step % every == 0 or step == len(batches):
            run.flush()
            seconds += time.perf_counter() - start
            yield Point(step, seconds, run.evaluate(held_out))
            start = time.perf_counter()


def pretrain(setting: Setting, folder: Path, console: Console) -> dict[str, Any]:
    """Makes the model, and exports that with the least held-out loss; gives what is worth knowing of it."""
    heads = setting.size // 64 or 1
    config = LlamaConfig(
        vocabulary=setting.vocabulary, size=setting.size, hidden=setting.hidden, layers=setting.layers, heads=heads,
        kv_heads=heads, head_size=setting.size // heads, context=setting.tokens, tied=True, bos_id=0, stop_ids=(1,),
    )  # fmt: skip
    batch, steps = setting.pretrain_batch, setting.pretrain_steps
    with tempfile.TemporaryDirectory() as books:
        paths = read_books(setting.books, Path(books))
        tokenizer = make_tokenizer(paths, setting.vocabulary)
        model = replace(config.init(jax.random.key(0), jnp.bfloat16), tokenizer=tokenizer)
        data = load_text(model, books, tokens=setting.tokens, batch=batch, held_out=0.05)
    count = len(data.train) * setting.tokens
    console.print(f"{model.parameter_count:,} parameters, {count:,} tokens of {len(paths)} books")
    run = Backpropagation(model, adamw(setting.pretrain_rate, steps))
    best, curve = model, []
    seen = HeldOut(data.train[:: max(1, len(data.train) // len(data.held_out))], batch)
    batches, held_out = TextBatches(data.train, batch, steps, 0), HeldOut(data.held_out, batch)
    for point in follow(run, batches, held_out, setting.every // 2):
        curve.append((*point, train_loss := run.evaluate(seen)))
        console.print(f"step {point.step}, {point.seconds:.0f} s: books {train_loss:.4f}, held out {point.loss:.4f}")
        losses = [loss for _, _, loss, _ in curve]
        if point.loss == min(losses):
            best = run.trained
        elif min(losses[-3:]) > min(losses):
            break
    export(best, folder)
    return {"tokens": count, "curve (step, seconds, held out, trained on)": curve}


@contextlib.contextmanager
def adapting(folder: Path, variant: Variant, eps: float, rate: float) -> Iterator[zo.Run]:
    """A run of a variant from the model's folder, in a directory that is thrown away."""
    model = zo.load(folder, dtype=variant.dtype).with_format(variant.format)
    estimator, optimizer = zo.two_point(eps, direction=variant.direction), zo.sgd(rate)
    with (
        tempfile.TemporaryDirectory() as directory,
        zo.Run(model, estimator, optimizer, directory=directory, key=jax.random.key(0)) as run,
    ):
        yield run


Make = Callable[[], contextlib.AbstractContextManager[Any]]


def compare(results: Results, name: str, make: Make, batches: TextBatches, held_out: HeldOut, every: int) -> None:
    """Takes a curve of a run. One that is thrown away goes first, so that everything is compiled."""
    start = time.perf_counter()
    with make() as run:
        list(follow(run, replace(batches, steps=min(52, batches.steps)), held_out, batches.steps))  # with a fold
    results.compile_seconds[name] = time.perf_counter() - start
    with make() as run:
        results.curves[name] = list(follow(run, batches, held_out, every))


def best_rate(results: Results, setting: Setting, folder: Path, data: TextData) -> float:
    """The learning rate with which a short run of dense directions comes furthest."""
    held_out = HeldOut(data.held_out, setting.batch)
    for rate in setting.rates:
        with adapting(folder, Variant(DENSE, zo.normal), setting.eps, rate) as run:
            try:
                for batch in TextBatches(data.train, setting.batch, setting.try_steps, 1):
                    run.step(batch)
                loss = run.evaluate(held_out)
            except zo.NonFiniteLoss:
                loss = np.inf
        results.held_out_by_rate[rate] = loss if np.isfinite(loss) else np.inf
    return min(results.held_out_by_rate, key=results.held_out_by_rate.__getitem__)


def projected_gradients(folder: Path, variant: Variant, eps: float, batches: TextBatches) -> np.ndarray:
    """g of one direction for each batch, all at the same weights: the learning rate is 0."""
    with adapting(folder, variant, eps, 0.0) as run:
        return np.array([run.step(batch).projected_gradient[0] for batch in batches])


def correlate(results: Results, setting: Setting, folder: Path, rows: Sequence[Variant], batches: TextBatches) -> None:
    """Pearson's correlation of each variant's g with those of float32 products: same matrices, directions, batches."""
    exact: dict[Any, np.ndarray] = {}
    for variant in rows:
        as_float32 = replace(variant, dtype="float32", format=variant.same or variant.format)
        what = str(as_float32.format), variant.direction
        if what not in exact:
            exact[what] = projected_gradients(folder, as_float32, setting.eps, batches)
        found = projected_gradients(folder, variant, setting.eps, batches)
        results.correlations[variant.name] = float(np.corrcoef(found, exact[what])[0, 1])
        write(results, setting.output)


def table(results: Results) -> Table:
    """The curves' ends side by side."""
    shown = Table("variant", title=f"{results.parameters:,} parameters, {results.device}")
    for heading in ("loss before", "after", f"to {DENSE}", f"to {LOWRANK}", "ms a step", "seconds", "correlation of g"):
        shown.add_column(heading, justify="right")
    for name, curve in results.curves.items():
        first, last = curve[0], curve[-1]
        relative = [f"{last.loss / results.curves[base][-1].loss - 1:+.2%}" if base in results.curves else ""
                    for base in (DENSE, LOWRANK)]  # fmt: skip
        correlation = f"{results.correlations[name]:.4f}" if name in results.correlations else ""
        speed = f"{1000 * last.seconds / last.step:.2f}", f"{last.seconds:.1f}"
        shown.add_row(name, f"{first.loss:.4f}", f"{last.loss:.4f}", *relative, *speed, correlation)
    return shown


def draw(results: Results, path: Path) -> None:
    """Held-out loss against forward passes, and against seconds."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ends = [curve[-1].loss for name, curve in results.curves.items() if name != ADAMW or len(results.curves) == 1]
    for i, (name, curve) in enumerate(results.curves.items()):
        losses, style = [point.loss for point in curve], {"color": f"C{i}", "linewidth": 1.5}
        passes = 3 if name == ADAMW else 2  # of a step
        left.plot([passes * point.step for point in curve], losses, label=f"{name}: {losses[-1]:.3f}", **style)
        right.plot([point.seconds for point in curve], losses, **style)
    left.set(xlabel="forward passes (a backward pass counts as two)", ylabel="held-out loss, nats per token")
    right.set(xlabel=f"seconds of training, {results.device}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    lowest, highest = min(ends), max(curve[0].loss for curve in results.curves.values())
    left.set_ylim(lowest - 0.1 * (highest - lowest), highest + 0.03 * (highest - lowest))  # AdamW may go below
    left.legend(title="held-out loss at the end")
    figure.suptitle(f"A Llama of {results.parameters / 1e6:.1f} M parameters, from novels to Shakespeare's plays")
    figure.savefig(path, dpi=120)


def write(results: Results, output: Path) -> None:
    """The JSON file and the picture."""
    (output / "results.json").write_text(json.dumps(asdict(results), indent=1, default=str) + "\n")
    draw(results, output / "losses.png")


def main(setting: Setting) -> Results:
    """Pretrains unless the model is there, adapts, compares, prints and writes."""
    setting = replace(setting, **TINY) if setting.tiny else setting
    console, folder = Console(width=150), setting.output / "model"
    setting.output.mkdir(parents=True, exist_ok=True)
    pretraining = {} if (folder / "config.json").is_file() else pretrain(setting, folder, console)
    model = zo.load(folder)
    results = Results(asdict(setting), jax.devices()[0].device_kind, model.parameter_count, pretraining)
    data = load_text(model, str(setting.plays), tokens=setting.tokens, batch=setting.batch)
    held_out, batches = HeldOut(data.held_out, setting.batch), TextBatches(data.train, setting.batch, setting.steps, 0)
    rate = best_rate(results, setting, folder, data)
    console.print(f"learning rate {rate}: {results.held_out_by_rate}")
    rows = [v for v in variants() if (v.name in setting.only if setting.only else v.dtype == "bfloat16")]

    for variant in rows:
        make = partial(adapting, folder, variant, setting.eps, rate * variant.rate)
        compare(results, variant.name, make, batches, held_out, setting.every)
        console.print(f"{variant.name}: {results.curves[variant.name][-1]}", highlight=False)
        write(results, setting.output)
    correlate(results, setting, folder, [v for v in rows if v.direction.rank], replace(batches, steps=setting.pairs))

    optimizer = adamw(setting.adam_rate, setting.adam_steps)
    batches = replace(batches, steps=setting.adam_steps)
    compare(results, ADAMW, partial(first_order, model, optimizer), batches, held_out, setting.every // 10)
    write(results, setting.output)
    console.print(table(results))
    return results


if __name__ == "__main__":
    main(tyro.cli(Setting))
