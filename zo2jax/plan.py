"""The plan: where the blocks of a model live, and how they are moved."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Plan:
    """Where each block lives, and how it is moved: pure data.

    >>> Plan({"head": "host"}).prefetch
    1
    """

    tiers: Mapping[str, Tier] = field(default_factory=dict)
    """By block; those that are not named, and those whose leaves another block shares, stay on the device."""
    prefetch: int = 1
    """Blocks whose upload is begun before the present one is computed."""
    overlap: bool = True
    """Whether write-backs go on while the next block is computed."""
    pinned: bool = True
    """Whether host memory is page-locked."""

    def __post_init__(self) -> None:
        """Raises ValueError for what is no tier, or a negative prefetch."""
        if wrong := {name: tier for name, tier in self.tiers.items() if tier not in ("device", "host", "disk")}:
            raise ValueError(f"tiers {wrong}: expected 'device', 'host' or 'disk'")
        if self.prefetch < 0:
            raise ValueError(f"prefetch is {self.prefetch}, expected an integer of at least 0")
