"""``mobe-gguf build``."""

from __future__ import annotations

import click

from mobe_gguf.runtime.build import Recipe, build, describe, inherited
from mobe_gguf.runtime.install import Environment
from mobe_gguf.runtime.source import say


@click.command()
@click.option(
    "--cuda/--no-cuda",
    default=None,
    help="Also compile the CUDA backend.  [default: as the installed runtime, else no]",
)
@click.option(
    "--cuda-arch",
    metavar="LIST",
    help="GPU architectures to compile for, such as 90 or '80;90'.  [default: this machine's GPUs]",
)
@click.option(
    "--vulkan/--no-vulkan",
    default=None,
    help="Also compile the Vulkan backend.  [default: as the installed runtime, else no]",
)
@click.option(
    "--portable/--no-portable",
    default=None,
    help="Compile for any CPU of this kind, chosen at run time, instead of for this machine's only.",
)
@click.option(
    "--test-tools/--no-test-tools",
    default=None,
    help="Also compile llama.cpp's test-backend-ops, which compares a GPU's results with the CPU's.",
)
@click.option(
    "--jobs", "-j", type=click.IntRange(min=1), help="Compile that many files at a time.  [default: cores]"
)
@click.option("--force", is_flag=True, help="Compile everything again.")
def command(
    cuda: bool | None,
    cuda_arch: str | None,
    vulkan: bool | None,
    portable: bool | None,
    test_tools: bool | None,
    jobs: int | None,
    force: bool,
) -> None:
    """Get, patch, compile and install the llama.cpp runtime.

    Downloads the pinned source with pip, applies this project's patches, compiles it once, and installs
    llama-cli, llama-server and the other tools, the libraries and the llama_cpp Python package into the
    environment that mobe-gguf runs in.  Done again with nothing changed, it returns at once.

    An option left out keeps the value it had when the installed runtime was built.
    """
    environment = Environment.active()
    options = inherited(
        environment, cuda=cuda, cuda_arch=cuda_arch, vulkan=vulkan, portable=portable, test_tools=test_tools
    )
    result = build(Recipe.patched(options), environment, jobs=jobs, force=force)
    done = "up to date" if result.fresh else f"built in {result.seconds:.0f} s ({result.steps} steps)"
    say(f"{describe(result.stamp)}: {done}; tools in {environment.scripts}")
