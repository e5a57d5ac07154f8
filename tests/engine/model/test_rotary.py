"""What RotaryEmbedding does of itself: caches that cannot be stale, layouts, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.model.rotary import RotaryEmbedding, apply_rotary_emb

TIME = 40


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(rotary: RotaryEmbedding) -> RotaryEmbedding:
    """The same, with nothing cached and never caching."""
    other = copy.deepcopy(rotary)
    other.cache_if_possible = False
    return other


def test_the_cache_changes_nothing() -> None:
    rotary = RotaryEmbedding(32, cache_max_seq_len=64)
    for length, offset in [(5, 0), (40, 0), (1, 40), (3, 61), (3, 62), (100, 0), (2, 0.5), (7, 3)]:
        t = heads(2, length, 64)
        expected = fresh(rotary).rotate_queries_or_keys(t, offset=offset)
        assert torch.equal(rotary.rotate_queries_or_keys(t, offset=offset), expected)


def load(rotary: RotaryEmbedding) -> None:
    rotary.load_state_dict({"freqs": rotary.freqs.detach() * 2})


def assign(rotary: RotaryEmbedding) -> None:
    rotary.load_state_dict({"freqs": rotary.freqs.detach() * 2}, assign=True)


def in_place(rotary: RotaryEmbedding) -> None:
    with torch.no_grad():
        rotary.freqs.mul_(2)


def replace(rotary: RotaryEmbedding) -> None:
    rotary.freqs = torch.nn.Parameter(rotary.freqs.detach() * 2, requires_grad=False)


def interpolate(rotary: RotaryEmbedding) -> None:
    rotary.interpolate_factor = 2.0


def widen(rotary: RotaryEmbedding) -> None:
    rotary.double()


@pytest.mark.parametrize("change", [load, assign, in_place, replace, interpolate, widen])
@pytest.mark.parametrize("use_xpos", [False, True])
def test_the_cache_is_never_stale(
    change: Callable[[RotaryEmbedding], None], use_xpos: bool
) -> None:
    rotary = RotaryEmbedding(32, use_xpos=use_xpos)
    t = heads(2, TIME, 32)
    before = rotary.rotate_queries_with_cached_keys(t, t)
    change(rotary)
    after = rotary.rotate_queries_with_cached_keys(t, t)
    expected = fresh(rotary).rotate_queries_with_cached_keys(t, t)
    assert all(map(torch.equal, after, expected))
    assert change is widen or not torch.equal(before[1], after[1])


@pytest.mark.parametrize("use_xpos", [False, True])
def test_a_cache_filled_in_inference_serves_training(use_xpos: bool) -> None:
    rotary = RotaryEmbedding(32, use_xpos=use_xpos)
    t = heads(2, TIME, 64)
    with torch.inference_mode():
        rotary.rotate_queries_with_cached_keys(t, t)
    q = t.clone().requires_grad_()
    query, _ = rotary.rotate_queries_with_cached_keys(q, t)
    query.square().sum().backward()
    assert q.grad is not None


def test_learned_frequencies_are_not_cached() -> None:
    rotary = RotaryEmbedding(32, learned_freq=True)
    t = heads(2, TIME, 64)
    first = rotary.rotate_queries_or_keys(t)
    first.square().sum().backward()  # a rotation keeps norms: there is nothing to learn
    assert rotary.freqs.grad is not None
    assert float(rotary.freqs.grad.abs().max()) < 1e-2
    with torch.no_grad():
        rotary.freqs.add_(0.1)
    assert not torch.equal(first, rotary.rotate_queries_or_keys(t))


def test_frequencies_that_are_not_learned_get_no_gradient() -> None:
    rotary = RotaryEmbedding(32, cache_if_possible=False).requires_grad_(True)
    assert not rotary.rotate_queries_or_keys(heads(2, TIME, 64)).requires_grad


@pytest.mark.parametrize("use_xpos", [False, True])
def test_precision_of_the_module_does_not_narrow_angles(use_xpos: bool) -> None:
    """After .bfloat16() the frequencies are rounded, but neither positions nor angles are."""
    rotary = RotaryEmbedding(32, use_xpos=use_xpos).bfloat16()
    other = RotaryEmbedding(32, use_xpos=use_xpos)
    other.load_state_dict({"freqs": rotary.freqs.float()})
    if use_xpos:
        other.scale = rotary.scale.float()
    t = heads(1, 600, 64).bfloat16()
    pairs = zip(
        rotary.rotate_queries_with_cached_keys(t, t),
        other.rotate_queries_with_cached_keys(t.float(), t.float()),
        strict=True,
    )
    for got, expected in pairs:
        assert torch.equal(got, expected.bfloat16())


def test_any_layout() -> None:
    rotary = RotaryEmbedding(32)
    t = heads(2, 3, TIME, 64)
    expected = rotary.rotate_queries_or_keys(t)
    odd = heads(2, 3, TIME, 65)[..., 1:].copy_(t)  # odd strides, odd offset
    apart = heads(2, 3, 64, TIME).transpose(-1, -2).copy_(t)
    packed = heads(2, TIME, 3, 3 * 64).transpose(1, 2)[..., 64:128].copy_(t)
    for each in (odd, apart, packed):
        assert torch.equal(rotary.rotate_queries_or_keys(each), expected)
    moved = rotary.rotate_queries_or_keys(t.movedim(2, 0).contiguous(), seq_dim=0)
    assert torch.equal(moved.movedim(0, 2), expected)
    assert torch.equal(rotary.rotate_queries_or_keys(t, seq_dim=2), expected)
    assert rotary.rotate_queries_or_keys(t[:, :, :0]).shape == (2, 3, 0, 64)


def test_xpos_scores_do_not_depend_on_what_was_cached() -> None:
    """A shorter sequence after a longer one has its own centre."""
    rotary = RotaryEmbedding(32, use_xpos=True)
    rotary.rotate_queries_and_keys(heads(1, TIME, 32), heads(1, TIME, 32))
    short = heads(1, 10, 32)
    expected = fresh(rotary).rotate_queries_and_keys(short, short)
    assert all(map(torch.equal, rotary.rotate_queries_and_keys(short, short), expected))


@pytest.mark.parametrize("q_len", [1, 7, TIME])
def test_xpos_with_cached_keys_has_the_same_bits_as_without(q_len: int) -> None:
    rotary = RotaryEmbedding(32, use_xpos=True)
    q, k = heads(2, 3, TIME, 64), heads(2, 3, TIME, 64, seed=1)
    query, key = rotary.rotate_queries_with_cached_keys(q[:, :, TIME - q_len :], k)
    expected_query, expected_key = rotary.rotate_queries_and_keys(q, k)
    assert torch.equal(query, expected_query[:, :, TIME - q_len :])
    assert torch.equal(key, expected_key)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_xpos_with_an_offset_moves_the_queries(factor: float) -> None:
    """Their scores are those of a sequence longer by so much."""
    rotary = RotaryEmbedding(32, use_xpos=True, interpolate_factor=factor)
    q, k = heads(1, 4, 32), heads(1, TIME, 32, seed=1)
    query, key = rotary.rotate_queries_with_cached_keys(q, k, offset=4)
    longer = torch.cat((k, q), dim=1)
    expected_query, expected_key = rotary.rotate_queries_and_keys(longer, longer)
    scores = query @ key.transpose(-1, -2)
    expected = expected_query[:, TIME:] @ expected_key[:, :TIME].transpose(-1, -2)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_axial_offsets_count_though_cached() -> None:
    rotary = RotaryEmbedding(16)
    rotary.rotate_queries_or_keys(heads(1, TIME, 16))
    shifted = rotary.get_axial_freqs(4, 6, offsets=(2, 3))
    assert torch.equal(shifted, rotary.get_axial_freqs(6, 9)[2:, 3:])
    assert torch.equal(rotary.get_axial_freqs(4, 6, offsets=torch.tensor([2, 3])), shifted)


def test_a_tall_image_without_a_batch() -> None:
    rotary = RotaryEmbedding(16, freqs_for="pixel")
    freqs, t = rotary.get_axial_freqs(9, 4), heads(9, 4, 64)
    assert torch.equal(apply_rotary_emb(freqs, t), apply_rotary_emb(freqs, t[None])[0])


@pytest.mark.parametrize("use_xpos", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_compiled(use_xpos: bool, learned: bool) -> None:
    """One graph, no breaks, the same values: real arithmetic instead of complex."""
    rotary = RotaryEmbedding(32, use_xpos=use_xpos, learned_freq=learned)

    def work(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary.rotate_queries_with_cached_keys(q, k)

    compiled: Any = torch.compile(work, fullgraph=True, backend="eager")
    q, k = heads(2, 3, 8, 64), heads(2, 3, TIME, 64, seed=1)
    for got, expected in zip(compiled(q, k), work(q, k), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"dim": 1}, "dim must be at least 2, got 1"),
        ({"dim": 8, "freqs_for": "words"}, "freqs_for must be one of lang, pixel, constant"),
        ({"dim": 8, "interpolate_factor": 0.5}, "interpolate_factor must be at least 1, got 0.5"),
        ({"dim": 2, "theta_rescale_factor": 2}, "needs a dim of at least 4, got 2"),
        ({"dim": 8, "use_xpos": True, "custom_freqs": torch.ones(3)}, "needs 4 frequencies, got 3"),
    ],
)
def test_settings_refused(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RotaryEmbedding(**kwargs)


def test_calls_refused() -> None:
    plain, xpos, t = RotaryEmbedding(16), RotaryEmbedding(16, use_xpos=True), heads(1, 5, 16)
    with pytest.raises(ValueError, match="call rotate_queries_and_keys"):
        xpos.rotate_queries_or_keys(t)
    with pytest.raises(ValueError, match="for xPos"):
        plain.rotate_queries_and_keys(t, t)
    with pytest.raises(ValueError, match="for xPos"):
        plain.get_scale(torch.arange(3))
    with pytest.raises(ValueError, match="must not outnumber keys: 5 > 4"):
        plain.rotate_queries_with_cached_keys(t, t[:, :4])
    with pytest.raises(ValueError, match="got 5 and 4"):
        xpos.rotate_queries_and_keys(t, t[:, :4])
    with pytest.raises(ValueError, match="offsets must name 2 axes, got 1"):
        plain.get_axial_freqs(2, 3, offsets=(1,))
    with pytest.raises(ValueError, match="t has only 8"):
        plain.rotate_queries_or_keys(heads(1, 5, 8))
    with pytest.raises(ValueError, match="t's 16 features from start_index 4 on, got 16"):
        apply_rotary_emb(torch.zeros(5, 16), t, start_index=4)
