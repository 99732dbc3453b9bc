"""Adam (Kingma and Ba 2015) on a few tensors, in place.

torch's own is not used, for two reasons.  First, its epsilon of 1e-8 is as large as gradients here: the loss is a mean over
a layer's weights, so a gradient is about 1e-6 in a layer of a million weights and 1e-9 in one of a billion.  There the
epsilon would remove most of the step.  Second, creating a ``torch.optim`` optimizer imports torch's compiler: 1.3 s of CPU
time, as long as a hundred steps on a small layer.
"""

from __future__ import annotations

import torch

#: Only prevents 0 / 0.  Its square and those of all relevant gradients are normal float32 numbers.
EPSILON = 1e-18


class Adam:
    """Updates ``parameters`` by their ``.grad``."""

    def __init__(self, parameters: list[torch.Tensor], betas: tuple[float, float]):
        self.parameters, self.betas, self.steps = parameters, betas, 0
        self.first = [torch.zeros_like(x) for x in parameters]
        self.second = [torch.zeros_like(x) for x in parameters]

    def step(self, rate: float) -> None:
        self.steps += 1
        b1, b2 = self.betas
        bias1, bias2 = 1 - b1**self.steps, 1 - b2**self.steps
        for x, first, second in zip(self.parameters, self.first, self.second, strict=True):
            assert x.grad is not None
            first.lerp_(x.grad, 1 - b1)
            second.mul_(b2).addcmul_(x.grad, x.grad, value=1 - b2)
            x.addcdiv_(first, second.sqrt().add_(EPSILON), value=-rate * bias2**0.5 / bias1)
