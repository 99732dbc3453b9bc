"""Values of wrong types, in every key of config.json and of GGUF files that is read: an answer in words, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from export.handmade import make_mobe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.editing import edit_config
from parity.gguf_files import factorize, qwen3moe

from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.evaluate.facts import facts_of
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.families import FAMILIES
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.quant.mixture import ModelFacts

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.integers(), st.floats(), st.text(max_size=3)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)

#: What ``families`` and the classes above it read, beside what a family calls its numbers.
CONFIG_KEYS = (
    "model_type",
    "first_k_dense_replace",
    "moe_layer_freq",
    "mlp_only_layers",
    "decoder_sparse_step",
    "architectures",
    "quantization_config",
    "num_B",
    "activation",
    "mobe",
)

GGUF_KEYS = (
    "general.name",
    "general.alignment",
    "split.count",
    "split.no",
    "split.tensors.count",
    *(
        f"qwen3moe.{name}"
        for name in (
            "block_count",
            "embedding_length",
            "context_length",
            "expert_count",
            "expert_used_count",
            "attention.head_count",
            "attention.head_count_kv",
            "mobe.version",
            "mobe.activation",
            "mobe.group_count",
        )
    ),
)

gguf_values = st.one_of(
    st.text(max_size=3),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.lists(st.text(max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(-3, 9), min_size=1, max_size=3),
)


def answers(*arguments: object) -> int:
    """Exit code of a command, which must end in words: 0, 1 or 2."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code in (0, 1, 2)
    return result.exit_code


def config_keys() -> Iterator[str]:
    fields = ("n_expert_keys", "n_expert_used_keys", "n_ff_exp_keys", "n_embd_keys", "n_layer_keys")
    yield from {key for family in FAMILIES for field in fields for key in getattr(family, field)}
    yield from CONFIG_KEYS


@pytest.mark.parametrize("family", tiny.FAMILIES)
@FEW
@given(data=st.data())
def test_config_of_a_family(family: str, model: Callable[..., Path], data: st.DataObject) -> None:
    config = json.loads((model(family) / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(config_keys())), min_size=1, max_size=2)):
        config[key] = data.draw(values, key)
    declared = next(f for f in FAMILIES if f.name == family)
    try:
        n_layer = declared.n_layer(config)
        if n_layer < 1000:  # Checkpoint asks no more layers than there are tensors
            assert all(0 <= layer < n_layer for layer in declared.moe_layers(config))
    except MobeError as e:
        assert "config.json: " in e.message  # noqa: PT017


@pytest.fixture(scope="module")
def edited(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An ordinary model, one with another rule for its layers, one with factors; each with its first config.json beside it."""
    folder = tmp_path_factory.mktemp("edited")
    paths = [
        Path(shutil.copytree(model("qwen3_moe"), folder / "qwen")),
        Path(shutil.copytree(model("deepseek_v3"), folder / "deepseek")),
        make_mobe(model("qwen2_moe"), folder / "mobe", our_key=True),
    ]
    for path in paths:
        shutil.copy(path / "config.json", path / "first.json")
    return paths


@FEW
@given(data=st.data())
def test_config_of_a_directory(edited: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(edited))
    shutil.copy(path / "first.json", path / "config.json")
    changes = {data.draw(st.sampled_from(sorted(config_keys()))): data.draw(values)}
    edit_config(path, **changes)
    answers("inspect", path)
    answers("inspect", path, "--json")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", dict(mlp_only_layers=5), "'mlp_only_layers' must be a list of layers, got 5"),
        ("qwen3_moe", dict(mlp_only_layers=["0"]), "'mlp_only_layers' must be a list"),
        ("qwen3_moe", dict(decoder_sparse_step="1"), "'decoder_sparse_step' must be an integer .* got '1'"),
        ("deepseek_v3", dict(first_k_dense_replace="1"), "'first_k_dense_replace' must be an integer"),
        ("deepseek_v3", dict(first_k_dense_replace=-1), "'first_k_dense_replace' must be an integer"),
        ("deepseek_v3", dict(moe_layer_freq="x"), "'moe_layer_freq' must be an integer"),
        ("deepseek_v3", dict(moe_layer_freq=[0, 1]), r"'moe_layer_freq' must be .* each layer, got \[0, 1\]"),
        ("deepseek_v3", dict(moe_layer_freq=[0, "1", 1]), "'moe_layer_freq' must be a number or a list"),
    ],
)
def test_messages_about_config(
    family: str, changes: dict[str, Any], words: str, own_model: Callable[..., Path]
) -> None:
    path = own_model(family)
    edit_config(path, **changes)
    with pytest.raises(MobeError, match=words) as e:
        _ = Checkpoint(path).moe_layers
    assert e.value.message.startswith(f"{path}/config.json: ")
    assert answers("inspect", path) == 1


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", dict(tie_word_embeddings="yes"), "'tie_word_embeddings' expected bool, got str"),
        ("qwen3_moe", dict(rms_norm_eps="1e-6"), "'rms_norm_eps' expected float, got str"),
        ("qwen3_moe", dict(rms_norm_eps=float("nan")), "'rms_norm_eps' is nan, expected a finite number"),
        (
            "qwen3_moe",
            dict(rms_norm_eps={"__float__": "NaN"}),
            "'rms_norm_eps' is nan, expected a finite number",
        ),
        ("qwen3_moe", dict(head_dim=True), "'head_dim' is True, and the runtime needs a positive integer"),
        ("qwen3_moe", dict(num_attention_heads=True), "'num_attention_heads' is True, expected int"),
        ("qwen3_moe", dict(num_key_value_heads=0), "'num_key_value_heads' is 0, and the runtime needs a pos"),
        ("qwen3_moe", dict(is_causal=0), "'is_causal' is 0, expected true or false"),
        ("qwen3_moe", dict(rope_parameters=[1]), r"'rope_parameters' must be an object, got \[1\]"),
        ("qwen3_moe", dict(rope_scaling={"factor": "4"}), "'rope_scaling': 'factor' must be a number"),
        ("deepseek_v3", dict(rms_norm_eps=None), "'rms_norm_eps' expected float, got NoneType"),
        ("deepseek_v3", dict(rope_interleave=None), "'rope_interleave' is None, and the runtime rotates"),
        ("deepseek_v3", dict(q_lora_rank=-1), "'q_lora_rank' is -1, and the runtime needs a number that"),
        ("llama4", dict(text_config={"rope_parameters": {"factor": "x"}}), "'factor' must be a number"),
        ("bailing_moe", dict(head_dim=-8), "'head_dim' is -8, and the runtime needs a positive integer"),
    ],
)
def test_values_of_a_wrong_type(
    family: str, changes: dict[str, Any], words: str, own_model: Callable[..., Path]
) -> None:
    """Before anything reads them."""
    path = own_model(family)
    edit_config(path, **changes)
    with pytest.raises(MobeError, match=words) as e:
        Checkpoint(path).check_values()
    assert e.value.message.startswith(f"{path}/config.json: ")


@pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
def test_types_that_a_class_writes_itself(family: str, model: Callable[..., Path]) -> None:
    Checkpoint(model(family)).check_values()


def test_a_whole_number_for_a_float(own_model: Callable[..., Path]) -> None:
    path = own_model("deepseek_v3")
    edit_config(path, routed_scaling_factor=2)
    Checkpoint(path).check_values()


def test_a_text_is_no_number_of_layers(own_model: Callable[..., Path]) -> None:
    path = own_model("qwen3_moe")
    edit_config(path, num_hidden_layers="3")
    with pytest.raises(MobeError, match="'num_hidden_layers' must be a positive integer, got '3'"):
        _ = Checkpoint(path).moe_layers


def test_a_key_that_the_file_has_no_room_for(own_model: Callable[..., Path], tmp_path: Path) -> None:
    """What only the converter reads: the GGUF key is named, and not what its writer trips over."""
    path = own_model("gpt_oss")
    edit_config(path, num_experts=["x"])
    result = CliRunner().invoke(
        main, ["export", str(path), str(tmp_path / "o.gguf"), "--dense", "--quant", "f32"]
    )
    assert (
        result.exit_code == 1
        and "makes ['x'] of key gpt-oss.expert_count, which is no UINT32" in " ".join(result.stderr.split())
    )


@FEW
@given(data=st.data())
def test_keys_of_a_gguf_file(tmp_path: Path, data: st.DataObject) -> None:
    file = qwen3moe()
    if data.draw(st.booleans()):
        factorize(file)
    for key in data.draw(st.lists(st.sampled_from(GGUF_KEYS), min_size=1, max_size=2, unique=True)):
        file.keys[key] = data.draw(gguf_values, key)
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    file.write(path)
    for command in ("inspect", "verify"):
        answers(command, path)
        answers(command, path, "--json")
    for read in (facts_of, lambda path: GgufModel(path).check_whole(), lambda path: GgufModel(path).config):
        try:
            read(path)
        except MobeError as e:
            assert str(path) in e.message  # noqa: PT017
    try:
        ModelFacts.of("qwen3moe", read_gguf(path).keys)
    except MobeError as e:
        assert "expected" in e.message or str(path) in e.message  # noqa: PT017


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("split.count", "2", "key split.count is '2', expected the number of files"),
        ("split.count", [2, 2], "key split.count is an array of 2, expected the number of files"),
        ("qwen3moe.expert_count", "8", "key qwen3moe.expert_count is '8', expected a whole number"),
        ("qwen3moe.block_count", -2, "key qwen3moe.block_count is -2, expected a whole number"),
        ("qwen3moe.mobe.group_count", "1", "key qwen3moe.mobe.group_count is '1'"),
        ("qwen3moe.mobe.group_count", True, "key qwen3moe.mobe.group_count is True"),
        ("qwen3moe.mobe.version", "1", "key qwen3moe.mobe.version is '1', this program knows 1 and 2"),
        ("qwen3moe.mobe.version", True, "key qwen3moe.mobe.version is True, this program knows 1 and 2"),
        ("qwen3moe.mobe.activation", 1, "key qwen3moe.mobe.activation is 1, expected a string"),
        ("general.name", ["a"], "key general.name is an array of 1, expected a string"),
    ],
)
def test_messages_about_keys(key: str, value: Any, words: str, tmp_path: Path) -> None:
    file = factorize(qwen3moe())
    file.keys[key] = value
    path = file.write(tmp_path / "m.gguf")
    for command in ("inspect", "verify"):
        result = CliRunner().invoke(main, [command, str(path)])
        assert result.exit_code == 1 and f"{path}: {words}" in result.stderr.replace(
            f"{path}: tensor blk.0.ffn_gate_basis.weight has 4 bases, ", f"{path}: "
        ), result.stderr
