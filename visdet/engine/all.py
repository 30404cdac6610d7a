"""Training: learner, loss, callbacks, checkpoints, and the registry: what a user of MMEngine looks for."""
from visdet.core.registry import register, entry, names, lookup, params, check_kwargs, KINDS
from visdet.core.config import Config, load_config, build
from visdet.core.bases import load_tree, lock_bases, preset_names
from visdet.engine.loss import *
from visdet.engine.optim import *
from visdet.engine.optimizers import adamw, sgd, lamb, adamw8bit, as_opt_func, TorchOptim
from visdet.engine.layer_decay import *
from visdet.engine.schedules import Schedule, as_schedule, one_cycle, step, flat_cos, finetune
from visdet.engine.callbacks import *
from visdet.engine.columns import *
from visdet.engine.ema import *
from visdet.engine.checkpoint import *
from visdet.engine.learner import *
from visdet.engine.show import *
from visdet.engine.preflight import *
