"""``mobe-gguf build``."""

from __future__ import annotations

import click

from mobe_gguf.core.progress import say
from mobe_gguf.runtime.build import BuildRecipe, build, describe, inherited
from mobe_gguf.runtime.install import Environment


@click.command()
@click.option(
    "--cuda/--no-cuda",
    default=None,
    help="Compile the CUDA backend, too.  [default: as in the installed runtime, else no]",
)
@click.option(
    "--cuda-arch",
    metavar="LIST",
    help="GPU architectures to compile for, for instance 90 or '80;90'.  [default: this machine's GPUs]",
)
@click.option(
    "--vulkan/--no-vulkan",
    default=None,
    help="Compile the Vulkan backend, too.  [default: as in the installed runtime, else no]",
)
@click.option(
    "--portable/--no-portable",
    default=None,
    help="Compile for every CPU of this architecture; the fastest code is chosen at run time. Otherwise for this machine's CPU alone.",
)
@click.option(
    "--test-tools/--no-test-tools",
    default=None,
    help="Compile llama.cpp's test-backend-ops, too. It compares a GPU's results with the CPU's.",
)
@click.option(
    "--jobs", "-j", type=click.IntRange(min=1), help="Number of files to compile at a time.  [default: cores]"
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

    pip downloads the pinned source. This project's patches are applied and the source is compiled once. llama-cli, llama-server,
    the other tools, the libraries and the Python package llama_cpp go into the environment that mobe-gguf runs in. A second run
    with nothing changed returns at once.

    An option that is left out keeps the value of the installed runtime.
    """
    environment = Environment.active()
    options = inherited(
        environment, cuda=cuda, cuda_arch=cuda_arch, vulkan=vulkan, portable=portable, test_tools=test_tools
    )
    result = build(BuildRecipe.patched(options), environment, jobs=jobs, force=force)
    done = "up to date" if result.fresh else f"built in {result.seconds:.0f} s ({result.steps} steps)"
    say(f"{describe(result.stamp)}: {done}; tools in {environment.scripts}")
