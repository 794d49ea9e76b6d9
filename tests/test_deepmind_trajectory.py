"""Six training steps equal DeepMind's: schedule, losses, gradients, weights, average.

Label smoothing 0.1, SGD-AGC (Nesterov 0.9, weight decay 2e-5, clipping 0.01), warm-up of 2 steps to
0.05, EMA 0.99999, no stochastic depth or dropout; float32 on both sides, so tolerances are those of
two summation orders: 1e-4 relative on losses and norms. In six steps this decay has a smaller
effect than that; tests/optim/test_optim.py tests it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nfnets_xla.models.names import haiku_names
from nfnets_xla.optim import SGD_AGC, Schedule, parameter_roles
from nfnets_xla.optim.ema import EMA
from tests.fixtures import deepmind


def test_six_steps_equal_deepminds() -> None:
    arrays = deepmind.ARRAYS
    net = deepmind.network().train()
    named = dict(net.named_parameters())
    optimizer = SGD_AGC(named.items(), parameter_roles(net, "head"), lr=0.0)
    ema = EMA(named.items(), decay=0.99999)
    images = torch.from_numpy(arrays["x_NHWC"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(arrays["labels"]).long()
    ours = {theirs: name for name, theirs in haiku_names(net).items()}

    def loss() -> Tensor:
        return F.cross_entropy(net(images), labels, label_smoothing=0.1)

    losses, rates = [], []
    for step in range(6):
        rates.append(Schedule("cosine", 0.05, 2, 6)(step))
        optimizer.set_lr(rates[-1])
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if step == 0:
            norms = [_norm(named[ours[name]].grad) for name in deepmind.NAMES]
            np.testing.assert_allclose(norms, arrays["grad0_norm"], rtol=1e-4, atol=1e-7)
        optimizer.step()
        ema.update(ema.decay_at(step))
        losses.append(float(value.detach()))
    losses.append(float(loss().detach()))

    np.testing.assert_allclose(rates, arrays["lrs"], atol=1e-8)
    np.testing.assert_allclose(losses, arrays["losses"], rtol=1e-4)
    final = [named[ours[name]].detach() for name in deepmind.NAMES]
    np.testing.assert_allclose([_norm(p) for p in final], arrays["final_norm"], rtol=1e-4)
    # Sums over both signs cancel: the error is relative to the norm times sqrt(count).
    sums = np.array([float(p.double().sum()) for p in final])
    scale = np.array([_norm(p) * p.numel() ** 0.5 for p in final])
    assert (np.abs(sums - arrays["final_sum"]) <= 1e-5 * scale + 1e-6).all()
    averages = [_norm(ema.shadow[ours[name]]) for name in deepmind.NAMES]
    np.testing.assert_allclose(averages, arrays["ema_norm"], rtol=1e-4)
    for key in arrays:
        if key.startswith("final:"):
            parameter = named[ours[key.removeprefix("final:")]].detach()
            theirs = torch.from_numpy(arrays[key])
            if theirs.ndim == 4:
                theirs = theirs.permute(3, 2, 0, 1)
            elif theirs.ndim == 2:
                theirs = theirs.T
            torch.testing.assert_close(parameter, theirs, rtol=1e-4, atol=1e-5)


def _norm(x: Tensor | None) -> float:
    assert x is not None
    return float(x.double().norm())
