from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.ranks.sora.gated import add_gated


def parts(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """result, x, A, B and the gate, one gate closed."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 7), (4, 7), (5, 4), (4,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    made[4][2] = 0
    return [tensor.requires_grad_() for tensor in made]


def reference(result: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Tensor, scaling: float) -> Tensor:
    """The equation, with the gate as a diagonal matrix."""
    return result + scaling * x @ (b @ torch.diag(gate) @ a).T


def test_value_and_gradients():
    torch.autograd.gradcheck(lambda *tensors: add_gated(*tensors, 1.5), parts())
    ours, plain = parts(), parts()
    weights = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for made, function in ((ours, add_gated), (plain, reference)):
        output = function(*made, 1.5)
        (output * weights).sum().backward()
    torch.testing.assert_close(add_gated(*ours, 1.5), reference(*plain, 1.5), atol=1e-12, rtol=1e-12)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-12)
    assert ours[4].grad[2] != 0, "a closed gate has a gradient, by which it may open again"
    assert (ours[2].grad[2] == 0).all() and (ours[3].grad[:, 2] == 0).all()


@pytest.mark.parametrize("trained", [(), (2,), (3,), (4,), (1, 3), (0, 4)])
def test_only_what_is_asked_for_gets_a_gradient(trained):
    made = parts()
    for at, tensor in enumerate(made):
        tensor.requires_grad_(at in trained)
    expected = parts()
    output = add_gated(*made, 0.5)
    assert output.requires_grad == bool(trained)
    if trained:
        output.square().sum().backward()
        reference(*expected, 0.5).square().sum().backward()
    for at, tensor in enumerate(made):
        assert (tensor.grad is not None) == (at in trained)
        if at in trained:
            torch.testing.assert_close(tensor.grad, expected[at].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_as_linear_does(dtype):
    """bfloat16 products of float32 factors, of inputs of either dtype; gradients come in the factors' own dtype."""
    made, plain = parts(torch.float32), parts(torch.float32)
    base = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = add_gated(base, made[1].to(dtype), *made[2:], 1.5)
        hidden = torch.nn.functional.linear(plain[1].to(dtype), plain[2]) * plain[4].to(torch.bfloat16)
        expected = base + torch.nn.functional.linear(hidden, plain[3]) * 1.5
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), atol=0.1, rtol=0.03)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    for one, other in zip(made[2:], plain[2:], strict=True):
        assert one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad, other.grad, atol=0.02 * float(other.grad.abs().max()), rtol=0.05)
