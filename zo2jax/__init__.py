"""zo2jax: fine-tune language models with zeroth-order optimization, two forward passes and no backward pass, in JAX.

>>> import jax, jax.numpy as jnp, zo2jax as zo
>>> algorithm = zo.mezo(lambda w, x: jnp.mean((w - x) ** 2), zo.two_point(eps=1e-3), zo.sgd(0.1))
>>> state = algorithm.init(jnp.zeros(3), jax.random.key(0))
>>> state, info = jax.jit(algorithm.step)(state, jnp.ones(3))
>>> bool(info.loss > 0.9)
True
"""

__version__ = "0.1.0"

from zo2jax.directions import Direction as Direction
from zo2jax.directions import dense as dense
from zo2jax.directions import lora as lora
from zo2jax.directions import lowrank as lowrank
from zo2jax.directions import normal as normal
from zo2jax.directions import rademacher as rademacher
from zo2jax.estimators import Estimator as Estimator
from zo2jax.estimators import averaged as averaged
from zo2jax.estimators import leave_one_out as leave_one_out
from zo2jax.estimators import one_sided as one_sided
from zo2jax.estimators import svrg as svrg
from zo2jax.estimators import two_point as two_point
from zo2jax.first_order import hybrid as hybrid
from zo2jax.first_order import last_blocks as last_blocks
from zo2jax.formats import int4 as int4
from zo2jax.formats import int8 as int8
from zo2jax.mezo import Info as Info
from zo2jax.mezo import Mezo as Mezo
from zo2jax.mezo import State as State
from zo2jax.mezo import mezo as mezo
from zo2jax.models.blocks import Block as Block
from zo2jax.models.generation import sampling as sampling
from zo2jax.models.heads import Classification as Classification
from zo2jax.models.heads import QuestionAnswering as QuestionAnswering
from zo2jax.models.hub import load as load
from zo2jax.models.layers import realign as realign
from zo2jax.models.model import Model as Model
from zo2jax.models.prefix import with_prefix as with_prefix
from zo2jax.models.probing import probed as probed
from zo2jax.models.stages import blocks as blocks
from zo2jax.monitor import Monitor as Monitor
from zo2jax.objectives import Generated as Generated
from zo2jax.optimizers import Optimizer as Optimizer
from zo2jax.optimizers import clip_by_running_scale as clip_by_running_scale
from zo2jax.optimizers import faithful as faithful
from zo2jax.optimizers import meazo as meazo
from zo2jax.optimizers import sgd as sgd
from zo2jax.plan import Plan as Plan
from zo2jax.plan import plan as plan
from zo2jax.recorder import NonFiniteLoss as NonFiniteLoss
from zo2jax.recorder import StepInfo as StepInfo
from zo2jax.replay import replay as replay
from zo2jax.run import Run as Run
from zo2jax.sensitivity import Sensitivity as Sensitivity
from zo2jax.sensitivity import sensitivity as sensitivity
from zo2jax.tasks.task import Task as Task
from zo2jax.updates import Rounding as Rounding
from zo2jax.updates import Update as Update
from zo2jax.updates import apply_update as apply_update
from zo2jax.updates import nearest as nearest
from zo2jax.updates import residual as residual
from zo2jax.updates import stochastic as stochastic
