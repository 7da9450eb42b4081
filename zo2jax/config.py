"""Configurations: frozen dataclasses in Python files, overrides as ``key=value``, and the objects they stand for."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from zo2jax.directions import Direction, dense, lora, lowrank
from zo2jax.estimators import Estimator, averaged, leave_one_out, one_sided, svrg, two_point
from zo2jax.first_order import Hybrid, hybrid, last_blocks
from zo2jax.formats import Format, named
from zo2jax.models.model import Model
from zo2jax.optimizers import Optimizer, clip_by_running_scale, sgd
from zo2jax.plan import Plan, parse_size, plan
from zo2jax.plan.measure import this_machine
from zo2jax.updates import ROUNDINGS, Rounding

_LOW_RANK = ("lowrank", "lora")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what was expected.

    >>> issubclass(ConfigError, ValueError)
    True
    """


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fine-tuning by MeZO on plain text or on a task. Every field is overridden on the command line as ``key=value``.

    >>> Config(model="m", data="d", steps=3).steps
    3
    """

    model: str = ""
    """A Hugging Face folder, or a hub id; or ``shape:NAME`` for random weights (`zo2jax.shapes`), and random tokens if
    there are no ``data``: for plans and measurements."""
    data: str = ""
    """Text: a file, several separated by commas, or a folder of .txt files. With a task: the training examples, or a
    folder of training and evaluation examples (JSON lines, JSON, TSV, CSV, Parquet), or ``hub:PATH[:CONFIG]``; empty
    for the task's own data set on the hub."""
    task: str = ""
    """Empty for plain text; a task's name (see `zo2jax.tasks.catalog`), "completion", "chat", or a Python file that
    holds a `zo2jax.Task`."""
    validation: str = ""
    """The evaluation examples, where they are not found beside the training examples."""
    train_examples: int = 1000
    dev_examples: int = 500
    """Of the training examples; their loss picks the best checkpoint."""
    eval_examples: int = 1000
    """Of the validation examples; the task's metric is taken on them."""
    data_seed: int = 0
    """Of the choice of examples."""
    objective: Literal["", "candidates", "tokens", "accuracy", "generated"] = ""
    """What a task is trained by: cross-entropy over candidates, or of the right text's tokens; or, without a
    gradient, the accuracy, or the metric of what the model writes. Empty for what the task says."""
    demonstrations: int = 0
    """In the prompts of evaluations (in-context learning)."""
    scoring: Literal["mean", "sum", "sfc", "icl_sfc"] = "mean"
    """Of candidates in evaluations: log-probability a token or in all, or calibrated."""
    directory: str = "runs/train"
    """The run directory."""
    steps: int = 1000
    seed: int = 0
    """Of the directions and of the order of the batches."""
    batch: int = 16
    """Rows a step."""
    tokens: int = 64
    """Tokens a row."""
    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate over ``steps``, down to zero."""
    warmup: int = 0
    """Steps over which the learning rate rises to its value, before the schedule begins."""
    weight_decay: float = 0.0
    momentum: float = 0.0
    """Of low-rank updates (LOZO-M); 0 for none."""
    clip: float = 0.0
    """Bound on |projected gradient|; 0 for none."""
    clip_scale: float = 0.0
    """Bound on it as a multiple of its running root mean square, such as 3; 0 for none."""
    eps: float = 1e-3
    """Perturbation scale."""
    eps_end: float = 0.0
    """To which it goes, in equal parts over ``steps``; 0: it stays."""
    direction: Literal["normal", "rademacher", "lowrank", "lora"] = "normal"
    """Of the perturbations; with "lowrank", or with a ``format``, matrices are only read but for a fold every
    ``refresh`` steps; with "lora" adapters are trained beside them."""
    rank: int = 2
    """Of low-rank directions, or of adapters (8 is usual)."""
    refresh: int = 50
    """Steps for which low-rank directions keep one factor; 0: for all. With a ``format``, steps whose updates dense
    directions add anew in each: 4 to 16 are usual."""
    alpha: float = 0.0
    """Adapters are multiplied by alpha / rank; 0: the rank."""
    targets: str = ""
    """Patterns of the leaves that are trained, or have an adapter, separated by commas, such as ``head.*`` or
    ``*.attn.[qv].*``; empty for all."""
    train_blocks: float = 0.0
    """The fraction of blocks that train, of those that ``targets`` let: those on which the loss depends most, as
    `zo2jax.sensitivity` measures before the first step; 0 for all."""
    sensitivity_steps: int = 8
    """Batches that it measures with."""
    perturb_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """The dtype in which probes of matrices are made and multiplied; empty for that of the weights."""
    prefix: int = 0
    """Learned keys and values before each row's own in every attention block, which then are all that is trained,
    unless there are ``targets`` (``*.prefix.*`` among them); 0 for none, 5 is usual. They begin as those of the first
    tokens of the training data, after the one that begins texts. eps and learning rate are larger (MeZO: 1e-1, and
    1e-2 or 1e-3)."""
    directions: int = 1
    """Directions a step."""
    estimator: Literal["two_point", "one_sided", "leave_one_out", "svrg"] = "two_point"
    """What is made of them: "two_point" takes two forward passes for each and averages them, "one_sided" (FZOO, with a
    learning rate of its own) one for each and one more, "leave_one_out" one for each. The latter take two directions at
    least. "svrg" compares "two_point" with the same of the weights that a period of ``refresh`` steps began with."""
    anchor_directions: int = 0
    """Of the first step of such a period, a multiple of ``directions``, such as twice the ``refresh``; for
    estimator=svrg."""
    first_order: str = ""
    """What is trained by backpropagation and AdamW, as `zo2jax.hybrid` says: "head", "last_blocks:3", or patterns of
    leaves in the last blocks, separated by commas; empty for nothing."""
    first_order_rate: float = 1e-3
    """Its learning rate, with the ``schedule``, ``warmup`` and ``weight_decay`` of the other."""
    micro_batches: int = 1
    """In which the ``batch`` rows of a step are computed, for activations of one of them."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Of the matrices; empty keeps the checkpoint's."""
    format: Literal["", "int8", "int4"] = ""
    """How matrices are kept; empty for as they are."""
    group: int = 0
    """Columns that share a scale of codes; 0: a whole row of int8, 64 of int4."""
    compute: Literal["bf16", "int8"] = "bf16"
    """How products with int8 codes are made; with "int8" activations are rounded to int8 as well."""
    rounding: Literal["stochastic", "nearest", "residual"] = "stochastic"
    """Of updates to 16-bit matrices; "residual" is exact, where they are only read."""
    held_out: float = 0.1
    """Fraction of the text that is kept for evaluation."""
    eval_every: int = 500
    """Steps between two evaluations, each followed by a checkpoint."""
    patience: int = 0
    """Evaluations in a row without a lower held-out loss than before, at which the run ends; 0: it goes on."""
    max_skipped: int = 10
    """Steps in a row that may have a loss that is not finite."""
    tensorboard: bool = True
    """Whether metrics are written for TensorBoard, beside metrics.jsonl."""
    sync_every: float = 1.0
    """Seconds after which a step is on the disk, should the power fail; 0: each at once."""
    replay_within: float = 600.0
    """Seconds in which a run that was killed is back where it was: checkpoints are saved in the background so often."""
    tier: Literal["device", "host", "disk", "auto"] = "device"
    """Where blocks live that do not stay on the device; "auto" for what `zo2jax plan` finds. It, ``device_memory`` and
    ``prefetch`` may be others when a run goes on, or is evaluated."""
    device_memory: str = ""
    """The most device memory that training may take, such as 4GiB: as many blocks stay on the device as fit. Empty: all
    blocks go to ``tier``. With tier=device, what does not fit is refused."""
    probe_batch: int = 0
    """Members of the population that are computed at once; 0: all, or as many as ``device_memory`` has room for. It
    changes the last bits of losses, so a run keeps to what it was begun with."""
    prefetch: int = 1
    """Blocks whose upload is begun before the present one is computed."""

    def __post_init__(self) -> None:
        """Checks the ranges of all fields.

        Raises:
            ConfigError: for the first value out of range.
        """
        counts = (
            "steps",
            "batch",
            "tokens",
            "directions",
            "micro_batches",
            "eval_every",
            "max_skipped",
            "sensitivity_steps",
        )
        for name in (*counts, "train_examples", "dev_examples", "eval_examples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected an integer of at least 1")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum}: expected a number of at least 0 and below 1, such as 0.9")
        if self.momentum and self.direction not in _LOW_RANK:
            raise ConfigError(f"momentum={self.momentum}, direction={self.direction}: expected direction=lowrank")
        if self.batch % self.micro_batches:
            raise ConfigError(
                f"micro_batches={self.micro_batches}, batch={self.batch}: expected a divisor of the batch"
            )
        for name in ("demonstrations", "prefetch", "group", "refresh", "prefix", "probe_batch", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected an integer of at least 0")
        if self.perturb_dtype and self.direction in _LOW_RANK:
            raise ConfigError(
                f"perturb_dtype={self.perturb_dtype}, direction={self.direction}: expected direction=normal or "
                "rademacher, with which matrices themselves are perturbed"
            )
        if self.prefix and self.direction == "lora":
            raise ConfigError(f"prefix={self.prefix}, direction=lora: expected one of them")
        if not self.make_direction().read_only and self.format and not self.prefix:
            raise ConfigError(
                f"format={self.format}, direction={self.direction}, refresh=0: expected a refresh, such as 8, or "
                "direction=lowrank"
            )
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup={self.warmup}: expected a number of steps below steps={self.steps}")
        if self.clip and self.clip_scale:
            raise ConfigError(f"clip={self.clip}, clip_scale={self.clip_scale}: expected one of them")
        if self.clip_scale and not 1 < self.clip_scale < float("inf"):
            raise ConfigError(f"clip_scale={self.clip_scale}: expected a number above 1, such as 3, or 0 for none")
        if self.device_memory:
            try:
                parse_size(self.device_memory)
            except ValueError as error:
                raise ConfigError(f"device_memory={self.device_memory}: {error}") from None
        for name in ("learning_rate", "first_order_rate", "weight_decay", "clip", "eps_end", "alpha", "sync_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a finite number of at least 0")
        if not self.replay_within >= 0:
            raise ConfigError(f"replay_within={self.replay_within}: expected seconds, inf for no checkpoints between")
        if not 0 < self.eps < float("inf"):
            raise ConfigError(f"eps={self.eps}: expected a positive number, such as 1e-3")
        self._check_selection()
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out}: expected a fraction between 0 and 1")
        self.make_estimator()
        if self.make_hybrid() is not None and self.objective in ("accuracy", "generated"):
            raise ConfigError(
                f"first_order={self.first_order}, objective={self.objective}: expected an objective with a gradient"
            )
        if self.first_order and self.tier == "auto":
            raise ConfigError(
                f"tier=auto, first_order={self.first_order}: expected tier=host, as plans do not know what a tail takes"
            )
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ConfigError(f"{name}={getattr(self, name)}: expected an integer from 0 to 2**32 - 1")

    def _check_selection(self) -> None:
        if not 0 <= self.train_blocks <= 1:
            raise ConfigError(f"train_blocks={self.train_blocks}: expected a fraction from 0 to 1, such as 0.5")
        if not self.train_blocks:
            return
        if self.first_order or self.objective == "generated":
            raise ConfigError(
                f"train_blocks={self.train_blocks}, first_order={self.first_order}, objective={self.objective}: "
                "expected neither first_order nor objective=generated with it"
            )
        if self.format and self.direction not in _LOW_RANK and not self.prefix:
            raise ConfigError(
                f"train_blocks={self.train_blocks}, format={self.format}, direction={self.direction}: expected "
                "direction=lowrank, which has targets with codes"
            )

    def make_direction(self) -> Direction:
        """The distribution of perturbations; a dense one has a refresh if there is a format.

        Raises:
            ConfigError: for a rank, refresh or alpha out of range.
        """
        try:
            targets = [target.strip() for target in self.targets.split(",") if target.strip()]
            targets = targets or ["*.prefix.*"] * (self.prefix > 0)
            if self.direction == "lora":
                return lora(self.rank, self.alpha or None, targets=targets)
            if self.direction == "lowrank":
                return lowrank(self.rank, refresh=self.refresh or None, targets=targets)
            refresh = self.refresh if self.format and not self.prefix else 0
            return dense(self.direction, refresh or None, targets=targets, perturb_dtype=self.perturb_dtype or None)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def make_estimator(self) -> Estimator:
        """The estimator that the config describes.

        Raises:
            ConfigError: for too few directions.
        """
        direction = self.make_direction()
        eps = optax.linear_schedule(self.eps, self.eps_end, self.steps) if self.eps_end else self.eps
        if self.anchor_directions and self.estimator != "svrg":
            raise ConfigError(f"anchor_directions={self.anchor_directions}: expected estimator=svrg with them")
        try:
            if self.estimator in ("two_point", "svrg"):
                one = two_point(eps, direction=direction)
                one = one if self.directions == 1 else averaged(one, self.directions)
                return one if self.estimator == "two_point" else svrg(one, self.anchor_directions)
            make = {"one_sided": one_sided, "leave_one_out": leave_one_out}[self.estimator]
            return make(self.directions, eps, direction=direction)
        except ValueError as error:
            of_anchor = f", anchor_directions={self.anchor_directions}" if self.estimator == "svrg" else ""
            raise ConfigError(f"estimator={self.estimator}, directions={self.directions}{of_anchor}: {error}") from None

    def make_optimizer(self) -> Optimizer:
        """SGD with the config's schedule, decay, momentum and clip."""
        clip = optax.clip(self.clip) if self.clip else None
        transform = clip_by_running_scale(self.clip_scale) if self.clip_scale else clip
        rate = self._rate(self.learning_rate)
        return sgd(rate, self.weight_decay, momentum=self.momentum, transform=transform)

    def make_hybrid(self) -> Hybrid | None:
        """What is trained by backpropagation, with AdamW, whose weight decay is that of matrices; or None.

        Raises:
            ConfigError: for what `zo2jax.hybrid` refuses.
        """
        if not self.first_order:
            return None
        kind, _, count = self.first_order.partition(":")
        patterns = tuple(pattern.strip() for pattern in self.first_order.split(",") if pattern.strip())
        try:
            count = "1" if self.first_order == "head" else count
            chosen = last_blocks(int(count)) if self.first_order == "head" or kind == "last_blocks" else patterns
            decayed = lambda leaves: jax.tree.map(lambda leaf: leaf.ndim > 1, leaves)  # noqa: E731
            rate = self._rate(self.first_order_rate)
            adamw = optax.adamw(rate, weight_decay=self.weight_decay, mask=decayed)
            return hybrid(first_order=chosen, optimizer=adamw)
        except ValueError as error:
            raise ConfigError(f"first_order={self.first_order}: {error}") from None

    def _rate(self, highest: float) -> Any:
        """A learning rate with the config's warmup and schedule."""
        steps = self.steps - self.warmup
        rates = {
            "constant": highest,
            "linear": optax.linear_schedule(highest, 0.0, steps),
            "cosine": optax.cosine_decay_schedule(highest, steps),
        }
        rate = rates[self.schedule]
        if self.warmup:
            rise = optax.linear_schedule(highest / self.warmup, highest, max(1, self.warmup - 1))
            rate = optax.join_schedules(
                [rise, rate if callable(rate) else optax.constant_schedule(rate)], [self.warmup]
            )
        return rate

    def make_plan(self, model: Model, batch: Any) -> Plan:
        """Where the blocks of a model live while batches of these shapes are trained on.

        Raises:
            ValueError: if ``device_memory`` is too small, naming the smallest that works.
        """
        return plan(
            model,
            self.make_estimator(),
            batch=batch,
            batches=self.micro_batches,
            tier=self.tier,
            device_memory=self.device_memory or None,
            probe_batch=self.probe_batch or None,
            prefetch=self.prefetch,
            rounding=self.make_rounding(),
            machine=this_machine(self.directory) if self.tier == "auto" else None,
        )

    def make_format(self, of_folder: Format | None) -> Format | None:
        """The format that matrices are kept in; that of the model's folder if the config names none.

        Raises:
            ConfigError: for a format without products of the kind that the config asks for.
        """
        found = named(self.format, self.group or None) if self.format else of_folder
        if found is None and self.compute != "bf16":
            raise ConfigError(f"compute={self.compute}: expected format=int8 with it, or a folder of int8 codes")
        try:
            return None if found is None else replace(found, compute=self.compute)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def make_rounding(self) -> Rounding:
        """The rounding policy of updates."""
        return ROUNDINGS[self.rounding]

    def as_json(self) -> dict[str, Any]:
        """What config.json holds: every field but those that may be others later; local paths are absolute."""
        values = asdict(self)
        neutral: tuple[str, ...] = (
            "directory",
            "tensorboard",
            "sync_every",
            "replay_within",
            "patience",
            "eval_examples",
            "demonstrations",
            "scoring",
        )
        neutral += () if self.format else ("format", "group")
        # Runs of versions that lack these are as with what they are by default.
        later = ["compute", "momentum", "estimator", "micro_batches", "warmup", "clip_scale", "eps_end"]
        later += ["prefix", "perturb_dtype", "first_order", "train_blocks"]
        neutral += () if self.train_blocks else ("sensitivity_steps",)
        neutral += () if self.first_order else ("first_order_rate",)
        neutral += tuple(name for name in later if getattr(self, name) == getattr(Config, name))
        neutral += () if self.anchor_directions else ("anchor_directions",)
        neutral += () if self.direction in _LOW_RANK else ("rank",)
        codes = self.format and self.direction != "lora" and not self.prefix
        neutral += () if self.direction == "lowrank" or codes else ("refresh",)
        neutral += () if self.direction == "lora" else ("alpha",)
        neutral += () if self.direction == "lora" or self.targets else ("targets",)
        for name in (*neutral, "tier", "device_memory", "probe_batch", "prefetch"):
            del values[name]
        values |= {name: _absolute(values[name]) for name in ("model", "task", "validation")}
        values["data"] = ",".join(_absolute(part.strip()) for part in self.data.split(","))
        return values

    def may_grow(self) -> tuple[str, ...]:
        """Keys that may be larger when a run goes on: ``steps``, unless a schedule depends on it."""
        return ("steps",) if self.schedule == "constant" and not self.eps_end else ()


@dataclass(frozen=True, kw_only=True)
class MezoRecipe(Config):
    """How MeZO fine-tunes OPT on a task (arXiv 2305.17333, appendix E.3): 20,000 steps of 16 examples.

    1000 examples, checked every 4000 steps on 500 others; a constant learning rate (MeZO searched 1e-6 and 1e-7), eps
    1e-3, no weight decay. Matrices are bfloat16, rounded stochastically, where MeZO kept float16.

    >>> MezoRecipe(task="sst2").steps
    20000
    """

    model: str = "facebook/opt-13b"
    steps: int = 20_000
    eval_every: int = 4000
    learning_rate: float = 1e-7
    dtype: Literal["", "float32", "bfloat16", "float16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class ReadOnlyRecipe(Config):
    """One row of 2048 tokens a step on int4 weights that never change: V is drawn once, and P is an adapter.

    >>> ReadOnlyRecipe(model="shape:1t").tier
    'auto'
    """

    dtype: Literal["", "float32", "bfloat16", "float16"] = "bfloat16"
    format: Literal["", "int8", "int4"] = "int4"
    direction: Literal["normal", "rademacher", "lowrank", "lora"] = "lowrank"
    refresh: int = 0
    batch: int = 1
    tokens: int = 2048
    tier: Literal["device", "host", "disk", "auto"] = "auto"


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path
