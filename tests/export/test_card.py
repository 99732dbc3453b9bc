"""The card beside the file, and the metadata in it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from click.testing import CliRunner

from export.handmade import cut, make_mobe
from export.published import make_wab
from mobe_gguf.cli import main
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.export import Recipe, card, export, parse_quant
from mobe_gguf.export.card import card_of, note
from mobe_gguf.formats.gguf import read_gguf

Maker = Callable[..., Path]

README = """---
license: other
license_name: modified-mit
license_link: "https://example.org/a:b"
language: [en, "no"]
base_model: [Org/Some-30B-A3B-Base]
pipeline_tag: text-generation
---
# The original
"""
ABOUT = {
    "version": 1,
    "source": "/machine/of/somebody/Some-30B-A3B",
    "settings": {
        "bases": 4,
        "rank": 48,
        "activation": "tanh",
        "layers": [0, 1, 2],
        "imatrix": "5f2a",
        "moments": "7c1e",
    },
    "errors": {"0": {"gate": 0.1, "up": 0.2}, "1": {"gate": 0.3, "up": 0.2}},
    "objectives": {"0.gate": 0.0125},
}


@pytest.fixture
def source(model: Maker, tmp_path: Path) -> Path:
    """A checkpoint as ``factorize`` writes it: the original's README.md, a ``mobe`` key that says where it was."""
    path = make_mobe(model("qwen3_moe"), tmp_path / "factors")
    (path / "README.md").write_text(README)
    config = json.loads((path / "config.json").read_text()) | {"mobe": ABOUT}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(*args: Any) -> str:
    """stderr of a successful ``mobe-gguf export``."""
    result = CliRunner().invoke(main, ["export", *map(str, args)])
    assert result.exit_code == 0, result.stderr
    return result.stderr


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, body = card.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_card(source: Path, out: Path, tmp_path: Path) -> None:
    err = run(source, out / "x.gguf", "--quant", "q8_0", "--base-model", "Org/Some-30B-A3B")
    assert f"card: {out / 'README.md'}" in err
    front, body = parts(out / "README.md")
    assert front["base_model"] == ["Org/Some-30B-A3B"] and front["base_model_relation"] == "quantized"
    assert {k: v for k, v in front.items() if k.startswith("license")} == {
        "license": "other",
        "license_name": "modified-mit",
        "license_link": "https://example.org/a:b",
    }
    assert front["language"] == ["en", "no"] and {"gguf", "mobe", "quantization"} <= set(front["tags"])
    assert "\n# Some 30B A3B MoBE\n" in body
    assert "3 layers the gate and up matrices of 8 experts share 4 bases of rank 48, activation tanh" in body
    found = describe(out / "x.gguf")
    assert f"{found.n_params / found.original_params:.1%} of the original's" in body
    size, bits = (out / "x.gguf").stat().st_size / 1e6, found.bits_per_weight
    assert f"| [x.gguf](x.gguf) | q8_0 | {size:.2f} MB | {bits:.2f} | A f16, B q8_0, down f16 |" in body
    assert "gate 0.2000 (0.1000 to 0.3000), up 0.2000 (0.2000 to 0.2000)" in body and "0.0125" in body
    assert "bases 4, rank 48, activation tanh." in body  # no list of layers, no checksums
    assert "mobe-gguf export factors/ x.gguf --quant q8_0\n" in body
    assert "llama-cli -m x.gguf" in body and 'Llama("x.gguf")' in body and "mobe-gguf build" in body
    assert str(tmp_path) not in (out / "README.md").read_text() and "/machine/" not in body


def test_layers_that_differ(model: Maker, tmp_path: Path, out: Path) -> None:
    path = make_mobe(model("qwen3_moe"), tmp_path / "factors")
    cut(path, 2, "up", m=3, r=40)
    run(path, out / "x.gguf", "--quant", "q8_0")
    assert "share 3 to 4 bases of rank 40 to 48, activation" in parts(out / "README.md")[1]


def test_without_what_is_not_known(model: Maker, mobe: Maker, out: Path) -> None:
    """No README.md in the source, no ``mobe`` key."""
    run(mobe("olmoe"), out / "x.gguf", "--quant", "q8_0")
    front, body = parts(out / "README.md")
    assert not {"base_model", "license", "language", "base_model_relation"} & set(front)
    assert "factorize`:" not in body and "error of the matrices" not in body
    shutil.rmtree(out)
    out.mkdir()
    run(model("olmoe"), out / "x.gguf", "--quant", "q8_0", "--dense")
    front, body = parts(out / "README.md")
    assert "mobe" not in front["tags"] and "Any llama.cpp runs" in body and "arxiv" not in body


def test_one_page_for_all_files(source: Path, out: Path) -> None:
    for quant in ("q8_0", "f16"):
        run(source, out / f"x-{quant}.gguf", "--quant", quant, "--imatrix", _imatrix(out.parent))
    run(source, out / "x-q4_0.gguf", "--quant", "q4_0", "--split-max-size", "1M", "--experts-used", "1")
    _, body = parts(out / "README.md")
    files = [line.split("](")[0] for line in body.splitlines() if line.startswith("| [")]
    assert files == ["| [x-q8_0.gguf", "| [x-f16.gguf", "| [x-q4_0.gguf"]
    commands = [line for line in body.splitlines() if line.startswith("mobe-gguf export")]
    assert commands == [
        "mobe-gguf export factors/ x-q8_0.gguf --quant q8_0 --imatrix imatrix.gguf",
        "mobe-gguf export factors/ x-f16.gguf --quant f16 --imatrix imatrix.gguf",
        "mobe-gguf export factors/ x-q4_0.gguf --quant q4_0 --experts-used 1 --split-max-size 1M",
    ]
    assert body.count("solved again") == 2
    (out / "x-q8_0.gguf").unlink()
    run(source, out / "x-f16.gguf", "--quant", "f16")
    text = (out / "README.md").read_text()
    assert "x-q8_0" not in text and text.count("| [x-f16.gguf") == 1 and text.count("| [x-q4_0.gguf") == 1


def test_a_page_is_of_one_factorization(source: Path, model: Maker, out: Path) -> None:
    """Other factors of the same model have a page of their own, and a file that came of both is on the newer alone."""
    other = source.with_name("other")
    make_mobe(model("qwen3_moe"), other)
    shutil.copy(source / "README.md", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"mobe": ABOUT | {"settings": {"bases": 3, "seed": 7}}})
    )

    def listed(name: str) -> list[str]:
        return re.findall(r"^\| \[(.*?)\]", (out / name).read_text(), re.MULTILINE)

    run(source, out / "a.gguf", "--quant", "q8_0")
    run(source, out / "b.gguf", "--quant", "f16")
    run(other, out / "c.gguf", "--quant", "q8_0")
    assert listed("README.md") == ["a.gguf", "b.gguf"] and "seed 7" not in (out / "README.md").read_text()
    assert listed("c.README.md") == ["c.gguf"] and "seed 7" in (out / "c.README.md").read_text()
    run(other, out / "b.gguf", "--quant", "f16")
    assert listed("README.md") == ["a.gguf"] and listed("b.README.md") == ["b.gguf"]
    assert "b.gguf --quant" not in (out / "README.md").read_text()
    assert card_of(out / "b.gguf") == out / "b.README.md" and card_of(out / "a.gguf") == out / "README.md"
    run(source, out / "b.gguf", "--quant", "f16")
    assert listed("README.md") == ["a.gguf", "b.gguf"] and not (out / "b.README.md").exists()
    # all that the page was of is replaced: it is the new one's
    (out / "b.gguf").unlink()
    run(other, out / "a.gguf", "--quant", "f16")
    assert listed("README.md") == ["a.gguf"] and "seed 7" in (out / "README.md").read_text()


def _imatrix(folder: Path) -> Path:
    """One with an entry of nothing that the model has."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(folder / "imatrix.gguf", "imatrix")
    writer.add_tensor("nothing.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("nothing.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "imatrix.gguf"


@pytest.mark.parametrize("change", ["written", "edited", "other model", "no text", "a directory"])
def test_pages_of_others_are_not_touched(change: str, source: Path, model: Maker, out: Path) -> None:
    page = out / "README.md"
    if change == "written":
        page.write_text("# My project\n")
    elif change == "no text":
        page.write_bytes(b"\xff\xfe\x00")
    elif change == "a directory":
        page.mkdir()
    else:
        other = (source,) if change == "edited" else (model("olmoe"), "--dense")
        run(*other, out / "a.gguf", "--quant", "f16")
    if change == "edited":
        page.write_text(page.read_text().replace("## Run", "Best model ever.\n\n## Run"))
    before = page.read_bytes() if page.is_file() else None
    for _ in range(2):
        err = run(source, out / "x.gguf", "--quant", "q8_0")
        assert f"card: {out / 'x.README.md'}" in err
    assert (page.read_bytes() if page.is_file() else None) == before
    (out / "x.README.md").write_text("mine, too")
    err = run(source, out / "x.gguf", "--quant", "q8_0")
    assert "no card: " in err and (out / "x.README.md").read_text() == "mine, too"


def test_what_was_measured(source: Path, out: Path) -> None:
    """It stays as long as its file does, and only the last of it."""
    for quant in ("q8_0", "f16"):
        run(source, out / f"x-{quant}.gguf", "--quant", quant)
    page = out / "README.md"
    for kl in ("0.3", "0.2"):
        assert card_of(out / "x-q8_0.gguf") == page
        note(page, out / "x-q8_0.gguf", f"KL divergence {kl} from y.")
    note(page, out / "x-f16.gguf", "KL divergence 0.1 from y.")
    text = page.read_text()
    section = text.split("## How it was made\n\n")[1].split("\n\n```\nmobe-gguf export")[0].splitlines()
    assert len(section) == 6 and all(line.startswith("- ") for line in section)
    assert section[-2:] == [
        "- `x-q8_0.gguf`: KL divergence 0.2 from y.",
        "- `x-f16.gguf`: KL divergence 0.1 from y.",
    ]
    run(source, out / "x-f16.gguf", "--quant", "f16")
    text = page.read_text()
    assert (
        "KL divergence 0.2" in text and text.count("KL divergence") == 1 and text.count("solved again") == 1
    )
    page.write_text(text + "Mine.\n")
    assert card_of(out / "x-q8_0.gguf") is None and card_of(out / "y.gguf") is None
    export(source, out / "z.gguf", Recipe("q8_0"), split_max_size=200_000, card=True, quiet=True)
    (first, *_) = sorted(out.glob("z-*.gguf"))
    assert card_of(first) == out / "z.README.md"


def test_no_card(source: Path, out: Path) -> None:
    assert "card:" not in run(source, out / "x.gguf", "--quant", "q8_0", "--no-card")
    run(source, out / "x.gguf", "--quant", "q8_0", "--dry-run")
    export(source, out / "x.gguf", Recipe("f16"), quiet=True)
    assert [path.name for path in out.iterdir()] == ["x.gguf"]


def test_two_exports_into_one_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lines are there, whoever reads and writes the page first."""
    subjects: list[Any] = []
    monkeypatch.setattr("mobe_gguf.export.write_card", lambda subject: subjects.append(subject) or "later")
    (tmp_path / "out").mkdir()
    for name in ("a.gguf", "b.gguf"):
        export(source, tmp_path / "out" / name, Recipe("f32"), card=True, quiet=True)
    made, both = card.page, threading.Barrier(2)

    def slow(subject: Any, old: str) -> str:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)  # without a lock both have read the old page now
        return made(subject, old)

    monkeypatch.setattr(card, "page", slow)
    threads = [threading.Thread(target=card.write_card, args=(subject,)) for subject in subjects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "[a.gguf]" in text and "[b.gguf]" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "a.gguf", "b.gguf"]


def test_a_card_that_cannot_be_written_is_no_failure(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "no card: " in run(source, out / "x.gguf", "--quant", "q8_0")
    assert [path.name for path in out.iterdir()] == ["x.gguf"]


def test_training_output(out: Path, tmp_path: Path) -> None:
    original = tiny.make_model("qwen3_moe", tmp_path / "Some-30B-A3B")
    wab = make_wab(original, tmp_path / "wab", g=2, m=8)
    run(original, out / "x.gguf", "--quant", "f16", "--wab", wab, "--activation", "silu")
    _, body = parts(out / "README.md")
    assert "share 8 bases of rank 48, in 2 groups, activation silu" in body
    assert "mobe-gguf export Some-30B-A3B/ x.gguf --quant f16 --wab wab/ --activation silu" in body


# metadata


def general(path: Path) -> dict[str, Any]:
    keys = {k: v for k, v in read_gguf(path).keys.items() if k.startswith("general.")}
    return {k: list(v.head) if hasattr(v, "head") else v for k, v in keys.items()}


def test_metadata_come_from_the_original(source: Path, out: Path) -> None:
    """Named after it, not after the directory that its factors are in; the rest is its README.md's."""
    export(source, out / "x.gguf", Recipe(parse_quant("q8_0")), quiet=True)
    keys = general(out / "x.gguf")
    assert keys["general.name"] == "Some 30B A3B MoBE" and keys["general.basename"] == "Some"
    assert keys["general.license"] == "other" and keys["general.license.name"] == "modified-mit"
    assert keys["general.license.link"] == "https://example.org/a:b"
    assert keys["general.languages"] == ["en", "no"] and keys["general.tags"] == ["text-generation"]
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/Org/Some-30B-A3B-Base"
    assert keys["general.file_type"] == 7 and keys["general.quantization_version"] == 2
    export(source, out / "y.gguf", Recipe("f16"), dense=True, quiet=True)
    assert general(out / "y.gguf")["general.name"] == "Some 30B A3B MoBE Dense"


def test_base_model(source: Path, out: Path) -> None:
    export(source, out / "x.gguf", Recipe("f16"), base_model="Other/Some-31B", quiet=True)
    keys = general(out / "x.gguf")
    assert {k: v for k, v in keys.items() if "base_model" in k} == {
        "general.base_model.count": 1,
        "general.base_model.0.name": "Some 31B",
        "general.base_model.0.organization": "Other",
        "general.base_model.0.repo_url": "https://huggingface.co/Other/Some-31B",
    }
    assert keys["general.name"] == "Some 31B MoBE"
    result = CliRunner().invoke(
        main, ["export", str(source), str(out / "x.gguf"), "--quant", "f16", "--base-model", "x"]
    )
    assert result.exit_code == 2 and "Qwen/Qwen3-30B-A3B" in result.stderr


def test_a_model_out_of_the_hubs_cache(source: Path, out: Path, tmp_path: Path) -> None:
    """By the path that ``factorize`` recorded, or the model's own."""
    snapshot = tmp_path / "models--Org--Some-30B-A3B" / "snapshots" / ("0" * 40)
    shutil.copytree(source, snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    for about in (None, ABOUT | {"source": str(snapshot)}):
        config["mobe"] = about
        (snapshot / "config.json").write_text(json.dumps(config))
        run(snapshot, out / "x.gguf", "--quant", "f16")
        assert (
            general(out / "x.gguf")["general.base_model.0.repo_url"]
            == "https://huggingface.co/Org/Some-30B-A3B"
        )
        assert general(out / "x.gguf")["general.name"] == "Some 30B A3B MoBE"
        assert parts(out / "README.md")[0]["base_model"] == ["Org/Some-30B-A3B"]
