"""Trains the small Llama that `zo2jax demo` adapts, by ordinary backpropagation on the standard library's docstrings.

    python examples/pretrain_tiny.py --steps 1000 --folder zo2jax/assets/tiny

It needs nothing but this package: the text is that of the Python which runs it. The tokenizer is a byte-level BPE
of 1024 tokens trained on the same text. About 8 minutes on 2 CPU cores, 10 s on an H200; losses and versions are
written beside the weights.
"""

import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zo2jax.models.hub import export
from zo2jax.models.llama import LlamaConfig
from zo2jax.run import mean_loss
from zo2jax.tasks.stdlib import docstrings
from zo2jax.tasks.text import HeldOut, TextBatches, load_text


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


def main(
    folder: Path = Path("tiny"),
    steps: int = 1000,
    batch: int = 32,
    tokens: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Trains, prints the losses, and exports a Hugging Face folder in bfloat16."""
    config = LlamaConfig(
        vocabulary=1024, size=128, hidden=344, layers=5, heads=4, kv_heads=2, head_size=32, context=256,
        tied=True, bos_id=0, stop_ids=(1,),
    )  # fmt: skip
    model = config.init(jax.random.key(seed))
    model = replace(model, tokenizer=make_tokenizer(docstrings(), config.vocabulary))
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "docstrings.txt"
        corpus.write_text(docstrings(), encoding="utf-8")
        text = load_text(model, str(corpus), tokens=tokens, batch=batch, held_out=0.02)
    print(f"{model.parameter_count:,} parameters, {len(text.train) * tokens:,} tokens of docstrings")

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps, learning_rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.05))
    params, state = model.params, optimizer.init(model.params)

    @jax.jit
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(model.loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    start = time.time()
    for i, rows in enumerate(TextBatches(text.train, batch, steps, seed)):
        params, state, loss = step(params, state, rows)
        if i % 100 == 0 or i == steps - 1:
            print(f"step {i:5d}  loss {float(loss):.3f}  {time.time() - start:6.0f} s", flush=True)

    trained = model.replace(jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim >= 2 else w, params))
    held_out = mean_loss(jax.jit(trained.loss_sum), trained.params, HeldOut(text.held_out, batch))
    export(trained, folder)
    readme = f"""# A small Llama trained on docstrings

{model.parameter_count:,} parameters, bfloat16, made by

    python examples/pretrain_tiny.py --steps {steps} --batch {batch} --tokens {tokens}

on the docstrings of Python {platform.python_version()}'s standard library ({len(text.train) * tokens:,} tokens)
in {time.time() - start:.0f} s on {jax.devices()[0].device_kind} with jax {jax.__version__}. Held-out loss of the
weights as they stand here: {held_out:.3f} nats per token. The weights are under Apache-2.0; the docstrings are under
the Python Software Foundation license.
"""
    (folder / "README.md").write_text(readme)
    print(readme)
    print(trained.generate("Return the", 40))


if __name__ == "__main__":
    tyro.cli(main)
