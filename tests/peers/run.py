"""The tests of llama.cpp and of llama-cpp-python themselves, on the patched build.

    python tests/peers/run.py [--jobs N] [-R REGEX]

All that need neither network nor git: compiled in the runtime's own build tree, run by CTest and pytest.  Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.runtime import build, source
from mobe_gguf.runtime import compile as compiling
from mobe_gguf.runtime.install import Environment

HERE = Path(__file__).resolve().parent

#: Tests that cannot run here, and why.
LEFT_OUT = {
    "test-download-model": "downloads a model",
    "test-arg-parser": "its last part downloads a page",
    "test-tokenizers-ggml-vocabs": "clones a repository of vocabularies",
    "test-quantize-perf": "measures, tests nothing",
}


def ctest(tree: Path, env: dict[str, str], *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["ctest", *arguments], cwd=tree, env=env, text=True, **options)


def targets_and_tests(tree: Path, env: dict[str, str]) -> tuple[list[str], list[str], list[str]]:
    """Programs to build, tests to run, and ``name: reason`` of those left out."""
    listed = ctest(tree, env, "--show-only=json-v1", check=True, capture_output=True)
    known = ninja_targets(tree, env)
    targets: set[str] = set()
    tests, left = [], []
    for test in json.loads(listed.stdout)["tests"]:
        properties = {p["name"]: p["value"] for p in test["properties"]}
        needs = properties.get("FIXTURES_REQUIRED", [])
        reason = LEFT_OUT.get(test["name"])
        if "model" in properties.get("LABELS", []) or "test-download-model" in needs:
            reason = "downloads a model"
        if reason:
            left.append(f"{test['name']}: {reason}")
            continue
        tests.append(test["name"])
    # CTest names a program only once it exists, so its own files are read
    for file in tree.rglob("CTestTestfile.cmake"):
        targets |= set(re.findall(r'"[^"]*/bin/([^"/]+)"', file.read_text(encoding="utf-8"))) & known
    return sorted(targets), tests, left


def ninja_targets(tree: Path, env: dict[str, str]) -> set[str]:
    listed = subprocess.run(
        ["ninja", "-C", str(tree), "-t", "targets", "all"],
        env=env,
        text=True,
        check=True,
        capture_output=True,
    )
    return {line.split(":")[0] for line in listed.stdout.splitlines()}


def last_build(tree: Path) -> int:
    """When ``mobe-gguf build`` last wrote its log: each that has something to do begins it anew."""
    return (tree.parent / "build.log").stat().st_mtime_ns


def peers_of_llama_cpp(jobs: int, pattern: str | None) -> int:
    """Compile and run CTest's tests; its exit code."""
    recipe = build.BuildRecipe.patched(build.inherited(Environment.active(), test_tools=True))
    build.build(recipe, jobs=jobs)
    env = compiling.environment()
    tree = source.cache_dir() / recipe.variant() / "build"
    targets, tests, left = targets_and_tests(tree, env)
    log = tree.parent / "peers.log"
    with build.locked(source.cache_dir()) as lock:
        compiling.compile_targets(tree, targets, jobs, env, log, lock)
        last = last_build(tree)
    # not locked, so that builds need not wait for the tests; one that changes what is tested makes them count for nothing
    chosen = "^(" + "|".join(tests) + ")$" if pattern is None else pattern
    limits = ["--timeout", "900", f"-j{jobs}"]
    code = ctest(tree, env, "--output-on-failure", *limits, "-R", chosen).returncode
    if last_build(tree) != last:
        raise MobeError("mobe-gguf build changed the runtime while its tests ran: run make peers again")
    for line in left:
        print(f"left out: {line}")
    return code


def peers_of_the_package() -> int:
    """Run llama-cpp-python's tests against the installed package; pytest's exit code."""
    recipe = build.BuildRecipe.patched(build.inherited(Environment.active(), test_tools=True))
    tree = source.cache_dir() / recipe.variant() / "src"
    # from the source tree, where relative paths lead to the vocabularies, but not with its llama_cpp, which has no libraries
    # (which `python -m pytest` would put first on the path)
    pytest = str(Path(sys.executable).with_name("pytest"))
    command = [
        pytest,
        "-q",
        "-rs",
        "-p",
        "offline",
        "--import-mode=importlib",
        "-c",
        os.devnull,
        "--rootdir",
        str(tree),
        "tests",
    ]
    env = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=tree, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", "-j", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-R", dest="pattern", help="only llama.cpp's tests of these names")
    options = parser.parse_args()
    code = peers_of_llama_cpp(options.jobs, options.pattern)
    if options.pattern is None:
        code = peers_of_the_package() or code
    return 1 if code else 0


if __name__ == "__main__":
    run_program(main)
