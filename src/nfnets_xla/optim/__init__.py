"""Optimizers (SGD and AdamW with adaptive gradient clipping, SAM), schedule, weight average."""

from nfnets_xla.optim.adamw import AdamW_AGC as AdamW_AGC
from nfnets_xla.optim.agc import agc_ as agc_
from nfnets_xla.optim.by_role import ByRole as ByRole
from nfnets_xla.optim.ema import EMA as EMA
from nfnets_xla.optim.guard import Guard as Guard
from nfnets_xla.optim.passes import Passes as Passes
from nfnets_xla.optim.roles import parameter_roles as parameter_roles
from nfnets_xla.optim.sam import SAM as SAM
from nfnets_xla.optim.schedule import Schedule as Schedule
from nfnets_xla.optim.schedule import scaled_peak as scaled_peak
from nfnets_xla.optim.schedule import warmup_length as warmup_length
from nfnets_xla.optim.sgd_agc import SGD_AGC as SGD_AGC
