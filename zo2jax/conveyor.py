"""The conveyor: the pages of a model's blocks in their tiers, and on their way to the device and back.

Before a block is computed, the upload of the next one is begun (memory that is allocated after a computation was issued
waits for it); pages that changed are written back while later blocks are computed; and an upload waits until earlier
blocks have left the device, so that there are never more than ``prefetch + 2`` of them there, nor more bytes than
`zo2jax.plan.room` says. Nothing else waits within a step. What is computed of a block is not known here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax

from zo2jax.link import Copy, StoreError
from zo2jax.marks import mark
from zo2jax.models.blocks import Params, Source
from zo2jax.pages import Layout, flat
from zo2jax.plan import Plan, Tier, following, room
from zo2jax.stores import FOLDS_OF_FILES, Keep, Pages, Store, Tiers, result


class Conveyor:
    """Brings blocks to the device and takes them back. They are numbered as their layouts are.

    Args:
        layouts: by block, in the order in which they are visited.
        plan: where they live, and how they are moved.
        stay: blocks that are on the device whatever the plan says, as do those without pages.
        more: layouts of what else comes into their tiers, by block.
        directory: for page files, if there are any.

    Raises:
        StoreError: if there is too little host memory.

    >>> leaves = {"w": jax.numpy.ones((2, 2))}
    >>> conveyor = Conveyor({"embed": Layout.of(leaves), "head": Layout.of(leaves)}, Plan({"head": "host"}))
    >>> conveyor.fill({"embed": leaves, "head": leaves}, lambda *read: None, coded=False, fixed=False)
    []
    >>> conveyor.put(1, tuple(2 * page for page in conveyor.take(1)))
    >>> conveyor.read(1)[0][:4].tolist(), conveyor.bytes_up, conveyor.bytes_down
    ([2.0, 2.0, 2.0, 2.0], 8192, 8192)
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        plan: Plan,
        stay: Collection[str] = (),
        more: Mapping[str, Layout] | None = None,
        directory: Path | None = None,
    ):
        """Takes the memory that files go through."""
        self._layouts, self._names, self._plan = layouts, tuple(layouts), plan
        self.tiers: dict[str, Tier] = {
            name: plan.tiers.get(name, "device") if layout.nbytes and name not in stay else "device"
            for name, layout in layouts.items()
        }
        self._sizes = [0 if t == "device" else layouts[name].nbytes for name, t in self.tiers.items()]
        self._room = room([size for size in self._sizes if size], plan.prefetch)
        self._next = following([size > 0 for size in self._sizes], plan.prefetch)
        kept = [*layouts.items(), *({} if more is None else more).items()]
        host, disk = ([x.nbytes for name, x in kept if self.tiers[name] == tier] for tier in ("host", "disk"))
        self._kept = Tiers(host, disk, directory, pinned=plan.pinned)
        self._stores: dict[int, Store] = {}
        self.bytes_up = self.bytes_down = 0  # over the link, so far
        self._coming: dict[int, Pages | Future[Pages]] = {}
        self._leaving: dict[int, Copy | Future[None]] = {}
        self._last: dict[int, list[jax.Array]] = {}
        self.lost = False
        """Whether pages that changed may not have been kept."""

    def fill(
        self,
        source: Mapping[str, Params],
        see: Callable[[str, Mapping[str, Any], Keep], None],
        *,
        coded: bool,
        fixed: bool,
    ) -> list[str]:
        """Puts all blocks into their tiers: the largest first, while there is room for what reading takes.

        Args:
            source: their leaves, read once, block by block; several at once, if it can.
            see: is given the name of each block, what was read of it, by dotted name, and what puts more into its tier.
            coded: whether codes are read as they are.
            fixed: whether pages never change. Then those of the disk tier stay in the model's own files, where these
                have them as pages need them.

        Returns:
            The blocks that stay in the model's own files; of these only leaves that are in no page are read.

        Raises:
            StoreError: if memory cannot be locked, or there is no room on the disk; if the model's files have changed.
        """
        made, in_files = Source.of(source), list[str]()

        def read(i: int) -> None:
            name = self._names[i]
            layout, keep = self._layouts[name], partial(self._kept.keep, self.tiers[name])
            pieces = layout.pieces(made.extents(name)) if fixed and self.tiers[name] == "disk" else None
            if pieces is None:
                leaves = made.coded(name) if coded else made[name]
                self._stores[i] = keep(name, layout, leaves)
            else:
                self._stores[i] = self._kept.find(layout, pieces)
                leaves = made.others(name)
                in_files.append(name)
            see(name, flat(leaves), keep)

        order = sorted(range(len(self._names)), key=lambda i: -self._layouts[self._names[i]].nbytes)
        try:
            if made.concurrent:
                list(self._kept.workers.map(read, order))
            else:
                for i in order:
                    read(i)
        except BaseException:
            self._kept.close()
            raise
        return in_files

    def take(self, i: int) -> Pages:
        """The pages of a block on the device, until `put` or `release`; the uploads of the next ones begin first."""
        for j in set(self._coming) - {i, *self._next[i]}:  # of a sweep that broke off
            del self._coming[j]
        for j in (i, *self._next[i]):
            self._begin(j)
        return result(self._coming.pop(i))

    def here(self, i: int) -> Pages:
        """Those of a block that stays on the device, at any time."""
        pages = self._stores[i].upload()
        assert not isinstance(pages, Future), "blocks that share a leaf stay on the device"
        return pages

    def put(self, i: int, pages: Pages) -> None:
        """Takes back a block whose pages changed: they go to its tier."""
        if (leaving := self._stores[i].commit(pages)) is not None:
            self._leaving[i], self._last[i] = leaving, []
            self.bytes_down += self._sizes[i]
            if not self._plan.overlap:
                self._left(i)

    def release(self, i: int, outs: Sequence[Any]) -> None:
        """Takes back a block whose pages are as they were, with the results of its visits."""
        if self._sizes[i]:  # the smallest result of a visit says when it is over
            self._last[i] = [min(jax.tree.leaves(out), key=lambda x: x.nbytes) for out in outs]

    def read(self, i: int) -> Any:
        """The pages of a block as they are in its tier, for whoever copies them."""
        self._left(i)
        return self._stores[i].read()

    def edit(self, change: Callable[[int, Store], tuple[int, int]]) -> None:
        """Has ``change`` edit all blocks in their stores, by number; it returns (bytes up, bytes down) over the link.

        Files go several at a time. Nothing may be on its way, see `wait` and `forget`.
        """
        files = [i for i, tier in enumerate(self.tiers.values()) if tier == "disk"]

        def edited(i: int) -> tuple[int, int]:
            return change(i, self._stores[i])

        with ThreadPoolExecutor(FOLDS_OF_FILES) as pool:
            moved = [*pool.map(edited, files), *map(edited, set(range(len(self._names))) - set(files))]
        self.bytes_up, self.bytes_down = map(sum, zip((self.bytes_up, self.bytes_down), *moved, strict=True))

    def wait(self) -> None:
        """Returns when every block is in its tier."""
        for i in list(self._leaving):
            self._left(i)

    def arrive(self) -> None:
        """Returns when what is uploaded ahead is there; or is not, which is an error for who asks for it."""
        for pages in self._coming.values():
            with suppress(StoreError):
                jax.block_until_ready(result(pages))

    def forget(self) -> None:
        """Forgets what was uploaded ahead, once it is there."""
        self.arrive()
        self._coming.clear()

    def close(self, *, wait: bool) -> None:
        """Lets go of host memory and page files; waits for write-backs first, or gives them up."""
        try:
            if wait:
                self.wait()
            self.forget()
        finally:
            self._coming.clear()
            self._kept.close()

    def _begin(self, i: int) -> None:
        """Begins the upload of a block; waits until there is room for it on the device."""
        if i in self._coming:
            return
        self._left(i)
        if self._sizes[i]:
            there = [j for j in self._coming if self._sizes[j]]
            while self._last and (
                len(self._last) + len(there) >= self._plan.prefetch + 2
                or sum(self._sizes[j] for j in (*self._last, *there, i)) > self._room
            ):
                self._left(next(iter(self._last)))
            self.bytes_up += self._sizes[i]
        self._coming[i] = self._stores[i].upload()

    def _left(self, i: int) -> None:
        """Waits until a block has left the device."""
        if i in self._leaving:
            try:
                with mark("wait"):
                    self._leaving[i].result()
            except BaseException:
                self.lost = True
                raise
            del self._leaving[i]
        with mark("wait"):
            jax.block_until_ready([x for x in self._last.pop(i, []) if not x.is_deleted()])
