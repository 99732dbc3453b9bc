"""The authors' raw training output beside the original model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from export.published import make_wab
from mobe_gguf.cli import main
from mobe_gguf.export import Recipe, export
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.mobe_checkpoint import reconstruct
from mobe_gguf.models.wab import WabCheckpoint, WabFiles, wab_name


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """An original model and its training output."""
    original = tiny.make_model("qwen3_moe", tmp_path / "original")
    return original, make_wab(original, tmp_path / "wab")


def run(*args: Any) -> tuple[int, str]:
    """Exit code and stderr of ``mobe-gguf export``; fails if it ends in a traceback."""
    result = CliRunner().invoke(main, ["export", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", dict()),
        ("qwen3_moe", dict(r=32, activation="tanh")),
        ("deepseek_v3", dict(g=2, m=8)),
        ("bailing_moe", dict(activation="tanh")),
        ("deepseek_v2", dict(g=4, m=8, activation="tanh")),
    ],
    ids=str,
)
def test_the_factors_give_the_experts_back(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """sigma is where it belongs, softmax and activation are applied, experts are those of their group."""
    original = tiny.make_model(family, tmp_path / "original")
    activation = options.get("activation", "silu")
    said = WabFiles((make_wab(original, tmp_path / "wab", **options),), activation)
    checkpoint = WabCheckpoint(original, said)
    for index in checkpoint.moe_layers:
        layer = checkpoint.layer(index)
        assert layer.projections == ("gate", "up")
        assert (layer.group_count("gate"), layer.n_basis("up")) == (options.get("g", 1), options.get("m", 4))
        for projection in layer.projections:
            want = checkpoint.expert_stack(index, projection)
            error = (reconstruct(layer, projection) - want).norm() / want.norm()
            assert error < 2**-11, error  # sigma has eleven bits


def test_sigma_is_rounded_as_training_rounds_it(made: tuple[Path, Path]) -> None:
    checkpoint = WabCheckpoint(made[0], WabFiles((made[1],), "silu"))
    for projection in ("gate", "up"):
        sigma = checkpoint.expert_stack(1, projection).half().std()
        assert sigma.dtype == torch.float16 and checkpoint.layer(1).scale(projection) == float(sigma)


def test_what_it_is_read_from(made: tuple[Path, Path]) -> None:
    """An interrupted export goes on only while all of these are the same."""
    files = set(WabCheckpoint(made[0], WabFiles((made[1],), "silu")).source_files())
    assert files == {*made[0].iterdir(), *made[1].iterdir()}


def test_exported_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Factors as in the files, everything else as in a file of the original."""
    original, wab = made
    export(original, tmp_path / "wab.gguf", Recipe("f32"), wab=WabFiles((wab,), "silu"), quiet=True)
    export(original, tmp_path / "plain.gguf", Recipe("f32"), allow_dense=True, quiet=True)
    ours, plain = read_gguf(tmp_path / "wab.gguf"), read_gguf(tmp_path / "plain.gguf")

    def values(file: Any, name: str) -> np.ndarray:
        info = file.tensors[name]
        return np.fromfile(file.path, np.float32, info.n_bytes // 4, offset=info.offset).reshape(info.shape)

    state = torch.load(wab / wab_name(2, "up"), weights_only=True)
    sigma = (
        torch.stack(
            [
                t
                for n, t in load_file(original / "model.safetensors").items()
                if "2.mlp.experts" in n and "up_" in n
            ]
        )
        .half()
        .std()
    )
    expected = {
        "blk.2.ffn_up_exps.weight": state["A_params"] * sigma,
        "blk.2.ffn_up_basis.weight": state["B_params"],
        "blk.2.ffn_up_basis.mix": state["w_params"].exp() / state["w_params"].exp().sum(1, keepdim=True),
    }
    for name, tensor in expected.items():
        np.testing.assert_allclose(values(ours, name), tensor.numpy(), rtol=1e-6, err_msg=name)
    others = set(plain.tensors) - {n for n in plain.tensors if "gate_exps" in n or "up_exps" in n}
    assert len(others) > 20
    for name in others:
        np.testing.assert_array_equal(values(ours, name), values(plain, name), err_msg=name)
    assert ours.keys["qwen3moe.mobe.activation"] == "silu"


def test_command(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    gate, up = tmp_path / "gate", tmp_path / "up"
    for folder in (gate, up):
        folder.mkdir()
        for path in wab.glob(f"*{folder.name}_proj_WAB.pth"):
            shutil.move(path, folder)
    out = tmp_path / "out.gguf"
    options = ["--quant", "q8_0", "--wab", gate, "--wab", up, "--activation", "silu"]
    assert run(original, out, *options)[0] == 0
    assert "blk.0.ffn_gate_basis.weight" in read_gguf(out).tensors
    shutil.copy(gate / wab_name(0, "gate"), tmp_path)
    code, err = run(original, out, *options, "--wab", tmp_path)
    assert code == 1 and "same layer, projection and group" in err


def test_usage(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    out = (tmp_path / "out.gguf", "--quant", "f32")
    for options, words in (
        (["--wab", wab], "--activation"),
        (["--activation", "silu"], "--wab DIR"),
        (["--wab-layers", "0"], "--wab DIR"),
        (["--wab", wab, "--activation", "none"], "tanh"),
        (["--wab", wab, "--activation", "silu", "--wab-layers", "a"], "--wab-layers: cannot read"),
    ):
        code, err = run(original, *out, *options)
        assert code == 2 and words in err, err


def _drop(*names: str) -> Any:
    return lambda wab: [(wab / name).unlink() for name in names]


def _change(name: str, **tensors: Any) -> Any:
    def change(wab: Path) -> None:
        state = torch.load(wab / name, weights_only=True) | tensors
        torch.save({key: value for key, value in state.items() if value is not None}, wab / name)

    return change


def _write(name: str, data: bytes) -> Any:
    return lambda wab: (wab / name).write_bytes(data)


def _regroup(wab: Path) -> None:
    """Group 1 alone, which is what the authors' ``train_group.py`` leaves as it is published."""
    (wab / wab_name(1, "gate")).rename(wab / wab_name(1, "gate", 1))


GATE = wab_name(1, "gate")
NAN = torch.full((4, 48, 64), float("nan"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(GATE, wab_name(2, "gate"), wab_name(2, "up")), f"layer 1 (gate), layer 2 (gate, up). Expected {GATE}"),
        (lambda wab: [path.unlink() for path in wab.iterdir()], "no files named like model_layers_0_mlp_gate_proj_WAB"),
        (_regroup, "model_layers_1_mlp_gate_proj_group0_WAB.pth is missing"),
        (_change(GATE, B_params=None), f"{GATE}: no tensor B_params"),
        (_change(GATE, A_params=[1, 2]), f"{GATE}: no tensor A_params"),
        (_change(GATE, w_params=torch.zeros(8)), "w_params is float32 [8], expected 2 dimensions"),
        (_change(GATE, w_params=torch.zeros(8, 4, dtype=torch.int64)), "w_params is int64"),
        (_change(GATE, B_params=torch.zeros(4, 48, 60)), "B_params has shape [4, 48, 60], expected [4, 48, 64]"),
        (_change(GATE, A_params=torch.zeros(4, 48, 48)), "A_params has shape [4, 48, 48], expected [8, 48, 48]"),
        (_change(GATE, B_params=NAN), f"{GATE}: B_params holds NaN"),
        (_write(GATE, b"nothing"), f"{GATE}: truncated, or no file"),
        (_write(wab_name(1, "down"), b""), "expected a name like model_layers_3_mlp_gate_proj_WAB.pth"),
        (_write(wab_name(9, "up"), b""), "layer 9"),
    ],
)  # fmt: skip
def test_what_is_refused(change: Any, words: str, made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    change(wab)
    code, err = run(original, tmp_path / "out.gguf", "--quant", "q8_0", "--wab", wab, "--activation", "silu")
    assert code == 1 and words in err, err
    assert not list(tmp_path.glob("*out.gguf*"))


def test_truncated_file(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    os.truncate(wab / GATE, (wab / GATE).stat().st_size // 2)
    code, err = run(original, tmp_path / "out.gguf", "--quant", "q8_0", "--wab", wab, "--activation", "silu")
    assert code == 1 and f"{GATE}: truncated, or no file" in err, err


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(
    zipped: bool, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with the variable that makes torch load such files elsewhere."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    original, wab = made
    state = {
        "A_params": Malicious(tmp_path / "it-ran"),
        "B_params": torch.zeros(1),
        "w_params": torch.zeros(1),
    }
    torch.save(state, wab / GATE, _use_new_zipfile_serialization=zipped)
    code, err = run(original, tmp_path / "out.gguf", "--quant", "q8_0", "--wab", wab, "--activation", "silu")
    assert code == 1 and GATE in err and "Traceback" not in err, err
    assert not zipped or ("refused" in err and "posix.mkdir" in err), err
    assert not (tmp_path / "it-ran").exists() and not (tmp_path / "out.gguf").exists()


def test_the_wrong_activation(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    code, err = run(original, tmp_path / "out.gguf", "--quant", "q8_0", "--wab", wab, "--activation", "tanh")
    assert code == 1 and "silu" in err and "--activation" in err, err


def test_layers_that_were_not_trained(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    (wab / wab_name(1, "up")).unlink()
    options = ["--quant", "f32", "--wab", wab, "--activation", "silu", "--wab-layers", "0,2"]
    assert run(original, tmp_path / "out.gguf", *options)[0] == 0
    tensors = read_gguf(tmp_path / "out.gguf").tensors
    assert [n for n in tensors if n.endswith("_basis.weight")] == [
        f"blk.{i}.ffn_{p}_basis.weight" for i in (0, 2) for p in ("gate", "up")
    ]
    assert tensors["blk.1.ffn_gate_exps.weight"].shape == (8, 48, 64)
    code, err = run(original, tmp_path / "out.gguf", *options[:-1], "0,5")
    assert code == 1 and "layer 5" in err


def test_files_in_the_models_own_directory(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    for path in wab.iterdir():
        shutil.move(path, original)
    code, err = run(original, tmp_path / "out.gguf", "--quant", "f32")
    assert code == 1 and f"--wab {original} --activation silu" in err, err
    options = ["--quant", "f32", "--wab", original, "--activation", "silu"]
    assert run(original, tmp_path / "out.gguf", *options)[0] == 0


def test_a_mobe_checkpoint_is_no_original(made: tuple[Path, Path], tmp_path: Path) -> None:
    original, wab = made
    config = json.loads((original / "config.json").read_text()) | {"num_B": 4}
    (original / "config.json").write_text(json.dumps(config))
    code, err = run(original, tmp_path / "out.gguf", "--quant", "f32", "--wab", wab, "--activation", "silu")
    assert code == 1 and "--wab goes with the original" in err
