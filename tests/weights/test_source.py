"""Files that are broken, or mean harm: refused before their memory is taken."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError
from weights.source import open_source, read_safetensors


def write_safetensors(
    path: Path, header: Any, data: bytes = b"", length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry(shape=[1 << 40, 1 << 20])}, "tensor w of shape .* are needed"),
        ({"w": entry(data_offsets=[0, 1 << 60])}, "tensor w claims bytes 0 to 1,152"),
        ({"w": entry(data_offsets=[16, 0])}, "tensor w claims bytes 16 to 0"),
        ({"w": entry(shape=[-2, -2])}, "tensor w claims"),
        ({"w": entry(dtype="F8_E4M3")}, "tensor w has type F8_E4M3; one of F64"),
        ({"w": {"shape": [2]}}, "tensor w has a broken header"),
        ({"w": entry(shape="big")}, "tensor w has a broken header"),
        ({"module.w": entry(), "w": entry()}, "tensor w is there twice"),
        ([1, 2], "the header is no object"),
        (b"{" * 5000, "cannot be read as safetensors"),
    ],
)
def test_headers(tmp_path: Path, header: Any, message: str) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


@pytest.mark.parametrize("length", [1 << 62, 90_000_000, 1000])
def test_a_header_longer_than_its_file(tmp_path: Path, length: int) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {}, bytes(16), length)
    with pytest.raises(CheckpointError, match=rf"the header claims {length:,} bytes of a file of"):
        read_safetensors(path)


@given(content=st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.(safetensors|pt)"):
            open_source(tmp_path / name)


class Harm:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_wants_more(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    content = {"model": {"w": torch.ones(2)}, "extra": Harm()}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Harm()}))
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: (refused|cannot be read)"):
        open_source(path)
    assert not (tmp_path / "harmed").exists()


def test_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"tensor w of shape .* claims 4,398,046,511,104 bytes"
    ):
        open_source(tmp_path / "a.pt")
    torch.save({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="tensor w is sparse"):
        open_source(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        ({"model": {"w": 3}}, "w is a int, not a tensor"),
        ({"step": 3}, "no tensors in it"),
        ({"module.w": torch.ones(1), "w": torch.ones(1)}, "tensor w is there twice"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "a.pt")


def test_files_from_before_pytorch_1_6(tmp_path: Path) -> None:
    content = {"w": torch.ones(2)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format from before PyTorch 1\.6, which cannot be"):
        open_source(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "cannot be read as JSON: maximum recursion"),
        ("[]", "expected a JSON object, got list"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"w": null}}', "shard 'None' is not a plain file name"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "shard '/etc/passwd' is not a plain file name"),
        ('{"weight_map": {"w": "gone.bin"}}', "gone.bin: cannot be read as a torch file"),
    ],
)
def test_an_index_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_settings_nested_beyond_all_measure(tmp_path: Path) -> None:
    for weights, name, content in (
        ("ckpt.pt", "config.json", '{"a":' * 100_000),
        ("lit_model.pth", "model_config.yaml", "[" * 5000),
    ):
        folder = tmp_path / name
        folder.mkdir()
        torch.save({"w": torch.ones(1)}, folder / weights)
        (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read as"):
            open_source(folder)


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no weights in it"):
        open_source(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 \*.pt files in it; name one of them"):
        open_source(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../w.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_source(tmp_path)
