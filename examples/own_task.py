"""A task of your own: tell prose from code, by the small model that comes with the package.

    python examples/own_task.py

The text is Python's own library, so that nothing is downloaded. The same with a model and examples of yours:
``zo.load("path/to/model")`` and ``read_examples("mine.jsonl")``.
"""

import tempfile

import jax

import zo2jax as zo
from zo2jax.demo import model_folder
from zo2jax.tasks.encoding import TaskBatches, TaskHeldOut
from zo2jax.tasks.scoring import evaluate
from zo2jax.tasks.stdlib import docstrings, source_code

TASK = zo.Task(prompt="{text}\nThis is", candidates=(" text", " code"), label="kind")


def make_examples(count: int) -> list[dict[str, str]]:
    """``count`` lines of docstrings and as many of source code, in turns."""
    prose = [line[:80] for line in docstrings().splitlines() if len(line) > 60]
    code = [line.strip()[:80] for line in source_code(400_000).splitlines() if len(line) > 60]
    chosen = zip(prose[:: len(prose) // count], code[:: len(code) // count], strict=False)
    return [{"text": text, "kind": kind} for pair in chosen for text, kind in zip(pair, ("text", "code"), strict=True)]


def main(steps: int = 150, count: int = 250) -> tuple[float, float]:
    """Trains for some steps on ``count`` lines of each kind; returns the held-out loss before and after."""
    model, examples = zo.load(model_folder(), dtype="float32"), make_examples(count)
    train, test = examples[: 8 * count // 5], examples[8 * count // 5 : 2 * count]
    print("zero-shot", evaluate(model, TASK, test, batch=32))
    batches = TaskBatches(model, TASK, train, batch=16, steps=steps, seed=0, objective="candidates")
    held_out = TaskHeldOut(model, TASK, test, batch=32, objective="candidates")
    with tempfile.TemporaryDirectory() as folder:
        run = zo.Run(model, zo.two_point(1e-3), zo.sgd(2e-4), directory=folder, key=jax.random.key(0))
        with run:
            before = run.evaluate(held_out)
            for batch in run.remaining(batches):
                run.step(batch)
            after = run.evaluate(held_out)
            print("trained  ", evaluate(run.model, TASK, test, batch=32))
    print(f"held-out loss {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
