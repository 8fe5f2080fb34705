"""The optimiser against torch's own Muon and AdamW, and against singular values."""

import copy

import pytest
import torch
from torch import nn

from unmurk.training.checkpoint import StateMismatch
from unmurk.training.muon import MOMENTUM, Muon, orthogonal


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(optimizer_of, weights, steps=4):
    """Weights after a few steps against gradients that are the same for every optimiser."""
    weights = [nn.Parameter(w.clone()) for w in weights]
    step = optimizer_of(weights)
    for number in range(steps):
        for place, w in enumerate(weights):
            w.grad = drawn(*w.shape, seed=100 * number + place)
        step()
    return [w.detach() for w in weights]


def test_singular_values_end_near_one_and_directions_stay():
    for shape in ((3, 8, 24), (2, 32, 9), (1, 16, 16)):
        x = drawn(*shape)
        u, s, v = torch.linalg.svd(orthogonal(x).double(), full_matrices=False)
        assert s.min() > 0.3 and s.max() < 1.25 and 0.8 < s.median() < 1.2
        w, _, z = torch.linalg.svd(x.double(), full_matrices=False)
        assert ((u @ v) - (w @ z)).abs().max() < 1e-4  # U V^T is that of x


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torchs_muon():
    weights = [drawn(16, 40), drawn(24, 9, seed=1)]

    def ours(w):
        return Muon(w, lr=0.01).step

    def theirs(w):
        muon = torch.optim.Muon(
            w, lr=0.01, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        return muon.step

    for steps in (1, 4):
        found, expected = trained(ours, weights, steps), trained(theirs, weights, steps)
        for a, b, w in zip(found, expected, weights, strict=True):
            # torch iterates in bfloat16, of three digits
            assert (a - b).norm() < 0.02 * (a - w).norm()


def test_a_kernel_is_a_matrix_and_vectors_are_adamws():
    kernel, bias, thin = drawn(16, 8, 3, 3), drawn(16, seed=1), drawn(2, 30, seed=2)

    def ours(w):
        return Muon([{"params": w[:1], "lr": 0.01}, {"params": w[1:], "lr": 0.02}]).step

    def flat(w):
        return Muon(w, lr=0.01).step

    def adamw(w):
        return torch.optim.AdamW(w, lr=0.02, betas=(0.9, 0.99), weight_decay=0.0).step

    found = trained(ours, [kernel, bias, thin], steps=1)
    assert torch.allclose(found[0].flatten(1), trained(flat, [kernel.flatten(1)], steps=1)[0])
    # the gradient of a place in the list is the same in both runs
    expected = trained(adamw, [kernel, bias, thin], steps=1)
    assert torch.allclose(found[1], expected[1]) and torch.allclose(found[2], expected[2])
    # 0.2 sqrt(max) orth has entries of the size of an AdamW step, 0.2 to 1 of the rate
    size = (found[0] - kernel).square().mean().sqrt() / 0.01
    assert 0.1 < size < 0.3


def test_a_state_goes_on_and_can_be_forgotten():
    w = [nn.Parameter(drawn(16, 40)), nn.Parameter(drawn(16))]
    first = Muon(w, lr=0.01)
    for p in w:
        p.grad = drawn(*p.shape, seed=3)
    first.step()
    copies = [nn.Parameter(p.detach().clone()) for p in w]
    second = Muon(copies, lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(w, copies, strict=True):
        p.grad, q.grad = drawn(*p.shape, seed=4), drawn(*p.shape, seed=4)
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(w, copies, strict=True))


def test_a_parameter_without_gradient_stays():
    w = [nn.Parameter(drawn(16, 40)), nn.Parameter(drawn(16, 40, seed=1))]
    before = [p.detach().clone() for p in w]
    w[0].grad = drawn(16, 40, seed=2)
    Muon(w, lr=0.01).step()
    assert not torch.equal(w[0], before[0]) and torch.equal(w[1], before[1])


def test_it_is_an_optimizer_of_torch():
    """Schedulers, parameter groups and closures work as with every optimizer of torch."""
    w = nn.Parameter(drawn(16, 40))
    optimizer = Muon([w], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.05 and optimizer.step(closure) < first


def test_a_state_of_other_parameters_is_refused():
    w, other = nn.Parameter(drawn(16, 40)), nn.Parameter(drawn(16, 41))
    for p in (w, other):
        p.grad = torch.ones_like(p)
    first, second = Muon([w]), Muon([other])
    first.step()
    second.step()
    with pytest.raises(StateMismatch, match="moments 0.momentum_buffer has another shape"):
        second.load_state_dict(first.state_dict())
