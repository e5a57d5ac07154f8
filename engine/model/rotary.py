"""RotaryEmbedding: the class, and the functions beside it, that training code expects.

Names, arguments and results are those of rotary-embedding-torch 0.9.1 (P. Wang, MIT), so that a
model written with that library runs with its import changed and its state dict unchanged. Pairs
are interleaved, (2i, 2i + 1), and angles are float32, as there. docs/rope.md lists where the two
differ, and why: chiefly xPos with cached keys, half-precision positions and stale caches.

What serves is engine/model/rope.py: half-split pairs and float64 angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.model.rope import XPOS_GAMMA
from engine.model.turn import along, at_least_float32, rotate_pairs, turns_of

FreqsFor = Literal["lang", "pixel", "constant"]


def broadcat(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = -1) -> Tensor:
    """Broadcast tensors against each other, then concatenate them along dim."""
    return torch.cat(torch.broadcast_tensors(*tensors), dim=dim)  # type: ignore[no-untyped-call]  # torch has no types here


def apply_rotary_emb(
    freqs: Tensor,
    t: Tensor,
    start_index: int = 0,
    scale: float | Tensor = 1.0,
    seq_dim: int = -2,
    freqs_seq_dim: int | None = None,
) -> Tensor:
    """Rotate rot_dim of t's features, from start_index on, by the angles freqs, times scale.

    freqs [..., rot_dim], radians, the two angles of a pair equal, as `RotaryEmbedding.forward`
    gives them: the first of each is used. freqs must broadcast to t [..., dim], except that
    [positions, rot_dim] lies along t's dimension seq_dim, and that where it has more positions than
    t the last ones count: so a query can be rotated by the angles of its whole sequence.
    freqs_seq_dim names the dimension that holds the positions where there are more than two.
    scale: a number, or a tensor like freqs. Computed in the wider of t's and freqs' dtypes, at
    least float32, and returned in t's. ValueError: freqs and t do not fit.
    """
    seq_dim = seq_dim - t.ndim if seq_dim >= 0 else seq_dim
    length = t.shape[seq_dim]
    if freqs.shape[-1] % 2 or start_index + freqs.shape[-1] > t.shape[-1]:
        raise ValueError(
            f"freqs must rotate an even number of t's {t.shape[-1]} features from start_index "
            f"{start_index} on, got {freqs.shape[-1]}"
        )
    if freqs_seq_dim is None and (
        freqs.ndim == 2 or (freqs.ndim == t.ndim == 3 and freqs.shape[0] != t.shape[0])
    ):
        freqs_seq_dim = 0
    if freqs_seq_dim is not None:
        extra = max(freqs.shape[freqs_seq_dim] - length, 0)
        freqs = freqs.narrow(freqs_seq_dim, extra, freqs.shape[freqs_seq_dim] - extra)
    turns = turns_of(freqs[..., ::2])
    if freqs.ndim == 2:
        turns = along(turns, seq_dim)
    if isinstance(scale, Tensor) and scale.ndim == 2:
        scale = along(scale[..., None], seq_dim)[..., 0]
    return rotate_pairs(t, turns, start_index, scale)


def apply_learned_rotations(
    rotations: Tensor, t: Tensor, start_index: int = 0, freq_ranges: Tensor | None = None
) -> Tensor:
    """Rotate t by angles that a network has computed, one per pair.

    rotations [..., pairs]; with freq_ranges [ranges], every rotation is multiplied by every range
    and there are pairs * ranges of them. See apply_rotary_emb for t and start_index.
    """
    if freq_ranges is not None:
        rotations = (rotations[..., None] * freq_ranges).flatten(-2)
    return apply_rotary_emb(rotations.repeat_interleave(2, dim=-1), t, start_index)


class RotaryEmbedding(nn.Module):
    """Rotary position embeddings, drop-in for rotary-embedding-torch's class.

    The first `dim` features of a head are rotated; the rest pass through. Frequencies, by pair i:
    custom_freqs if given, else by freqs_for: `lang` theta^(-2i / dim) (Su et al. 2021, arXiv
    2104.09864), `pixel` pi times dim // 2 values from 1 to max_freq / 2, `constant` num_freqs ones.
    They are the state dict's one entry, `freqs`, and are trained if learned_freq.

    theta_rescale_factor: NTK-aware scaling, theta * factor^(dim / (dim - 2)).
    interpolate_factor: positions are divided by it (position interpolation), at least 1.
    use_xpos, xpos_scale_base: a magnitude as well, zeta_i^(position / base) for queries and its
    inverse for keys (Sun et al. 2022, arXiv 2212.10554).
    seq_before_head_dim: t is [..., time, heads, dim] rather than [..., heads, time, dim].
    cache_if_possible, cache_max_seq_len: keep the turns of positions up to that length; learned
    frequencies are never kept. Raises ConfigError for a setting that cannot work.
    """

    freqs: nn.Parameter
    scale: Tensor
    apply_rotary_emb = staticmethod(apply_rotary_emb)

    def __init__(
        self,
        dim: int,
        custom_freqs: Tensor | None = None,
        freqs_for: FreqsFor = "lang",
        theta: float = 10000,
        max_freq: float = 10,
        num_freqs: int = 1,
        learned_freq: bool = False,
        use_xpos: bool = False,
        xpos_scale_base: float = 512,
        interpolate_factor: float = 1.0,
        theta_rescale_factor: float = 1.0,
        seq_before_head_dim: bool = False,
        cache_if_possible: bool = True,
        cache_max_seq_len: int = 8192,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ConfigError(f"dim must be at least 2, got {dim}")
        if freqs_for not in get_args(FreqsFor):
            choices = ", ".join(get_args(FreqsFor))
            raise ConfigError(f"freqs_for must be one of {choices}; got {freqs_for!r}")
        if not interpolate_factor >= 1:
            raise ConfigError(f"interpolate_factor must be at least 1, got {interpolate_factor}")
        if theta_rescale_factor != 1:
            if dim < 4:
                raise ConfigError(f"theta_rescale_factor needs a dim of at least 4, got {dim}")
            theta *= theta_rescale_factor ** (dim / (dim - 2))
        pairs = dim // 2
        if custom_freqs is not None:
            freqs = custom_freqs
        elif freqs_for == "lang":
            freqs = torch.pow(theta, torch.arange(pairs).float() * 2 / dim).reciprocal()
        elif freqs_for == "pixel":
            freqs = torch.linspace(1.0, max_freq / 2, pairs) * math.pi
        else:
            freqs = torch.ones(num_freqs)
        if use_xpos and freqs.shape[-1] not in (1, pairs):
            raise ConfigError(f"xPos needs {pairs} frequencies, got {freqs.shape[-1]}")

        self.freqs = nn.Parameter(freqs, requires_grad=learned_freq)
        self.freqs_for = freqs_for
        self.learned_freq = learned_freq
        self.interpolate_factor = interpolate_factor
        self.use_xpos = use_xpos
        self.seq_before_head_dim = seq_before_head_dim
        self.default_seq_dim = -3 if seq_before_head_dim else -2
        self.cache_if_possible = cache_if_possible
        self.cache_max_seq_len = cache_max_seq_len
        self._cached: dict[str, tuple[Tensor | None, object, Tensor]] = {}  # see _kept
        self._longest = 0
        if use_xpos:
            zeta = (2 * torch.arange(pairs) + XPOS_GAMMA * dim) / ((1 + XPOS_GAMMA) * dim)
            self.scale_base = xpos_scale_base
            self.register_buffer("scale", zeta, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the frequencies are."""
        return self.freqs.device

    def get_seq_pos(
        self,
        seq_len: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        offset: float = 0,
    ) -> Tensor:
        """Positions offset, offset + 1, ... divided by interpolate_factor; [seq_len], float32."""
        device = self.device if device is None else device
        dtype = torch.float32 if dtype is None else dtype
        positions = torch.arange(seq_len, device=device, dtype=dtype) + offset
        return positions / self.interpolate_factor

    def forward(self, t: Tensor, seq_len: int | None = None, offset: float = 0) -> Tensor:
        """Angles of the positions t [...]: [..., 2 * pairs], the two of a pair side by side.

        seq_len and offset are taken for the library's sake; t says all.
        """
        return self._angles(t).repeat_interleave(2, dim=-1)

    def rotate_queries_or_keys(
        self,
        t: Tensor,
        seq_dim: int | None = None,
        offset: float = 0,
        scale: float | Tensor | None = None,
    ) -> Tensor:
        """t with its positions, offset and on along seq_dim, rotated in; same shape and dtype.

        scale: multiplies what was rotated: a number, or a tensor [time, features].
        ValueError: with xPos and no scale, since queries and keys then need opposite ones.
        """
        if self.use_xpos and scale is None:
            raise ValueError(
                "with xPos queries and keys have opposite scales: call rotate_queries_and_keys"
            )
        seq_dim = self._seq_dim(t, seq_dim)
        if isinstance(scale, Tensor) and scale.ndim == 2:
            scale = along(scale[..., None], seq_dim)[..., 0]
        turns = self._turns_at(t.shape[seq_dim], offset)
        return rotate_pairs(t, along(turns, seq_dim), 0, 1.0 if scale is None else scale)

    def rotate_queries_with_cached_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None, offset: float = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotate all keys from position 0 on, and the queries of the last of those positions.

        q is as long as k, or shorter; offset moves the queries only. The result equals the last
        rows of the uncached rotation of the whole sequence, with xPos too. The library's does not:
        it centres the queries' xPos exponents on q's length and the keys' on k's, so its scores are
        off by zeta^((k_len // 2 - q_len // 2) / scale_base) per pair.
        """
        seq_dim = self._seq_dim(q, seq_dim)
        q_len, k_len = q.shape[seq_dim], k.shape[seq_dim]
        if q_len > k_len:
            raise ValueError(f"queries must not outnumber keys: {q_len} > {k_len}")
        first = k_len - q_len + offset
        if not self.use_xpos:
            return (
                self.rotate_queries_or_keys(q, seq_dim, first),
                self.rotate_queries_or_keys(k, seq_dim),
            )
        if offset == 0:
            queries = self._xpos_turns("query", k_len)[k_len - q_len :]
        else:
            magnitude = self._magnitude(self.get_seq_pos(q_len, offset=first), k_len // 2)
            queries = self._turns_at(q_len, first) * magnitude[..., None]
        keys = self._xpos_turns("key", k_len)
        return rotate_pairs(q, along(queries, seq_dim)), rotate_pairs(k, along(keys, seq_dim))

    def rotate_queries_and_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """xPos: rotate and scale queries and keys of the same positions, 0 and on.

        The exponents are centred on the middle of the sequence. ValueError: without use_xpos, or
        where q and k differ in length.
        """
        if not self.use_xpos:
            raise ValueError("rotate_queries_and_keys is for xPos: construct with use_xpos=True")
        seq_dim = self._seq_dim(q, seq_dim)
        length = q.shape[seq_dim]
        if k.shape[seq_dim] != length:
            raise ValueError(
                f"queries and keys must be as long, got {length} and {k.shape[seq_dim]}: "
                "call rotate_queries_with_cached_keys"
            )
        queries, keys = self._xpos_turns("query", length), self._xpos_turns("key", length)
        return rotate_pairs(q, along(queries, seq_dim)), rotate_pairs(k, along(keys, seq_dim))

    def get_scale(self, t: Tensor, seq_len: int | None = None, offset: float = 0) -> Tensor:
        """xPos magnitudes of queries at positions t [time], centred on len(t) // 2; [time, dim].

        Those of keys are the inverse. seq_len and offset are taken for the library's sake.
        """
        if not self.use_xpos:
            raise ValueError("get_scale is for xPos: construct with use_xpos=True")
        return self._magnitude(t, len(t) // 2).repeat_interleave(2, dim=-1)

    def get_axial_freqs(
        self, *dims: int, offsets: tuple[float, ...] | Tensor | None = None
    ) -> Tensor:
        """Angles for a grid: [*dims, len(dims) * 2 * pairs], one block of features per axis.

        Positions on an axis are 0, 1, ... (`pixel`: evenly spaced from -1 to 1) plus its offset.
        """
        if offsets is not None and len(offsets) != len(dims):
            raise ValueError(f"offsets must name {len(dims)} axes, got {len(offsets)}")
        angles = []
        for axis, size in enumerate(dims):
            if self.freqs_for == "pixel":
                positions = torch.linspace(-1, 1, steps=size, device=self.device)
            else:
                positions = torch.arange(size, device=self.device)
            if offsets is not None:
                positions = positions + offsets[axis]
            shape = [1] * len(dims) + [-1]
            shape[axis] = size
            angles.append(self.forward(positions).view(shape))
        grid = [each.expand(*dims, -1) for each in angles]
        return torch.cat(grid, dim=-1)

    def _seq_dim(self, t: Tensor, seq_dim: int | None) -> int:
        """The dimension of time, counted from the end."""
        seq_dim = self.default_seq_dim if seq_dim is None else seq_dim
        return seq_dim - t.ndim if seq_dim >= 0 else seq_dim

    def _angles(self, positions: Tensor) -> Tensor:
        """[..., pairs], at least float32, with gradients only if the frequencies are learned."""
        freqs = self.freqs if self.learned_freq else self.freqs.detach()
        freqs = freqs.to(at_least_float32(freqs.dtype))
        return positions.to(freqs.dtype)[..., None] * freqs

    def _magnitude(self, positions: Tensor, centre: int) -> Tensor:
        """zeta^((position - centre) / scale_base), [time, pairs]: a query's; a key's is inverse."""
        powers = (positions.to(at_least_float32(positions.dtype)) - centre) / self.scale_base
        return torch.pow(self.scale.to(powers.dtype), powers[:, None])

    def _turns_at(self, length: int, offset: float) -> Tensor:
        """Turns [length, pairs, 2] of the positions from offset on."""
        first, end = int(offset), int(offset) + length
        if first != offset or first < 0 or not self._keeps(end):
            return turns_of(self._angles(self.get_seq_pos(length, self.device, offset=offset)))
        count = min(1 << (end - 1).bit_length(), self.cache_max_seq_len)
        count = max(count, self._longest)
        self._longest = count
        turns = self._kept("turns", count, lambda: turns_of(self._angles(self.get_seq_pos(count))))
        return turns[first:end]

    def _xpos_turns(self, role: Literal["query", "key"], length: int) -> Tensor:
        """Turns with xPos magnitudes [length, pairs, 2]; those of the last length are kept."""

        def make() -> Tensor:
            magnitude = self._magnitude(self.get_seq_pos(length), length // 2)
            magnitude = magnitude.reciprocal() if role == "key" else magnitude
            return self._turns_at(length, 0) * magnitude[..., None]

        return self._kept(role, length, make) if self._keeps(length) else make()

    def _kept(self, name: str, length: int, make: Callable[[], Tensor]) -> Tensor:
        """What make() gives, kept until the length or the frequencies change."""
        version = 0 if self.freqs.is_inference() else self.freqs._version
        key = (length, version, self.interpolate_factor, getattr(self, "scale_base", None))
        freqs, kept_key, kept = self._cached.get(name, (None, None, self.freqs))
        if freqs is not self.freqs or kept_key != key:
            with torch.inference_mode(False), torch.no_grad():  # for training as well
                kept = make()
            self._cached[name] = (self.freqs, key, kept)
        return kept

    def _keeps(self, end: int) -> bool:
        """Whether turns of positions below end are cached."""
        may = self.cache_if_possible and not self.learned_freq
        return may and 0 < end <= self.cache_max_seq_len and not torch.compiler.is_compiling()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cached.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no types here

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached.clear()
        super()._load_from_state_dict(*args, **kwargs)
