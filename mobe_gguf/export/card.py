"""The README.md beside exported files, as users of the hub expect it: what the model is made of, sizes, errors, how to run it.

One page covers all files in a directory that were made of one model, factorized in one way.  The next export adds its
line and keeps those of files that still exist; ``mobe-gguf eval --card`` adds what it measured.  If the README.md there
is about other factors, or is someone's own, the card is named after the file instead.  A page that someone wrote or
changed is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

from mobe_gguf.core.atomic import PATIENCE, atomic_path
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import amount, readable
from mobe_gguf.core.locks import Busy, locked
from mobe_gguf.core.names import ALL_PROJECTIONS
from mobe_gguf.export.origin import HUB, Origin
from mobe_gguf.export.report import Report
from mobe_gguf.formats.contents import WEIGHTS, rows
from mobe_gguf.models.factors import FactorDirectory, ModelDirectory, recorded
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.quant.recipe import Recipe

#: Marks a page as ours.  The checksum over the rest shows that nobody changed it.
MARK = re.compile(r"<!-- made by mobe-gguf export: [0-9a-f]{16} -->\n")

#: Lines about one file: in the table, the commands and the remarks.
FILE_ROW = re.compile(r"\| \[([^\]]+)\]\(")
COMMAND = re.compile(r"mobe-gguf export \S+ (\S+) ")
REMARK = re.compile(r"- `([^`]+)`: ")

PAPER = "[Mixture-of-Basis-Experts](https://arxiv.org/abs/2508.05257)"


@dataclass(frozen=True)
class Subject:
    """What a card is about: one export of ``checkpoint``, with its ``recipe``, its other ``options``, the file's
    ``keys`` and the ``report``."""

    report: Report
    keys: Mapping[str, Any]
    checkpoint: ModelDirectory | GgufModel
    recipe: Recipe
    origin: Origin
    dense: bool
    options: tuple[str, ...] = ()

    @property
    def factorized(self) -> bool:
        """Whether the file holds factors."""
        factors = self.checkpoint.factors
        return factors is not None and factors.any_left and not self.dense

    @property
    def name(self) -> str:
        name = str(self.keys.get("general.name") or self.origin.name)
        multiplied_out = self.dense and self.origin.of_mobe and not name.lower().endswith("dense")
        return f"{name} dense" if multiplied_out else name  # a GGUF source keeps its name

    def values(self, key: str) -> list[Any]:
        """An array of the keys, which have it as a list or, out of a GGUF file, with its first values in ``head``."""
        value = self.keys.get(key) or []
        return list(getattr(value, "head", value))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder's card while it is read and rewritten, so that no export loses another's lines."""
    lock = folder / ".README.md.lock"
    with locked(lock, PATIENCE):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def write_card(subject: Subject) -> str:
    """Write the card beside the first file; returns its path, or why there is none, as a line for the report."""
    first = Path(subject.report.path)
    try:
        with _alone(first.absolute().parent):
            return _write_card(subject, first)
    except Busy:
        return f"no card: another export writes one in {first.absolute().parent}"
    except OSError as e:
        return f"no card: {first.with_name('README.md')} cannot be written: {e.strerror or e}"


def _write_card(subject: Subject, first: Path) -> str:
    places = _places(first)
    for path in places:
        old = _ours(path)
        if old is None:
            continue
        if not {f"# {subject.name}", *_about(subject), *_recipe(subject)} <= set(old.splitlines()):
            if _kept(old, FILE_ROW, first.parent, subject):
                continue  # those files were made of other factors
            old = ""
        try:
            with atomic_path(path) as part:
                part.write_text(page(subject, old), encoding="utf-8")
            _forget(first, next(other for other in places if other != path))
        except OSError as e:
            return f"no card: {path} cannot be written: {e.strerror or e}"
        return f"card: {path}"
    return f"no card: {path} is there and was not made here, or was changed"


def _forget(file: Path, path: Path) -> None:
    """Remove ``file``, which another export has replaced, from the page at ``path`` if that page is ours."""
    old = _ours(path) or ""

    def is_of(line: str) -> bool:
        found = (pattern.match(line) for pattern in (FILE_ROW, COMMAND, REMARK))
        return any(match and _stem(Path(match[1])) == _stem(file) for match in found)

    lines = [line for line in old.splitlines() if not is_of(line)]
    if any(map(FILE_ROW.match, lines)):
        _rewrite(path, "\n".join([*lines, ""]))
    elif old:
        path.unlink()


def _rewrite(card: Path, text: str) -> None:
    """Replace a card of ours by ``text``, with a new mark."""
    with atomic_path(card) as part:
        part.write_text(MARK.sub(_mark(text), text), encoding="utf-8")


def card_of(file: Path) -> Path | None:
    """The card with a line about the GGUF ``file``, if nobody changed it since ``mobe-gguf export`` or :func:`note`
    wrote it."""
    for path in _places(file):
        rows = map(FILE_ROW.match, (_ours(path) or "").splitlines())
        if any(row and _stem(Path(row[1])) == _stem(file) for row in rows):
            return path
    return None


def note(card: Path, file: Path, measured: str) -> None:
    """Put ``measured``, which begins with ``KL divergence``, into ``card`` as a remark on ``file``; it replaces an
    earlier one.

    MobeError if it cannot be written.
    """
    earlier = f"- `{file.name}`: KL divergence "
    text, commands = card.read_text(encoding="utf-8").rsplit("\n\n```\n", 1)
    lines = [line for line in text.split("\n") if not line.startswith(earlier)]
    text = "\n".join([*lines, f"- `{file.name}`: {measured}", "", "```", commands])
    try:
        _rewrite(card, text)
    except OSError as e:
        raise MobeError(f"{card} cannot be written: {e.strerror or e}") from e


def deliver(card: Path, file: Path, out: Path, first: Path | None = None) -> str:
    """Move ``card``, which is about ``file`` alone, to where the file goes; returns its path or why there is none, as
    :func:`write_card` does.  ``first``: the first of several files that ``out`` was split into."""
    text = card.read_text(encoding="utf-8")
    if first is not None and first.name != file.name:
        lines = (x if COMMAND.match(x) else x.replace(file.name, first.name) for x in text.split("\n"))
        text = "\n".join(lines)
        text = MARK.sub(_mark(text), text)
    for path in _places(out):
        if not (old := _ours(path)) and old is not None or (old and _only_of(old, out)):
            try:
                with atomic_path(path) as part:
                    part.write_text(text, encoding="utf-8")
            except OSError as e:
                return f"no card: {path} cannot be written: {e.strerror or e}"
            return f"card: {path}"
    return f"no card: {path} is there and is of other files, or was not made here"


def _only_of(card: str, file: Path) -> bool:
    """Whether a card of ours is about this file alone."""
    found = [match[1] for line in card.splitlines() if (match := FILE_ROW.match(line))]
    return all(_stem(Path(name)) == _stem(file) for name in found)


def _places(file: Path) -> tuple[Path, Path]:
    return file.with_name("README.md"), file.with_name(f"{_stem(file)}.README.md")


def _ours(path: Path) -> str | None:
    """The page at ``path``; empty if there is none, None if it is someone else's or was changed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError):
        return None
    found = MARK.search(text)
    return text if found is not None and found[0] == _mark(text) else None


def _mark(text: str) -> str:
    checksum = hashlib.sha256(MARK.sub("", text).encode()).hexdigest()[:16]
    return f"<!-- made by mobe-gguf export: {checksum} -->\n"


def page(subject: Subject, old: str = "") -> str:
    """The whole page; lines about files that still exist are taken from the ``old`` one."""
    folder = Path(subject.report.path).parent
    front = f"---\n{_front_matter(front_matter(subject))}\n---\n"
    lines = [f"# {subject.name}", "", *_about(subject), ""]
    lines += [
        "| file | quantization | size | bits per weight | types |",
        "|---|---|---|---|---|",
        *_kept(old, FILE_ROW, folder, subject),
        _file_row(subject),
        "",
        "## Run",
        "",
        *_run(subject),
        "",
        "## How it was made",
        "",
        *_recipe(subject),
        *_kept(old, REMARK, folder, subject),
        *_remarks(subject),
        "",
        "```",
        *_kept(old, COMMAND, folder, subject),
        command(subject),
        "```",
        "",
    ]
    body = "\n".join(lines)
    return f"{front}{_mark(front + body)}{body}"


def _kept(old: str, pattern: re.Pattern[str], folder: Path, subject: Subject) -> list[str]:
    """Lines of the old page about other files that still exist."""
    now = Path(subject.report.path).name
    found = [(line, match[1]) for line in old.splitlines() if (match := pattern.match(line))]
    written = {_stem(Path(now))} | {_stem(Path(name)) for name in subject.report.files}
    return [
        line
        for line, name in found
        if _stem(Path(name)) not in written and any(folder.glob(f"{_glob(_stem(Path(name)))}*.gguf"))
    ]


def _glob(text: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", text)


def _stem(path: Path) -> str:
    """``model`` of ``model.gguf`` and of ``model-00001-of-00003.gguf``."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name)


# front matter


def front_matter(subject: Subject) -> dict[str, Any]:
    """The keys that the hub reads, as far as they are known."""
    keys, origin = subject.keys, subject.origin
    base = origin.base
    url = str(keys.get("general.base_model.0.repo_url") or "")
    lineage = base or (url.removeprefix(HUB) if url.startswith(HUB) else None)
    found = {
        "base_model": [lineage] if lineage else None,
        "base_model_relation": "quantized" if base else None,
        "license": keys.get("general.license"),
        "license_name": keys.get("general.license.name"),
        "license_link": keys.get("general.license.link"),
        "language": subject.values("general.languages"),
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", *(["mobe"] if origin.of_mobe else []), "moe", "quantization"],
    }
    return {key: value for key, value in found.items() if value}


def _front_matter(values: Mapping[str, Any]) -> str:
    """YAML as the hub's own client writes and reads it."""
    from huggingface_hub import ModelCardData

    plain: dict[str, Any] = {
        k: list(map(str, v)) if isinstance(v, list) else str(v) for k, v in values.items()
    }
    return ModelCardData(**plain).to_yaml()


# what it is


def _about(subject: Subject) -> list[str]:
    origin, report = subject.origin, subject.report
    of = f"[{origin.base}]({HUB}{origin.base})" if origin.base else origin.source
    factors = subject.checkpoint.factors
    if factors is None or not factors.any_left:
        return [f"{of} as GGUF: {amount(report.n_params)} parameters."]
    form = _form(factors)
    if subject.dense:
        return [
            f"{of} as GGUF, its experts as {PAPER} gives them back, multiplied out: {form}. "
            f"{amount(report.n_params)} parameters, as many as the original has."
        ]
    share = report.n_params / report.original_params
    return [
        f"{of} as GGUF, its experts compressed as a {PAPER}: {form}. {amount(report.n_params)} parameters, "
        f"{share:.1%} of the original's {amount(report.original_params)}."
    ]


def _form(checkpoint: FactorDirectory) -> str:
    layers = [checkpoint.layer(index) for index in checkpoint.moe_layers]
    layers = [layer for layer in layers if layer.projections]
    found = [p for p in ALL_PROJECTIONS if any(p in layer.projections for layer in layers)]
    units = [(layer, p) for layer in layers for p in layer.projections]  # of --target each has its own sizes
    bases = _span([layer.n_basis(p) for layer, p in units])
    rank = _span([layer.rank(p) for layer, p in units])
    g = units[0][0].group_count(units[0][1])
    groups = f", in {g} groups" if g > 1 else ""
    return (
        f"in {len(layers)} layers the {_and(found)} matrices of {checkpoint.n_expert} experts share "
        f"{bases} bases of rank {rank}{groups}, activation {checkpoint.activation}"
    )


def _span(sizes: list[int]) -> str:
    """``6``, or ``3 to 9``."""
    return f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _file_row(subject: Subject) -> str:
    report, first = subject.report, Path(subject.report.path).name
    files = f", {len(report.files)} files" if len(report.files) > 1 else ""
    types = ", ".join(
        f"{row.label} {'/'.join(t for t, _ in row.types.most_common())}"
        for row in rows(report.entries)
        if row.label in WEIGHTS
    )
    size = f"{report.n_bytes / 1e9:.2f} GB" if report.n_bytes >= 10**9 else f"{report.n_bytes / 1e6:.2f} MB"
    return (
        f"| [{first}]({quote(first)}) | {report.quant} | {size}{files} | {report.bits_per_weight:.2f} "
        f"| {types} |"
    )


def _run(subject: Subject) -> list[str]:
    file = Path(subject.report.path).name
    if not subject.factorized:
        return [
            "Any llama.cpp runs these files:",
            "",
            f"    llama-cli -m {file}",
            f"    llama-server -m {file}",
        ]
    return [
        "These files need the llama.cpp that `mobe-gguf build` makes; an ordinary one refuses them.",
        "",
        "    mobe-gguf build",
        f"    llama-cli -m {file}",
        f"    llama-server -m {file}",
        "",
        "In Python, in the same environment:",
        "",
        "```python",
        "from llama_cpp import Llama",
        "",
        f"llm = Llama({json.dumps(file, ensure_ascii=False)})",
        "```",
    ]


# how it was made


def command(subject: Subject) -> str:
    """The command of this export, with file names instead of paths."""
    recipe, model = subject.recipe, readable(subject.checkpoint.path.absolute().name)
    words = [
        "mobe-gguf export",
        f"{model}/" if subject.checkpoint.path.is_dir() else model,
        f"{_stem(Path(subject.report.path))}.gguf",
        f"--quant {recipe.quant}",
    ]
    for option, value in (
        ("--basis-type", recipe.basis),
        ("--transform-type", recipe.transform),
        ("--down-type", recipe.down),
        ("--output-tensor-type", recipe.output),
        ("--token-embedding-type", recipe.embedding),
    ):
        words += [f"{option} {value}"] if value else []
    words += [f"--tensor-type '{pattern}={kind}'" for pattern, kind in recipe.overrides]
    words += [f"--quant-rest {recipe.rest}"] if recipe.rest else []
    words += ["--pure"] if recipe.pure else []
    words += [recipe.target.option()] if recipe.target else []
    words += [f"--imatrix {Path(path).name}" for path in recipe.imatrix]
    words += [f"--moments {Path(recipe.moments).name}"] if recipe.moments else []
    words += ["--dense"] if subject.dense else []
    return " ".join([*words, *subject.options])


def _recipe(subject: Subject) -> list[str]:
    config = subject.checkpoint.config
    lines = []
    settings = recorded(config, "settings")
    if isinstance(settings, dict):
        said = ", ".join(
            f"{key} {_plain(value)}" for key, value in settings.items() if _is_telling(key, value)
        )
        lines.append(f"- Factors by `mobe-gguf factorize`: {said}.")
    return lines + [f"- {line}." for line in (_errors(config), _objective(config)) if line]


def _is_telling(key: str, value: Any) -> bool:
    return value is not None and key not in ("imatrix", "moments", "layers")


def _plain(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _errors(config: Mapping[str, Any]) -> str | None:
    """``mobe.errors``: layer -> projection -> |W - W'|^2 / |W|^2."""
    layers = recorded(config, "errors")
    layers = (
        [layer for layer in layers.values() if isinstance(layer, dict)] if isinstance(layers, dict) else []
    )
    said = []
    for projection in ALL_PROJECTIONS:
        found = [e for layer in layers if isinstance(e := layer.get(projection), (int, float))]
        if found:
            said.append(f"{projection} {mean(found):.4f} ({min(found):.4f} to {max(found):.4f})")
    return f"Relative squared error of the matrices, before quantization: {', '.join(said)}" if said else None


def _objective(config: Mapping[str, Any]) -> str | None:
    found = recorded(config, "objectives")
    values = [e for e in found.values() if isinstance(e, (int, float))] if isinstance(found, dict) else []
    return (
        f"Weighted by what the experts are fed, which was minimised: {mean(values):.4f}" if values else None
    )


def _remarks(subject: Subject) -> list[str]:
    """What is true of this file and not of others."""
    refit, file = subject.report.refit, Path(subject.report.path).name
    if refit is None or not refit.norm:
        return []
    said = refit.as_json()
    return [
        f"- `{file}`: A and mix solved again for the rounded bases, relative squared error of the outputs "
        f"{said['error_before']:.4f} before, {said['error_after']:.4f} after."
    ]
