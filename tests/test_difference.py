"""B A x - B0 A0 x: its value, its gradients, and how it behaves in every place where a layer runs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from rankwise.directions import largest_triplets
from rankwise.directions.difference import Pairs, add_difference
from rankwise.directions.start import spectral_norm, spectral_start


def given(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3)) -> tuple[torch.Tensor, ...]:
    """Result (.., 5), input (.., 7), A (2, 7) and B (5, 2) with gradients, and the frozen A0, B0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*shape, 5), (*shape, 7), (2, 7), (5, 2), (2, 7), (5, 2)]
    values = [torch.randn(*each, generator=generator, dtype=torch.float64).to(dtype) for each in shapes]
    return tuple(value.requires_grad_(number < 4) for number, value in enumerate(values))


def reference(result, x, a, b, a0, b0, scaling):
    return result + scaling * ((x @ a.T) @ b.T - (x @ a0.T) @ b0.T)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 3)])
def test_value_and_gradients(shape):
    values = given(shape=shape)
    found = add_difference(*values[:2], Pairs(*values[2:]), 1.7)
    expected = reference(*values, 1.7)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, dtype=torch.float64)
    own = torch.autograd.grad((found * weight).sum(), values[:4])
    other = torch.autograd.grad((expected * weight).sum(), values[:4])
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (2, 3), (0, 3)])
def test_gradients_of_some_of_its_inputs(wanted):
    values = [value.detach().requires_grad_(number in wanted) for number, value in enumerate(given())]
    own = torch.autograd.grad(add_difference(*values[:2], Pairs(*values[2:]), 0.5).sum(), [values[n] for n in wanted])
    other = torch.autograd.grad(reference(*values, 0.5).sum(), [values[n] for n in wanted])
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two)


def test_numerical_gradients():
    values = given()
    pairs = values[4:]
    assert torch.autograd.gradcheck(
        lambda result, x, a, b: add_difference(result, x, Pairs(a, b, *pairs), 1.3), values[:4]
    )


def test_zero_at_the_start_whatever_the_input():
    """In float32 and with inputs of every size; B A - B0 A0 by two products would leave their rounding."""
    result, x, a, b, *_ = given(torch.float32)
    x = x * torch.logspace(-20, 20, 7)
    found = add_difference(result, x, Pairs(a, b, a.detach(), b.detach()), 3.0)
    assert torch.equal(found, result)


def test_an_input_that_is_not_contiguous():
    result, x, *factors = (value.detach() for value in given(shape=(3, 4)))
    expected = reference(result, x, *factors, 1.0)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    other = result.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    torch.testing.assert_close(add_difference(other, turned, Pairs(*factors), 1.0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_of_a_base_in_bfloat16(dtype):
    """As PEFT calls it: the input in the factors' float32, the base's result in its own dtype."""
    result, x, *factors = given(torch.float32)
    low = result.detach().to(dtype).requires_grad_()
    found = add_difference(low, x, Pairs(*factors), 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(low.float(), x, *factors, 2.0), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    assert low.grad.dtype == dtype and factors[0].grad.dtype == torch.float32


def test_autocast_computes_in_its_own_dtype_with_exact_differences():
    """The differences are formed before the cast: a step too small for bfloat16's digits of A is not lost."""
    result, x, a, b, *_ = given(torch.float32)
    a0, b0 = a.detach() * (1 + 1e-4), b.detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = add_difference(result.bfloat16(), x, Pairs(a, b, a0, b0), 1.0)
        assert found.dtype == torch.bfloat16
        update = add_difference(torch.zeros_like(result), x, Pairs(a, b, a0, b0), 1.0)
    expected = reference(torch.zeros(1), x, a, b, a0, b0, 1.0)
    assert (update - expected).norm() < 0.02 * expected.norm()
    update.sum().backward()
    assert a.grad.dtype == torch.float32
    torch.testing.assert_close(a.grad, (x.sum((0, 1))[None] * b.sum(0)[:, None]).detach(), atol=0.1, rtol=0.05)


COMPILED = """
import peft, torch
import rankwise as rw
torch.manual_seed(0)
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), rw.MiloraConfig(r=2, target_modules=["0"]))
layer = model.get_base_model()[0]
layer.lora_B["default"].weight.data *= 1.5
x = torch.randn(3, 6, requires_grad=True)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
for kind in (torch.float32, torch.bfloat16):
    with torch.autocast("cpu", kind, enabled=kind == torch.bfloat16):
        inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        own = torch.autograd.grad(compiled(x).float().square().sum(), inputs)
        other = torch.autograd.grad(layer(x).float().square().sum(), inputs)
    for one, two in zip(own, other):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
"""


def test_compiled_in_one_graph():
    """The compiler's front end finds no break; in a process of its own, where no call is checked for its shapes."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=120)


def test_twice_the_gradient_is_refused():
    values = given()
    (first,) = torch.autograd.grad(
        add_difference(*values[:2], Pairs(*values[2:]), 1.0).square().sum(), values[2], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(30, 20), (1, 9), (20, 50)])
def test_the_largest_singular_value(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    largest = float(largest_triplets(weight, 1).S[0])
    assert 0.85 * largest < spectral_norm(weight) <= largest * (1 + 1e-5)
    assert spectral_norm(torch.zeros(shape)) == 0


def test_a_start_takes_the_scaling_into_account():
    """2.5 B0 A0 is the sum of the three smallest s u v, by numpy; B0 and A0 share the values evenly."""
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(5))
    b0, a0, zero = spectral_start(weight, 3, "minor", scaling=2.5)
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(2.5 * (b0 @ a0), (u[:, -3:] * s[-3:]) @ vh[-3:], atol=1e-6)
    np.testing.assert_allclose(b0.norm(dim=0), a0.norm(dim=1), rtol=1e-5)
    assert zero == 0
