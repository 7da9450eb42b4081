"""What happened in a stretch of time: who was busy, and to what each moment goes."""

import heapq
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


class Event(NamedTuple):
    """Something that the device did: its lane, and milliseconds.

    >>> Event("upload", 1.0, 0.5).start
    1.0
    """

    lane: str
    start: float
    duration: float


class Window(NamedTuple):
    """A stretch of time, in milliseconds.

    >>> Window(1.0, 3.0).end
    3.0
    """

    start: float
    end: float


def busy(happened: Iterable[Event], lane: str, window: Window) -> float:
    """The share of a window in which a lane does something; what overlaps within the lane counts once.

    >>> busy([Event("upload", 0.0, 2.0), Event("upload", 1.0, 2.0), Event("compute", 0.0, 4.0)], "upload", Window(0, 4))
    0.75
    """
    total, reached = 0.0, window.start
    for event in sorted(event for event in happened if event.lane == lane):
        end = min(event.start + event.duration, window.end)
        total += max(0.0, end - max(event.start, reached))
        reached = max(reached, end)
    return total / (window.end - window.start)


COMPUTE = ("forward", "perturb", "update")
"""The parts of a step that the device computes."""

PARTS = (*COMPUTE, "upload", "write-back", "disk", "wait", "Python")
"""The parts of a step's time."""

_PRECEDENCE = dict.fromkeys(COMPUTE, 0) | {"upload": 1, "write-back": 2, "disk": 3, "wait": 4}


def parts(happened: Iterable[Event], window: Window) -> dict[str, float]:
    """Milliseconds of a window by `PARTS`: each moment goes to one of them, so that they add up to the window.

    A moment in which something is computed goes to that: of several things to the one that began last, which is the
    innermost one where a loop is an event too. Else it goes to the first of upload, write-back, disk and wait that goes
    on, and to Python if nothing does.

    >>> happened = [Event("upload", 0.0, 3.0), Event("forward", 1.0, 1.0), Event("wait", 0.0, 4.0)]
    >>> {part: ms for part, ms in parts(happened, Window(0.0, 6.0)).items() if ms}
    {'forward': 1.0, 'upload': 2.0, 'wait': 1.0, 'Python': 2.0}
    """
    total = dict.fromkeys(PARTS, 0.0)
    inside = sorted(
        (event.start, event.start + event.duration, event.lane)
        for event in happened
        if event.start < window.end and event.start + event.duration > window.start
    )
    edges = {window.start, window.end, *(min(max(edge, window.start), window.end) for e in inside for edge in e[:2])}
    begun = 0
    going_on: list[tuple[int, float, float, str]] = []  # the first is what the moment goes to
    for start, end in pairwise(sorted(edges)):
        while begun < len(inside) and inside[begun][0] <= start:
            since, until, lane = inside[begun]
            heapq.heappush(going_on, (_PRECEDENCE[lane], -since, until, lane))
            begun += 1
        while going_on and going_on[0][2] <= start:
            heapq.heappop(going_on)
        total[going_on[0][3] if going_on else "Python"] += end - start
    return total
