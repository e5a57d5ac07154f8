"""The locks hold what pyproject.toml asks for, and one PyTorch is named everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from proofs.common import TORCH

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SERVED = ["grammar", "otel"]


def locked(name: str) -> dict[str, list[str]]:
    """Versions by package; several where they depend on the Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "locks" / f"{name}.txt").read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)==(\S+)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.parametrize(
    ("name", "extras"), [("cpu", SERVED), ("cuda", SERVED), ("loadtest", ["loadtest"])]
)
def test_a_lock_is_that_of_the_project(name: str, extras: list[str]) -> None:
    versions = locked(name)
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "torch" and name != "cuda":
            assert "torch" not in versions  # from an index of its own, or not at all
            continue
        assert requirement.name in versions, f"{requirement.name} is not in locks/{name}.txt"
        for version in versions[requirement.name]:
            assert version in requirement.specifier, f"{requirement.name} {version}: make lock"


def test_the_lock_of_the_build_is_that_of_the_project() -> None:
    (version,) = locked("build")["setuptools"]
    (text,) = PYPROJECT["build-system"]["requires"]
    assert version in Requirement(text).specifier
    assert f'"{text}"' in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(("name", "least"), [("cpu", 50), ("cuda", 70), ("loadtest", 50)])
def test_every_package_has_hashes(name: str, least: int) -> None:
    blocks = re.split(r"^(?=\S)", (ROOT / "locks" / f"{name}.txt").read_text(), flags=re.M)
    packages = [block for block in blocks if "==" in block.partition("\n")[0]]
    assert len(packages) > least
    assert all("--hash=sha256:" in block for block in packages)


def test_only_the_lock_with_cuda_has_cuda() -> None:
    for lock in ("cpu", "loadtest"):
        found = locked(lock)
        assert not [name for name in found if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert "nvidia-cublas" in locked("cuda")


def test_one_pytorch() -> None:
    assert f"ARG TORCH={TORCH}\n" in (ROOT / "Dockerfile").read_text()
    assert f"TORCH ?= {TORCH}\n" in (ROOT / "Makefile").read_text()
    assert locked("cuda")["torch"] == [TORCH.partition("==")[2]]
