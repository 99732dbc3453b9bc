"""``mobe-gguf build``: download, patch, compile and install the runtime.  Only what has changed is done again.

The cache directory holds

    llama_cpp_python-V.tar.gz    the source distribution, checked against its checksum on each use
    lock                         held while a build runs
    VARIANT/src/                 the patched tree, updated in place; VARIANT/source.key says from what
    VARIANT/ggml_mobe/           the kernel sources (CMake's GGML_MOBE_DIR)
    VARIANT/build/               the build directory of CMake and Ninja
    VARIANT/build.log

A VARIANT belongs to one combination of options, tool chain and processor.  Its name does not depend on patches and
kernels: when these change, the files that differ are replaced and Ninja recompiles what depends on them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobe_gguf.core import locks, resources
from mobe_gguf.core.atomic import atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import sha256
from mobe_gguf.core.progress import say
from mobe_gguf.runtime import compile as compiling
from mobe_gguf.runtime import install, patch, source
from mobe_gguf.runtime.compile import BuildOptions
from mobe_gguf.runtime.install import Environment
from mobe_gguf.runtime.source import LLAMA_CPP, Pin

#: The fields of ``BuildOptions`` that add a backend to the CPU's.
BACKENDS = ("cuda", "vulkan")


@dataclass(frozen=True)
class BuildRecipe:
    """Everything that determines a build's result: source, patches, kernel sources, options.

    ``patches=(), kernels=None`` builds the unpatched runtime, in a separate variant.
    """

    options: BuildOptions
    patches: tuple[Path, ...]
    kernels: Path | None
    pin: Pin = LLAMA_CPP

    @classmethod
    def patched(cls, options: BuildOptions) -> BuildRecipe:
        """The recipe of this installation: its own patches and kernel sources."""
        patches = sorted(resources.path("patches").glob("*.patch"))
        return cls(options, tuple(patches), resources.path("native") / "ggml_mobe")

    @property
    def version(self) -> str:
        """The version that pip lists for the installed package."""
        return f"{self.pin.version}+mobe" if self.patches else self.pin.version

    def definitions(self) -> dict[str, str]:
        """CMake cache entries, without paths."""
        commit = f"{self.pin.name}-{self.version}"
        return {**compiling.definitions(self.options), "LLAMA_BUILD_COMMIT": commit}

    def source_key(self) -> str:
        """A hash that changes with the patched tree."""
        return _digest(self.pin.sha256, [(path.name, sha256(path)) for path in self.patches])

    def variant(self) -> str:
        """Name of the build tree whose object files this recipe may reuse."""
        # test tools only add targets to the same tree
        definitions = {k: v for k, v in self.definitions().items() if k != "LLAMA_BUILD_TESTS"}
        names = compiling.TOOLCHAIN_VARIABLES + ((compiling.VULKAN_VARIABLE,) if self.options.vulkan else ())
        toolchain = {name: os.environ.get(name) for name in names}
        processor = None if self.options.portable else compiling.processor()
        backends = [name for name in BACKENDS if getattr(self.options, name)]
        words = [*(backends or ["cpu"]), "portable" if self.options.portable else "native"]
        words += [] if self.patches else ["stock"]
        return "-".join([*words, _digest(self.pin.sha256, definitions, toolchain, processor)[:10]])

    def key(self) -> str:
        """A hash that changes with the installed runtime."""
        kernels = [(path.as_posix(), sha256(file)) for path, file in self.kernel_files().items()]
        return _digest(self.variant(), self.source_key(), self.definitions(), self.options.tools, kernels)

    def kernel_files(self) -> dict[Path, Path]:
        """The kernel sources: path relative to ``kernels`` -> file."""
        if self.kernels is None or not self.kernels.is_dir():
            return {}
        return {
            path.relative_to(self.kernels): path
            for path in sorted(self.kernels.rglob("*"))
            if path.is_file() and not path.name.startswith(".") and "__pycache__" not in path.parts
        }


@dataclass(frozen=True)
class BuildResult:
    """What ``build`` did: number of Ninja's steps, seconds; ``fresh`` if there was nothing to do."""

    stamp: Mapping[str, Any]
    fresh: bool
    steps: int
    seconds: float


def build(
    recipe: BuildRecipe,
    environment: Environment | None = None,
    *,
    jobs: int | None = None,
    force: bool = False,
    cache: Path | None = None,
) -> BuildResult:
    """Install the runtime of ``recipe`` in ``environment`` (default: the running interpreter's).

    ``force`` compiles from scratch.  Raises ``MobeError`` when something that the build needs is missing or a step
    fails.  The next run does not mistake an incomplete build for a complete one.
    """
    start = time.monotonic()
    environment = environment or Environment.active()
    key = recipe.key()
    stamp = current(environment, key)
    if stamp and not force:
        return BuildResult(stamp, True, 0, time.monotonic() - start)
    cache = cache or source.cache_dir()
    env = compiling.environment()
    compiling.check_toolchain(recipe.options, env)
    try:
        environment.check_writable()
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache) as lock:
            stamp = current(environment, key)  # another build may have just installed it
            steps = 0
            if force or not stamp:
                for leftover in [*cache.glob("download-*"), *cache.glob("*/unpack-*")]:  # of a killed build
                    source.remove(leftover)
                steps = _build(recipe, key, environment, cache / recipe.variant(), jobs, force, env, lock)
                stamp = current(environment, key)
    except OSError as error:
        raise MobeError(
            f"the build stopped: {error.filename or cache}: {error.strerror or error}; "
            "mend that and run mobe-gguf build again, it resumes where it stopped"
        ) from error
    if not stamp:
        raise MobeError(
            f"{environment.libraries}: the runtime is not whole right after it was installed; build again: mobe-gguf build --force"
        )
    return BuildResult(stamp, False, steps, time.monotonic() - start)


def current(environment: Environment, key: str) -> Mapping[str, Any] | None:
    """The stamp of ``environment`` if its runtime is complete and has this ``key``, else None."""
    stamp = install.read_stamp(environment)
    return stamp if stamp and stamp["key"] == key and install.is_whole(environment, stamp) else None


def _build(
    recipe: BuildRecipe,
    key: str,
    environment: Environment,
    work: Path,
    jobs: int | None,
    force: bool,
    env: dict[str, str],
    lock: int | None,
) -> int:
    """Run the steps of a build below ``work``; returns Ninja's number of steps."""
    if force:
        source.remove(work)
    work.mkdir(exist_ok=True)
    # nothing below the cache directory is a checkout, even if the cache lies inside a repository
    env["GIT_CEILING_DIRECTORIES"] = str(work.resolve())
    log = work / "build.log"
    log.unlink(missing_ok=True)

    tree = patched_tree(recipe, work, env)
    kernels = work / "ggml_mobe"
    copy_kernels(recipe, work, kernels)

    say(f"configuring (log: {log})")
    values = recipe.definitions()
    if recipe.kernels is not None:
        values["GGML_MOBE_DIR"] = str(kernels)
    built = work / "build"
    compiling.configure(tree / "vendor" / "llama.cpp", built, values, env, log, lock)
    targets = (*compiling.LIBRARIES, *recipe.options.tools)
    jobs = jobs or len(os.sched_getaffinity(0))
    steps = compiling.compile_targets(built, targets, jobs, env, log, lock)

    if recipe.key() != key:
        raise MobeError(
            "patches or kernel sources changed while they were being compiled: run mobe-gguf build again"
        )
    stamp = {
        "key": key,
        "version": recipe.version,
        "patches": [path.name for path in recipe.patches],
        "options": asdict(recipe.options),
    }
    say(f"installing into {environment.libraries}")
    install.install(environment, tree, built, recipe.pin, recipe.version, recipe.options, stamp)
    return steps


def patched_tree(recipe: BuildRecipe, work: Path, env: Mapping[str, str]) -> Path:
    """Update ``work/src`` to the patched source; files that do not change keep their time stamps."""
    tree, marker, fresh = work / "src", work / "source.key", work / "src.new"
    key = recipe.source_key()
    if marker.is_file() and marker.read_text(encoding="utf-8") == key:
        return tree
    archive = source.fetch(recipe.pin, work.parent, env)
    say(f"unpacking and applying {len(recipe.patches)} patches")
    source.remove(fresh)
    source.unpack(archive, recipe.pin, fresh)
    patch.apply(fresh, recipe.patches, env)
    marker.unlink(missing_ok=True)
    patch.mirror(fresh, tree)
    source.remove(fresh)
    with atomic_path(marker) as part:
        part.write_text(key, encoding="utf-8")
    return tree


def copy_kernels(recipe: BuildRecipe, work: Path, target: Path) -> None:
    """Update ``target`` to the kernel sources; files that do not change keep their time stamps."""
    fresh = work / "ggml_mobe.new"
    source.remove(fresh)
    fresh.mkdir()
    for name, file in recipe.kernel_files().items():
        copy = fresh / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    patch.mirror(fresh, target)
    source.remove(fresh)


@contextmanager
def locked(cache: Path) -> Iterator[int | None]:
    """Hold the cache's lock, after waiting for any other build; yields its descriptor, None if there are no locks."""
    waiting = f"another build is at work in {cache}, waiting for it"
    with locks.locked(cache / "lock", None, lambda: say(waiting)) as fd:
        if fd is None:
            say(f"{cache} is on a file system without locks: run one build at a time")
        yield fd


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def inherited(environment: Environment, **chosen: Any) -> BuildOptions:
    """Options in which everything left open (None) is as in the installed runtime, or else the default.

    So ``mobe-gguf build`` after ``mobe-gguf build --cuda`` has nothing to do.
    """
    before = (install.read_stamp(environment) or {}).get("options", {})
    values = {**before, **{name: value for name, value in chosen.items() if value is not None}}
    if not values.get("cuda") and chosen.get("cuda_arch") is None:
        values.pop("cuda_arch", None)
    return BuildOptions(**values)


def describe(stamp: Mapping[str, Any]) -> str:
    """One line about an installed runtime."""
    chosen = [name for name in (*BACKENDS, "portable") if stamp["options"].get(name)] or ["cpu"]
    return f"llama-cpp-python {stamp['version']}, {len(stamp['patches'])} patches, {' '.join(chosen)}"
