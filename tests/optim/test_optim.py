"""SGD-AGC, SAM and the average against plain-numpy twins, and what each must not change."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets_xla import WSConv2d
from nfnets_xla.optim import SAM, SGD_AGC, Schedule, by_role, parameter_roles
from nfnets_xla.optim.agc import clip_adaptively
from nfnets_xla.optim.ema import EMA
from tests.reference.sgd_agc import ema_update, sam_ascent, sgd_agc_step

STEPS = 200


class Small(nn.Module):
    """Every role at least once, in float64, so that twins agree to rounding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = WSConv2d(4, 8, 3, groups=2)
        self.hidden = nn.Linear(8, 6)
        self.skip = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        # The standardised weight is float32 by design, so the convolution is written out here.
        weight = self.conv.weight * self.conv.gain[:, None, None, None]
        pooled = F.conv2d(x, weight, self.conv.bias, groups=2).mean((2, 3))
        hidden = torch.tanh(self.hidden(pooled))
        return self.head(hidden + self.skip * hidden**2)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    # Inputs are small: a twin agrees to rounding only if training is not chaotic.
    return [
        (
            torch.randn(5, 4, 5, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (5,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def sgd(net: nn.Module, **options: float | None) -> SGD_AGC:
    given = {"lr": 0.1, **options}
    return SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), **given)  # type: ignore[arg-type]


def closure_for(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def arrays(net: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}


def gradients_at(net: Small, weights: dict[str, np.ndarray], x: Tensor, y: Tensor) -> dict:
    probe = copy.deepcopy(net)
    probe.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
    F.cross_entropy(probe(x), y).backward()
    return {n: _required(p.grad).numpy().copy() for n, p in probe.named_parameters()}


@pytest.mark.parametrize("rho", [None, 0.05])
def test_many_steps_equal_the_numpy_twin(rho: float | None) -> None:
    net = Small()
    roles = parameter_roles(net, "head")
    hyper = {"momentum": 0.9, "weight_decay": 0.01, "clipping": 0.02}
    inner = sgd(net, **hyper)
    optimizer = inner if rho is None else SAM(inner, rho=rho)
    ema = EMA(net.named_parameters(), decay=0.9)
    weights, shadow = arrays(net), arrays(net)
    momenta = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step, (x, y) in enumerate(batches()):
        lr = Schedule("cosine", 0.1, 5, STEPS)(step)
        inner.set_lr(lr)
        optimizer.step(closure_for(net, optimizer, x, y))
        ema.update(ema.decay_at(step))
        where = weights
        if rho is not None:
            where = sam_ascent(weights, gradients_at(net, weights, x, y), rho)
        gradients = gradients_at(net, where, x, y)
        sgd_agc_step(weights, gradients, momenta, dict(roles), lr=lr, **hyper)
        ema_update(shadow, weights, 0.9, step)
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ema.shadow[name].numpy(), shadow[name], rtol=1e-9, atol=1e-12)
    moved = np.abs(net.skip.detach().numpy())
    assert moved > 0  # because of eps, a zero-initialised scalar can move


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("fused_on", [by_role.FUSED_ON, ()])
def test_without_clipping_it_is_torchs_sgd(
    fused_on: tuple[str, ...], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_role, "FUSED_ON", fused_on)
    net, twin = Small(), Small()
    ours = sgd(net, clipping=None, weight_decay=0.0, nesterov=nesterov)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    for x, y in batches()[:20]:
        ours.step(closure_for(net, ours, x, y))
        theirs.step(closure_for(twin, theirs, x, y))  # type: ignore[arg-type]
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_defaults_are_the_papers() -> None:
    paper = {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 2e-5,
        "clipping": 0.01,
        "clipping_eps": 1e-3,
    }
    defaults = sgd(Small()).defaults
    assert {name: defaults[name] for name in paper} == paper


def test_gradients_within_the_bound_pass_bit_for_bit() -> None:
    weight = torch.randn(4, 3, 3, 3)
    gradient = 1e-4 * torch.randn(4, 3, 3, 3)
    assert torch.equal(clip_adaptively(gradient, weight, 0.01, 1e-3)[0], gradient)


def test_clipped_units_have_the_norm_of_the_bound_and_keep_their_direction() -> None:
    weight, gradient = torch.randn(4, 6), 100 * torch.randn(4, 6)
    clipped, factor = clip_adaptively(gradient, weight, 0.01, 1e-3)
    assert bool((factor < 1).all())
    torch.testing.assert_close(clipped.norm(dim=1), 0.01 * weight.norm(dim=1))
    torch.testing.assert_close(F.cosine_similarity(clipped, gradient), torch.ones(4))
    vector, _ = clip_adaptively(
        gradient[0], weight[0], 0.01, 1e-3
    )  # a gain: one norm for all of it
    torch.testing.assert_close(vector.norm(), 0.01 * weight[0].norm())


def test_classifier_weight_is_decayed_and_not_clipped_its_bias_the_reverse() -> None:
    net = Small()
    optimizer = sgd(net, weight_decay=0.5, clipping=0.01, momentum=0.0)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    before = arrays(net)
    optimizer.step()
    change = {name: (before[name] - p.detach().numpy()) / 0.1 for name, p in net.named_parameters()}
    np.testing.assert_allclose(change["head.weight"], 100 + 0.5 * before["head.weight"])
    bound = 0.01 * max(np.linalg.norm(before["head.bias"]), 1e-3)
    np.testing.assert_allclose(np.linalg.norm(change["head.bias"]), bound)
    np.testing.assert_allclose(np.linalg.norm(change["conv.gain"]), 0.01 * np.sqrt(8))


def test_sam_with_rho_0_is_the_inner_optimizer() -> None:
    net, twin = Small(), Small()
    plain, inner = sgd(net), sgd(twin)
    wrapped = SAM(inner, rho=0.0)
    for x, y in batches()[:10]:
        plain.step(closure_for(net, plain, x, y))
        wrapped.step(closure_for(twin, wrapped, x, y))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_sam_perturbs_by_rho_restores_exactly_and_returns_the_first_loss() -> None:
    net = Small()
    inner = sgd(net, lr=0.0)
    optimizer = SAM(inner, rho=0.05)
    before = arrays(net)
    x, y = batches()[0]
    seen: list[dict[str, np.ndarray]] = []
    losses: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(arrays(net))
        losses.append(closure_for(net, optimizer, x, y)())
        return losses[-1]

    returned = optimizer.step(closure)
    assert returned is losses[0]
    assert len(seen) == 2
    moved = np.sqrt(sum(((seen[1][n] - seen[0][n]) ** 2).sum() for n in before))
    np.testing.assert_allclose(moved, 0.05, rtol=1e-9)
    assert losses[1] > losses[0]
    assert all((before[name] == now).all() for name, now in arrays(net).items())


def test_sam_with_a_zero_gradient_stays_finite() -> None:
    net = Small()
    optimizer = SAM(sgd(net), rho=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p * 0).sum() for p in net.parameters())
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_momentum_survives_both_kinds_of_checkpoint() -> None:
    net, twin = Small(), Small()
    first = sgd(net)
    data = batches()
    for x, y in data[:5]:
        first.step(closure_for(net, first, x, y))
    twin.load_state_dict(net.state_dict())
    second = sgd(twin)
    second.load_slots(first.slots(), updates=1)
    third_net = copy.deepcopy(net)
    third = SAM(sgd(third_net), rho=0.0)
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    for x, y in data[5:8]:
        first.step(closure_for(net, first, x, y))
        second.step(closure_for(twin, second, x, y))
        third.step(closure_for(third_net, third, x, y))
    for a, b, c in zip(net.parameters(), twin.parameters(), third_net.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    net = Small()
    optimizer = sgd(net, weight_decay=0.5)
    before = arrays(net)
    net.head.bias.grad = torch.ones_like(net.head.bias)
    optimizer.step()
    changed = {name for name, now in arrays(net).items() if not (now == before[name]).all()}
    assert changed == {"head.bias"}


def test_ema_decay_warms_up() -> None:
    ema = EMA(Small().named_parameters(), decay=0.99)
    assert ema.decay_at(0) == 0.1
    assert ema.decay_at(10) == 11 / 20
    assert ema.decay_at(10_000) == 0.99


def test_bad_values_are_refused() -> None:
    net = Small()
    roles = parameter_roles(net, "head")
    with pytest.raises(ValueError, match="momentum is 1"):
        sgd(net, momentum=1.0)
    with pytest.raises(ValueError, match="clipping is 0"):
        sgd(net, clipping=0.0)
    with pytest.raises(ValueError, match=r"roles differ in skip"):
        SGD_AGC([(n, p) for n, p in net.named_parameters() if n != "skip"], roles, lr=0.1)
    with pytest.raises(ValueError, match="no submodule 'fc'"):
        parameter_roles(net, "fc")
    with pytest.raises(ValueError, match="belongs to a Embedding"):
        parameter_roles(nn.Embedding(3, 2), None)
    with pytest.raises(ValueError, match="rho is -1"):
        SAM(sgd(net), rho=-1)
    with pytest.raises(ValueError, match="needs a closure"):
        SAM(sgd(net), rho=0.1).step()
    with pytest.raises(ValueError, match="warmup_steps is 9"):
        Schedule("cosine", 1, 9, 6)(0)
    with pytest.raises(ValueError, match="momentum of another model"):
        sgd(net).load_slots({"momentum": {}}, updates=0)
    with pytest.raises(ValueError, match="averages of another model"):
        EMA(net.named_parameters(), 0.9).load({})
    with pytest.raises(ValueError, match="parameters were given without names"):
        EMA(net.parameters(), 0.9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay is 1"):
        EMA(net.named_parameters(), 1.0)


def _required(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient
