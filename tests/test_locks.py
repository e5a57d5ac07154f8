"""The locks hold what pyproject.toml asks for, and one PyTorch is named everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from proofs.common import TORCH

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, list[str]]:
    """Versions by package; several where they depend on the Python."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "locks" / f"{name}.txt").read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)==(\S+)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_is_that_of_the_project(name: str) -> None:
    versions = locked(name)
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        if (name, requirement.name) == ("cpu", "torch"):
            assert "torch" not in versions  # from an index of its own, without its hash
            continue
        assert requirement.name in versions, f"{requirement.name} is not in locks/{name}.txt"
        for version in versions[requirement.name]:
            assert version in requirement.specifier, f"{requirement.name} {version}: make lock"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_package_has_hashes(name: str) -> None:
    blocks = re.split(r"^(?=\S)", (ROOT / "locks" / f"{name}.txt").read_text(), flags=re.M)
    packages = [block for block in blocks if "==" in block.partition("\n")[0]]
    assert len(packages) > 30
    assert all("--hash=sha256:" in block for block in packages)


def test_only_the_lock_with_cuda_has_cuda() -> None:
    assert not [name for name in locked("cpu") if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert "nvidia-cublas" in locked("cuda")


def test_one_pytorch() -> None:
    assert f"ARG TORCH={TORCH}\n" in (ROOT / "Dockerfile").read_text()
    assert f"TORCH ?= {TORCH}\n" in (ROOT / "Makefile").read_text()
    assert locked("cuda")["torch"] == [TORCH.partition("==")[2]]
