"""Codes and scales out of libggml's bytes and back, for every type whose codes can be chosen."""

import numpy as np
import pytest
import torch

from mobe_gguf.quant.rounding import TYPES
from mobe_gguf.runtime import ggml


def values(kind: str, n: int = 1024, rows: int = 24) -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((rows, n)).astype(np.float32)
    if kind == "heavy":
        x = (x**3 * np.exp(rng.standard_normal((rows, 1)))).astype(np.float32)
    if kind == "holes":
        x[:, : n // 4] = 0
        x[3] = 0
    return np.ascontiguousarray(x * np.float32(0.02))


@pytest.mark.parametrize("kind", ["normal", "heavy", "holes"])
@pytest.mark.parametrize("name", sorted(TYPES))
def test_bytes_survive(name: str, kind: str) -> None:
    x = values(kind)
    weights = np.random.default_rng(1).random(x.shape[1], np.float32) + np.float32(0.1)
    data = ggml.quantize(x, name, weights)
    stored = TYPES[name].unpack(data)
    assert stored.codes.shape == (len(x), x.shape[1] // TYPES[name].width)
    assert np.array_equal(TYPES[name].pack(stored), data)


@pytest.mark.parametrize("name", sorted(TYPES))
def test_grid_says_what_libggml_decodes(name: str) -> None:
    """Random codes under the encoder's scales: every code and every place, not only what the encoder chose."""
    one = TYPES[name]
    x = values("heavy")
    stored = one.unpack(ggml.quantize(x, name, np.ones(x.shape[1], np.float32)))
    top = 1 << 8 * stored.codes.dtype.itemsize if one.width > 1 else len(one.points)
    rng = np.random.default_rng(2)
    if one.width == 1:
        stored = stored.replace(codes=rng.integers(0, top, stored.codes.shape).astype(stored.codes.dtype))
    decoded = ggml.dequantize(one.pack(stored), name, x.shape[1])
    grid = one.grid(stored, batch=2)
    codes = torch.from_numpy(stored.codes.astype(np.int64)).view(2, len(x) // 2, -1)
    said = grid.values(codes).view(x.shape).numpy()
    if stored.dmin is None:
        assert np.array_equal(said, decoded)
    else:  # libggml may be compiled to fused multiply and add
        assert np.abs(said - decoded).max() <= 1e-6 * np.abs(decoded).max()


@pytest.mark.parametrize("name", sorted(n for n, t in TYPES.items() if t.width == 1))
def test_nearest_level(name: str) -> None:
    """The code that a grid takes is the best of all codes of the type."""
    one = TYPES[name]
    x = values("normal", n=256, rows=6)
    stored = one.unpack(ggml.quantize(x, name))
    grid = one.grid(stored)
    w = torch.from_numpy(x)[None]
    for j in (0, 17, 100, 255):
        code, unit = grid.choose(j, w[..., j : j + 1], None)
        g = j // one.group
        offset = 0 if grid.offset is None else grid.offset[..., g, None]
        ladder = torch.from_numpy(one.points[:, 0]) * grid.scale[..., g, None] + offset
        best = (ladder - w[..., j, None]).abs().amin(-1)
        taken = (ladder.gather(-1, code[..., None]) - w[..., j, None]).abs()[..., 0]
        assert torch.equal(torch.from_numpy(one.points[:, 0])[code], unit[..., 0])
        assert (taken <= best + 1e-7).all()


def test_every_type_of_the_recipe_is_known() -> None:
    from mobe_gguf.quant.recipe import BLOCK, FLOATS

    codebooks = {name for name in BLOCK if name.startswith(("iq1", "iq2", "iq3"))}
    assert set(BLOCK) - set(FLOATS) - codebooks <= set(TYPES)


def test_real_matrices_survive(shipped_experts: np.ndarray) -> None:
    for name, one in TYPES.items():
        x = shipped_experts
        data = ggml.quantize(x, name, np.ones(x.shape[1], np.float32))
        assert np.array_equal(one.pack(one.unpack(data)), data), name


@pytest.fixture(scope="module")
def shipped_experts() -> np.ndarray:
    from mobe_gguf.core import resources
    from mobe_gguf.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(resources.path("models") / "tiny-moe")
    return checkpoint.expert_stack(0, "gate")[:2].float().flatten(0, 1).contiguous().numpy()
