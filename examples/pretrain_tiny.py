"""Trains a small model from scratch by ordinary backpropagation: something to fine-tune.

    python examples/pretrain_tiny.py --steps 1000 --folder zo2jax/assets/tiny
    python examples/pretrain_tiny.py --family gpt2 --size small --text novel.txt --steps 250 --folder gpt2-small

The first makes the Llama that `zo2jax demo` adapts, and needs nothing but this package: the text is the docstrings of
the standard library. About 8 minutes on 2 CPU cores, 10 s on an H200. The second makes a model of about 280,000
parameters of another family in about a minute. The tokenizer is a byte-level BPE trained on the same text; losses and
versions are written beside the weights.
"""

import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zo2jax.models.decoder import Decoder
from zo2jax.models.gpt2 import Gpt2Config
from zo2jax.models.hub import export
from zo2jax.models.llama import LlamaConfig
from zo2jax.models.opt import OptConfig
from zo2jax.models.qwen3 import Qwen3Config
from zo2jax.objectives import mean_loss
from zo2jax.tasks.stdlib import docstrings
from zo2jax.tasks.text import HeldOut, TextBatches, load_text

Family = Literal["llama", "qwen3", "opt", "gpt2"]
Size = Literal["tiny", "small"]


def make_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Byte-level BPE with the special tokens <s> (0) and </s> (1)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def shape(family: Family, size: Size) -> Decoder:
    """The configuration of a small model: 1.3 M parameters ("tiny"), or 0.26 M ("small")."""
    width, heads, vocabulary = (128, 4, 1024) if size == "tiny" else (64, 4, 512)
    common = {"vocabulary": vocabulary, "size": width, "layers": 5, "heads": heads, "context": 256, "tied": True}
    common |= {"bos_id": 0, "stop_ids": (1,)}
    if family == "gpt2":
        return Gpt2Config(**common, hidden=4 * width)
    if family == "opt":
        return OptConfig(**common, hidden=4 * width, token_size=width, prompt_bos=None)
    kind = Qwen3Config if family == "qwen3" else LlamaConfig
    return kind(**common, hidden=width * 43 // 16, kv_heads=heads // 2, head_size=width // heads)


def main(
    folder: Path = Path("tiny"),
    family: Family = "llama",
    size: Size = "tiny",
    text: Path | None = None,
    steps: int = 1000,
    batch: int = 32,
    tokens: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Trains, prints the losses, and exports a Hugging Face folder in bfloat16."""
    config = shape(family, size)
    source = docstrings() if text is None else text.read_text(encoding="utf-8")
    model = replace(config.init(jax.random.key(seed)), tokenizer=make_tokenizer(source, config.vocabulary))
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text(source, encoding="utf-8")
        rows = load_text(model, str(corpus), tokens=tokens, batch=batch, held_out=0.02)
    what = "docstrings" if text is None else text.name
    print(f"{model.parameter_count:,} parameters, {len(rows.train) * tokens:,} tokens of {what}")

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps, learning_rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.05))
    params, state = model.params, optimizer.init(model.params)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(model.loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    start = time.time()
    for i, chosen in enumerate(TextBatches(rows.train, batch, steps, seed)):
        params, state, loss = step(params, state, chosen)
        if i % 100 == 0 or i == steps - 1:
            print(f"step {i:5d}  loss {float(loss):.3f}  {time.time() - start:6.0f} s", flush=True)

    shapes = config.init(jax.random.key(seed), jnp.bfloat16)
    trained = replace(shapes, source=jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim >= 2 else w, params))
    trained = replace(trained, tokenizer=model.tokenizer)
    loss_sum = jax.jit(trained.loss_sum)
    held_out = mean_loss(lambda rows: loss_sum(trained.params, rows), HeldOut(rows.held_out, batch))
    export(trained, folder)
    source = f"the docstrings of Python {platform.python_version()}'s standard library" if text is None else text.name
    licence = "; the docstrings are under\nthe Python Software Foundation license" if text is None else ""
    options = "" if text is None else f" --family {family} --size {size} --text {text.name}"
    readme = f"""# A small {config.architecture} trained on {what}

{model.parameter_count:,} parameters, bfloat16, made by

    python examples/pretrain_tiny.py{options} --steps {steps} --batch {batch} --tokens {tokens}

on {source} ({len(rows.train) * tokens:,} tokens)
in {time.time() - start:.0f} s on {jax.devices()[0].device_kind} with jax {jax.__version__}. Held-out loss of the
weights as they stand here: {held_out:.3f} nats per token. The weights are under Apache-2.0{licence}.
"""
    (folder / "README.md").write_text(readme)
    print(readme)
    print(trained.generate("Return the" if text is None else "It was", 40))


if __name__ == "__main__":
    tyro.cli(main)
