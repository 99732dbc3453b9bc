"""Models in several files: as llama-gguf-split makes them, and interrupted anywhere."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from export.handmade import make_mobe
from mobe_gguf import runtime
from mobe_gguf.cli import main
from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.export import ExportOptions, Recipe, export, parse_size, shards, write
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.models.checkpoint import Checkpoint

Maker = Callable[..., Path]
LIMIT = 1_000_000


@pytest.fixture(scope="module")
def source(model: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some MB of f32 tensors: several files of at most 1 MB."""
    sizes = dict(hidden_size=64, moe_intermediate_size=96, num_hidden_layers=3)
    return make_mobe(model("qwen3_moe", **sizes), tmp_path_factory.mktemp("shards") / "mobe")


@pytest.fixture(scope="module")
def complete(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the files that ``source`` makes."""
    out = tmp_path_factory.mktemp("complete") / "out.gguf"
    return Path(export(source, out, Recipe("f32"), split_max_size=LIMIT, quiet=True).path)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_are_those_of_llama_gguf_split(source: Path, tmp_path: Path) -> None:
    """Byte for byte; and the tool merges them again."""
    export(source, tmp_path / "whole.gguf", Recipe("f32"), quiet=True)
    split = [runtime.tool("llama-gguf-split"), "--split", "--split-max-size", "1M"]
    subprocess.run([*split, tmp_path / "whole.gguf", tmp_path / "theirs"], check=True, capture_output=True)
    report = export(source, tmp_path / "ours.gguf", Recipe("f32"), split_max_size=LIMIT, quiet=True)
    ours, theirs = (sorted(tmp_path.glob(f"{name}-*.gguf")) for name in ("ours", "theirs"))
    assert len(ours) > 2 and [str(path) for path in ours] == report.files
    assert [p.name for p in ours] == [f"ours-{i + 1:05d}-of-{len(ours):05d}.gguf" for i in range(len(ours))]
    for a, b in zip(ours, theirs, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert report.n_bytes == sum(path.stat().st_size for path in ours)
    merge = [runtime.tool("llama-gguf-split"), "--merge", ours[0], tmp_path / "merged.gguf"]
    subprocess.run(merge, check=True, capture_output=True)
    merged, whole = read_gguf(tmp_path / "merged.gguf"), read_gguf(tmp_path / "whole.gguf")
    for name, info in whole.tensors.items():
        a = np.fromfile(merged.path, np.uint8, info.n_bytes, offset=merged.tensors[name].offset)
        b = np.fromfile(whole.path, np.uint8, info.n_bytes, offset=info.offset)
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert not list(tmp_path.glob(".*"))


def test_the_first_file_loads(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "whole.gguf", Recipe("f32"), quiet=True)
    report = export(source, tmp_path / "out.gguf", Recipe("f32"), split_max_size=LIMIT, quiet=True)
    from llama_cpp import Llama

    scores = []
    for path in (tmp_path / "whole.gguf", report.path):
        with closing(Llama(str(path), n_ctx=32, n_threads=1, logits_all=True, verbose=False)) as llama:
            llama.eval([5, 6, 7])
            scores.append(llama.scores[:3].copy())
    np.testing.assert_array_equal(*scores)


def test_inspect_sees_all_files(source: Path, complete: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "whole.gguf", Recipe("f32"), quiet=True)
    whole, split = describe(tmp_path / "whole.gguf"), describe(complete)
    assert split.entries == whole.entries and split.layers == whole.layers and not split.problems
    assert split.n_bytes == sum(path.stat().st_size for path in complete.parent.iterdir())
    first, second, *others = sorted(complete.parent.iterdir())
    with pytest.raises(MobeError, match="name the first"):
        describe(second)
    shutil.copy(first, tmp_path)
    with pytest.raises(MobeError, match=rf"{second.name}: cannot be read"):
        describe(tmp_path / first.name)
    for path, target in zip((first, *others), (second, *others), strict=True):
        shutil.copy(path, tmp_path / target.name)
    with pytest.raises(MobeError, match=rf"{second.name}: its keys split.no"):
        describe(tmp_path / first.name)


def test_what_fits_into_one_file_is_one_file(source: Path, tmp_path: Path) -> None:
    report = export(source, tmp_path / "out.gguf", Recipe("f32"), split_max_size=10**9, quiet=True)
    assert names(tmp_path) == {"out.gguf"} and report.files == [str(tmp_path / "out.gguf")]


def test_a_tensor_that_is_larger(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tensor blk\.0\.\S+_exps\.weight alone.*--split-max-size 1M"):
        export(source, tmp_path / "out.gguf", Recipe("f32"), split_max_size=100_000, quiet=True)
    assert not names(tmp_path)


def test_command(source: Path, tmp_path: Path) -> None:
    command = [
        "export",
        str(source),
        str(tmp_path / "out.gguf"),
        "--quant",
        "f32",
        "--split-max-size",
        "1M",
        "--json",
        "--no-card",
    ]
    planned = CliRunner().invoke(main, [*command, "--dry-run"])
    assert planned.exit_code == 0 and not names(tmp_path)
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    files = json.loads(done.stdout)["files"]
    assert json.loads(planned.stdout)["files"] == files == sorted(map(str, tmp_path.iterdir()))
    assert f"{len(files)} files, the first is {files[0]}" in done.stderr


@pytest.mark.parametrize("size", ["0.9M", "1.5M", "50000M"])
def test_the_card_has_the_size_as_it_was_said(size: str) -> None:
    assert ExportOptions(split_max_size=parse_size(size, "--o")).words() == (f"--split-max-size {size}",)


def failing_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the disk full at the given tensor; returns the names of those that were written, as they are."""
    tofile, seen = write.Encoded.tofile, []

    def full(self: write.Encoded, file: Any) -> None:
        seen.append(self.tensor.name)
        if len(seen) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tofile(self, file)

    monkeypatch.setattr(write.Encoded, "tofile", full)
    return seen


def interrupted(source: Path, out: Path, complete: Path) -> Path:
    """Export until the disk is full in the second file; returns the folder with the first one."""
    with pytest.MonkeyPatch.context() as patch:
        failing_at(len(read_gguf(complete).tensors) + 2, patch)
        with pytest.raises(
            MobeError, match=r"disk is full; 1 of \d files are finished and kept in .*same command"
        ):
            export(source, out, Recipe("f32"), split_max_size=LIMIT, quiet=True)
    parts = out.with_name(f".{out.name}.parts")
    assert names(parts) == {"state.json", complete.name}
    return parts


def test_goes_on_with_the_file_it_was_at(
    source: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = interrupted(source, tmp_path / "out.gguf", complete)
    assert names(tmp_path) == {parts.name}
    seen = failing_at(10**9, monkeypatch)
    report = export(source, tmp_path / "out.gguf", Recipe("f32"), split_max_size=LIMIT, quiet=True)
    assert report.files_kept == 1
    assert len(seen) == len(report.entries) - len(read_gguf(complete).tensors)
    assert names(tmp_path) == names(complete.parent)
    for path in complete.parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("what", ["quant", "source", "size", "state"])
def test_what_differs_is_written_again(
    what: str, source: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, recipe = tmp_path / "source", Recipe("f32")
    shutil.copytree(source, copy)
    parts = interrupted(copy, tmp_path / "out.gguf", complete)
    if what == "quant":
        recipe = Recipe("f32", overrides=(("attn_q", "bf16"),))
    elif what == "source":
        os.utime(copy / "model.safetensors", (1, 1))
    elif what == "size":
        (parts / complete.name).write_bytes(complete.read_bytes()[:-1])
    else:
        (parts / "state.json").write_text("[")
    seen = failing_at(10**9, monkeypatch)
    report = export(copy, tmp_path / "out.gguf", recipe, split_max_size=LIMIT, quiet=True)
    assert report.files_kept == 0 and len(seen) == len(report.entries)
    assert not parts.exists()


def test_a_failure_in_the_first_file_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(2, monkeypatch)
    with pytest.raises(MobeError, match="disk is full; nothing was written"):
        export(source, tmp_path / "out.gguf", Recipe("f32"), split_max_size=LIMIT, quiet=True)
    assert not names(tmp_path)


def test_a_directory_in_the_way(source: Path, complete: Path, tmp_path: Path) -> None:
    """Found first; or, if it was made meanwhile, when the files get their names: nothing is lost."""
    first, options = tmp_path / complete.name, dict(split_max_size=LIMIT, quiet=True)
    first.mkdir()
    with pytest.raises(MobeError, match=f"{first}: it is a directory, expected a file or none"):
        export(source, tmp_path / "out.gguf", Recipe("f32"), **options)
    assert names(tmp_path) == {first.name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mobe_gguf.export.check_places", lambda paths: None)
        patch.setattr("mobe_gguf.export.check_output", lambda path, read=(): None)
        with pytest.raises(MobeError, match=rf"{first.name}.*cannot be written: Is a directory"):
            export(source, tmp_path / "out.gguf", Recipe("f32"), **options)
    first.rmdir()
    assert export(source, tmp_path / "out.gguf", Recipe("f32"), **options).files_kept > 0
    assert first.read_bytes() == complete.read_bytes()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_no_file_in_the_way(kind: str, source: Path, complete: Path, tmp_path: Path) -> None:
    """A set is not written through links: its files wait beside it, and the link may lead to another disk."""
    last = tmp_path / max(names(complete.parent))
    last.symlink_to(complete) if kind == "link" else os.mkfifo(last)
    before = complete.read_bytes()
    with pytest.raises(MobeError, match=f"{last}: it is a .*{kind}"):
        export(source, tmp_path / "out.gguf", Recipe("f32"), split_max_size=LIMIT, dry_run=True, quiet=True)
    assert names(tmp_path) == {last.name} and complete.read_bytes() == before


class Killed(BaseException):
    """Stands for the end of the process: nothing cleans up behind it."""


def test_no_set_of_old_and_new_files(
    source: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed anywhere while a new set takes the names of an older one: either no first file, or a whole set."""
    paths = [tmp_path / name for name in sorted(names(complete.parent))]
    seen: list[tuple[bool, ...]] = []
    for steps in range(2 * len(paths) + 3):
        parts = shards.Parts(tmp_path / "out.gguf", "key")
        parts.folder.mkdir(exist_ok=True)
        for path in paths:
            path.write_text("old")
            (parts.folder / path.name).write_text("new")
        left = steps

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return real(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "unlink"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(module, name, counted(getattr(module, name)))
            with contextlib.suppress(Killed):
                parts.deliver(paths)
        if paths[0].exists():
            assert len({path.read_text() for path in paths}) == 1, steps
        seen.append(tuple(path.exists() and path.read_text() == "new" for path in paths))
    assert len(set(seen)) == len(paths) + 1 and all(seen[-1]) and not parts.folder.exists()


def test_space_is_checked_first(
    source: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted run finished counts as free."""
    usage, out = shutil.disk_usage(tmp_path), tmp_path / "out.gguf"
    interrupted(source, out, complete)
    needed = export(source, out, Recipe("f32"), dry_run=True, quiet=True).data_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 500_000))
    with pytest.raises(MobeError, match="are needed"):
        export(source, tmp_path / "other.gguf", Recipe("f32"), split_max_size=LIMIT, quiet=True)
    assert export(source, out, Recipe("f32"), split_max_size=LIMIT, quiet=True).files_kept == 1


SLOWLY = """
import sys
from mobe_gguf.cli import main
from mobe_gguf.export import write
tofile = write.Encoded.tofile
def slow(self, file):
    tofile(self, file)
    file.flush()
    if self.tensor.name == sys.argv[1]:
        print("at it", flush=True)
        sys.stdin.readline()
write.Encoded.tofile = slow
main(sys.argv[2:])
"""
AT_ONCE = "import sys; from mobe_gguf import cli; from mobe_gguf.core import atomic; atomic.PATIENCE = 0.1; cli.main(sys.argv[1:])"


@pytest.mark.parametrize("split", [True, False])
def test_two_at_once(split: bool, source: Path, complete: Path, tmp_path: Path) -> None:
    """Two processes, the first in the middle: the second is refused, and what the first writes is whole."""
    command = ["export", source, tmp_path / "out.gguf", "-q", "--no-card", "--quant"]
    size = ["--split-max-size", "1M"] if split else []
    second_file = complete.with_name(complete.name.replace("-00001-", "-00002-"))
    at = list(read_gguf(second_file).tensors)[1]
    first = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, at, *command, "f32", *size],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and first.stdout.readline() == "at it\n"
    for quant in ("f32", "f16"):
        second = subprocess.run(
            [sys.executable, "-c", AT_ONCE, *command, quant, *size], capture_output=True, text=True
        )
        assert second.returncode == 1 and "out.gguf: another run is writing it" in second.stderr, (
            second.stderr
        )
    first.communicate("\n")
    assert first.returncode == 0
    if split:
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
            p.name: p.read_bytes() for p in complete.parent.iterdir()
        }
    else:
        export(source, tmp_path / "alone.gguf", Recipe("f32"), quiet=True)
        assert names(tmp_path) == {"out.gguf", "alone.gguf"}
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_killed(model: Maker, tmp_path: Path) -> None:
    """SIGKILL with a file finished and another begun: nothing under the names, and the next run finishes the set."""
    sizes = dict(num_experts=64, hidden_size=512, moe_intermediate_size=128, num_hidden_layers=2)
    source = make_mobe(model("qwen3_moe", **sizes), tmp_path / "mobe", m=16)
    out, parts = tmp_path / "out.gguf", tmp_path / ".out.gguf.parts"
    command = ["export", str(source), str(out), "--quant", "q5_1", "--split-max-size", "6M", "-q"]
    program = "from mobe_gguf.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, *command])
    while not (begun := list(parts.glob(".out-00002-of-*.part"))) or begun[0].stat().st_size < 100_000:
        assert process.poll() is None, "the export ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("out-*"))
    (first,) = parts.glob("out-00001-of-*.gguf")
    before = first.stat().st_ino
    assert CliRunner().invoke(main, command).exit_code == 0
    assert (tmp_path / first.name).stat().st_ino == before
    assert len(list(tmp_path.glob("out-*.gguf"))) == int(first.stem[-5:]) and not parts.exists()


def test_what_lies_in_the_model_beside_it(own_model: Callable[..., Path]) -> None:
    """A lock, or a finished GGUF file, in MODEL does not make it another: a stopped export into it resumes."""
    path = own_model("qwen3_moe")
    before = set(Checkpoint(path).source_files())
    for name in (".out.gguf.parts.lock", "other.gguf"):
        (path / name).write_text("")
    assert set(Checkpoint(path).source_files()) == before
