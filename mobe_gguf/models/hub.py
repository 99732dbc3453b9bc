"""Download models from the Hugging Face hub by id.  Needs huggingface_hub: ``pip install 'mobe-gguf[hub]'``.

    org/name    hf:org/name@revision    org/name/file.gguf

Models are stored in the user's shared hub cache (``HF_HOME``).  Only files that this package reads are downloaded: weights
as safetensors or GGUF, JSON, tokenizer files; never code or pickles.  ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and ``HF_TOKEN``
apply as usual.
"""

from __future__ import annotations

import re
from pathlib import Path

from mobe_gguf.core.errors import MobeError, UsageError

_ID = re.compile(
    r"(?P<hf>hf:)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<file>/[^@]+\.gguf)?(@(?P<revision>[\w./-]+))?"
)

#: Files of a model directory that are downloaded; none from folders, which hold copies in other formats.
ALLOWED = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "README.md",
)
IGNORED = ("*/*", "consolidated*")


def resolve(model: Path, quiet: bool = False, headers_only: bool = False) -> Path:
    """``model`` itself if it exists or is not an id; else the local copy of the hub's model.  Missing files are downloaded.

    ``headers_only``: config.json, tokenizer and the like, no weights.  A path whose folder exists counts as a misspelled
    path; write ``hf:`` before an id to ask the hub in that case.  MobeError if the hub has no such model, or cannot be
    reached.
    """
    match = _ID.fullmatch(str(model))
    if model.exists():
        return model
    if match is None:
        if str(model).startswith("hf:"):
            raise UsageError(
                f"{model}: expected hf:ORG/NAME, as hf:Qwen/Qwen3-30B-A3B, and @REVISION behind it if need be"
            )
        return model
    if not match["hf"] and model.parent.exists():
        raise MobeError(f"{model}: no such file or directory. If a model of the hub is meant: hf:{model}")
    if match["file"] and headers_only:
        raise MobeError(
            f"{model}: a GGUF file of the hub has to be here whole; download it, or name the model's repository"
        )
    if match["file"]:
        file = match["file"][1:]
        split = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file)
        wanted = [f"{split[1]}-?????-of-{split[2]}.gguf" if split else file]
        folder = _download(model, match["repo"], match["revision"], wanted, [], quiet)
        return _present(
            folder / file, f"{match['repo']}: has no file {file} (or it is not in the cache, offline)"
        )
    wanted = [pattern for pattern in ALLOWED if not (headers_only and pattern.endswith(".safetensors"))]
    folder = _download(model, match["repo"], match["revision"], wanted, list(IGNORED), quiet)
    _present(
        folder / "config.json",
        f"{match['repo']}: no config.json; if its models are GGUF files, name one: {match['repo']}/NAME.gguf",
    )
    return folder


def _present(path: Path, otherwise: str) -> Path:
    if not path.is_file():
        raise MobeError(otherwise)
    return path


def _download(
    model: Path, repo: str, revision: str | None, wanted: list[str], ignored: list[str], quiet: bool
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors, utils
    except ImportError as e:
        raise MobeError(
            f"{model}: no such file or directory. To take it from the Hugging Face hub, install its client:\n"
            "  pip install 'mobe-gguf[hub]'"
        ) from e
    at = f" at revision {revision}" if revision else ""
    bars_off = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if quiet:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns=ignored
            )
        )
    except errors.GatedRepoError as e:
        raise MobeError(
            f"{repo}: the model is gated. Accept its terms on the hub, then: hf auth login (or set HF_TOKEN)"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise MobeError(
            f"{model}: no such file or directory here, and no such model on the hub (or it is private: hf auth login)"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise MobeError(f"{repo}: the hub has no such model{at}") from e
    except errors.LocalEntryNotFoundError as e:
        raise MobeError(
            f"{repo}{at}: the hub cannot be reached, or is not to be (HF_HUB_OFFLINE), and the model is not in the cache. "
            "Download it where there is a network, or name a directory."
        ) from e
    except Exception as e:  # which errors the client raises differs between releases
        raise MobeError(
            f"{repo}{at}: cannot be downloaded: {str(e).splitlines()[0] if str(e) else type(e).__name__}. "
            "Files that are whole are kept; run the same command again."
        ) from e
    finally:
        if quiet and not bars_off:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def model_id(path: Path) -> str | None:
    """The model's id if ``path`` is in the hub's cache, where the directory's own name is a hash."""
    match = re.fullmatch(r"models--(.+?)--(.+)", path.parent.parent.name)
    return f"{match[1]}/{match[2]}" if match and path.parent.name == "snapshots" else None
