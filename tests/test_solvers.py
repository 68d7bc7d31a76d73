from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.directions.solvers import choice, decompose, krylov, products, square
from rankwise.directions.solvers.edges import block_of, by_inverse
from rankwise.directions.solvers.inverses import gram_inverse, gram_matrix, lu_inverse
from rankwise.directions.solvers.krylov import Map, dominant_subspace
from rankwise.directions.triplets import Part, triplets
from rankwise.errors import UserError

SIDE = 400
SHAPES = {"square": (SIDE, SIDE), "tall": (520, SIDE), "wide": (SIDE, 520)}
K = np.arange(1, SIDE + 1)
SPECTRA = {
    "linear": K / SIDE,
    "power law": 1.0 / K,
    "steep power law": 1.0 / K**2,
    "exponential": np.exp(-K / 30),
    "jump": np.where(K <= 12, 1e-5, K / SIDE),
    "small jump": np.where(K <= 12, 3e-7, K / SIDE),
    "jump to zero": np.where(K <= 12, 0.0, K / SIDE),
    "one zero": np.where(K <= 1, 0.0, K / SIDE),
    "huge outlier": np.concatenate([[1e6], 1.0 / K[1:]]),
    "clustered": np.where(K <= SIDE - 40, 1.0, 0.5) * (1 + 1e-6 * np.sin(K)),
    "outliers": np.concatenate([[1e3, 1e2, 50], K[3:] / SIDE]),
    "rank-deficient": np.where(K <= 50, 0.0, K / SIDE),
    "repeated": np.where(K <= 200, 1.0, 0.25),
    "equal": np.ones(SIDE),
    "zero": np.zeros(SIDE),
}
TYPES = {"float32": (torch.float32, 1e-3), "float64": (torch.float64, 1e-7), "bfloat16": (torch.bfloat16, 1e-3)}
ENDS: list[Part] = ["minor", "principal"]
SHIPPED = choice.LEAST_SIDE, choice.LARGEST_SHARE["tall"]


@pytest.fixture(autouse=True, scope="module")
def small_weights_take_the_fast_way():
    """Where it is no faster it is right all the same, and an SVD by numpy takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "LEAST_SIDE", 384)
        patch.setitem(choice.LARGEST_SHARE, "tall", 8)
        yield


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def doubled(weight: torch.Tensor) -> torch.Tensor:
    """Exactly rank-deficient: a column twice."""
    weight[:, 1] = weight[:, 0]
    return weight


def centred(weight: torch.Tensor) -> torch.Tensor:
    """Rank-deficient but for rounding: rows of mean 0."""
    return weight - weight.mean(dim=1, keepdim=True)


def make(shape: tuple[int, int], spectrum: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    m, n = shape
    values = np.sort(spectrum)[::-1]
    weight = (orthonormal(m, len(values), 1) * values) @ orthonormal(n, len(values), 2).T
    return torch.tensor(weight).to(dtype)


def leak_of(vh: torch.Tensor, weight: torch.Tensor, part: Part) -> float:
    """Root mean square sine between the vectors and all singular directions up to the rank-th, by numpy's float64 SVD.

    Directions whose value is that of the rank-th to a millionth belong to the subspace: which of them is taken is free.
    """
    _, s, full = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    rank = len(vh)
    beyond = s > s[-rank] * (1 + 1e-6) + 1e-12 * s[0] if part == "minor" else s < s[rank - 1] * (1 - 1e-6)
    return float(np.linalg.norm(full[beyond] @ vh.double().numpy().T) / rank**0.5)


@pytest.mark.parametrize("part", ENDS)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_end_of_any_spectrum(shape, spectrum, kind, part):
    """Orthonormal, singular, of numpy's values, and within the stated leak, whichever method was taken."""
    dtype, tolerance = TYPES[kind]
    check(make(SHAPES[shape], SPECTRA[spectrum], dtype), 12, part, tolerance)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("change", [doubled, centred])
@pytest.mark.parametrize("shape", [(400, 400), (401, 400), (700, 400), (400, 700)], ids=str)
def test_random_weights_of_deficient_rank(shape, change, kind, rank):
    """The left vectors of a value near zero cannot be had from ``W V``: the leak of both sides is measured."""
    dtype, tolerance = TYPES[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    weight = change(weight).to(dtype)
    check(weight, rank, "minor", tolerance)
    found = decompose(weight, list(range(399, 399 - rank, -1)))
    if found.leak is not None:
        true = max(leak_of(found.V.T, weight, "minor"), leak_of(found.U.T, weight.T, "minor"))
        assert true <= 1.5 * found.leak + 1e-9


def check(weight: torch.Tensor, rank: int, part: Part, tolerance: float) -> None:
    u, s, vh = (part.double() for part in triplets(weight, rank, part))
    exact = weight.double()
    rounding = 1e-12 if weight.dtype == torch.float64 else 1e-5
    every = np.linalg.svd(exact.numpy(), compute_uv=False)
    largest = max(float(every[0]), 1e-30)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.linalg.matrix_norm(u.T @ u - eye) < rounding
    assert torch.linalg.matrix_norm(vh @ vh.T - eye) < rounding
    longer = exact @ vh.T - u * s if len(u) >= vh.shape[1] else exact.T @ u - vh.T * s
    assert torch.linalg.matrix_norm(longer) < (tolerance if len(u) == vh.shape[1] else rounding) * largest
    # What numpy's own rounding may leak, where the values are spread wide.
    gap = float(abs(np.diff(every[[-rank - 1, -rank]] if part == "minor" else every[[rank - 1, rank]])[0]))
    allowed = max(tolerance, 1e-15 * largest / gap) if gap > 1e-6 * every[-1] else tolerance
    assert leak_of(vh, weight, part) < allowed
    assert leak_of(u.T, weight.T, part) < allowed
    expected = every[::-1][:rank] if part == "minor" else every[:rank]
    np.testing.assert_allclose(s.numpy(), expected, atol=1e-7 * largest)
    captured = float(((u * s) @ vh).square().sum())
    assert abs(captured - float((expected**2).sum())) < 1e-6 * rank * largest**2


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(400, 400), (700, 400), (401, 400)], ids=str)
def test_random_weights_take_the_fast_way_and_know_their_leak(shape, seed):
    """The estimate is above the true leak, and within a hundred times of it where it is above rounding."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = decompose(weight, list(range(399, 379, -1)))
    assert found.method != "dense"
    true = max(leak_of(found.V.T, weight, "minor"), leak_of(found.U.T, weight.T, "minor"))
    assert true <= found.leak <= max(100 * true, 1e-4)


def test_a_subspace_that_has_not_converged_is_seen():
    """One refinement of a random block: the captured energy would be a poor witness, the estimate is not."""
    weight = torch.randn(700, 400, generator=torch.Generator().manual_seed(0))
    inverse = gram_inverse(weight, torch.float32, smallest=True)
    noise = torch.randn(400, 400, generator=torch.Generator().manual_seed(1)) * 0.05
    spoiled = inverse._replace(
        map=Map(lambda x: inverse.map.apply(x) + noise @ x, lambda x: inverse.map.apply_transposed(x) + noise.T @ x)
    )
    edge = by_inverse(weight, 12, spoiled, 1e-9)
    assert edge.leak > leak_of(edge.V.T, weight, "minor")


def test_what_cannot_be_had_fast_falls_back_and_says_so(caplog):
    weight = make((400, 400), SPECTRA["repeated"], torch.float32)
    with caplog.at_level(logging.INFO, "rankwise"):
        found = decompose(weight, list(range(399, 387, -1)))
    assert found.method == "dense" and found.leak is None
    assert "LU in float32 of a weight of shape (400, 400): the leak may be" in caplog.text


@pytest.mark.parametrize(
    ("shape", "picked", "method"),
    [
        ((400, 400), range(399, 379, -1), "LU in float32"),
        ((700, 400), range(399, 379, -1), "Gram matrix in float32"),
        ((400, 700), range(399, 379, -1), "Gram matrix in float32"),
        ((400, 400), range(190, 210), "dense"),
        ((400, 400), range(399, 299, -1), "dense"),
        ((40, 40), range(39, 35, -1), "dense"),
    ],
    ids=str,
)
def test_the_method_follows_shape_and_part(shape, picked, method):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    assert decompose(weight, list(picked)).method == method
    assert decompose(weight, list(picked), "dense").method == "dense"


@pytest.mark.parametrize("part", ["middle", "random"])
def test_the_gram_matrix_serves_the_middle(part, monkeypatch):
    """Where the Gram matrix holds the spectrum its eigenvectors are the SVD's; where not, the SVD is taken."""
    weight = make((520, 400), SPECTRA["linear"], torch.float32)
    by_gram = triplets(weight, 10, part, seed=3)
    monkeypatch.setattr(choice, "LEAST_GRAM", 10**6)
    by_svd = triplets(weight, 10, part, seed=3)
    torch.testing.assert_close(by_gram.S, by_svd.S, rtol=1e-6, atol=0)
    torch.testing.assert_close((by_gram.Vh * by_svd.Vh).sum(1).abs(), torch.ones(10), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(400, 400), (520, 400)], ids=str)
def test_tiny_values_that_differ_little_are_told_apart(shape):
    """Squared, those of 3e-7 that differ by a thousandth would drown in the rounding of the larger ones' squares."""
    weight = make(shape, SPECTRA["small jump"], torch.float32)
    found = decompose(weight, list(range(399, 395, -1)))
    assert found.method.startswith(("LU", "Gram"))
    assert max(leak_of(found.V.T, weight, "minor"), leak_of(found.U.T, weight.T, "minor")) < 3e-6


@pytest.mark.parametrize("rank", [12, 40])
def test_rounding_of_the_factors_is_seen(rank):
    """Left vectors that are astray where the right ones are exact: measured singly or on mixtures."""
    weight = torch.randn(400, 400, generator=torch.Generator().manual_seed(14))
    u, _, vh = np.linalg.svd(weight.double().numpy())
    left, right = (torch.tensor(side[:, -rank:].copy()) for side in (u, vh.T))
    astray = torch.linalg.qr(left + 0.01 * torch.tensor(u[:, :rank].copy()))[0]
    _, _, _, _, seen = square.pairs(weight, astray, right, lu_inverse(weight))
    assert 0.008 < seen < 0.012


def test_scale_does_not_matter():
    weight = torch.randn(400, 400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    base = decompose(weight, list(range(399, 389, -1)))
    for scale in (2.0**-140, 2.0**140):
        found = decompose(weight * scale, list(range(399, 389, -1)))
        torch.testing.assert_close(found.S / scale, base.S, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, 3, device="meta"), "meta device"),
        (torch.full((400, 400), 1e37), "do not fit into torch.float32"),
    ],
    ids=["sparse", "meta", "too large"],
)
def test_weights_that_are_refused(weight, message):
    with pytest.raises(UserError, match=message):
        triplets(weight, 1, "principal")


def test_eight_bits_and_autocast_give_the_same_triplets():
    weight = torch.randn(400, 400, generator=torch.Generator().manual_seed(13)).to(torch.float8_e4m3fn)
    plain = triplets(weight.float(), 8, "minor")
    with torch.autocast("cpu", torch.bfloat16):
        found = triplets(weight, 8, "minor")
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    strided = triplets(weight.float().T.contiguous().T, 8, "minor")
    assert all(torch.equal(one, other) for one, other in zip(strided, plain, strict=True))


def test_a_single_row_or_column():
    row = torch.randn(1, 30, generator=torch.Generator().manual_seed(6))
    for weight in (row, row.T):
        u, s, vh = triplets(weight, 1, "minor")
        torch.testing.assert_close(s, row.norm()[None])
        torch.testing.assert_close(u * s @ vh, weight)


def test_the_gram_matrix_is_the_product_and_symmetric():
    weight = torch.randn(37, 23, generator=torch.Generator().manual_seed(7))
    gram = gram_matrix(weight, torch.float64, parts=4)
    torch.testing.assert_close(gram, weight.double().T @ weight.double())
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-12)
    narrow = weight[:, :2].double()
    torch.testing.assert_close(gram_matrix(narrow, torch.float64), narrow.T @ narrow)


@pytest.mark.parametrize("smallest", [True, False])
def test_an_inverse_undoes_its_factor(smallest):
    """F^-1 F^-T (sign (W^T W - shift)) is the identity, and the shift lies outside the spectrum."""
    weight = torch.randn(60, 40, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    inverse = gram_inverse(weight, torch.float64, smallest)
    gram = weight.T @ weight
    values = np.linalg.eigvalsh(gram.numpy())
    assert inverse.shift < values[0] if smallest else inverse.shift > values[-1]
    shifted = inverse.sign * (gram - inverse.shift * torch.eye(40, dtype=torch.float64))
    undone = inverse.map.apply(inverse.map.apply_transposed(shifted))
    torch.testing.assert_close(undone, torch.eye(40, dtype=torch.float64), atol=1e-8, rtol=0)


def test_lu_takes_a_singular_weight():
    weight = torch.randn(30, 30, generator=torch.Generator().manual_seed(9))
    weight[:, 3] = 0
    inverse = lu_inverse(weight)
    assert torch.isfinite(inverse.map.apply(torch.ones(30, 1))).all()


def test_dominant_subspace_against_numpy():
    matrix = make((80, 50), 0.8 ** np.arange(50), torch.float64)
    start = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(11), dtype=torch.float64))[0]
    found, values = dominant_subspace(Map(lambda x: matrix @ x, lambda x: matrix.T @ x), start, 3, 1e-9, most=6)
    u, s, _ = np.linalg.svd(matrix.numpy())
    np.testing.assert_allclose(np.linalg.norm(u.T[:3] @ found[:, :3].numpy(), axis=0), 1, atol=1e-9)
    np.testing.assert_allclose(values[:3].numpy(), s[:3], rtol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_the_fast_way_agrees_with_the_dense_one(data):
    """Any shape and rank that the fast methods take: the same values, and the same subspace to the stated leak."""
    m = data.draw(st.integers(384, 460))
    n = data.draw(st.sampled_from([m, *range(384, 461, 7)]))
    rank = data.draw(st.integers(1, 36))
    part: Part = data.draw(st.sampled_from(ENDS))
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    fast, dense = triplets(weight, rank, part), triplets(weight, rank, part, solver="dense")
    torch.testing.assert_close(fast.S, dense.S, rtol=1e-4, atol=1e-6 * float(dense.S.max()))
    assert leak_of(fast.Vh, weight, part) < 1e-3
    assert leak_of(fast.U.T, weight.T, part) < 1e-3


def test_small_weights_and_large_shares_are_dense(monkeypatch):
    least, share = SHIPPED
    monkeypatch.setattr(choice, "LEAST_SIDE", least)
    monkeypatch.setitem(choice.LARGEST_SHARE, "tall", share)
    weight = torch.randn(700, 512, generator=torch.Generator().manual_seed(15))
    last = list(range(511, 479, -1))
    assert decompose(weight[:500, :500], [499]).method == decompose(weight, last).method == "dense"
    assert decompose(weight[:512], last).method == "LU in float32"


@pytest.mark.parametrize("kind", ["well", "ill", "dependent", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_block_becomes_orthonormal(dtype, kind):
    """By Cholesky where that holds, by Householder's reflections where it cannot; always x = q r."""
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(16), dtype=dtype)
    if kind == "ill":
        x = x * 10.0 ** torch.linspace(0, -12, 12, dtype=dtype) + x[:, :1]
    if kind in ("dependent", "zero"):
        x[:, 5:] = x[:, :1] if kind == "dependent" else 0
    q, r = krylov.orthonormal(x)
    rounding = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(q.T @ q, torch.eye(12, dtype=dtype), atol=rounding, rtol=0)
    torch.testing.assert_close(q @ r, x, atol=rounding * float(x.abs().max()), rtol=0)
    assert torch.equal(r, r.triu())


def test_products_in_parts_are_products(monkeypatch):
    """In float64 from a float32 weight, three rows at a time."""
    generator = torch.Generator().manual_seed(17)
    weight = torch.randn(20, 11, generator=generator)
    v, u = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (11, 20))
    monkeypatch.setattr(products, "CHUNK", 3 * 8 * 11)
    exact = weight.numpy().astype(np.float64)
    forward, back = exact @ v.numpy(), exact.T @ u.numpy()
    for found, expected in [
        (products.product_and_transposed(weight, v, u), (forward, back)),
        (products.gram_product(weight, v), (forward, exact.T @ forward)),
        ((products.transposed_product(weight, u),), (back,)),
    ]:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-13, atol=1e-13)


def test_block_is_wider_than_the_rank():
    assert [block_of(rank) for rank in (1, 32, 128)] == [17, 48, 160]
