"""``mobe-gguf sample``: the file whole or not at all, and what is refused before work."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mobe_gguf.calibrate import sample as module
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError
from mobe_gguf.formats.gguf import read_model
from mobe_gguf.runtime.sample import Sampled, Sampling


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A head that says how long a text may be, and no more."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_context_length(128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "m.gguf"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """The runtime's part is left out: two documents come back, or the first of ``failures`` is raised."""
    asked: list[Sampling] = []

    def fake(path: Path, settings: Sampling, tell) -> Sampled:
        asked.append(settings)
        tell(settings.tokens // 2)
        if settings.seed:
            raise KeyboardInterrupt if settings.seed == 1 else MobeError(f"{path}: no")
        tell(settings.tokens + 3)
        return Sampled(["one\ntwo", "three"], settings.tokens + 3)

    monkeypatch.setattr(module, "sample", fake)
    return asked


def run(*arguments: object) -> click.testing.Result:
    return CliRunner().invoke(main, ["sample", *map(str, arguments)])


def test_the_file(file: Path, tmp_path: Path, written: list[Sampling]):
    out = tmp_path / "out.txt"
    done = run(file, out, "-n", 50, "--ctx", 64, "-ngl", "all", "--n-cpu-moe", 2, "-t", 3)
    assert done.exit_code == 0, done.output
    assert out.read_text() == "one\ntwo\n\nthree\n"
    assert "53 tokens in 2 documents" in done.output and f"--text {out}" in done.output
    assert "[25/50]" in done.output and "[50/50]" in done.output and "tokens/s" in done.output
    assert written == [Sampling(50, 64, threads=3, gpu_layers=-1, n_cpu_moe=2)]
    assert run(file, out, "-q", "--ctx", 64).output == ""


@pytest.mark.parametrize(("seed", "code", "said"), [(1, 130, "stopped"), (2, 1, "m.gguf: no")])
def test_whole_or_not_at_all(
    file: Path, tmp_path: Path, written: list[Sampling], seed: int, code: int, said: str
):
    out = tmp_path / "out.txt"
    out.write_text("before")
    done = run(file, out, "--ctx", 64, "--seed", seed)
    assert done.exit_code == code and said in done.output
    assert out.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ctx", 129), "at most 128 tokens"),
        (("--temp", 0), "--temp 0.0: expected a number above 0"),
        (("--temp", "nan"), "--temp nan"),
        (("-ngl", "auto"), "--gpu-layers auto"),
        (("-ngl", "many"), "--gpu-layers many"),
        (("-np", 0), "--parallel"),
        (("--tokens", 0), "--tokens"),
    ],
)
def test_wrong_usage(
    file: Path, tmp_path: Path, written: list[Sampling], options: tuple[object, ...], said: str
):
    done = run(file, tmp_path / "out.txt", *options)
    assert done.exit_code == 2 and said in done.output
    assert not written and not (tmp_path / "out.txt").exists()


def test_files_that_are_refused(file: Path, tmp_path: Path, written: list[Sampling]):
    before = file.read_bytes()
    done = run(file, file)
    assert (
        done.exit_code == 2 and "is read; it would be replaced" in done.output and file.read_bytes() == before
    )
    (tmp_path / "text.gguf").write_text("no model, but a text of some length")
    done = run(tmp_path / "text.gguf", tmp_path / "out.txt")
    assert done.exit_code == 1 and "GGUF" in done.output and not written
    done = run(file, tmp_path / "none" / "out.txt", "--ctx", 64)
    assert done.exit_code == 1 and "mkdir -p" in done.output
    assert read_model(file).arch_number("context_length") == 128
