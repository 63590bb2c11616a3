"""BatchNorm in training: what is frozen, what is refused, and the layer over ranks against torch's own."""

import copy

import pytest
import torch
from torch import nn

from student.training.batch_norm import (
    GlobalBatchNorm,
    batch_norms,
    has_trained_batch_norm,
    over_ranks,
    set_up_batch_norm,
)
from teachercache.core.errors import UserError


def towers() -> nn.ModuleDict:
    """A tower whose kernel is frozen and one that is trained, each with a BatchNorm, as a block of a ResNet has it."""
    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    frozen[0].requires_grad_(False)
    return nn.ModuleDict({"frozen": frozen, "trained": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})


def set_up(module: nn.Module, **changes) -> None:
    set_up_batch_norm(module, **{"micro_batches": False, "ranks": 1, "device": "cpu", **changes})


def test_a_frozen_tower_keeps_its_statistics_and_trains_the_norm_itself():
    module = towers()
    before = copy.deepcopy(module["frozen"][1].state_dict())
    set_up(module)
    module.train()  # as after an evaluation
    images = torch.randn(5, 3, 2, 2)
    module["frozen"](images).sum().backward()
    module["trained"](images)
    assert all(torch.equal(before[name], value) for name, value in module["frozen"][1].state_dict().items())
    assert module["frozen"][1].weight.grad.norm() > 0
    assert int(module["trained"][1].num_batches_tracked) == 1


def test_the_rows_of_a_batch_do_not_change_each_other_in_a_frozen_tower():
    """So micro-batches of it are exact, and allowed."""
    module = nn.ModuleDict({"frozen": towers()["frozen"]})
    set_up(module, micro_batches=True)
    images = torch.randn(6, 3, 2, 2)
    whole = module.train()["frozen"](images)
    assert torch.allclose(whole, torch.cat([module["frozen"](images[k : k + 2]) for k in (0, 2, 4)]))
    assert not has_trained_batch_norm(module)


def test_micro_batches_of_a_trained_tower_are_refused_by_name():
    with pytest.raises(
        UserError, match=r"--micro-batch: BatchNorm \(trained\.1\).* leave --micro-batch away"
    ):
        set_up(towers(), micro_batches=True)
    assert has_trained_batch_norm(towers())


def test_over_ranks_only_what_is_trained_is_replaced():
    module = towers()
    names = [place.name for place in batch_norms(module)]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    set_up(module, ranks=2)
    assert type(module["frozen"][1]) is nn.BatchNorm2d
    assert type(module["trained"][1]) is GlobalBatchNorm
    assert has_trained_batch_norm(module)
    assert names == ["frozen.1", "trained.1"]
    assert before.keys() == module.state_dict().keys()


@pytest.mark.parametrize("kind", ["plain", "without statistics", "cumulative", "timm"])
def test_the_layer_over_ranks_is_torchs_on_one_process(kind, monkeypatch):
    """Values, gradients and running statistics over two steps, then the values of evaluation."""
    from timm.layers import BatchNormAct2d

    monkeypatch.setattr("student.training.batch_norm._sum_over_ranks", lambda value: value)
    layers = {
        "plain": lambda: nn.BatchNorm2d(4),
        "without statistics": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
        "timm": lambda: BatchNormAct2d(4),
    }
    torch.manual_seed(0)
    layer = layers[kind]()
    ours = over_ranks(copy.deepcopy(layer), "cpu")
    for _ in range(2):
        images = torch.randn(5, 4, 3, 2) * 2 + 1
        inputs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [module(x) for module, x in zip((layer, ours), inputs, strict=True)]
        weights = torch.randn_like(images)
        for values in outputs:
            (values * weights).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    for (name, value), other in zip(layer.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, value.grad, msg=name)
    torch.testing.assert_close(ours.eval()(images), layer.eval()(images))
