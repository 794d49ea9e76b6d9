"""Optimizers, and what torch.distributed does to parameters and their state."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from nfnets_xla.optim import SAM, SGD_AGC, agc_, parameter_roles
from tests.optim.network import closure_of, small_net


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_shards_of_fsdp2_are_refused(mesh: DeviceMesh) -> None:
    """They have the shape of the whole parameter, so only their type reveals them."""
    net = small_net()
    whole = parameter_roles(net, "head")
    net.stem.weight = nn.Parameter(distribute_tensor(net.stem.weight.detach(), mesh))
    refused = r"'stem.weight' is a DTensor, .* it is sharded"
    with pytest.raises(ValueError, match=refused):
        parameter_roles(net, "head")
    with pytest.raises(ValueError, match=refused):
        SGD_AGC(net.named_parameters(), whole, lr=0.1)
    with pytest.raises(ValueError, match=refused):
        agc_(net.named_parameters(), whole)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"microbatches": 2}])
def test_sam_around_torchs_sgd_takes_shards_of_fsdp2(
    options: dict[str, Any], mesh: DeviceMesh
) -> None:
    """And its weights are restored, also after an error: torch has no rule for lists of them."""
    nets = [nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    images, labels = torch.randn(4, 6), torch.arange(4)
    fully_shard(nets[1], mesh=mesh)
    for net in nets:
        sam = SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.5, **options)

        def closure(net: nn.Module = net, fails: bool = False) -> Tensor:
            net.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            if fails:
                raise KeyboardInterrupt
            return loss

        for _ in range(2):
            sam.step(closure)
        calls = iter([False, True])
        with pytest.raises(KeyboardInterrupt):
            sam.step(lambda closure=closure, calls=calls: closure(fails=next(calls)))
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(other.full_tensor(), one)  # type: ignore[attr-defined]


@pytest.mark.parametrize("flat", [False, True])
def test_a_partly_frozen_network_is_resumed_through_distributed_checkpoints(flat: bool) -> None:
    """Such checkpoints omit the state of frozen parameters."""
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    nets = [small_net() for _ in range(2)]
    for net in nets:
        net.stem.requires_grad_(False)
    one, other = (
        SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=0.5) for net in nets
    )
    one.step(closure_of(nets[0]))
    state = copy.deepcopy(get_optimizer_state_dict(nets[0], one, options=form))
    set_optimizer_state_dict(nets[1], other, state, options=form)
    nets[1].load_state_dict(nets[0].state_dict())
    for net, optimizer in zip(nets, (one, other), strict=True):
        optimizer.step(closure_of(net))
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
