"""Images as buildah makes them, from a base of debootstrap's. Standard library only."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proofs.common import Failed, call, local_torch

BASE_PACKAGES = "python3,python3-venv,ca-certificates"
HOST_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


class Buildah:
    """buildah with all that it keeps under one folder."""

    def __init__(self, work: Path) -> None:
        """work: an empty folder with room for some gigabytes."""
        storage = ("--storage-driver", "vfs", "--root", work / "storage")
        self._options: tuple[str | Path, ...] = (*storage, "--runroot", work / "run")

    def __call__(self, *arguments: str | Path, log: Path | None = None) -> str:
        """One command's output, without the white space around it."""
        return call("buildah", *self._options, *arguments, log=log).strip()

    def remove(self, name: str) -> None:
        """An image, and the containers, mounted ones too."""
        self("rm", "--all")
        self("rmi", "--force", name)

    def remove_all(self) -> None:
        """Containers (which are mounted) and images."""
        self("rm", "--all")
        self("rmi", "--all", "--force")


def make_base(buildah: Buildah, work: Path, suite: str) -> str:
    """An image of a minimal Debian with Python; its name.

    The certificates are this machine's, so that pip finds a package index from inside as it does
    here, also through a proxy that has its own.
    """
    rootfs = work / "rootfs"
    call(
        "debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", suite, rootfs,
        log=work / "debootstrap.log",
    )  # fmt: skip
    if HOST_CERTIFICATES.exists():
        shutil.copy(HOST_CERTIFICATES, rootfs / HOST_CERTIFICATES.relative_to("/"))
    (rootfs / "etc/pip.conf").write_text(f"[global]\ncert = {HOST_CERTIFICATES}\n")
    (rootfs / "etc/resolv.conf").unlink(missing_ok=True)  # buildah makes one
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, rootfs, "/")
    name = "localhost/ropeway-base"
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)
    shutil.rmtree(rootfs)
    return name


def local_index(work: Path, version: str) -> Path | None:
    """A package index of one wheel, where pip has PyTorch's CPU build at hand; else None."""
    wheel = local_torch(work / "index" / "torch", version)
    if wheel is None:
        return None
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>\n')
    return wheel.parent.parent


@dataclass(frozen=True)
class Image:
    """root: its files, mounted; config: what it says of itself, as Docker has it."""

    root: Path
    config: dict[str, Any]

    @property
    def environment(self) -> list[str]:
        """NAME=VALUE, as the image sets it."""
        return self._list("Env")

    def command(self, *arguments: str) -> list[str]:
        """What `docker run IMAGE ARGUMENTS` executes."""
        return self._list("Entrypoint") + (list(arguments) or self._list("Cmd"))

    @property
    def healthcheck(self) -> list[str]:
        """The command of HEALTHCHECK, without its CMD."""
        kind, *command = self.config["Healthcheck"]["Test"]
        if kind != "CMD":
            raise Failed(f"HEALTHCHECK is {kind}, not CMD: it would need a shell")
        return list(command)

    @property
    def size(self) -> int:
        """Bytes of all files, each inode once, without the shipped weights."""
        seen = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder) / name
                if path.suffix != ".safetensors":
                    status = path.lstat()
                    seen[status.st_ino] = status.st_size
        return sum(seen.values())

    def files(self, *beginnings: str) -> list[str]:
        """Names of files and folders that begin so."""
        return [path.name for path in self.root.rglob("*") if path.name.startswith(beginnings)]

    def _list(self, key: str) -> list[str]:
        return list(self.config.get(key) or [])
