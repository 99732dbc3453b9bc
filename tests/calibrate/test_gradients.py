"""The loss's gradients at the experts' matrices, layer by layer, are those of the whole model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobe_gguf.calibrate import gradients
from mobe_gguf.calibrate import moments as module
from mobe_gguf.calibrate.experts import PairGradients
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.checkpoint import Checkpoint

from .test_layers import CHUNKS, CTX, Killed, Killer, inner

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe", "olmoe")


@pytest.fixture(autouse=True)
def _likeliest(monkeypatch):
    """Labels are the likeliest tokens, and any text suffices."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(module, "NEEDED", 0)


def gathered(path: Path, text: Path, out: Path, **options) -> Moments:
    collect(path, text, out, ctx=CTX, chunks=CHUNKS, keep=1, quiet=True, **{"gradients": True} | options)
    return Moments(out)


def ids_of(path: Path, text: Path) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(path)(text.read_text()).input_ids
    return torch.tensor(tokens[: CTX * CHUNKS]).view(CHUNKS, CTX)


def whole(path: Path, text: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Of each layer: tokens' experts, the router's weights, inputs, and the norms of gradients at gate's and up's outputs and at down's,
    all ``[T, k]``; by autograd through the whole model, one expert and token at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval().requires_grad_(False)
    source, found = Checkpoint(path), {}
    for name, part in model.named_modules():
        if (layer := re.search(r"layers\.(\d+)\..*\.experts$", name)) and hasattr(part, "down_proj"):
            found[int(layer[1])] = at = {}
            part.forward = partial(experts, source, int(layer[1]), part, at)
    table, ids = model.get_input_embeddings(), ids_of(path, text)
    states = table(ids).detach().requires_grad_()
    table.forward = lambda _: states
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), logits.flatten(0, 1).argmax(-1), reduction="sum"
    ).backward()
    for at in found.values():
        for kind in ("gate", "down"):
            norms = [sum(part.grad.square().sum() for part in parts).sqrt() for parts in at.pop(kind)]
            at[kind] = torch.stack(norms).view(at["index"].shape)
    return found


def experts(source, layer, part, at, x, index, weights):
    act, bias = inner(source, layer), getattr(part, "down_proj_bias", None)
    out, flat = torch.zeros_like(x.reshape(-1, x.shape[-1])), x.reshape(-1, x.shape[-1])
    at |= {"index": index.detach(), "weights": weights.detach(), "x": flat.detach(), "gate": [], "down": []}
    stacks = [source.expert_stack(layer, kind).double() for kind in source.family.kinds]
    rows = []
    for t, k in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        e = int(index[t, k])
        products = [stack[e] @ flat[t] for stack in stacks[:-1]]
        y = stacks[-1][e] @ act(e, *products)
        y = y if bias is None else y + bias[e]
        for kind, tensors in (("gate", products), ("down", [y])):
            for one in tensors:
                one.retain_grad()
            at[kind].append(tensors)
        rows.append(y * weights[t, k])
    out = torch.stack(rows).view(*index.shape, -1).sum(1)
    return out.view(x.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_the_whole_model(family, model, text, tmp_path):
    path = model(family)
    got, expected = gathered(path, text, tmp_path / "m"), whole(path, text)
    assert sorted(expected) == list(Checkpoint(path).moe_layers) and got.about["gradients"]
    for layer, at in expected.items():
        mine = got.gradients(layer)
        assert mine["index"].equal(at["index"].short())
        gate, down = (at[kind] / at["weights"] for kind in ("gate", "down"))
        assert torch.allclose(down, down.mean(1, keepdim=True).expand_as(down), rtol=1e-6)
        assert torch.allclose(mine["gate"].double(), gate / gate.mean(), rtol=0.01, atol=1e-3)
        assert torch.allclose(mine["down"].double(), down.mean(1) / down.mean(), rtol=0.01, atol=1e-3)


def test_they_weigh_the_inputs(model, text, tmp_path):
    path = model("qwen3_moe")
    source, at = Checkpoint(path), whole(path, text)[1]
    gate = at["gate"] / at["weights"]
    factors = at["weights"] ** 2 * gate / gate.mean()
    sums = torch.zeros(source.n_expert, source.n_embd, source.n_embd).double()
    for t, k in torch.cartesian_prod(*map(torch.arange, at["index"].shape)).tolist():
        sums[at["index"][t, k]] += factors[t, k] * torch.outer(at["x"][t], at["x"][t])
    s = (sums + PRIOR * sums.mean(0)) / (1 + PRIOR) / (CTX * CHUNKS)
    for memory in (None, 10**6):
        moments = gathered(path, text, tmp_path / f"m{memory}", memory=memory)
        found, name = moments.find("blk.1.ffn_up_exps.weight"), "blk.1.ffn_up_exps.weight"
        mine = (found.root @ found.root.mT).double() * moments.scale(name)
        assert float((mine - s).norm() / s.norm()) < 2e-3


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_5_moe_text", "qwen2_moe", "mixtral"])
def test_other_families_have_them(family, model, text, tmp_path):
    path = model(family)
    got = gathered(path, text, tmp_path / "m")
    for layer in Checkpoint(path).moe_layers:
        found = got.gradients(layer)
        assert float(found["gate"].float().mean()) == pytest.approx(1, rel=1e-2)
        assert float(found["down"].float().std()) > 0.1


def test_an_expert_that_the_token_did_not_have():
    found = PairGradients(
        torch.tensor([[0, 2], [1, 0]]), torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.ones(2)
    )
    index = torch.tensor([[2, 1], [0, 1]])
    assert found.gate_of(index, torch.arange(4)).tolist() == [3.0, 2.0, 7.0, 5.0]


def test_killed_anywhere(model, text, tmp_path, monkeypatch):
    """At each file that gets its name: the same bytes, and no layer is run again."""
    path, out = model("olmoe"), tmp_path / "m"
    expected = gathered(path, text, tmp_path / "whole").path.read_bytes()
    killer, loads = Killer(monkeypatch), []
    load = gradients.WholeLayer.answering
    monkeypatch.setattr(
        gradients.WholeLayer, "answering", lambda self: (loads.append(self.number), load(self))[1]
    )

    kills, layers = 0, Checkpoint(path).n_layer
    for after in (False, True):
        for at in range(1, 100):
            killer.set(at, after)
            loads.clear()
            try:
                gathered(path, text, out)
                break
            except Killed:
                kills += 1
            killer.set(0)
            gathered(path, text, out, resume=True)
            assert out.read_bytes() == expected and not (tmp_path / "m.work").exists()
            assert len(loads) <= 2 * layers + 1
            out.unlink()
        out.unlink()
    assert kills > 4 * layers


def test_few_tokens_are_told(model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "NEEDED", 60)
    path = model("qwen3_moe")
    collect(path, text, tmp_path / "m", ctx=CTX, chunks=CHUNKS, gradients=True)
    assert "warning: --gradients is left out: it helps from 3840 tokens an expert" in capsys.readouterr().err
    assert not Moments(tmp_path / "m").about["gradients"]
    collect(path, text, tmp_path / "without", ctx=CTX, chunks=CHUNKS, quiet=True)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "without").read_bytes()


def test_a_layer_that_does_not_fit(model, text, tmp_path):
    with pytest.raises(UsageError, match="--gradients needs a layer's experts in memory, .* may use 1.00 kB"):
        gathered(model("qwen3_moe"), text, tmp_path / "m", memory=1000)
    assert not (tmp_path / "m.work").exists()
