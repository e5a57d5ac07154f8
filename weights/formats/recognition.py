"""Which format a checkpoint has, and which of its tensors make which of ours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import CheckpointError
from weights.formats.known import FORMATS, UNSUPPORTED, UNSUPPORTED_CODE
from weights.formats.table import MODULES, Format
from weights.source import Source, StoredTensor


@dataclass(frozen=True)
class Recognised:
    """parts: tensor of ours -> the stored tensors that make it, to be put one below the other."""

    format: Format
    parts: dict[str, list[StoredTensor]]
    num_layers: int


def recognise(source: Source) -> Recognised:
    """Find the format by names and shapes, and the place of every tensor; nothing is read.

    Raises CheckpointError, naming the tensor, for what no format has, is not supported, is missing
    or has no place.
    """
    _refuse(source)
    chosen, tensors = _match(source)
    return _sort(source, chosen, tensors)


def _refuse(source: Source) -> None:
    for pattern, reason in UNSUPPORTED.items():
        for name, tensor in source.tensors.items():
            if re.fullmatch(pattern, name):
                raise CheckpointError(f"{tensor.file}: tensor {name}: {reason}")
    for pattern, reason in UNSUPPORTED_CODE.items():
        if match := re.search(pattern, source.code):
            raise CheckpointError(f"{source.path}: {match[0]!r} in the code in it: {reason}")


def _match(source: Source) -> tuple[Format, dict[str, StoredTensor]]:
    """The format, and the tensors under the names that its table has."""
    for each in FORMATS:
        head, base = each.modules["head"], str(each.modules["embedding"]).partition(".")[0] + "."
        tensors = source.tensors
        if not any(name.startswith(base) for name in tensors) and base != "embedding.":
            tensors = {
                name if name.startswith(f"{head}.") else base + name: tensor
                for name, tensor in tensors.items()
            }
        if not all(any(re.fullmatch(mark, name) for name in tensors) for mark in each.marks):
            continue
        up = tensors.get(str(each.modules["mlp.up"]).format(0) + ".weight")
        width = tensors.get(f"{each.modules['embedding']}.weight")
        if up is None or width is None or len(up.shape) != 2 or len(width.shape) != 2:
            continue
        inner = 0 if "mlp.up" in each.transposed else 1
        if up.shape[inner] == width.shape[1]:
            return each, tensors
    some = ", ".join(list(source.tensors)[:4])
    raise CheckpointError(
        f"{source.path}: no known format has these tensors ({some}, ...); known: "
        f"{', '.join(each.name for each in FORMATS)}"
    )


def _sort(source: Source, chosen: Format, tensors: dict[str, StoredTensor]) -> Recognised:
    """Which stored tensors make which of ours; everything must have its place."""
    qkv = chosen.modules["qkv"]
    first = (qkv if isinstance(qkv, str) else qkv[0]).replace("{}", r"(\d+)") + r"\.weight"
    found = (re.fullmatch(first, name) for name in tensors)
    layers = {int(match[1]) for match in found if match}
    if layers != set(range(len(layers))):
        raise CheckpointError(f"{source.path}: layers {sorted(layers)} are not consecutive")
    parts: dict[str, list[StoredTensor]] = {}
    left = dict(tensors)
    for module, theirs in chosen.modules.items():
        places = [("", None)] if module in MODULES else [("blocks.{}.", i) for i in sorted(layers)]
        for prefix, layer in places:
            for kind in ("weight", "bias"):
                names = [
                    f"{each.format(layer)}.{kind}"
                    for each in ((theirs,) if isinstance(theirs, str) else theirs)
                ]
                there = [tensors[name] for name in names if name in tensors]
                if there and len(there) != len(names):
                    gone = next(name for name in names if name not in tensors)
                    raise CheckpointError(f"{source.path}: tensor {gone} is missing")
                if there:
                    parts[f"{prefix.format(layer)}{module}.{kind}"] = there
                for name in names:
                    left.pop(name, None)
    ignored = (*chosen.ignored, r".*\b(inv_)?freqs?")
    for name, tensor in left.items():
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise CheckpointError(
                f"{tensor.file}: unknown tensor {name} of shape {list(tensor.shape)}; "
                f"{chosen.title} has none of this name"
            )
    return Recognised(chosen, parts, len(layers))
