"""A whole update beside timm's: python benchmarks/update.py

Adaptive clipping, weight decay, Nesterov step and average of the weights, given F0's gradients, in
eager PyTorch on the CPU or a GPU, of

    ours   SGD_AGC and EMA;
    timm   adaptive_clip_grad, torch's SGD and ModelEmaV3, at their defaults.

Prints medians of several updates taken in turns, the number of operators called (one of torch's
foreach operators counts once, however many kernels it launches), and their ratios; then, if
torch_xla is installed, the nodes of the XLA graph of an update of nfnet_mini_f0: unrolled for both,
and stacked for ours.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from _turns import Report, medians
from nfnets_xla import NFNet
from nfnets_xla.models.stacked import stack
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.optim import SGD_AGC, parameter_roles
from nfnets_xla.optim.ema import EMA

CUDA = torch.cuda.is_available()
RUNS = 11
VIEWS = (
    "view",
    "detach",
    "alias",
    "unbind",
    "split",
    "expand",
    "t",
    "unsqueeze",
    "select",
    "slice",
)
Update = Callable[[], object]


class Count(TorchDispatchMode):
    """Counts operators that compute something; views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls += not name.startswith(VIEWS) and "reshape" not in name
        return func(*args, **(kwargs or {}))


def main() -> None:
    if sys.argv[1:2] == ["--nodes"]:
        print(json.dumps(nodes(sys.argv[2])))
        return
    report = Report(
        "update_cuda" if CUDA else "update",
        "python benchmarks/update.py: nfnet_f0, clipping, decay, Nesterov step, average",
    )
    threads = (torch.get_num_threads(),) if CUDA else (1, torch.get_num_threads())
    for count in threads:
        torch.set_num_threads(count)
        ours, timms = our_update(network("nfnet_f0")), timms_update(theirs("dm_nfnet_f0"))
        seconds = medians({"timm": timms, "ours": ours}, RUNS)
        report.say(f"\n{count} threads")
        calls = {name: calls_of(update) for name, update in (("timm", timms), ("ours", ours))}
        for name, called in calls.items():
            report.say(f"{name:6}{1e3 * seconds[name]:9.1f} ms{called:9} operators")
        ratio, fewer = seconds["timm"] / seconds["ours"], calls["timm"] / calls["ours"]
        report.say(f"ours: {ratio:.2f} times as fast, {fewer:.1f} times fewer operators")
    forms = ("timm", "ours", "ours stacked") if importlib.util.find_spec("torch_xla") else ()
    if forms:
        report.say("\nnodes of the XLA graph of an update, nfnet_mini_f0")
    for form in forms:
        ran = subprocess.run(
            [sys.executable, __file__, "--nodes", form], capture_output=True, text=True, check=True
        )
        report.say(f"{form:14}{json.loads(ran.stdout.splitlines()[-1]):7}")
    report.save()


def calls_of(update: Update) -> int:
    with Count() as counted:
        update()
    return counted.calls


def network(name: str) -> NFNet:
    torch.manual_seed(0)
    return NFNet(VARIANTS[name])


def theirs(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name)


def with_gradients(net: nn.Module) -> nn.Module:
    net.to("cuda" if CUDA else "cpu")
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return net


def our_update(net: NFNet) -> Update:
    with_gradients(net)
    sgd = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=1e-3)
    ema = EMA(net.named_parameters(), 0.999)
    decay = torch.tensor([0.999], device=next(net.parameters()).device)

    def update() -> None:
        sgd.step()
        ema.update(decay)

    return update


def timms_update(net: nn.Module) -> Update:
    with_gradients(net)
    parameters = list(net.parameters())
    sgd = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=2e-5)
    ema = ModelEmaV3(net, decay=0.999)

    def update() -> None:
        adaptive_clip_grad(parameters[:-2], clip_factor=0.01)  # exclude_head
        sgd.step()
        ema.update(net)

    return update


def nodes(form: str) -> int:
    """Lines of HLO that an update adds to a graph whose inputs are weights and gradients."""
    from nfnets_xla import xla

    xla.start(virtual_devices=1)
    net = NFNet(VARIANTS["nfnet_mini_f0"])
    net = stack(net) if form == "ours stacked" else net
    net.to(xla.device())
    for parameter in net.parameters():
        parameter.grad = torch.ones(parameter.shape).to(xla.device())
    if form == "timm":
        parameters = list(net.parameters())
        sgd = torch.optim.SGD(
            parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=2e-5, foreach=False
        )
        for parameter in parameters:
            zeros = torch.zeros(parameter.shape).to(xla.device())
            sgd.state[parameter]["momentum_buffer"] = zeros
        average = [torch.zeros(p.shape).to(xla.device()) for p in parameters]
        xla.sync(wait=True)
        adaptive_clip_grad(parameters[:-2], clip_factor=0.01)
        sgd.step()
        for shadow, parameter in zip(average, parameters, strict=True):
            shadow.lerp_(parameter.detach(), 0.001)
        return count([*parameters, *average])
    optimizer = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=1e-3)
    ema = EMA(net.named_parameters(), 0.999)
    rate, decay = (torch.tensor([value]).to(xla.device()) for value in (1e-3, 0.999))
    xla.sync(wait=True)
    optimizer.set_lr(rate)
    optimizer.step()
    ema.update(decay)
    momentum = optimizer.slots()["momentum"]
    return count([*net.parameters(), *momentum.values(), *ema.shadow.values()])


def count(tensors: list[Tensor]) -> int:
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    return _XLAC._get_xla_tensors_hlo(tensors).count(" = ")


if __name__ == "__main__":
    main()
