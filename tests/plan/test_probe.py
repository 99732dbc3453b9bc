"""``mobe-gguf plan --probe``: what it measures, against the same computed by hand."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mobe_gguf.cli import main
from mobe_gguf.core import resources
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.plan import probe as probing
from mobe_gguf.plan.cost import probed_error
from mobe_gguf.plan.forms import factorized_forms, plain_form
from mobe_gguf.plan.layout import read_layout
from mobe_gguf.plan.probe import TypeProbe, at_bits, spectrum
from mobe_gguf.runtime import ggml

MODEL = resources.path("models") / "tiny-moe"


def test_what_is_measured() -> None:
    layout = read_layout(MODEL)
    factors = next(form for form in factorized_forms(layout) if form.bases == 2)
    plain = [plain_form(layout, quant) for quant in ("q8_0", "q4_0")]
    found = probing.probe(MODEL, layout, [*plain, factors], None, quiet=True)
    assert (found.layer, found.projection, found.experts, found.of) == (2, "gate", 24, 24)
    checkpoint, before = Checkpoint(MODEL), []
    for e in probing._spread(24, probing.SAMPLE):
        w = checkpoint.expert(2, "gate", e)
        q = ggml.dequantize(
            ggml.quantize(w.numpy(), "q4_0", np.ones(w.shape[1], np.float32), name="w"), "q4_0", w.shape[1]
        )
        before.append((float((w - torch.from_numpy(q)).square().sum()), float(w.square().sum())))
    expected = sum(lost for lost, _ in before) / sum(size for _, size in before)
    q4_0 = found.types["q4_0"]
    assert q4_0.before == pytest.approx(expected, rel=0.02) and 0 < q4_0.after <= q4_0.before * 1.01
    form = found.forms[factors.name]
    assert 0.9 * form.fit < form.after < 0.5 and form.gain == pytest.approx(form.plain / form.after)
    n, p, d = layout.expert_shape()
    stored = sum(
        factors.tensor_bytes(f"blk.2.ffn_gate_{x}") for x in ("exps.weight", "basis.weight", "basis.mix")
    )
    assert form.bits == pytest.approx(8 * stored / (n * p * d), rel=1e-6)
    assert found.shared > found.random > 0.5, "the model learned something"
    down = found.error(factors.types["blk.0.ffn_down_exps.weight"])
    assert probed_error(factors, found) == pytest.approx((2 * form.after + down) / 3, rel=0.2)


def test_spectrum_of_random_matrices_is_the_random_one() -> None:
    w = torch.randn(6, 50, 64, generator=torch.Generator().manual_seed(0))
    shared, random = spectrum(w, 300, 64)
    assert shared == pytest.approx(random, abs=0.02)
    low = torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(1)) @ torch.randn(8, 64)
    assert spectrum(low, 300, 64)[0] == pytest.approx(1.0, abs=1e-4)


def test_plain_types_of_any_bits() -> None:
    types = {"a": TypeProbe(2, 0, 0.04), "b": TypeProbe(4, 0, 0.01), "worse": TypeProbe(3, 0, 0.05)}
    assert at_bits(types, 3) == pytest.approx(0.02) and at_bits(types, 4) == pytest.approx(0.01)
    assert at_bits(types, 1) == pytest.approx(0.08) and math.isnan(at_bits({}, 3))


def test_what_it_needs(tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["plan", *map(str, arguments)])
        return done.exit_code, done.stderr

    shutil.copy(MODEL / "config.json", tmp_path)
    code, said = call(tmp_path / "config.json", "--probe")
    assert code == 2 and "there are no weights to probe" in said
    code, said = call(MODEL, "--moments", "m.safetensors")
    assert code == 2 and "--moments is for --probe" in said
    code, said = call(MODEL, "--probe", "--moments", tmp_path / "none.safetensors")
    assert code == 1 and "no such file" in said
