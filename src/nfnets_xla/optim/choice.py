"""The optimizers that a recipe can name; config.py says which settings go together."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nfnets_xla.optim.adamw import AdamW_AGC
from nfnets_xla.optim.by_role import ByRole
from nfnets_xla.optim.guard import Guard
from nfnets_xla.optim.sgd_agc import SGD_AGC

OPTIMIZERS: Mapping[str, type[ByRole]] = {"sgd": SGD_AGC, "adamw": AdamW_AGC}


def make_optimizer(
    name: str,
    named_parameters: Mapping[str, Tensor],
    roles: Mapping[str, str],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    guard: Guard | None,
    **own: float,
) -> ByRole:
    """`own` is what config.py lists for this optimizer; with a `beta2`, `momentum` is beta1."""
    options: dict[str, Any] = {"momentum": momentum, **own}
    if "beta2" in own:
        options["betas"] = (options.pop("momentum"), options.pop("beta2"))
    common = {"lr": lr, "weight_decay": weight_decay, "clipping": clipping, "guard": guard}
    return OPTIMIZERS[name](named_parameters.items(), roles, **common, **options)
