"""quantize_head: error bounds, the layout of what it makes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec_kernels as sk
from specdec_kernels import quantize

FORMATS = ["int8", "int4", "fp8"]
ULP = torch.finfo(torch.float32).eps


def made(height: int, dim: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """[V, D] of several laws: normal, heavy tails, rows of other sizes, a row and a stretch of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(height, dim, generator=generator)
    weight[1::4] = weight[1::4] ** 3
    weight *= 10.0 ** torch.randint(-6, 7, (height, 1), generator=generator)
    weight[2] = 0
    weight[4, : dim // 2] = 0
    return weight.to(dtype).float().nan_to_num(posinf=6e4, neginf=-6e4).to(dtype)


def each_scale(head: sk.QuantizedHead) -> torch.Tensor:
    """[V, D] float64, the scale of every element."""
    scales = head.scales.double()
    if head.values.dtype == torch.uint8:
        return scales.repeat_interleave(128, 1)[:, : head.dim]
    return scales[:, None].expand(-1, head.dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 127, 128, 300, 1024])
@pytest.mark.parametrize("format", FORMATS)
def test_error_bounds(format, dim, dtype):
    weight = made(60, dim, dtype)
    head = sk.quantize_head(weight, format)
    assert head.dim == dim and head.scales.dtype == torch.float32 and bool((head.scales > 0).all())
    w, got, scale = weight.double(), head.dequantize(torch.float64), each_scale(head)
    error, most = (w - got).abs(), w.abs().amax(1)
    # Quotients and products are rounded to fp32 at most a few times.
    slack = 4 * ULP * (w.abs() + scale)
    if format == "int8":
        assert bool((error <= scale / 2 + slack).all())
        torch.testing.assert_close(head.scales.double(), (most / 127).clamp(min=2.0**-126), rtol=2 * ULP, atol=0)
    elif format == "fp8":
        assert bool((error <= torch.maximum(w.abs(), scale / 64) / 16 + slack).all())
        torch.testing.assert_close(head.scales.double(), (most / 448).clamp(min=2.0**-126), rtol=2 * ULP, atol=0)
    else:
        clipped = ((w / scale) > 7.5) | ((w / scale) < -8.5)
        assert bool((error <= scale / 2 + slack)[~clipped].all())
        # No worse than the scale that clips nothing, of which half a step is the largest error.
        padded = torch.nn.functional.pad(error, (0, -dim % 128)).unflatten(1, (-1, 128)).square().sum(2)
        peak = torch.nn.functional.pad(w.abs(), (0, -dim % 128)).unflatten(1, (-1, 128)).amax(2)
        assert bool((padded <= 128 * (peak / 14) ** 2 + 1e-30).all())


def test_int4_is_laid_out_as_documented():
    dim = 200
    head = sk.quantize_head(made(9, dim), "int4")
    assert head.values.shape == (9, 128) and head.values.dtype == torch.uint8 and head.scales.shape == (9, 2)
    got = head.dequantize()
    for v, d in [(0, 0), (3, 63), (5, 64), (6, 127), (7, 128), (8, 191), (8, 192), (0, 199)]:
        group, column = divmod(d, 128)
        byte = int(head.values[v, group * 64 + column % 64])
        q = (byte >> 4 if column >= 64 else byte & 15) - 8
        assert got[v, d] == q * head.scales[v, group]
    # What fills the last group up is 0.
    assert bool((head.values[:, 64 + 200 - 192 :] >> 4 == 8).all())


def test_whole_numbers_are_kept():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-127, 128, (20, 256), generator=generator).float()
    weight[:, 0] = 127
    assert torch.equal(sk.quantize_head(weight, "int8").dequantize(), weight)
    few = torch.randint(-7, 8, (20, 256), generator=generator).float()
    few[:, ::128] = 7
    assert torch.equal(sk.quantize_head(few, "int4").dequantize(), few)
    powers = 2.0 ** torch.randint(-9, 9, (20, 256), generator=generator)
    powers[:, 0] = 448
    assert torch.equal(sk.quantize_head(powers, "fp8").dequantize(), powers)


def test_ties_are_rounded_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert sk.quantize_head(weight).values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    weight = torch.tensor([[448.0, 17.0, 19.0, -17.0, -19.0]])  # neighbours in e4m3: 16, 18, 20
    assert sk.quantize_head(weight, "fp8").dequantize().tolist() == [[448.0, 16.0, 20.0, -16.0, -20.0]]


@pytest.mark.parametrize("laws", ["normal", "laplace"])
def test_int4_clips_where_that_pays(laws):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 512, generator=generator)
    if laws == "laplace":
        weight = weight.sign() * -torch.rand(200, 512, generator=generator).log()
    groups = weight.unflatten(1, (-1, 128))
    plain = groups.abs().amax(2, keepdim=True) / 7
    unclipped = ((groups / plain).round() * plain - groups).square().sum()
    best = torch.full(groups.shape[:2], float("inf"))
    for steps in torch.linspace(6, 14, 81):
        scale = groups.abs().amax(2, keepdim=True) / steps
        best = torch.minimum(best, ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(2))
    got = (sk.quantize_head(weight, "int4").dequantize() - weight).square().sum()
    assert got < 0.9 * unclipped and got < 1.05 * best.sum()


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_quantized_on_their_own(format, monkeypatch):
    weight = made(67, 300)
    whole = sk.quantize_head(weight, format)
    monkeypatch.setattr(quantize, "_SLICE", 1000)
    for part in (slice(None), slice(5, 30), slice(66, 67), slice(0, 0)):
        alone = sk.quantize_head(weight[part], format)
        assert torch.equal(alone.values.view(torch.uint8), whole.values[part].view(torch.uint8))
        assert torch.equal(alone.scales, whole.scales[part])
    strided = sk.quantize_head(weight.T.contiguous().T, format)
    assert torch.equal(strided.values.view(torch.uint8), whole.values.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_the_ends_of_fp32(format):
    tiny, huge = 2.0**-140, torch.finfo(torch.float32).max
    weight = torch.tensor([[0.0, 0.0], [tiny, -tiny], [huge, -huge], [1.0, tiny]])
    got = sk.quantize_head(weight, format).dequantize(torch.float64)
    assert bool(got.isfinite().all()) and bool((got[0] == 0).all()) and float(got[1].abs().max()) < 2.0**-126
    torch.testing.assert_close(got[2:], weight[2:].double(), rtol=1 / 8, atol=1e-30)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_refused(format, poison, monkeypatch):
    weight = torch.ones(50, 130)
    weight[37, 129] = weight[41, 2] = poison
    for size in (quantize._SLICE, 700):
        monkeypatch.setattr(quantize, "_SLICE", size)
        with pytest.raises(ValueError, match=r"weight: expected finite numbers, got NaN or an infinity in row 37$"):
            sk.quantize_head(weight, format)


def test_arguments_are_checked():
    weight = torch.ones(3, 4)
    for arguments, error, message in [
        ((weight.double(),), TypeError, "weight: expected dtype float32 or bfloat16 or float16, got float64"),
        ((weight[0],), ValueError, r"weight: expected shape \[V, D\], got \[4\]"),
        (([1.0],), TypeError, "weight: expected a tensor, got list"),
        ((weight, "int3"), ValueError, "dtype: expected one of 'int8', 'int4', 'fp8', got 'int3'"),
    ]:
        with pytest.raises(error, match=message):
            sk.quantize_head(*arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_a_tied_head_stays_trainable(format):
    embedding = torch.nn.Embedding(40, 130)
    before = embedding.weight.detach().clone()
    head = sk.quantize_head(embedding.weight, format)
    assert torch.equal(embedding.weight, before) and not head.scales.requires_grad
    embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad is not None


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_saved_as_safetensors(format, tmp_path):
    head = sk.quantize_head(made(12, 200), format)
    save_file({"values": head.values, "scales": head.scales}, tmp_path / "head.safetensors")
    loaded = sk.QuantizedHead(**load_file(tmp_path / "head.safetensors"), dim=head.dim)
    assert torch.equal(loaded.dequantize(), head.dequantize())
    hidden = torch.randn(2, 200, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sk.head_topk(hidden, loaded, 3).tokens, sk.head_topk(hidden, head, 3).tokens)
