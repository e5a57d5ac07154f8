"""What attention is to the rest of the engine: a callable per step, and a backend that makes it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.profiles import ProfileTables
from engine.scaling import RopeScaling

BLOCK_SIZES = (16, 32, 64)
MAX_HEAD_DIM = 256
"""What the kernels serve."""


class Attention(Protocol):
    """What a layer of the network calls."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Queries, keys, values [..., 3 * hidden_size], in that order -> [..., hidden_size]."""
        ...


@dataclass(frozen=True)
class KVCache:
    """The pages of every layer.

    keys[layer]   [num_blocks, num_heads, head_dim, block_size]: a score reads 64 slots at a time
    values[layer] [num_blocks, num_heads, block_size, head_dim]

    A key is stored rotated by its offset inside its page, and by nothing else. Pages begin as
    zeros, so a slot that was never written holds a finite number. In the memory of a GPU the
    dimensions of a key lie side by side, as tensor cores want them: there, keys are transposed
    views.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        dimensions_last: bool | None = None,
    ) -> KVCache:
        """Zeroed pages, so that the memory is there, or is missing now and not in mid stream.

        dimensions_last: whether a key's dimensions lie side by side; None: where the device is no
        CPU.
        """
        if dimensions_last is None:
            dimensions_last = torch.device(device).type != "cpu"
        shape = (num_blocks, config.num_heads, block_size, config.head_dim)
        transposed = (*shape[:2], shape[3], shape[2])

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers = range(config.num_layers)
        keys = (zeros(shape).mT if dimensions_last else zeros(transposed) for _ in layers)
        return cls(keys=tuple(keys), values=tuple(zeros(shape) for _ in layers))

    @property
    def block_size(self) -> int:
        """Tokens in a page."""
        return self.keys[0].shape[3]

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Keys and values of one page in all layers, in bytes."""
        return 2 * config.num_layers * config.hidden_size * block_size * dtype.itemsize


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the rows of a step stand. A row is one token that the step computes.

    query_start  int32 [num_seqs + 1]: rows query_start[s] .. query_start[s + 1] - 1 belong to
                 sequence s, at consecutive positions
    positions    int32 [num_rows]: the position t of each row in its sequence
    slot_mapping int64 [num_rows]: where its key and value go, block id * block_size + offset
    block_tables int32 [num_seqs, max_blocks]: block ids in order of position
    bases        int32 [num_seqs, max_blocks]: the position b of each block's first slot
    num_blocks   int32 [num_seqs]: how many entries of the two tables are in use
    profiles     int32 [num_seqs]: the row of ProfileTables that the sequence is rotated by

    Slot o of a block with base b is visible to a row at position t when b + o <= t. All tensors are
    contiguous and on the device of the cache.
    """

    query_start: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    bases: Tensor
    num_blocks: Tensor
    profiles: Tensor


def score_scale(config: ModelConfig) -> float:
    """What a query is multiplied by, so that weights are powers of two of the scores."""
    return math.log2(math.e) / math.sqrt(config.head_dim)


def check_shapes(
    whose: str, config: ModelConfig, cache: KVCache, dtypes: Sequence[torch.dtype]
) -> None:
    """Raise ConfigError for what `whose` ("the CPU kernel") does not serve."""
    dtype = cache.keys[0].dtype
    if dtype not in dtypes:
        names = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise ConfigError(f"dtype must be one of {names} for {whose}, got {dtype}")
    if cache.block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size must be one of {BLOCK_SIZES} for {whose}, got {cache.block_size}"
        )
    if config.head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim must be at most {MAX_HEAD_DIM} for {whose}, got {config.head_dim}"
        )


class AttentionBackend(ABC):
    """Paged attention over one cache.

    A token's output is a function of its own position and of the cached bytes alone: pages in table
    order, the query rotated by t - b for each, in float32. It is the same to the bit in a chunk of
    any size, alone or among others.
    """

    name: str
    reads_each_call = False
    """Whether what bind returns reads the metadata at every call, so that they may change between
    steps."""

    def __init__(self, config: ModelConfig, profiles: ProfileTables, cache: KVCache) -> None:
        """profiles: rows that a step names must have been put."""
        self.config = config
        self.profiles = profiles
        self.cache = cache

    def put_profile(self, row: int, scaling: RopeScaling, num_positions: int) -> None:
        """Have a row hold a scaling in force, between two steps; see ProfileTables.put."""
        self.profiles.put(row, scaling, num_positions)

    @abstractmethod
    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Store the rows' keys and values, then attend.

        qkv [num_rows, 3 * hidden_size] in the cache's dtype: queries, keys, values, each
        [num_heads, head_dim]. Returns [num_rows, hidden_size] in the same dtype.
        """

    def bind(self, metadata: AttentionMetadata) -> Attention:
        """The attention of one step."""

        def attention(layer: int, qkv: Tensor) -> Tensor:
            return self.forward(layer, qkv, metadata)

        return attention
