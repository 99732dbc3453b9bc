"""Where an expert's matrix lies, and on which side its bases: shapes and parts, against the tensors of models."""

from __future__ import annotations

import pytest
import torch

from mobe_gguf.core.sides import side
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.layout import GATE_UP, ExpertLayout

N, P, D = 3, 4, 6


@pytest.mark.parametrize(("projection", "output"), [("gate", False), ("up", False), ("down", True)])
def test_factors_multiply_to_the_matrix(projection, output):
    on = side(projection)
    a, z = torch.rand(on.transform(P, 5)), torch.rand(on.basis(5, D))
    w = on.multiply(a, z)
    assert on.output is output and tuple(w.shape) == on.matrix(P, D) == ExpertLayout(N, P, D).shape(
        projection
    )
    assert w.shape[on.d_axis] == z.shape[on.d_axis] == D and z.shape[on.r_axis] == a.shape[on.d_axis] == 5
    assert on.basis_form.format(d=D) == ("[m, 6, r]" if output else "[m, r, 6]")


def test_parts_of_a_fused_tensor():
    apart, together = ExpertLayout(N, P, D), ExpertLayout(N, P, D, fused=GATE_UP, block=(3, 4))
    assert [apart.place(p) for p in ("gate", "up", "down")] == [(0, 1)] * 3
    assert [together.place(p) for p in ("gate", "up", "down")] == [(0, 2), (1, 2), (0, 1)]
    assert apart.stored_shape("up") == (P, D) and together.stored_shape("up") == (N, 2 * P, D)
    assert together.stored_shape("down") == (N, D, P)
    assert together.scale_shapes("gate") == ((N, 3, 2), (N, 4, 2)), "over both parts, or of each"
    assert together.scale_shapes("down") == ((N, 2, 1), (N, 2, 1))
    assert ExpertLayout(N, P, D, block=(3, 4)).scale_shapes("down") == ((2, 1),)
    assert apart.gated and not ExpertLayout(N, P, D, ("up", "down")).gated


@pytest.mark.parametrize("fused", [False, True])
def test_of_a_model(fused, model):
    checkpoint = Checkpoint(model("qwen3_moe", **({"fused": True} if fused else {})))
    layout = checkpoint.layout(checkpoint.moe_layers[0])
    assert bool(layout.fused) is fused
    for projection in layout.projections:
        name = checkpoint.expert_sources(checkpoint.moe_layers[0], projection)[0]
        assert checkpoint.shape(name) == layout.stored_shape(projection)
