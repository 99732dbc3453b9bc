"""Layer by layer the moments are those of the whole model; after any kill the same file comes out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mobe_gguf.calibrate import dense, experts, roots, workspace
from mobe_gguf.calibrate import moments as module
from mobe_gguf.calibrate.dense import gguf_names
from mobe_gguf.calibrate.layers import Run
from mobe_gguf.calibrate.moments import collect
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.formats.moments import Moments
from mobe_gguf.models.checkpoint import Checkpoint

FAMILIES = (
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "mixtral",
    "gpt_oss",
    "llama4_text",
    "nemotron_h",
    "granitemoe",
    "qwen3_5_moe_text",
)
CTX, CHUNKS = 32, 6
#: Enough for nothing: experts are read one at a time, and what matrices are fed is summed one set after the other.
LITTLE = 1


def inner(source: Checkpoint, layer: int):
    """What an expert's down is fed, of the products with the matrices before it."""
    if source.family.name == "gpt_oss":
        bias = source.get(f"model.layers.{layer}.mlp.experts.gate_up_proj_bias").double()

        def clamped(e, g, u):
            g, u = (g + bias[e, ::2]).clamp(max=7), (u + bias[e, 1::2]).clamp(-7, 7)
            return (u + 1) * g * torch.sigmoid(1.702 * g)

        return clamped
    if source.family.kinds[0] == "up":
        return lambda e, u: torch.relu(u) ** 2
    return lambda e, g, u: torch.nn.functional.silu(g) * u


def slope(act, products: list[torch.Tensor], down: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What down is fed, and how much the expert's output changes with the products."""
    with torch.enable_grad():
        products = [one.detach().requires_grad_() for one in products]
        h = act(*products)
        by = torch.autograd.grad(h.sum(), products)
    squares = down.square().sum(0)
    return h.detach(), float(sum(one.square() @ squares for one in by).sqrt())


def whole(path: Path, text: Path) -> dict[str, torch.Tensor]:
    """``[n, d, d]`` of every GGUF tensor, by hooks on the whole model; of experts with PRIOR; E over the text's tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    source = Checkpoint(path)
    names = gguf_names(source.family.name, source.n_layer)
    found: dict[str, torch.Tensor] = {}

    def linear(name):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            if name.endswith("ssm_out") and source.family.name == "qwen3_5_moe_text":
                # as the converter reorders its columns: 2 heads of keys, 4 of values, of 16
                x = x[:, torch.arange(64).view(2, 2, 16).transpose(0, 1).flatten()]
            found[f"{name}.weight"] = (x.T @ x / len(x))[None]

        return hook

    def queries(name, head, nope):
        def hook(module, args, out):
            x = out.reshape(-1, out.shape[-1] // head, head)[..., :nope].double()
            found[f"{name}.weight"] = torch.einsum("thi,thj->hij", x, x) / len(x)

        return hook

    def routed(layer):
        def hook(module, args):
            if len(args) == 1:  # Llama-4: all tokens for each expert, times the scores
                return scaled(layer, args[0].double())
            x, index, weights = args[0].double(), args[1], args[2].double()
            n, d, p = source.n_expert, source.n_embd, source.n_ff_exp
            inputs, hidden = torch.zeros(n, d, d).double(), torch.zeros(n, p, p).double()
            act = inner(source, layer)
            for e in range(n):
                *matrices, down = [source.expert(layer, z, e).double() for z in source.family.kinds]
                for t, k in (index == e).nonzero().tolist():
                    h, by = slope(partial(act, e), [matrix @ x[t] for matrix in matrices], down)
                    inputs[e] += weights[t, k] ** 2 * by * torch.outer(x[t], x[t])
                    hidden[e] += weights[t, k] ** 2 * torch.outer(h, h)
            for projection in source.family.kinds:
                sums = hidden if projection == "down" else inputs
                mixed = (sums + PRIOR * sums.mean(0)) / (1 + PRIOR) / len(x)
                found[f"blk.{layer}.ffn_{projection}_exps.weight"] = mixed

        return hook

    def scaled(layer, inputs):
        n, p = source.n_expert, source.n_ff_exp
        each, sums, down = inputs.view(n, -1, inputs.shape[-1]), [], torch.zeros(n, p, p).double()
        for e, x in enumerate(each):
            g, u, w = (source.expert(layer, z, e).double() for z in ("gate", "up", "down"))
            each_slope = [slope(partial(inner(source, layer), e), [g @ one, u @ one], w) for one in x]
            h, by = torch.stack([h for h, _ in each_slope]), torch.tensor([by for _, by in each_slope])
            sums.append(x.T @ (x * by[:, None]))
            down[e] = h.T @ h
        for projection in ("gate", "up", "down"):
            found_ = down if projection == "down" else torch.stack(sums)
            mixed = (found_ + PRIOR * found_.mean(0)) / (1 + PRIOR) / each.shape[1]
            found[f"blk.{layer}.ffn_{projection}_exps.weight"] = mixed

    for path_, part in model.named_modules():
        if layer := re.search(r"layers\.(\d+)\..*\.experts$", path_):
            if hasattr(part, "down_proj"):
                part.register_forward_pre_hook(routed(int(layer[1])))
        name = names(path_)
        if isinstance(part, torch.nn.Linear) and name and "_inp" not in name:
            part.register_forward_pre_hook(linear(name))
        if hasattr(part, "kv_b_proj"):
            last = part.q_b_proj if getattr(part, "q_b_proj", None) is not None else part.q_proj
            last.register_forward_hook(
                queries(names(f"{path_}.k_b_proj"), part.qk_head_dim, part.qk_nope_head_dim)
            )
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text.read_text()).input_ids)[: CTX * CHUNKS]
    with torch.no_grad():
        model(ids.view(CHUNKS, CTX))
    return found


def gathered(path: Path, text: Path, out: Path, **options) -> Moments:
    collect(path, text, out, ctx=CTX, chunks=CHUNKS, keep=1, quiet=True, **options)
    return Moments(out)


@pytest.mark.parametrize("memory", [None, LITTLE])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_the_whole_model(family, memory, model, text, tmp_path):
    """Of every matrix, experts beside each other or one at a time."""
    path = model(family)
    got, expected = gathered(path, text, tmp_path / "m", memory=memory), whole(path, text)
    assert set(expected) <= set(got.names)
    assert {re.sub(r"_v_b|token_embd", "", n) for n in set(got.names) - set(expected)} <= {
        f"blk.{i}.attn.weight" for i in range(3)
    }
    for name, s in expected.items():
        found = got.find(name)
        mine = (found.root @ found.root.mT).double() * got.scale(name)
        assert found.rest is None and float((mine - s).norm() / s.norm()) < 1e-3, name
    for part in ("attn_output.weight", "output.weight", "ffn_down_exps.weight"):
        assert any(name.endswith(part) for name in expected), part
    if family.startswith("deepseek"):
        assert {"blk.0.ffn_down.weight", "blk.1.attn_kv_b.weight", "blk.1.attn_k_b.weight"} <= set(expected)
    if family in ("qwen2_moe", "deepseek_v3"):
        assert "blk.1.ffn_up_shexp.weight" in expected


def test_many_channels(model, text, tmp_path, monkeypatch):
    """All experts of a layer in one subspace, nearly; of inputs that all tokens have, every second token."""
    for place in (experts, roots, dense):
        monkeypatch.setattr(place, "MOST", 24)
    monkeypatch.setattr(dense, "MANY", 64)
    monkeypatch.setattr(dense, "TOKENS", 1)
    got, expected = gathered(model("qwen3_moe"), text, tmp_path / "m"), whole(model("qwen3_moe"), text)
    for name in ("blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight"):
        found, s = got.find(name), expected[name] / got.scale(name)
        assert found.root.shape[2] == 24 and found.rest is not None
        space = torch.linalg.qr(found.root[0])[0].double()
        for e, root in enumerate(found.root.double()):
            assert float((root - space @ (space.T @ root)).norm() / root.norm()) < 0.1
            if "exps" in name:
                inside = space.T @ (root @ root.T - s[e]) @ space
                assert float(inside.norm() / s[e].norm()) < 0.05
                assert torch.allclose(found.channels()[e, 0], s[e].diagonal(), rtol=0.01, atol=1e-3)
    assert got.tokens("blk.0.attn_q.weight").tolist() == [CTX * CHUNKS // 3]
    assert got.tokens("blk.0.attn_output.weight").tolist() == [CTX * CHUNKS // 3]
    assert float(got.find("blk.0.attn_q.weight").channels().mean()) == pytest.approx(1, rel=0.01)


def test_every_second_token():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    total = dense.Sum(torch.zeros(1, 8, 8), every=3)
    for part in x.split([10, 10, 1, 1, 1, 27]):
        total.add(part)
    assert total.tokens == 17 and torch.allclose(total.sums[0], x[::3].T @ x[::3], atol=1e-5)


def test_a_layer_that_does_more_than_add_its_experts(model, text, tmp_path, monkeypatch):
    """It is seen in the first batch, and all run again."""
    kind = AutoModelForCausalLM.from_config(Checkpoint(model("qwen3_moe")).hf_config()).model.layers[0]
    forward = type(kind).forward
    monkeypatch.setattr(type(kind), "forward", lambda *a, **k: forward(*a, **k).mul(2).tanh())
    one = gathered(model("qwen3_moe"), text, tmp_path / "one", memory=LITTLE)
    all_ = gathered(model("qwen3_moe"), text, tmp_path / "all")
    for name in one.names:
        a, b = (m.find(name).root @ m.find(name).root.mT * m.scale(name) for m in (one, all_))
        assert float((a - b).norm() / b.norm()) < 1e-3, name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_fused_experts(family, model, text, tmp_path):
    one, fused = (gathered(model(family, fused=f), text, tmp_path / str(f)) for f in (False, True))
    for name in one.names:
        assert torch.allclose(one.find(name).root, fused.find(name).root, atol=1e-2), name


def test_what_matrices_share_is_summed_once(model, text, tmp_path):
    got = gathered(model("qwen3_moe"), text, tmp_path / "m")
    for names in (["attn_q", "attn_k", "attn_v"], ["ffn_gate_exps", "ffn_up_exps"]):
        assert len({got.stem(f"blk.1.{name}.weight") for name in names}) == 1
    assert got.tokens("blk.1.attn_q.weight").tolist() == [CTX * CHUNKS]
    assert int(got.tokens("blk.1.ffn_up_exps.weight").sum()) == 2 * CTX * CHUNKS


def test_as_many_directions_as_hold_the_energy(model, text, tmp_path):
    collect(model("qwen3_moe"), text, tmp_path / "m", ctx=CTX, chunks=CHUNKS, keep=0.5, quiet=True)
    got, exact = Moments(tmp_path / "m"), gathered(model("qwen3_moe"), text, tmp_path / "all")
    for name in got.names:
        found, s = got.find(name), exact.find(name)
        k = found.root.shape[2]
        assert k < s.root.shape[1] / 2 and found.rest is not None
        held = found.root.square().sum() / s.root.square().sum()
        assert 0.4 < float(held) < 0.9, name
        assert torch.allclose(found.channels(), s.channels(), rtol=0.05, atol=0.02), name


# resuming


class Killed(BaseException):
    pass


class Killer:
    """Raises Killed before, or with ``after`` after, the file number ``at`` gets its name; 0: never."""

    def __init__(self, monkeypatch):
        self.at, self.after, self.named, self._replace = 0, False, 0, os.replace
        monkeypatch.setattr(os, "replace", self)

    def __call__(self, *args):
        self.named += 1
        if self.named != self.at:
            return self._replace(*args)
        if self.after:
            self._replace(*args)
        raise Killed

    def set(self, at, after=False):
        self.at, self.after, self.named = at, after, 0


def test_killed_anywhere(model, text, tmp_path, monkeypatch):
    """At each file that gets its name; and what was finished is not done again."""
    path = model("deepseek_v3")
    expected = gathered(path, text, tmp_path / "whole").path.read_bytes()
    out, killer = tmp_path / "m", Killer(monkeypatch)
    layers, kills = [], 0
    run = Run._layer
    monkeypatch.setattr(Run, "_layer", lambda self, i, *a: (layers.append(i), run(self, i, *a)))
    for after in (False, True):
        for at in range(1, 100):
            killer.set(at, after)
            try:
                gathered(path, text, out)
                break
            except Killed:
                kills += 1
                assert not out.exists() or after
            killer.set(0)
            layers.clear()
            finished = [p.name for p in tmp_path.glob("m.work/layer-*")]
            gathered(path, text, out, resume=True)
            assert out.read_bytes() == expected and not (tmp_path / "m.work").exists()
            assert len(layers) <= 3 - len([f for f in finished if "output" not in f]) + 1
            out.unlink()
        out.unlink()
    assert kills > 12


@pytest.mark.parametrize("what", ["ctx", "text", "model"])
def test_a_changed_setting_is_told(what, model, text, tmp_path, monkeypatch):
    stop = module._assemble
    monkeypatch.setattr(module, "_assemble", lambda *a: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        gathered(model("olmoe"), text, tmp_path / "m")
    monkeypatch.setattr(module, "_assemble", stop)
    with pytest.raises(UsageError, match="holds unfinished work. Go on with it:\n  --resume"):
        gathered(model("olmoe"), text, tmp_path / "m")
    other = tmp_path / "other.txt"
    other.write_text("Something else altogether was written here. " * 60)
    changed = {
        "ctx": (model("olmoe"), text, dict(ctx=16)),
        "text": (model("olmoe"), other, dict(ctx=CTX)),
        "model": (model("olmoe", seed=7), text, dict(ctx=CTX)),
    }[what]
    name = {"ctx": "(text|tokens|ctx)", "text": "text", "model": "(model|source_checksum)"}[what]
    with pytest.raises(UsageError, match=rf"m.work was begun with {name} \S+, now it is \S+. Give the same"):
        collect(
            changed[0],
            changed[1],
            tmp_path / "m",
            chunks=CHUNKS,
            keep=1,
            quiet=True,
            resume=True,
            **changed[2],
        )
    gathered(model("olmoe"), text, tmp_path / "m", resume=True)


def test_killed_for_good(model, text, tmp_path):
    """SIGKILL while a layer runs."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from mobe_gguf.calibrate import layers, moments as m\n"
        "run = layers.Run._layer\n"
        "layers.Run._layer = lambda self, i, *a: os.kill(os.getpid(), signal.SIGKILL) if i == 2 else run(self, i, *a)\n"
        f"m.collect(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), ctx={CTX}, chunks={CHUNKS}, keep=1, quiet=True)"
    )
    path, out = model("qwen3_moe"), tmp_path / "m"
    done = subprocess.run([sys.executable, "-c", script, path, text, out], capture_output=True)
    assert done.returncode == -9
    left = sorted(p.name for p in (tmp_path / "m.work").iterdir())
    assert {"layer-000.safetensors", "layer-001.safetensors", "states-002"} <= set(left)
    gathered(path, text, out, resume=True)
    assert out.read_bytes() == gathered(path, text, tmp_path / "whole").path.read_bytes()


# bad input


def damage(path: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file, {"format": "pt"})


def test_a_layer_that_answers_nan(own_model, text, tmp_path):
    """Which layer, which chunk: a weight that is finite, and too large."""
    path = own_model("qwen3_moe")
    damage(path, "model.layers.1.self_attn.o_proj.weight", lambda t, n: t[n].fill_(3e38))
    with pytest.raises(
        MobeError, match=r"layer 1 answers NaN or Inf in chunk 0 of the text \(tokens 0 and on\)"
    ):
        gathered(path, text, tmp_path / "m")
    assert (tmp_path / "m.work" / "layer-000.safetensors").is_file() and not (tmp_path / "m").exists()


def test_weights_that_are_nan(own_model, text, tmp_path):
    path = own_model("qwen3_moe")
    name = "model.layers.2.self_attn.q_proj.weight"
    damage(path, name, lambda t, n: t[n][0].fill_(float("nan")))
    with pytest.raises(MobeError, match=f"tensor {re.escape(name)} holds values that are NaN or Inf"):
        gathered(path, text, tmp_path / "m")


def test_tensors_that_are_missing_or_of_another_shape(own_model, text, tmp_path):
    path = own_model("qwen3_moe")
    name = "model.layers.1.self_attn.q_proj.weight"
    damage(path, name, lambda t, n: t.update({n: t[n][:, :32].clone()}))
    with pytest.raises(
        MobeError, match=rf"tensor {re.escape(name)} has shape \[64, 32\], expected \[64, 64\]"
    ):
        gathered(path, text, tmp_path / "m")
    damage(path, name, lambda t, n: t.pop(n))
    with pytest.raises(MobeError, match=f"tensor {re.escape(name)} is missing"):
        gathered(path, text, tmp_path / "n")


def test_a_tokenizer_of_another_model(own_model, text, tmp_path):
    path = own_model("qwen3_moe")
    import json

    config = json.loads((path / "config.json").read_text()) | {"vocab_size": 100}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        damage(path, name, lambda t, n: t.update({n: t[n][:100].clone()}))
    with pytest.raises(MobeError, match=r"its tokenizer gives token \d+, the model knows 100"):
        gathered(path, text, tmp_path / "m")


def test_no_disk_for_states(model, text, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workspace.os, "posix_fallocate", full)
    with pytest.raises(
        MobeError, match=r"m.work: no room for 0.00 GB of states: the disk is full. Make room"
    ):
        gathered(model("qwen3_moe"), text, tmp_path / "m")


def test_names_of_one_architecture_leave_the_others_as_they_are() -> None:
    """gguf-py's maps share a table that some architectures change."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    from mobe_gguf.calibrate.dense import gguf_names

    name = "model.layers.0.post_attention_layernorm"
    before = get_tensor_name_map(MODEL_ARCH.QWEN3MOE, 2).get_name(name)
    assert before is not None
    assert gguf_names("qwen3_moe", 2)("no.such.module") is None  # every architecture is asked
    assert get_tensor_name_map(MODEL_ARCH.QWEN3MOE, 2).get_name(name) == before
