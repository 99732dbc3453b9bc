"""What a compile asks for before it starts, and what it shows meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime import compile as compiling
from mobe_gguf.runtime.build import BuildRecipe, describe
from mobe_gguf.runtime.compile import BuildOptions
from mobe_gguf.runtime.source import LLAMA_CPP
from native import cuda_tree

CORE_H = "#define VK_HEADER_VERSION 309\n#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 4, VK_HEADER_VERSION)\n"


@pytest.fixture
def sdk(tmp_path: Path) -> dict[str, str]:
    """The environment with a Vulkan SDK in which everything can be found and nothing works."""
    home = tmp_path / "sdk"
    files = {
        "include/vulkan/vulkan.h": "",
        "include/vulkan/vulkan.hpp": "",
        "include/vulkan/vulkan_core.h": CORE_H + "#define VK_EXT_layer_settings 1\n",
        "lib/libvulkan.so": "",
        "bin/glslc": "#!/bin/sh\n",
        "share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake": "",
    }
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (home / "bin/glslc").chmod(0o755)
    return {**compiling.environment(), "VULKAN_SDK": str(home)}


def test_what_vulkan_needs_is_found_in_its_sdk(sdk: dict[str, str]):
    compiling.check_toolchain(BuildOptions(vulkan=True), sdk)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("include/vulkan/vulkan_core.h", CORE_H, r"too old: 1\.4\.309 lacks VK_EXT_layer_settings"),
        ("include/vulkan/vulkan.hpp", None, r"there is no \S+vulkan\.hpp"),
        (
            "share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake",
            "set(SPIRV-Headers_FOUND FALSE)",
            r"SPIRV-Headers_FOUND to FALSE",
        ),
    ],
)
def test_what_vulkan_lacks_is_named(sdk: dict[str, str], name: str, text: str | None, said: str):
    path = Path(sdk["VULKAN_SDK"], name)
    path.write_text(text) if text is not None else path.unlink()
    with pytest.raises(MobeError, match=said) as caught:
        compiling.check_toolchain(BuildOptions(vulkan=True), sdk)
    assert "apt install libvulkan-dev glslc spirv-headers" in caught.value.message
    assert "mobe-gguf build --no-vulkan" in caught.value.message and "\n" not in caught.value.message
    compiling.check_toolchain(BuildOptions(), sdk)


@pytest.fixture
def toolkit(tmp_path: Path) -> dict[str, str]:
    """The environment with a CUDA toolkit whose nvcc and CUDA runtime are this machine's and whose cuBLAS is only there."""
    real, home = cuda_tree.toolkit(), tmp_path / "toolkit"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
        for path in (real / folder).iterdir():
            if "cublas" not in path.name and path.name not in ("nvcc", "stubs"):
                (home / folder / path.name).symlink_to(path)
    # where nvcc lies is where it looks for the rest
    shutil.copy2(real / "bin/nvcc", home / "bin/nvcc")
    (home / "nvvm").symlink_to(real / "nvvm")
    (home / "lib64/stubs").mkdir()
    for name in ("include/cublas_v2.h", "lib64/libcublas.so", "lib64/stubs/libcuda.so"):
        (home / name).write_text("")
    env = {name: value for name, value in compiling.environment().items() if not name.startswith("CUDA")}
    return {**env, "CUDACXX": str(home / "bin/nvcc")}


def test_what_cuda_needs_is_found_in_its_toolkit(toolkit: dict[str, str]):
    compiling.check_toolchain(BuildOptions(cuda=True, cuda_arch="90"), toolkit)


@pytest.mark.parametrize("name", ["include/cublas_v2.h", "lib64/libcublas.so", "lib64/stubs/libcuda.so"])
def test_what_cuda_lacks_is_named(toolkit: dict[str, str], name: str):
    home = Path(toolkit["CUDACXX"]).parents[1]
    (home / name).unlink()
    with pytest.raises(MobeError, match=rf"there is no {Path(name).name} in {home}") as caught:
        compiling.check_toolchain(BuildOptions(cuda=True, cuda_arch="90"), toolkit)
    assert "mobe-gguf build --no-cuda" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("arch", "host", "said"),
    [
        ("20", None, "nvcc fatal : Unsupported gpu architecture 'compute_20'"),
        ("H100", None, "CMAKE_CUDA_ARCHITECTURES: H100 is not one of"),
        ("90", "exit 1", "nvcc fatal : Failed to preprocess host compiler properties"),
        (
            "90",
            'case "$*" in *-x?c++*) echo host_config.h:143: error: gcc 99 is not supported >&2; exit 1; esac\ng++ "$@"',
            "gcc 99",
        ),
    ],
)
def test_what_nvcc_does_not_compile_is_told(
    toolkit: dict[str, str], tmp_path: Path, arch: str, host: str | None, said: str
):
    if host is not None:
        (tmp_path / "host").write_text(f"#!/bin/sh\n{host}\n")
        (tmp_path / "host").chmod(0o755)
        toolkit["CUDAHOSTCXX"] = str(tmp_path / "host")
    with pytest.raises(MobeError, match=re.escape(said)):
        compiling.check_toolchain(BuildOptions(cuda=True, cuda_arch=arch), toolkit)


def test_vulkan_has_a_build_tree_of_its_own(monkeypatch: pytest.MonkeyPatch):
    def variant(**options: bool) -> str:
        return BuildRecipe(BuildOptions(**options), (), None, LLAMA_CPP).variant()

    monkeypatch.delenv("VULKAN_SDK", raising=False)
    plain, vulkan = variant(), variant(vulkan=True)
    assert plain.startswith("cpu-native-") and vulkan.startswith("vulkan-native-")
    # CMake remembers where it found the headers
    monkeypatch.setenv("VULKAN_SDK", "/elsewhere")
    assert variant() == plain and variant(vulkan=True) != vulkan
    stamp = {"version": "1", "patches": [], "options": {"cuda": False, "vulkan": True}}
    assert describe(stamp) == "llama-cpp-python 1, 0 patches, vulkan"


def test_steps_are_counted_by_the_outer_ninja(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """As ggml-vulkan has it: new files are looked for first, and one step runs a Ninja of its own."""
    ninja = tmp_path / "ninja"
    lines = ["[0/2] Re-checking globbed directories...", "[1/4] Building a.o", "[2/4] Performing build step"]
    lines += ["[1/2] Building gen.o", "[2/2] Linking gen", "[3/4] Building b.o", "[4/4] Linking c"]
    ninja.write_text(f"#!{sys.executable}\nprint({chr(10).join(lines)!r})\n")
    ninja.chmod(0o755)
    env = {**os.environ, "PATH": str(tmp_path)}
    with open(tmp_path / "lock", "w") as lock:
        steps = compiling.compile_targets(tmp_path, ["all"], 1, env, tmp_path / "log", lock.fileno())
    assert steps == 4
    assert "compiling llama.cpp: 4 steps" in capfd.readouterr().err
