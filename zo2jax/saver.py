"""Checkpoints of a run: at once, or while it trains, one block at a step."""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping

import jax

from zo2jax.checkpoint import Snapshots, Steps
from zo2jax.journal import Journal
from zo2jax.kept import Kept
from zo2jax.mezo import State
from zo2jax.models.blocks import Params
from zo2jax.pages import on_host
from zo2jax.weights import Weights

_Entries = list[tuple[str, Params]]


class Saver:
    """Saves the weights of a run, at once or in the background.

    In the background each step hands over a copy of one block, which a thread writes; so the blocks are of different
    steps, and one that is restored takes the updates that it lacks from the journal (`zo2jax.restored`). Copies of a
    few blocks are in host memory for it.

    Such a checkpoint is begun so often that a run that is killed is back where it was within ``within`` seconds: a
    replay takes less time than the training of the same steps, which makes the same updates and forward passes besides,
    and a checkpoint replaces the one before when it has been written. Where writing takes longer than ``within``, one
    follows the other.

    Args:
        snapshots: of the run.
        journal: of the run.
        kept: how the run keeps its weights.
        within: seconds; infinity for no checkpoints but those that are asked for.
        behind: seconds that the replay of the present journal took or would take.
    """

    def __init__(self, snapshots: Snapshots, journal: Journal, kept: Kept, within: float, behind: float):
        """Saves nothing yet."""
        self._snapshots, self._journal, self._kept, self._within = snapshots, journal, kept, within
        self._since = time.monotonic() - behind  # what was trained since then would be taken again
        self._took = 0.0  # seconds, the last one in the background
        self._wanted = False
        self._background: _Background | None = None

    def save(self, state: State, weights: Weights, metrics: Mapping[str, float]) -> None:
        """Saves the weights, which have every update, durable on return; what is written meanwhile is given up."""
        self.close()
        began = time.monotonic()
        self._journal.sync()  # which no checkpoint is ahead of
        self._snapshots.save(state, self._kept.entries(weights.stream), metrics, Steps(weights.begun))
        self._since = began

    @property
    def busy(self) -> bool:
        """Whether there is something to be done in the background."""
        return self._wanted or (self._background is not None and self._background.is_alive())

    @property
    def late(self) -> bool:
        """Whether a checkpoint is due."""
        return time.monotonic() - self._since >= self._within - self._took

    def begin(self) -> None:
        """Has the next step begin a checkpoint in the background, unless one is under way."""
        self._wanted = not self.busy

    def check(self) -> None:
        """Raises what went wrong in the background."""
        if self._background is None or self._background.is_alive():
            return
        ended = self._background
        self._let_go()
        if ended.error is not None:
            self._since = time.monotonic()  # not at every step
            raise ended.error
        self._since, self._took = ended.began, time.monotonic() - ended.began

    def step(self, state: State, weights: Weights) -> None:
        """Hands over a block; called when the probes of a step are done, and its update is not taken yet.

        Args:
            state: before the step.
            weights: which have the updates of all steps before.
        """
        if self._background is None and (self._wanted or self.late):
            self._wanted = False
            self._background = _Background(self._snapshots, self._journal, state, list(weights.stream))
            self._on_drop = weakref.finalize(self, self._background.abandon)  # of a run that nobody closes
        if self._background is not None:
            self._background.take(self._kept, weights)

    def close(self) -> None:
        """Gives up what is not yet written; the journal has it all."""
        self._wanted = False
        if self._background is not None:
            self._background.abandon()
            self._background.join()
            self._let_go()

    def _let_go(self) -> None:
        self._on_drop.detach()
        self._background = None


class _Abandoned(Exception):
    pass


class _Background(threading.Thread):
    """Writes a checkpoint of blocks that it is given one by one."""

    def __init__(self, snapshots: Snapshots, journal: Journal, state: State, names: list[str]):
        """Begins."""
        super().__init__(name="zo2jax-saver", daemon=True)
        self._snapshots, self._journal, self._state = snapshots, journal, state
        self._names, self._done = names[::-1], dict[str, int]()
        self._handed: queue.Queue[_Entries | None] = queue.Queue(1)
        self._ended = False  # all blocks were handed over
        self.error: BaseException | None = None
        self._abandoned = False
        self.began = time.monotonic()
        self.start()

    def run(self) -> None:
        """What the thread does."""
        try:
            self._snapshots.save(self._state, self._blocks(), {}, Steps(True, self._done))
        except _Abandoned:
            pass
        except BaseException as error:  # for the thread of the run
            self.error = error

    def take(self, kept: Kept, weights: Weights) -> None:
        """A copy of the next block, unless the one before is not being written yet."""
        if self._handed.full() or self._ended:
            return
        if not self._names:  # the journal has the step at which the last block was handed over now
            self._ended = True
            self._handed.put(None)
            return
        entries = kept.entries_of(weights.stream, self._names[-1])
        copies = [(entry, jax.tree.map(on_host, leaves)) for entry, leaves in entries]
        self._done[self._names.pop()] = weights.done
        self._handed.put(copies)

    def abandon(self) -> None:
        """Ends soon, without a checkpoint unless all blocks were handed over."""
        if not self._ended:
            self._ended = self._abandoned = True
            with contextlib.suppress(queue.Empty):
                self._handed.get_nowait()
            self._handed.put(None)

    def _blocks(self) -> Iterator[tuple[str, Params]]:
        """What is to be written, as it is handed over."""
        while (entries := self._handed.get()) is not None and not self._abandoned:
            while entries:
                yield entries.pop(0)
        if self._abandoned:
            raise _Abandoned
        self._journal.sync()  # which no checkpoint is ahead of
