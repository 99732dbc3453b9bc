"""The command: what it prints, its exit codes, and that nothing is written when it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from models.editing import edit_tensors
from safetensors.torch import load_file, save_file

from mobe_gguf.cli import main
from mobe_gguf.core.errors import UsageError
from mobe_gguf.export import ExportOptions, ExportRequest, Recipe, write_model
from mobe_gguf.factorize.job import prepare
from mobe_gguf.factorize.job.unit import fit
from mobe_gguf.factorize.plan import Options
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint

#: A form that saves, for experts of 48 x 64.
SMALLER = ("--bases", 4, "--rank", 32)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["factorize", *map(str, arguments)])


def refused(code: int, *arguments: object) -> str:
    """Stderr of a call that must fail with ``code`` and a message, not with a traceback."""
    result = call(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    assert "Error" in result.stderr and "Traceback" not in result.stderr
    return result.stderr


def test_the_whole_command(model, tmp_path):
    result = call(model("qwen3_moe"), tmp_path / "out", "--steps", 4, *SMALLER, "--layers", "0,2", "-v")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    for expected in (
        "qwen3_moe, 3 of 3 layers MoE, 8 experts (2 used) of 48 x 64",
        "layers 0,2, gate and up: 4 bases of rank 32",
        "[1/4] layer 0 gate: error of the weights 0.",
        "[4/4] layer 2 up: error of the weights 0.",
        "0 s left",
        "whole model",
        "mobe-gguf export",
    ):
        assert expected in result.stderr
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("command", ["factorize", "ablate"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", str(10**20 - 1), f"--seed {10**20 - 1}: expected a whole number from 0 to 2^64 - 1"),
        ("--seed", "-1", "--seed -1: expected a whole number"),
        ("--layers", "0-9999999999", "cannot read '0-9999999999'; expected numbers below 10000 and ranges"),
    ],
)
def test_numbers_that_are_too_large(command, option, value, message, model, tmp_path):
    arguments = [command, str(model("qwen3_moe")), str(tmp_path / "out"), option, value]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert message in result.stderr and not (tmp_path / "out").exists()


def test_json_and_quiet(model, tmp_path):
    result = call(model("olmoe"), tmp_path / "out", "--steps", 2, "--rank", 40, "--json", "-q")
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert len(report["units"]) == 6 and all(0 < u["error"] < 1 for u in report["units"])
    assert report["settings"]["bases"] == 2 and report["plan"]["model_shed_share"] > 0


def test_few_terms(model, tmp_path):
    out = tmp_path / "out"
    result = call(model("qwen3_moe"), out, "--steps", 5, *SMALLER, "--layers", 1, "--mix-terms", 2, "-v")
    assert result.exit_code == 0 and "scalar mix of at most 2 terms" in result.stderr
    mix = MobeCheckpoint(out).layer(1).mix("up")
    assert ((mix != 0).sum(1) == 2).all()
    assert json.loads((out / "config.json").read_text())["mobe"]["settings"]["mix_terms"] == 2


def test_forms(model, tmp_path):
    out = tmp_path / "out"
    form = ("--activation", "none", "--mix", "row")
    result = call(model("qwen3_moe"), out, "--steps", 3, *SMALLER, "--layers", 1, *form, "-v")
    assert result.exit_code == 0 and "none, row mix" in result.stderr
    checkpoint = MobeCheckpoint(out)
    assert checkpoint.activation == "none" and checkpoint.layer(1).mix("gate").shape == (8, 4, 32)
    settings = json.loads((out / "config.json").read_text())["mobe"]["settings"]
    assert (settings["activation"], settings["mix"]) == ("none", "row")
    gguf = tmp_path / "model.gguf"
    exported = CliRunner().invoke(main, ["export", str(out), str(gguf), "--quant", "q8_0", "-q"])
    assert exported.exit_code == 0, exported.stderr
    assert read_gguf(gguf).tensors["blk.1.ffn_gate_basis.mix"].shape == (8, 4, 32)


def test_a_resumed_job_keeps_its_mix(model, tmp_path):
    work = tmp_path / "out.work"
    work.mkdir()
    job = prepare(model("qwen3_moe"), tmp_path / "out", Options(mix="row"))
    (work / "job.json").write_text(json.dumps(job.description()))
    message = refused(1, model("qwen3_moe"), tmp_path / "out", "--resume", "--mix", "scalar")
    assert "--mix is scalar now, but the job to resume was started with row" in message


@pytest.mark.parametrize("kind", ["directory", "config", "gguf"])
def test_factors_larger_than_the_experts_are_refused(kind, model, tmp_path):
    """Whatever the model is read from; without options there are sizes that save."""
    path, out = model("qwen3_moe", moe_intermediate_size=64), tmp_path / "out"
    if kind == "config":
        path = path / "config.json"
    elif kind == "gguf":
        path, directory = tmp_path / "m.gguf", path
        write_model(
            ExportRequest(
                directory, path, Recipe("f16"), ExportOptions(dense=True, allow_dense=True, quiet=True)
            )
        )
    for options in (
        ("--published",),
        ("--bases", 4, "--rank", 48),
        ("--bases", 4, "--projections", "down", "--published"),
    ):
        message = refused(2, path, out, "--dry-run", *options)
        assert "of the parameters of the 8 experts of 64 x 64" in message and "--rank" in message
    result = call(path, out, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)["plan"]
    assert plan["projected_after"] < 0.8 * plan["projected_before"]
    assert not out.exists()


def test_dry_run_writes_nothing(model, tmp_path):
    result = call(model("deepseek_v3"), tmp_path / "out", "--dry-run")
    assert result.exit_code == 0 and "whole model" in result.stderr
    plan = json.loads(call(model("deepseek_v3"), tmp_path / "out", "--dry-run", "--json").stdout)
    assert plan["settings"]["layers"] == [1, 2] and plan["plan"]["units"] == 4
    assert not any(tmp_path.iterdir())


def test_dry_run_beside_unfinished_work_and_out(model, tmp_path):
    work, out = tmp_path / "out.work", tmp_path / "out"
    (work / "units").mkdir(parents=True)
    (work / "job.json").write_text("{}")
    out.mkdir()
    result = call(model("qwen3_moe"), out, "--dry-run")
    assert result.exit_code == 0 and "whole model" in result.stderr
    assert (work / "job.json").read_text() == "{}"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_dry_run_of_a_config_alone(family, model, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(model(family) / "config.json", tmp_path / "bare")
    whole = json.loads(call(model(family), tmp_path / "out", "--dry-run", "--json").stdout)
    for bare in (tmp_path / "bare", tmp_path / "bare" / "config.json"):
        result = call(bare, tmp_path / "out", "--dry-run", "--json")
        assert result.exit_code == 0, result.stderr
        plan = json.loads(result.stdout)
        assert plan["plan"]["model_before"] == whole["plan"]["model_before"]
        assert plan["plan"]["projected_after"] == whole["plan"]["projected_after"]
    assert "safetensors" in refused(1, tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_error_that_is_shown_is_the_one_that_was_minimized(model, tmp_path, monkeypatch):
    result = call(model("qwen3_moe"), tmp_path / "out", "--steps", 2, *SMALLER, "--layers", "0")
    assert "minimized: relative error of the weights" in result.stderr
    text = tmp_path / "text.txt"
    text.write_text("The keeper counted 12 ships; she'd never counted so many. " * 60)
    moments = tmp_path / "m.safetensors"
    done = CliRunner().invoke(
        main, ["moments", str(model("qwen3_moe")), str(moments), "--text", str(text), "--ctx", "32", "-q"]
    )
    assert done.exit_code == 0, done.output
    common = ("--steps", 2, *SMALLER, "--layers", "0", "--moments", moments)
    result = call(model("qwen3_moe"), tmp_path / "by", *common, "--json")
    unit = json.loads(result.stdout)["units"][0]
    assert f"layer 0 gate: error of the outputs {unit['objective']:.5f}" in result.stderr
    result = call(model("qwen3_moe"), tmp_path / "by2", *common)
    heading = result.stderr.index("minimized: relative error of the outputs")
    first, weights = (
        result.stderr.index(f"{unit['objective']:.5f}", heading),
        result.stderr.index(f"{unit['error']:.5f}", heading),
    )
    assert unit["objective"] < unit["error"] and first < weights


def test_a_target_says_what_the_whole_model_keeps(model, tmp_path):
    result = call(model("qwen3_moe"), tmp_path / "out", "--target", "0.75", "--dry-run")
    plan = json.loads(
        call(model("qwen3_moe"), tmp_path / "o", "--target", "0.75", "--dry-run", "--json").stdout
    )["plan"]
    kept = plan["model_after"] / plan["model_before"]
    assert kept > 0.76
    assert f"--target 0.75 is of gate and up alone; the whole model keeps {kept:.1%}" in result.stderr


def test_help_does_not_need_torch_and_shows_examples():
    result = call("--help")
    assert result.exit_code == 0
    assert (
        "--resume" in result.stdout and "mobe-gguf factorize Qwen3-30B-A3B/ mobe/ --dry-run" in result.stdout
    )


def test_wrong_usage(model, tmp_path):
    source, out = model("qwen3_moe"), tmp_path / "out"
    for options, message in (
        (["--bases", 3, "--groups", 2], "--bases 3 does not divide by --groups 2"),
        (["--rank", 65], "--rank 65 is more than the hidden size 64"),
        (["--bases", 9], "more than the 8 experts"),
        (["--groups", 3], "must divide 8"),
        (["--groups", 0], "'--groups': 0 is not in the range"),
        (["--layers", "0-x"], "cannot read '0-x'"),
        (["--layers", "3"], "layer 3 has no routed experts"),
        (["--projections", "gate,left"], "'left' is unknown"),
        (["--activation", "relu"], "'relu' is not one of"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--objective", "activation"], "needs --imatrix"),
        (["--steps", "many"], "not a valid integer"),
    ):
        assert message in refused(2, source, out, *options)
    refused(2, source)
    assert not any(tmp_path.iterdir())


def damage(path: Path, kind: str) -> str:
    """Break a model; returns what the message must say."""
    if kind == "missing shard":
        shard = sorted(path.glob("*.safetensors"))[-1]
        shard.unlink()
        return f"shard {shard.name} is missing"
    if kind == "truncated":
        shard = sorted(path.glob("*.safetensors"))[-1]
        os.truncate(shard, shard.stat().st_size - 100)
        return f"{shard.name}: truncated or corrupt safetensors file"
    if kind == "nan":
        shard = next(
            s for s in sorted(path.glob("*.safetensors")) if any(".experts.7.up" in n for n in load_file(s))
        )
        tensors = load_file(shard)
        name = next(n for n in tensors if ".experts.7.up" in n)
        tensors[name][0, 0] = float("nan")
        save_file(tensors, shard)
        return f"tensor {name} holds 1 values that are NaN or Inf"
    config = json.loads((path / "config.json").read_text())
    if kind == "family":
        config["model_type"] = "llama"
        message = "Known: qwen3_moe, qwen2_moe, deepseek_v2"
    elif kind == "already factorized":
        config["num_B"] = 4
        message = "is a MoBE checkpoint already"
    else:
        del config["num_experts_per_tok"], config["moe_intermediate_size"]
        message = "no 'moe_intermediate_size'"
    (path / "config.json").write_text(json.dumps(config))
    return message


@pytest.mark.parametrize(
    "kind", ["missing shard", "truncated", "nan", "family", "already factorized", "config key"]
)
def test_a_broken_source(kind, own_model, tmp_path):
    source = own_model("qwen3_moe", max_shard_size="200KB")
    message = damage(source, kind)
    # one layer at least before the NaN would be read: then what is finished stays
    error = refused(1, source, tmp_path / "out", "--steps", 1, "--layers", "0", "--projections", "up")
    assert message in error.replace("\n", " ")
    assert {p.name for p in tmp_path.iterdir()} == {"own"}


def test_out_in_the_way(model, tmp_path):
    source = model("qwen3_moe")
    (tmp_path / "out").mkdir()
    assert "exists already. Choose another OUT" in refused(1, source, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(1, source, tmp_path / "file" / "out", "--steps", 1)
    assert (tmp_path / "file").read_text() == ""
    assert "cannot be written" in refused(1, source, tmp_path / ("x" * 300), "--steps", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_not_writable(model, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot be written" in refused(1, model("qwen3_moe"), tmp_path / "closed" / "out", "--steps", 1)


def test_interrupt_says_how_to_go_on(model, tmp_path, monkeypatch):
    left = ["one unit"]

    def interrupt(*args, **kwargs):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return fit(*args, **kwargs)

    monkeypatch.setattr("mobe_gguf.factorize.job.unit.fit", interrupt)
    out = tmp_path / "out"
    message = refused(130, model("qwen3_moe"), out, "--steps", 1, "-q")
    assert message == f"Error: stopped. Finished units are kept in {out}.work; run again with --resume.\n"
    message = refused(130, model("qwen3_moe"), tmp_path / "other", "--steps", 1, "-q")
    assert message == "Error: stopped. No unit was finished.\n" and {p.name for p in tmp_path.iterdir()} == {
        "out.work"
    }


def test_sigterm_is_as_an_interrupt(model, tmp_path):
    """The real command; what it finished is kept, and goes on."""
    out, arguments = tmp_path / "out", ["--steps", "20", "-q", "--layers", "0,1"]
    command = [sys.executable, "-c", "from mobe_gguf.cli import main; main()", "factorize"]
    process = subprocess.Popen(
        [*command, model("qwen3_moe"), out, *arguments], stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("out.work/units/layer-*.safetensors")):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)
    process.terminate()
    assert "run again with --resume" in process.communicate()[1] and process.returncode == 130
    assert call(model("qwen3_moe"), out, *arguments, "--resume").exit_code == 0


@pytest.mark.parametrize("out", [".", "/", "", "..", "a/.."])
@pytest.mark.parametrize("command", [["factorize"], ["ablate", "--no-kl", "--no-plot"]])
def test_no_name_for_a_directory(out, command, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [*command, str(model("qwen3_moe")), out])
    assert result.exit_code == 2 and "a directory that is there already; name a new one, as " in result.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--bases", "--rank", "--groups", "--mix-terms", "--steps"])
def test_numbers_below_one(option, model, tmp_path):
    message = refused(2, model("qwen3_moe"), tmp_path / "out", option, 0)
    assert option in message and "warning" not in message
    name = option[2:].replace("-", "_")
    with pytest.raises(UsageError, match=f"^{option} 0: expected at least 1"):
        prepare(model("qwen3_moe"), tmp_path / "out", Options(**{name: 0}))


def test_a_dry_run_checks_what_will_not_be_factorized_too(own_model, tmp_path):
    path = own_model("qwen3_moe")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    message = refused(1, path, tmp_path / "out", "--layers", "0", "--dry-run")
    assert f"tensor {name} has type int8" in message
    edit_tensors(path, lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"))
    message = refused(1, path, tmp_path / "out", "--dry-run")
    assert "tensor model.layers.2.mlp.gate.weight is missing" in message


@pytest.mark.parametrize(
    "command", [("factorize", "OUT", "--json"), ("inspect",), ("eval", "x.gguf"), ("demo",)]
)
def test_stdout_is_closed(command, model, tmp_path):
    """The result would be lost: said before the work."""
    start = [sys.executable, "-c", "from mobe_gguf.cli import main; main()", command[0], model("qwen3_moe")]
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *start, *command[1:]],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 2 and "the result is printed on stdout, which is closed" in process.stderr
    assert not any(tmp_path.iterdir())
