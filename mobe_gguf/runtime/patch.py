"""Apply the patch series, and copy the changes to the tree from which object files were compiled."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from mobe_gguf.core.errors import MobeError


def apply(tree: Path, patches: Iterable[Path], env: Mapping[str, str]) -> None:
    """Apply ``patches`` in order to ``tree``, with ``git apply`` or, where git is missing, ``patch``.

    Paths in the patches are relative to ``tree`` (``a/vendor/llama.cpp/src/...``).  Patches must match exactly, without
    fuzz.  Raises ``MobeError``, which names the patch that does not apply and shows the first messages.
    """
    patches = list(patches)
    if not patches:
        return
    git, gnu_patch = shutil.which("git", path=env.get("PATH")), shutil.which("patch", path=env.get("PATH"))
    if git:
        command = [git, "apply", "--whitespace=nowarn"]
    elif gnu_patch:
        command = [gnu_patch, "-p1", "--batch", "--forward", "--fuzz=0", "--no-backup-if-mismatch", "-i"]
    else:
        raise MobeError("neither git nor patch is installed, and one applies the patches: apt install git")
    # inside a repository, git apply silently skips all paths that do not belong to that repository
    env = {name: value for name, value in env.items() if not name.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(tree.parent.resolve())
    for patch in patches:
        done = subprocess.run(
            [*command, str(patch.resolve())],
            cwd=tree,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            complaints = "\n".join(done.stdout.strip().splitlines()[:20])
            raise MobeError(
                f"{patch} does not apply to the pinned source:\n{complaints}\n"
                "mend the patch (its paths start at the source distribution's top directory) "
                "and run mobe-gguf build again"
            )


def mirror(new: Path, old: Path) -> int:
    """Make ``old`` equal to ``new`` by moving over the files that differ; return how many changed.

    Files with equal contents keep their time stamps, so that Ninja recompiles only what changed.  Moved files get the
    current time, because they may be older than the object file compiled from the previous one.  ``new`` is left
    incomplete.  After an interruption, the next call repairs ``old``.
    """
    changed = 0
    old.mkdir(parents=True, exist_ok=True)
    wanted = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    for relative in sorted(wanted):
        source, target = new / relative, old / relative
        if target.is_file() and filecmp.cmp(source, target, shallow=False):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        os.utime(source)
        os.replace(source, target)
        changed += 1
    for path in sorted(old.rglob("*"), reverse=True):  # a directory comes after its contents
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(old) not in wanted:
            path.unlink()
            changed += 1
    return changed
