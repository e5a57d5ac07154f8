"""The compiled products: near float64, exact rows, every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation
from engine.errors import ConfigError
from engine.model import cpu_linear
from engine.model.cpu_linear import (
    MAX_INT8_FEATURES,
    WORDS_PER_PATCH,
    BF12Weight,
    Format,
    KernelLinear,
    PanelEmbedding,
    WeightMemory,
    quantize_rows,
    to_panels,
)
from engine.model.library import KernelUnavailableError, supported_variants

VARIANTS = ["avx512bf16", "avx512", "avx2"]
FORMATS: list[Format] = ["float32", "bfloat16", "int8"]
SHAPES = [(64, 64), (96, 50), (33, 7), (101, 130), (768, 96), (1, 1)]
"""in_features, out_features: with and without whole panels, words and vectors."""

NUM_ROWS = [1, 2, 3, 5, 6, 7, 13, 32, 64, 100]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Unless a test says otherwise; the number of before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    if request.param not in supported_variants("linear"):  # nothing compiled: an error, not a skip
        pytest.skip(f"this machine has no {request.param}")
    return str(request.param)


def _linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def _stored(weight_format: Format) -> torch.dtype:
    return torch.float32 if weight_format == "float32" else torch.bfloat16


def _product(x: Tensor, linear: nn.Linear, weight_format: Format) -> Tensor:
    """In float64, of the numbers that the kernel multiplies."""
    weight = linear.weight.double()
    if weight_format == "bfloat16":
        x = x.bfloat16()
    if weight_format == "int8":
        quantized, scale = quantize_rows(linear.weight)
        weight = quantized.double() * scale[:, None].double()
        largest = x.float().abs().amax(dim=-1, keepdim=True)
        x = (x.float() * (127 / largest)).round().double() * (largest.double() / 127)
    out = x.double() @ weight.T
    return out if linear.bias is None else out + linear.bias.double()


def _assert_close(actual: Tensor, expected: Tensor, terms: Tensor) -> None:
    """terms: the sum of the sizes of what is added up; float32's error is relative to that."""
    assert expected.dtype == torch.float64
    error = (actual.double() - expected).abs()
    step = 2**-8 if actual.dtype == torch.bfloat16 else 2**-23
    assert (error <= step * expected.abs() + 4e-6 * terms + 1e-7).all(), float(error.max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_near_float64(
    variant: str,
    shape: tuple[int, int],
    weight_format: Format,
    out_dtype: torch.dtype,
    bias: bool,
) -> None:
    linear = _linear(*shape, _stored(weight_format), bias)
    layer = KernelLinear(
        linear,
        WeightMemory(),
        weight_format=weight_format,
        in_dtype=torch.float32,
        out_dtype=out_dtype,
        variant=variant,
    )
    for count in (1, 2, 7, 100):
        x, residual = torch.randn(count, shape[0]), torch.randn(count, shape[1])
        expected = _product(x, linear, weight_format)
        terms = x.double().abs() @ linear.weight.double().abs().T + 1
        _assert_close(layer(x), expected, terms)
        _assert_close(layer(x, residual), expected + residual.double(), terms)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_are_near_float64(
    variant: str, weight_format: Format, activation: Activation
) -> None:
    # The product is the input itself, times what the bias adds: each activation over -12 to 12.
    linear = _linear(64, 64, _stored(weight_format))
    layer = KernelLinear(
        linear,
        WeightMemory(),
        activation=activation,
        weight_format=weight_format,
        in_dtype=torch.float32,
        out_dtype=torch.float32,
        variant=variant,
    )
    x = torch.linspace(-20, 20, 801)[:, None] * torch.randn(64)
    before = _product(x, linear, weight_format)
    expected = {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda y: F.relu(y) ** 2,
    }[activation](before)
    terms = x.double().abs() @ linear.weight.double().abs().T + 1
    slope = 2 * before.abs() + 1 if activation == "relu2" else 1.2
    _assert_close(layer(x), expected, terms * slope)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("width", [64, 100, 7])
@pytest.mark.parametrize("kind", ["layernorm", "bare layernorm", "rmsnorm", "bare rmsnorm"])
def test_norms_are_near_float64(variant: str, weight_format: Format, width: int, kind: str) -> None:
    linear = _linear(width, 48, _stored(weight_format))
    affine = not kind.startswith("bare")
    make = nn.RMSNorm if kind.endswith("rmsnorm") else nn.LayerNorm
    norm = make(width, 1e-5, elementwise_affine=affine)
    for parameter in norm.parameters():
        parameter.normal_()
    layer = KernelLinear(
        linear,
        WeightMemory(),
        norm=norm,
        weight_format=weight_format,
        in_dtype=torch.float32,
        out_dtype=torch.float32,
        variant=variant,
    )
    x = torch.randn(9, width) * 3 + 1
    normed = norm.double()(x.double())
    terms = normed.abs() @ linear.weight.double().abs().T + 1
    if weight_format == "float32":
        return _assert_close(layer(x), _product(normed, linear, "float32"), terms)
    # A row on the border between two steps may be rounded either way.
    step = {"bfloat16": 2**-8, "int8": 1 / 127}[weight_format]
    weight = linear.weight.double()
    exact = normed @ weight.T + linear.bias.double()
    error = (layer(x).double() - exact).abs()
    bound = step * normed.abs().amax(dim=1, keepdim=True) * weight.abs().sum(dim=1)
    bound += 1 / 127 * weight.abs().amax(dim=1) * normed.abs().sum(dim=1, keepdim=True)
    assert (error <= bound).all()
    assert error.mean() < bound.mean() / 4


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("shape", [(96, 200), (101, 50), (768, 64)])
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(
    variant: str, weight_format: Format, shape: tuple[int, int], in_dtype: torch.dtype
) -> None:
    layer = KernelLinear(
        _linear(*shape, _stored(weight_format)),
        WeightMemory(),
        norm=nn.LayerNorm(shape[0]),
        activation="gelu",
        weight_format=weight_format,
        in_dtype=in_dtype,
        variant=variant,
    )
    rows = torch.randn(511, shape[0]).to(in_dtype)
    residual = torch.randn(511, shape[1])
    whole = layer(rows, residual)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in [*NUM_ROWS, 193, 511]:
            for start in {0, (511 - count) // 3, 511 - count}:
                part = slice(start, start + count)
                assert torch.equal(layer(rows[part], residual[part]), whole[part])


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(64)])
def test_a_nan_is_not_lost(
    variant: str, weight_format: Format, activation: Activation | None, norm: nn.Module | None
) -> None:
    layer = KernelLinear(
        _linear(64, 64, _stored(weight_format)),
        WeightMemory(),
        norm=norm,
        activation=activation,
        weight_format=weight_format,
        variant=variant,
    )
    x = torch.randn(8, 64).to(_stored(weight_format))
    x[3, 10] = torch.nan
    assert layer(x).isnan().any(dim=1).tolist() == [row == 3 for row in range(8)]


def test_zeros_are_served_in_int8(variant: str) -> None:
    linear = _linear(64, 64, torch.float32)
    linear.weight[5] = 0
    layer = KernelLinear(linear, WeightMemory(), weight_format="int8", variant=variant)
    assert torch.equal(layer(torch.zeros(2, 64)), linear.bias.expand(2, -1))
    assert (layer(torch.randn(2, 64))[:, 5] == linear.bias[5]).all()


def test_leading_dimensions_are_kept(variant: str) -> None:
    layer = KernelLinear(_linear(64, 50, torch.float32), WeightMemory(), variant=variant)
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 50)
    assert layer(torch.randn(64)).shape == (50,)
    assert layer(torch.randn(0, 64)).shape == (0, 50)
    assert f"float32, {variant}" in repr(layer)


def test_kept_rows_have_one_memory(variant: str) -> None:
    linear = _linear(64, 50, torch.float32)
    x = torch.randn(4, 64)
    kept = KernelLinear(linear, WeightMemory(), variant=variant, kept_rows=3)
    own = KernelLinear(linear, WeightMemory(), variant=variant)
    for rows in (x[:3], x[1:3], x):
        assert torch.equal(kept(rows), own(rows))
    first, second, large = kept(x[:3]), kept(x[1:3]), kept(x)
    assert first.data_ptr() == second.data_ptr() != large.data_ptr()
    one, other = own(x), own(x)
    assert one.data_ptr() != other.data_ptr()


def test_much_scratch_space_goes_back(variant: str) -> None:
    """More than 4 MiB of it comes from the system, in each of the calls, and none of it stays."""
    inputs, rows = 1024, 1200
    linear = _linear(inputs, 8, torch.float32)
    norm = nn.LayerNorm(inputs)
    layer = KernelLinear(linear, WeightMemory(), norm=norm, variant=variant)
    x = torch.randn(rows, inputs)
    assert rows * inputs * 4 > 2**22
    assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(100)]))
    before = psutil.Process().memory_info().vms
    for _ in range(20):
        layer(x)
    assert psutil.Process().memory_info().vms - before < 10 * rows * inputs * 4


def test_what_it_cannot_read_is_refused() -> None:
    layer = KernelLinear(_linear(64, 50, torch.float32), WeightMemory())
    for x in (torch.randn(2, 63), torch.randn(2, 64).double(), torch.randn(64, 2).T):
        with pytest.raises(ValueError, match="x must be contiguous"):
            layer(x)
    for residual in (torch.randn(2, 49), torch.randn(2, 50).bfloat16(), torch.randn(50, 2).T):
        with pytest.raises(ValueError, match="residual must be contiguous"):
            layer(torch.randn(2, 64), residual)
    with pytest.raises(ConfigError, match=r"weight is torch\.float16"):
        KernelLinear(_linear(64, 50, torch.float16), WeightMemory(), in_dtype=torch.float32)
    with pytest.raises(ConfigError, match="no GroupNorm"):
        KernelLinear(_linear(64, 50, torch.float32), WeightMemory(), norm=nn.GroupNorm(1, 64))
    with pytest.raises(ConfigError, match=f"at most {MAX_INT8_FEATURES} for int8, got 70000"):
        KernelLinear(_linear(70_000, 1, torch.float32), WeightMemory(), weight_format="int8")
    with pytest.raises(KernelUnavailableError, match="'mmx' is not among"):
        KernelLinear(_linear(64, 50, torch.float32), WeightMemory(), variant="mmx")


def test_sums_of_int8_fit_at_the_limit(variant: str) -> None:
    linear = nn.Linear(MAX_INT8_FEATURES, 1, bias=False)
    linear.weight.fill_(1.0)
    layer = KernelLinear(linear, WeightMemory(), weight_format="int8", variant=variant)
    for sign in (1.0, -1.0):
        value = layer(torch.full((1, MAX_INT8_FEATURES), sign)).item()
        assert value == pytest.approx(sign * MAX_INT8_FEATURES, rel=1e-6)


def test_panels_hold_each_weight_once() -> None:
    weight = torch.arange(70 * 6, dtype=torch.float32).view(70, 6).bfloat16()
    panels = to_panels(weight)
    assert panels.shape == (2, 3, 64, 2)
    assert panels[1, 2, 5, 1] == weight[69, 5]
    assert panels[1, :, 6:].count_nonzero() == 0


def test_memory_gives_every_tensor_its_own_place() -> None:
    memory = WeightMemory()
    tensors = [torch.full((count,), float(count)) for count in (3, 1000, 2**25, 5)]
    copies = [memory.copy(tensor) for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))
    assert all(each.data_ptr() % 64 == 0 for each in copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64, 320])
def test_an_embedding_is_read_from_the_panels(variant: str, dtype: torch.dtype, width: int) -> None:
    linear = _linear(width, 150, dtype)
    head = KernelLinear(linear, WeightMemory(), variant=variant)
    ids = torch.tensor([[0, 149, 63], [64, 0, 127]])
    assert torch.equal(PanelEmbedding(head)(ids), linear.weight[ids].float())
    for wrong in (-1, 150):
        with pytest.raises(IndexError, match=r"token ids must be in \[0, 150\)"):
            PanelEmbedding(head)(torch.tensor([1, wrong]))


def test_no_embedding_is_read_from_int8(variant: str) -> None:
    head = KernelLinear(
        _linear(32, 40, torch.float32), WeightMemory(), weight_format="int8", variant=variant
    )
    with pytest.raises(ConfigError, match="int8"):
        PanelEmbedding(head)


# ---- bfloat16 in 12 bits ----


def _normal(weight: Tensor) -> None:
    weight.normal_(std=0.02)


def _zero(weight: Tensor) -> None:
    weight.zero_()


def _patched(weight: Tensor) -> None:
    """Sixteen upper bytes everywhere; others at the ends, in both of a word, in one step often."""
    upper = torch.randint(0x30, 0x40, weight.shape)
    lower = torch.randint(0, 0x100, weight.shape)
    outputs, inputs = weight.shape
    for output, column in ((0, 0), (-1, -1), (13, 4), (13, 5), *((n, 6) for n in (12, 29, 61))):
        upper[output % outputs, column % inputs] = 0x8D
    weight.copy_((upper << 8 | lower).short().view(torch.bfloat16))


def _unusual(weight: Tensor) -> None:
    """NaN with something in it, infinities, -0, and numbers that are not normal."""
    numbers = torch.tensor([0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x807F, 0x3F80])
    chosen = numbers[torch.randint(0, 8, weight.shape)]
    weight.copy_(chosen.short().view(torch.bfloat16))


FILLS = [_normal, _zero, _patched, _unusual]


def _held(
    linear: nn.Linear, variant: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[KernelLinear, KernelLinear]:
    """In 12 bits, however many patches that takes, and in 16."""
    monkeypatch.setattr(cpu_linear, "WORDS_PER_PATCH", 1)
    coded, whole = (
        KernelLinear(
            linear, WeightMemory(), in_dtype=torch.float32, variant=variant, twelve_bits=each
        )
        for each in (True, False)
    )
    assert (coded.in_12_bits, whole.in_12_bits) == (True, False)
    return coded, whole


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int16 if numbers.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("shape", [(64, 64), (33, 7), (101, 130), (768, 96), (6, 200), (1, 1)])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("threads", [1, 3])
def test_twelve_bits_lose_none(
    variant: str,
    shape: tuple[int, int],
    fill: Callable[[Tensor], None],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(threads)
    linear = _linear(*shape, torch.bfloat16)
    fill(linear.weight.data)
    coded, whole = _held(linear, variant, monkeypatch)
    read = PanelEmbedding(coded)(torch.arange(shape[1]))
    assert torch.equal(_bits(read), _bits(linear.weight.float()))
    for rows in NUM_ROWS:
        x = torch.randn(rows, shape[0])
        assert torch.equal(_bits(coded(x)), _bits(whole(x)))


def test_patches_are_the_words_without_codes(variant: str) -> None:
    weight = torch.empty(64, 1024, dtype=torch.bfloat16)
    torch.manual_seed(0)
    _patched(weight)
    held = BF12Weight.of(weight, WeightMemory(), variant)
    assert held is not None
    assert held.panels.nbytes == weight.nbytes * 12 // 16
    words = weight.contiguous().view(torch.int32)
    by_place = {each & 0xFFFFFFFF: each >> 32 for each in held.patches.tolist()}
    assert by_place == {
        step * 64 + output: int(words[output, step])
        for output, step in ((0, 0), (13, 2), (12, 3), (29, 3), (61, 3), (63, 511))
    }
    assert list(by_place) == sorted(by_place)


@pytest.mark.parametrize("too_many", [0, 1])
def test_many_patches_are_not_worth_it(variant: str, too_many: int) -> None:
    linear, after = _linear(1024, 64, torch.bfloat16), _linear(64, 64, torch.bfloat16)
    words = 64 * 1024 // 2
    rare = words // WORDS_PER_PATCH + too_many
    upper = torch.arange(0x30, 0x40).repeat(words // 8)
    upper[: 2 * rare : 2] = 0x8D
    linear.weight.data.copy_((upper << 8).short().view(torch.bfloat16).view(64, 1024))
    memory = WeightMemory()
    held = [KernelLinear(each, memory, variant=variant) for each in (linear, after)]
    assert [each.in_12_bits for each in held] == [not too_many, True]
    assert ("in 12 bits" in str(held[0])) == (not too_many)
    for layer, weight in zip(held, (linear.weight, after.weight), strict=True):
        assert torch.equal(PanelEmbedding(layer)(torch.arange(64)), weight.float())


def test_a_weight_may_be_a_view(variant: str) -> None:
    linear = _linear(64, 128, torch.bfloat16)
    kept = linear.weight.detach().clone()
    linear.weight.data = linear.weight.data.T.contiguous().T
    held = KernelLinear(linear, WeightMemory(), variant=variant)
    assert torch.equal(PanelEmbedding(held)(torch.arange(128)), kept.float())
