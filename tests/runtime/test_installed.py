"""The runtime in this environment: found, whole, and usable with no variable set."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError
from mobe_gguf.runtime.build import BuildRecipe, current, inherited
from mobe_gguf.runtime.install import Environment


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], env={}, cwd="/", capture_output=True, text=True)


@pytest.mark.usefixtures("built")
def test_an_unchanged_build_returns_at_once():
    environment = Environment.active()
    if not current(environment, BuildRecipe.patched(inherited(environment)).key()):
        pytest.skip("patches or kernels have changed since the runtime was built: run mobe-gguf build")
    # neither HOME nor PATH is set: it needs no cache, compiler or cmake to see that all is there
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(environment.scripts / "mobe-gguf", "build")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "up to date" in done.stderr, done.stderr
    assert done.stdout == ""
    # of the processor, not by the clock: a busy machine proves nothing
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 2.0


@pytest.mark.usefixtures("built")
def test_tools_run_from_the_path():
    for name in inherited(Environment.active()).tools:
        assert runtime.tool(name).samefile(Environment.active().scripts / name)
    done = run(Environment.active().scripts / "llama-cli", "--version")
    assert done.returncode == 0 and "llama-cpp-python-" in done.stderr + done.stdout
    with pytest.raises(MobeError, match=r"no program 'llama-tea'; it has .*llama-cli, llama-completion"):
        runtime.tool("llama-tea")
    with pytest.raises(MobeError, match="no program 'libllama.so'"):
        runtime.tool("libllama.so")


@pytest.mark.usefixtures("built")
def test_llama_cpp_imports():
    done = run(
        sys.executable, "-c", "from llama_cpp import Llama, llama_print_system_info as i; print(i().decode())"
    )
    assert done.returncode == 0 and "CPU" in done.stdout, done.stderr
    listed = run(sys.executable, "-m", "pip", "show", "-f", "llama-cpp-python")
    assert "Location" in listed.stdout and "llama_cpp/lib/libllama.so" in listed.stdout


@pytest.mark.usefixtures("built")
def test_the_converter_gets_its_own_gguf():
    code = """
import gguf as earlier, gguf.constants
from mobe_gguf import runtime
runtime.use_conversion()
runtime.use_conversion()
from conversion import get_model_class
import gguf
tree = str(runtime.source_tree())
assert gguf.__file__.startswith(tree) and get_model_class.__module__ == "conversion"
assert get_model_class("Qwen3MoeForCausalLM").model_arch == gguf.MODEL_ARCH.QWEN3MOE
assert not earlier.__file__.startswith(tree) and earlier.GGUFReader
# values may pass between the two
old, new = earlier.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q4_K
assert old == new and gguf.GGML_QUANT_SIZES[old] == (256, 144)
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_another_conversion_module_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "source_tree", Environment.active().libraries.resolve)
    monkeypatch.setitem(sys.modules, "conversion", runtime)
    monkeypatch.setattr(runtime, "__file__", "/elsewhere/conversion.py")
    with pytest.raises(MobeError, match=r"already imported from /elsewhere/conversion\.py"):
        runtime.use_conversion()


def test_a_missing_runtime_names_the_command(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Environment, "active", classmethod(lambda cls: cls.at(tmp_path)))
    assert not runtime.is_built()
    for ask in (
        runtime.source_tree,
        runtime.lib_dir,
        lambda: runtime.tool("llama-cli"),
        runtime.use_conversion,
    ):
        with pytest.raises(MobeError, match=r"not installed in .*: run mobe-gguf build$"):
            ask()
