"""Attention in bfloat16 on a CPU computes in float32 while a stage trains."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rankwise.attention import Float32Attention, fast_attention

attention = functional.scaled_dot_product_attention


def _inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 7, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def _masks() -> dict[str, torch.Tensor | None]:
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    added = torch.zeros(7, 7).masked_fill(~seen, -1e30)
    return {"none": None, "boolean": seen, "added": added.bfloat16(), "added in float32": added}


def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", _masks())
def test_bfloat16_is_computed_in_float32_with_its_gradients(mask: str, autocast: bool) -> None:
    mine, exact = (
        _inputs(torch.bfloat16),
        [tensor.detach().double().requires_grad_() for tensor in _inputs(torch.bfloat16)],
    )
    weights = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with Float32Attention(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = attention(*mine, attn_mask=_masks()[mask])
    reference = _written_out(*exact, mask=_masks()[mask])
    result.backward(weights)
    reference.backward(weights.double())
    assert result.dtype == torch.bfloat16
    # One rounding of the result and of each gradient, 2^-9 of it; attention in bfloat16 rounds its probabilities too.
    torch.testing.assert_close(result.double(), reference, rtol=2**-8, atol=1e-6)
    for tensor, double in zip(mine, exact, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad.double(), double.grad, rtol=2**-8, atol=1e-6)


def test_float32_under_autocast_is_not_rounded_before() -> None:
    """Rotary positions give a query and a key in float32 beside a value in bfloat16."""
    query, key, value = (tensor.detach() for tensor in _inputs(torch.float32))
    query = query + 2**-12  # lost in bfloat16
    with Float32Attention(), torch.autocast("cpu", torch.bfloat16):
        result = attention(query, key, value.bfloat16())
    assert torch.equal(result, attention(query, key, value.bfloat16().float()).bfloat16())


def test_long_rows_of_wide_heads_are_left_to_the_kernel() -> None:
    """Where it is the faster: its sums in bfloat16 differ from float32's."""
    generator = torch.Generator().manual_seed(0)
    for length, same in ((128, False), (129, True)):
        inputs = [torch.randn(1, 1, length, 128, generator=generator).bfloat16() for _ in range(3)]
        with Float32Attention():
            result = attention(*inputs)
        assert torch.equal(result, attention(*inputs)) == same
        assert torch.equal(result, attention(*(one.float() for one in inputs)).bfloat16()) != same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_as_without_it(dtype: torch.dtype) -> None:
    query, key, value = _inputs(dtype)
    before = attention(query, key, value, None, 0.0, True)
    with Float32Attention():
        after = attention(query, key, value, None, 0.0, True)
    assert after.dtype == dtype
    assert torch.equal(before, after)


def test_every_argument_of_torch_is_passed_on() -> None:
    query, key, value = (tensor.detach() for tensor in _inputs(torch.bfloat16))
    with Float32Attention():
        result = attention(query, key[:, :2], value[:, :2], is_causal=True, scale=0.3, enable_gqa=True)
        by_name = attention(query=query, key=key[:, :2], value=value[:, :2], is_causal=True, scale=0.3, enable_gqa=True)
    wide = [tensor.float() for tensor in (query, key[:, :2], value[:, :2])]
    expected = attention(*wide, is_causal=True, scale=0.3, enable_gqa=True).bfloat16()
    assert torch.equal(result, expected)
    assert torch.equal(by_name, expected)


def test_only_bfloat16_on_a_cpu_is_watched() -> None:
    """Each call of a torch function within costs some microseconds."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert isinstance(fast_attention(cpu, torch.bfloat16), Float32Attention)
    others = [(cpu, torch.float32), (cpu, torch.float64), (gpu, torch.bfloat16), (gpu, torch.float32)]
    assert not any(isinstance(fast_attention(*one), Float32Attention) for one in others)
