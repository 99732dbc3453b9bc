"""The build pipeline, on a miniature of the source distribution."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.runtime import build as building
from mobe_gguf.runtime import compile as compiling
from mobe_gguf.runtime import install as installing
from mobe_gguf.runtime import patch, source
from mobe_gguf.runtime.build import build, inherited
from mobe_gguf.runtime.compile import BuildOptions
from mobe_gguf.runtime.install import Environment
from mobe_gguf.runtime.install import _swap as swap

from .miniature import ALL_STEPS, FILES, PATCH, Miniature


def answer(environment: Environment) -> int:
    """What an installed tool prints, started through its link and with no variable set."""
    return int(
        subprocess.run([environment.scripts / "llama-cli"], env={}, capture_output=True, check=True).stdout
    )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment.at(tmp_path / "env")


def test_builds_installs_and_then_has_nothing_to_do(
    tmp_path: Path, miniature: Miniature, environment: Environment
):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / miniature.pin.filename).write_bytes(miniature.archive)
    first = build(miniature.recipe(), environment, cache=cache)
    assert not first.fresh and first.steps == ALL_STEPS
    assert answer(environment) == 40
    assert not list(cache.glob("*/src/.git")), "a .git would be taken for a repository"

    again = build(miniature.recipe(), environment, cache=cache)
    assert again.fresh and again.steps == 0

    # the installed runtime owes nothing to the cache
    shutil.rmtree(cache)
    assert build(miniature.recipe(), environment, cache=cache).fresh
    assert answer(environment) == 40
    for name in ("conversion", "gguf-py/gguf", "include", "ggml/include", "models/templates"):
        assert (environment.tree / name).is_dir()


def test_a_changed_patch_rebuilds_only_what_it_touches(
    tmp_path: Path, miniature: Miniature, environment: Environment, patch_41: Path, patch_mtmd: Path
):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / miniature.pin.filename).write_bytes(miniature.archive)
    recipe = miniature.recipe((patch_41,))
    key = recipe.key()
    assert build(recipe, environment, cache=cache).steps == ALL_STEPS
    assert answer(environment) == 41
    objects = {path: path.stat().st_mtime_ns for path in cache.glob("*/build/CMakeFiles/**/*.o")}

    patch_41.write_text(PATCH.replace("+    return 41", "+    return 43"))
    assert recipe.key() != key
    assert 0 < build(recipe, environment, cache=cache).steps < ALL_STEPS
    assert answer(environment) == 43
    changed = [path.name for path, before in objects.items() if path.stat().st_mtime_ns != before]
    assert changed == ["llama.c.o"]

    # a patch that goes: its file comes back with the date that it has in the archive, years ago
    assert build(miniature.recipe((patch_mtmd,)), environment, cache=cache).steps > 0
    assert answer(environment) == 40


def test_changed_kernels_rebuild(tmp_path: Path, miniature: Miniature, environment: Environment):
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "kernel.c").write_text("int kernel(void) { return 1; }\n")
    recipe = miniature.recipe(kernels=kernels)
    build(recipe, environment, cache=miniature.cache)
    assert answer(environment) == 41
    (kernels / "kernel.c").write_text("int kernel(void) { return 2; }\n")
    assert not build(recipe, environment, cache=miniature.cache).fresh
    assert answer(environment) == 42
    (kernels / "kernel.c").unlink()
    (kernels / ".kernel.c.swp").write_text("an editor's")
    build(recipe, environment, cache=miniature.cache)
    assert answer(environment) == 40


def test_sources_that_change_during_a_build_are_noticed(
    miniature: Miniature, environment: Environment, patch_41: Path, monkeypatch: pytest.MonkeyPatch
):
    def edited_meanwhile(*arguments: object) -> int:
        patch_41.write_text(PATCH.replace("+    return 41", "+    return 43"))
        return 0

    monkeypatch.setattr(compiling, "compile_targets", edited_meanwhile)
    with pytest.raises(MobeError, match="changed while they were being compiled"):
        build(miniature.recipe((patch_41,)), environment, cache=miniature.cache)
    assert not environment.stamp.exists()


def test_an_option_left_out_stays_as_installed(miniature: Miniature, environment: Environment):
    assert inherited(environment, cuda=None, portable=None) == BuildOptions()
    build(miniature.recipe(), environment, cache=miniature.cache)
    stamp = environment.stamp.read_text().replace('"cuda": false', '"cuda": true')
    environment.stamp.write_text(stamp.replace('"cuda_arch": null', '"cuda_arch": "90"'))
    assert inherited(environment, cuda=None, cuda_arch=None) == BuildOptions(cuda=True, cuda_arch="90")
    assert inherited(environment, cuda=False, cuda_arch=None) == BuildOptions()
    with pytest.raises(UsageError, match="needs --cuda"):
        inherited(environment, cuda=False, cuda_arch="80")


@pytest.mark.parametrize("lost", ["lib/libllama.so.0", "__init__.py", "lib/llama-server"])
def test_a_damaged_installation_is_mended(miniature: Miniature, environment: Environment, lost: str):
    build(miniature.recipe(), environment, cache=miniature.cache)
    (environment.package / lost).unlink()
    mended = build(miniature.recipe(), environment, cache=miniature.cache)
    assert not mended.fresh and (environment.package / lost).exists()
    assert answer(environment) == 40


def test_an_interrupted_installation_is_not_taken_for_whole(
    miniature: Miniature, environment: Environment, patch_41: Path, monkeypatch: pytest.MonkeyPatch
):
    build(miniature.recipe(), environment, cache=miniature.cache)
    for stopped_at in range(3):
        swaps = []

        def stopped(new: Path, final: Path, at: int = stopped_at, swaps: list[Path] = swaps) -> None:
            swaps.append(final)
            if len(swaps) > at:
                raise KeyboardInterrupt
            swap(new, final)

        with monkeypatch.context() as context:
            context.setattr(installing, "_swap", stopped)
            with pytest.raises(KeyboardInterrupt):
                build(miniature.recipe((patch_41,)), environment, cache=miniature.cache)
        # neither the old runtime nor the new one is there as a whole
        assert not environment.stamp.exists()
        assert not build(miniature.recipe(), environment, cache=miniature.cache).fresh
        assert answer(environment) == 40


@pytest.mark.parametrize("step", ["_copy_binaries", "_write_metadata", "_installed_files"])
def test_an_installation_that_is_interrupted_early_leaves_the_old_runtime(
    miniature: Miniature, environment: Environment, patch_41: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    """The new one lies there whole before anything of the old one is touched."""
    build(miniature.recipe(), environment, cache=miniature.cache)
    before = {path for path in environment.libraries.parent.rglob("*") if not path.is_dir()}
    with monkeypatch.context() as context:
        context.setattr(installing, step, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(miniature.recipe((patch_41,)), environment, cache=miniature.cache)
    assert {path for path in environment.libraries.parent.rglob("*") if not path.is_dir()} == before
    assert build(miniature.recipe(), environment, cache=miniature.cache).fresh
    assert answer(environment) == 40
    build(miniature.recipe((patch_41,)), environment, cache=miniature.cache)
    assert answer(environment) == 41


def test_an_interrupted_update_of_the_tree_is_not_taken_for_whole(
    miniature: Miniature,
    environment: Environment,
    patch_41: Path,
    patch_mtmd: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    before = miniature.recipe((patch_mtmd,))
    build(before, environment, cache=miniature.cache)
    work = miniature.cache / before.variant()

    def killed_half_way(new: Path, old: Path) -> int:
        os.replace(new / "vendor/llama.cpp/src/llama.c", old / "vendor/llama.cpp/src/llama.c")
        (old / "llama_cpp/__init__.py").unlink()
        (old / "llama_cpp/stray.py").touch()
        (work / "unpack-abc").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(patch, "mirror", killed_half_way)
        build(miniature.recipe((patch_41,)), environment, cache=miniature.cache)
    environment.stamp.unlink()
    build(before, environment, cache=miniature.cache)
    assert answer(environment) == 40
    assert (environment.package / "__init__.py").is_file()
    assert not (environment.package / "stray.py").exists()
    assert not list(work.glob("unpack-*")) and not (work / "src.new").exists()


def test_a_corrupted_archive_is_refused(
    tmp_path: Path, miniature: Miniature, environment: Environment, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / miniature.pin.filename).write_bytes(miniature.archive[:-1] + b"x")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(MobeError, match=r"pip could not download llama-cpp-python==9\.9\.9") as caught:
        build(miniature.recipe(), environment, cache=cache)
    assert str(cache) in caught.value.message and "No matching distribution" in caught.value.message
    assert not environment.stamp.exists()


def test_downloads_by_name_with_pip(tmp_path: Path, miniature: Miniature, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / miniature.pin.filename).write_bytes(miniature.archive)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    cache = tmp_path / "cache"
    cache.mkdir()
    archive = source.fetch(miniature.pin, cache, compiling.environment())
    assert archive.read_bytes() == miniature.archive
    assert [path.name for path in cache.iterdir()] == [archive.name]

    archive.unlink()
    (tmp_path / "index" / miniature.pin.filename).write_bytes(miniature.archive + b"x")
    with pytest.raises(MobeError, match="(?s)could not download.*DO NOT MATCH THE HASHES"):
        source.fetch(miniature.pin, cache, compiling.environment())
    assert not list(cache.iterdir())


def test_a_patch_that_does_not_apply_is_named(
    tmp_path: Path, miniature: Miniature, environment: Environment, patch_41: Path
):
    second = tmp_path / "0002-again.patch"
    second.write_text(PATCH)
    with pytest.raises(MobeError, match=r"(?s)0002-again\.patch does not apply.*llama\.c"):
        build(miniature.recipe((patch_41, second)), environment, cache=miniature.cache)
    assert not environment.stamp.exists()


@pytest.mark.parametrize("program", ["git", "patch"])
def test_patches_apply_inside_another_repository(tmp_path: Path, patch_41: Path, program: str):
    """``git apply`` started below a repository's top skips foreign paths, and exits 0."""
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path / "repository")], check=True)
    tree = tmp_path / "repository" / "cache" / "src"
    file = tree / "vendor/llama.cpp/src/llama.c"
    file.parent.mkdir(parents=True)
    file.write_text(FILES["vendor/llama.cpp/src/llama.c"])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    patch.apply(tree, [patch_41], {"PATH": str(tmp_path / "bin"), "GIT_DIR": "/nowhere"})
    assert "return 41" in file.read_text()
    with pytest.raises(MobeError, match=r"0001-answer\.patch does not apply"):
        patch.apply(tree, [patch_41], {"PATH": str(tmp_path / "bin")})


def test_a_failing_compile_ends_with_the_compilers_words(
    miniature: Miniature, environment: Environment, patch_41: Path
):
    patch_41.write_text(PATCH.replace("+    return 41", "+    return undeclared"))
    recipe = miniature.recipe((patch_41,))
    with pytest.raises(MobeError, match="compiling llama.cpp failed") as caught:
        build(recipe, environment, cache=miniature.cache)
    message = caught.value.message
    assert "undeclared" in message and len(message.splitlines()) <= compiling.TAIL + 2
    log = Path(message.splitlines()[-1].removeprefix("the whole log: "))
    assert "undeclared" in log.read_text()
    assert not environment.stamp.exists()
    patch_41.write_text(PATCH)
    build(recipe, environment, cache=miniature.cache)
    assert answer(environment) == 41


def test_two_builds_do_not_meet(
    miniature: Miniature, environment: Environment, capfd: pytest.CaptureFixture[str]
):
    (miniature.cache / "lock").touch()
    with open(miniature.cache / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = threading.Thread(
            target=build, args=(miniature.recipe(), environment), kwargs={"cache": miniature.cache}
        )
        other.start()
        time.sleep(0.5)
        assert other.is_alive() and not environment.stamp.exists()
    other.join(60)
    assert answer(environment) == 40
    assert "another build is at work" in capfd.readouterr().err


def test_a_killed_build_keeps_the_lock_until_its_compiler_is_gone(tmp_path: Path):
    (tmp_path / "lock").touch()
    with building.locked(tmp_path) as lock:
        running = compiling._run(["sleep", "30"], os.environ, tmp_path / "log", lock)
        process, _ = running.__enter__()
    # this process has let go of the lock, as one that was killed
    with open(tmp_path / "lock") as f:
        with pytest.raises(BlockingIOError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        running.__exit__(None, None, None)
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_replaces_another_llama_cpp_python(miniature: Miniature, environment: Environment):
    info = environment.libraries / "llama_cpp_python-0.3.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.1\n")
    stray = environment.libraries / "llama_cpp_old_helper.py"
    stray.write_text("")
    outside = environment.libraries.parent / "outside.txt"
    outside.write_text("")
    (info / "RECORD").write_text("llama_cpp_old_helper.py,,\n../outside.txt,,\n")
    build(miniature.recipe(), environment, cache=miniature.cache)
    assert not stray.exists() and not info.exists()
    assert outside.exists(), "a file outside of the environment's directories was deleted"
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--path", str(environment.libraries)],
        capture_output=True,
        text=True,
    )
    assert "llama_cpp_python 9.9.9" in " ".join(listed.stdout.split())


def test_pip_tells_the_truth_and_uninstalls_all(tmp_path: Path, miniature: Miniature) -> None:
    """In a virtual environment: pip checks what is installed, and leaves no file of it."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    before = {path for path in venv.rglob("*") if not path.is_dir()}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = Environment(
        venv / "lib" / version / "site-packages", venv / "bin", venv / "share" / "mobe-gguf"
    )
    build(miniature.recipe(), environment, cache=miniature.cache)

    def pip(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), *words]
        return subprocess.run(command, capture_output=True, text=True)

    checked = pip("check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (environment.tree / "include" / "llama.h").unlink()  # of a damaged one, too
    gone = pip("uninstall", "-y", "llama-cpp-python")
    assert gone.returncode == 0, gone.stderr
    assert {path for path in venv.rglob("*") if not path.is_dir()} == before


def test_missing_tools_are_named(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    for program in ("cmake", "ninja"):
        (tmp_path / "bin" / program).symlink_to(shutil.which("true"))
    env = {"PATH": str(tmp_path / "bin")}
    with pytest.raises(MobeError, match=r"no C compiler found.*apt install g\+\+"):
        compiling.check_toolchain(BuildOptions(), env)
    (tmp_path / "bin" / "gcc").symlink_to(shutil.which("true"))
    with pytest.raises(MobeError, match=r"no C\+\+ compiler found.*apt install g\+\+"):
        compiling.check_toolchain(BuildOptions(), env)
    with pytest.raises(MobeError, match=r"\$CXX = no-such-compiler"):
        compiling.check_toolchain(BuildOptions(), {**env, "CXX": "no-such-compiler -m64"})
    (tmp_path / "bin" / "g++").symlink_to(shutil.which("true"))
    compiling.check_toolchain(BuildOptions(), env)
    with pytest.raises(MobeError, match="nvcc"):
        compiling.check_toolchain(BuildOptions(cuda=True, cuda_arch="90"), {**env, "CUDACXX": "no-such-nvcc"})
    (tmp_path / "bin" / "cmake").unlink()
    with pytest.raises(MobeError, match="pip install cmake"):
        compiling.check_toolchain(BuildOptions(), env)


def test_an_unwritable_environment_is_named(
    tmp_path: Path, miniature: Miniature, monkeypatch: pytest.MonkeyPatch
):
    # root, who may run this, may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
    with pytest.raises(MobeError, match="not writable"):
        build(miniature.recipe(), Environment.at(tmp_path / "env"), cache=miniature.cache)
