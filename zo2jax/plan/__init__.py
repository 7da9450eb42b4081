"""The plan: where the blocks of a model live, how they are moved, and what that takes in bytes and seconds."""

from zo2jax.plan.planning import Budget as Budget
from zo2jax.plan.planning import Plan as Plan
from zo2jax.plan.planning import Tier as Tier
from zo2jax.plan.planning import following as following
from zo2jax.plan.planning import parse_size as parse_size
from zo2jax.plan.planning import plan as plan
from zo2jax.plan.planning import room as room
