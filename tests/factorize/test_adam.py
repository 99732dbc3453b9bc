"""Our Adam is Adam, at any size of the gradients."""

from __future__ import annotations

import pytest
import torch

from mobe_gguf.factorize.adam import Adam


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])
def test_steps_are_those_of_torch_and_do_not_depend_on_the_scale(scale):
    g = torch.Generator().manual_seed(0)
    ours, theirs = [[torch.ones(3, 4), torch.ones(5)] for _ in range(2)]
    adam = Adam(ours, (0.8, 0.95))
    reference = torch.optim.Adam(theirs, betas=(0.8, 0.95), eps=0.0)
    for step in range(6):
        for x, y in zip(ours, theirs, strict=True):
            y.grad = torch.randn(x.shape, generator=g)
            x.grad = y.grad * scale
        reference.param_groups[0]["lr"] = 0.1 * (step + 1)
        reference.step()
        adam.step(0.1 * (step + 1))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)


def test_what_has_no_gradient_stays():
    x = torch.ones(4)
    x.grad = torch.zeros(4)
    adam = Adam([x], (0.9, 0.99))
    for _ in range(3):
        adam.step(0.5)
    assert torch.equal(x, torch.ones(4))
