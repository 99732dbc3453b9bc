"""Compile llama.cpp with CMake and Ninja: options, targets, and the progress that the user sees."""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.progress import bar, console, say

#: Programs that are installed on the PATH.
TOOLS = (
    "llama-cli",
    "llama-completion",
    "llama-server",
    "llama-perplexity",
    "llama-bench",
    "llama-quantize",
    "llama-imatrix",
    "llama-gguf-split",
    "ggml-rpc-server",
)

#: llama.cpp's own operator tests, on request (``BuildOptions.test_tools``).
TEST_TOOLS = ("test-backend-ops",)

#: The targets that the Python package loads; the libraries that they depend on are built with them.
LIBRARIES = ("llama", "mtmd")

#: Environment variables that CMake takes compilers and flags from when it first configures a tree.
TOOLCHAIN_VARIABLES = ("CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")

#: Environment variable with the directory of LunarG's SDK, where CMake first looks for Vulkan's headers, loader and glslc.
VULKAN_VARIABLE = "VULKAN_SDK"

#: Checks what ggml-vulkan's own CMakeLists.txt requires, and for VK_EXT_layer_settings, whose names its source uses.
VULKAN_PROBE = """\
cmake_minimum_required(VERSION 3.21)
project(probe C)
find_package(Vulkan COMPONENTS glslc REQUIRED)
list(APPEND CMAKE_PREFIX_PATH "$ENV{VULKAN_SDK}")
find_package(SPIRV-Headers CONFIG REQUIRED)
foreach(header vulkan_core.h vulkan.hpp)
    if (NOT EXISTS ${Vulkan_INCLUDE_DIR}/vulkan/${header})
        message(FATAL_ERROR "there is no ${Vulkan_INCLUDE_DIR}/vulkan/${header}")
    endif()
endforeach()
file(STRINGS ${Vulkan_INCLUDE_DIR}/vulkan/vulkan_core.h found REGEX VK_EXT_layer_settings LIMIT_COUNT 1)
if (NOT found)
    message(FATAL_ERROR "the headers in ${Vulkan_INCLUDE_DIR} are too old: ${Vulkan_VERSION} lacks VK_EXT_layer_settings")
endif()
"""

#: Checks what ggml-cuda's own CMakeLists.txt requires, and that nvcc compiles for the architectures with this host compiler.
CUDA_PROBE = """\
cmake_minimum_required(VERSION 3.21)
project(probe CXX CUDA)
find_package(CUDAToolkit REQUIRED)
foreach(library cudart cublas cuda_driver)
    if (NOT TARGET CUDA::${library})
        string(REPLACE cuda_driver cuda library ${library})
        message(FATAL_ERROR "there is no lib${library}.so in ${CUDAToolkit_LIBRARY_DIR} nor where CMake looks besides")
    endif()
endforeach()
find_file(header cublas_v2.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
if (NOT header)
    message(FATAL_ERROR "there is no cublas_v2.h in ${CUDAToolkit_INCLUDE_DIRS}")
endif()
"""

#: Without a terminal, a progress line at least this often (seconds).
LINE_EVERY = 15.0

#: Number of compiler lines shown after a failed build.
TAIL = 20


@dataclass(frozen=True)
class BuildOptions:
    """The user's options for the build; each field changes what is compiled.

    ``cuda_arch``: CMake's CUDA_ARCHITECTURES ("90", "80;90"); None means the GPUs of this machine.
    """

    cuda: bool = False
    cuda_arch: str | None = None
    vulkan: bool = False
    portable: bool = False
    test_tools: bool = False

    def __post_init__(self) -> None:
        if self.cuda_arch is not None and not self.cuda:
            raise UsageError("--cuda-arch says which GPUs to compile for and needs --cuda")

    @property
    def tools(self) -> tuple[str, ...]:
        return TOOLS + (TEST_TOOLS if self.test_tools else ())


def definitions(options: BuildOptions) -> dict[str, str]:
    """The CMake cache entries for ``options``.  They contain no paths, so they can be part of a key."""
    chosen = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "ON",
        # tools and libraries are installed in one directory and find each other there
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
        "GGML_NATIVE": "OFF" if options.portable else "ON",
        "GGML_BACKEND_DL": "ON" if options.portable else "OFF",
        "GGML_CPU_ALL_VARIANTS": "ON" if options.portable else "OFF",
        "GGML_CUDA": "ON" if options.cuda else "OFF",
        "GGML_RPC": "ON",
        "GGML_RPC_RDMA": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_TESTS": "ON" if options.test_tools else "OFF",
        # the server's web page is not in the source distribution, and would be downloaded from a model hub
        "LLAMA_BUILD_UI": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
    }
    if options.cuda:
        chosen["CMAKE_CUDA_ARCHITECTURES"] = options.cuda_arch or "native"
    if options.vulkan:
        chosen["GGML_VULKAN"] = "ON"
    return chosen


def processor() -> str:
    """Instruction set and features of this machine's CPU, on which ``-march=native`` depends."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    features = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return f"{os.uname().machine} {features[1] if features else ''}"


def environment() -> dict[str, str]:
    """The environment variables for every command of a build; this environment's cmake and ninja come first."""
    return {
        **os.environ,
        "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath),
        "NINJA_STATUS": "[%f/%t] ",
    }


def check_toolchain(options: BuildOptions, env: Mapping[str, str]) -> None:
    """Check the programs that a build needs, before anything is downloaded.  ``MobeError`` names the missing program and
    says how to get it."""

    def found(variable: str, *names: str) -> bool:
        names = (env[variable].split()[0],) if env.get(variable, "").strip() else names
        return any(shutil.which(name, path=env["PATH"]) for name in names)

    for program in ("cmake", "ninja"):
        if not found("", program):
            raise MobeError(f"{program} is not installed: python -m pip install {program}")
    for language, variable, names in (
        ("C", "CC", ("cc", "gcc", "clang")),
        ("C++", "CXX", ("c++", "g++", "clang++")),
    ):
        if not found(variable, *names):
            looked = f"${variable} = {env[variable]}" if env.get(variable) else ", ".join(names)
            raise MobeError(f"no {language} compiler found (looked for {looked}): apt install g++")
    if options.cuda:
        if not _nvcc(env):
            raise MobeError(
                "--cuda needs the CUDA compiler nvcc, found neither on the PATH nor below $CUDA_HOME, $CUDA_PATH "
                "or /usr/local/cuda: install the CUDA toolkit, or run mobe-gguf build --no-cuda"
            )
        if options.cuda_arch is None and not glob.glob("/dev/nvidia[0-9]*"):
            raise MobeError(
                "--cuda compiles for this machine's GPUs and found none: name the target, "
                "for instance mobe-gguf build --cuda --cuda-arch 90 (H100), 89 (RTX 40), 86 (RTX 30), 80 (A100)"
            )
        _check_cuda(options, env)
    if options.vulkan:
        _check_vulkan(env)


def _nvcc(env: Mapping[str, str]) -> str | None:
    homes = [env[name] for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)] + ["/usr/local/cuda"]
    path = os.pathsep.join([env["PATH"], *(os.path.join(home, "bin") for home in homes)])
    return shutil.which(env.get("CUDACXX") or "nvcc", path=path)


def _check_cuda(options: BuildOptions, env: Mapping[str, str]) -> None:
    """Raise ``MobeError`` if nvcc does not compile for the requested GPUs, or cuBLAS is missing."""
    arch = definitions(options)["CMAKE_CUDA_ARCHITECTURES"]
    if why := _probe(
        CUDA_PROBE, env, CMAKE_CUDA_COMPILER=_nvcc(env) or "nvcc", CMAKE_CUDA_ARCHITECTURES=arch
    ):
        raise MobeError(
            f"--cuda needs a whole CUDA toolkit, with cuBLAS, that knows the GPUs ({arch}) and this C++ compiler: {why}; "
            "install NVIDIA's package cuda-toolkit, name another compiler by CUDAHOSTCXX, or run mobe-gguf build --no-cuda"
        )


def _check_vulkan(env: Mapping[str, str]) -> None:
    """Raise ``MobeError`` if CMake does not find everything that Vulkan needs.  CMake looks in more places than the PATH."""
    if why := _probe(VULKAN_PROBE, env):
        raise MobeError(
            f"--vulkan needs the Vulkan loader and its C++ headers, glslc and SPIRV-Headers: {why}; "
            "apt install libvulkan-dev glslc spirv-headers (Debian 12's are too old), or LunarG's Vulkan SDK with "
            f"${VULKAN_VARIABLE} naming its directory, or run mobe-gguf build --no-vulkan"
        )


def _probe(project: str, env: Mapping[str, str], **values: str) -> str:
    """Why CMake fails to configure ``project``, in one line; empty if it succeeds."""
    with tempfile.TemporaryDirectory(prefix="probe-") as scratch:
        Path(scratch, "CMakeLists.txt").write_text(project, encoding="utf-8")
        done = subprocess.run(
            _cmake(Path(scratch), Path(scratch), values, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(env),
        )
    if done.returncode == 0:
        return ""
    # nvcc's message, whose lines CMake breaks, or else CMake's own, indented below a line with the place
    patterns = (
        r"^ *([^\n]*(?:nvcc fatal|\berror) *:.*?)\n *(?:\n|ninja: )",
        r"^CMake Error[^\n]*:\n(.*?)\n\S",
    )
    said = (re.search(pattern, done.stdout, re.MULTILINE | re.DOTALL) for pattern in patterns)
    text = next((match[1] for match in said if match), done.stdout)
    return " ".join(text.split())[:300].rstrip(".") or f"cmake ended with {done.returncode}"


def _cmake(tree: Path, build: Path, values: Mapping[str, str], env: Mapping[str, str]) -> list[str]:
    """The command that configures ``tree`` into ``build`` for Ninja, with ``values`` in CMake's cache."""
    values = {**values, "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=env["PATH"]) or "ninja"}
    command = [shutil.which("cmake", path=env["PATH"]) or "cmake", "-G", "Ninja", "-S", str(tree)]
    return [*command, "-B", str(build), *(f"-D{name}={value}" for name, value in values.items())]


def configure(
    tree: Path, build: Path, values: Mapping[str, str], env: Mapping[str, str], log: Path, lock: int | None
) -> None:
    """Run CMake on ``tree`` into ``build``.  Raises ``MobeError`` with the end of its output."""
    values = dict(values)
    if values.get("GGML_CUDA") == "ON":
        values["CMAKE_CUDA_COMPILER"] = _nvcc(env) or "nvcc"
    lines: list[str] = []
    with _run(_cmake(tree, build, values, env), env, log, lock) as (process, output):
        lines += output
    if process.returncode != 0:
        raise _failure("configuring llama.cpp", process.returncode, lines, log)


def compile_targets(
    build: Path, targets: Sequence[str], jobs: int, env: Mapping[str, str], log: Path, lock: int | None
) -> int:
    """Build ``targets`` with Ninja; return how many steps it took (0: everything was up to date).

    Shows Ninja's own count as a bar, or as occasional lines where stderr is not a terminal.  Raises ``MobeError`` with
    the compiler's output and the log's path.
    """
    ninja = shutil.which("ninja", path=env["PATH"]) or "ninja"
    lines: list[str] = []
    steps = 0
    with _run([ninja, "-C", str(build), f"-j{jobs}", *targets], env, log, lock) as (process, output):
        for line in output:
            lines.append(line)
            if match := _finished(line, 0):
                steps = _show(int(match[2]), match, output, lines)
    if process.returncode != 0:
        raise _failure("compiling llama.cpp", process.returncode, lines, log)
    return steps


#: Ninja's line for a finished step, as set by ``environment()``.
_STATUS = re.compile(r"^\[(\d+)/(\d+)\] (.*)$")


def _finished(line: str, done: int) -> re.Match[str] | None:
    """Match Ninja's status line if it reports a step after the first ``done``.

    Two kinds of lines begin at 1 again, with a total of their own, and are skipped: those that Ninja prints before it
    counts (it looks for new files), and those of an inner Ninja, such as the one that compiles Vulkan's shader generator.
    """
    match = _STATUS.match(line)
    return match if match and int(match[1]) > done else None


def _show(total: int, match: re.Match[str], output: Iterator[str], lines: list[str]) -> int:
    """Read the rest of Ninja's output and show a bar over ``total`` steps; return the steps done."""
    done = 0
    with bar("compile", total) as progress:
        say(f"compiling llama.cpp: {total} steps")
        printed = time.monotonic()
        while True:
            now = time.monotonic()
            line = None
            if now - printed > LINE_EVERY and not console.is_terminal:
                line, printed = match[3].rsplit("/", 1)[-1], now
            progress.advance(int(match[1]) - done, line)
            done = int(match[1])
            for text in output:
                lines.append(text)
                if following := _finished(text, done):
                    match = following
                    break
            else:
                return done


@contextmanager
def _run(
    command: Sequence[str], env: Mapping[str, str], log: Path, lock: int | None
) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    """Run ``command``; yields the process and the lines of its output, which are also appended to ``log``.

    Child processes inherit ``lock``: if this process is killed, the lock holds until they have ended, too.
    """
    with open(log, "a", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(env),
            pass_fds=() if lock is None else (lock,),
        )
        assert process.stdout is not None
        try:
            yield process, _logged(process.stdout, sink)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()


def _logged(stream: IO[str], sink: IO[str]) -> Iterator[str]:
    for line in stream:
        sink.write(line)
        sink.flush()
        yield line.rstrip("\n")


def _failure(what: str, code: int, lines: Sequence[str], log: Path) -> MobeError:
    """The error for a failed command: shows the first failing step's output, or else the end of all output."""
    first = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
    if first is None:
        shown = list(lines[-TAIL:])
    else:
        # the line after "FAILED: target" is the compiler's command, thousands of characters long
        end = next((i for i in range(first + 2, len(lines)) if _STATUS.match(lines[i])), len(lines))
        shown = [lines[first], *lines[first + 2 : end]][:TAIL]
    text = "".join(f"\n{line[:300]}" for line in shown)
    how = f"failed (exit code {code})" if code > 0 else f"was stopped by {signal.Signals(-code).name}"
    return MobeError(f"{what} {how}:{text}\nthe whole log: {log}")
