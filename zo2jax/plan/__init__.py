"""The plan: where the blocks of a model live, how they are moved, and what that takes in bytes and seconds."""

from zo2jax.plan.demand import following as following
from zo2jax.plan.demand import room as room
from zo2jax.plan.machine import Machine as Machine
from zo2jax.plan.planned import Budget as Budget
from zo2jax.plan.planned import Plan as Plan
from zo2jax.plan.planned import Tier as Tier
from zo2jax.plan.planned import parse_size as parse_size
from zo2jax.plan.planning import plan as plan
