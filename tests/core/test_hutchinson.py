from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from ffprune.core.errors import NonFiniteLoss, ParameterError
from ffprune.core.hutchinson import Product, hessian_traces
from tests.oracles import hutchinson as oracle

torch.set_num_threads(1)
PRODUCTS: list[Product] = ["exact", "finite_difference"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = seeded(1)
    shapes = {"up": (4, 3), "down": (3, 4)}
    return {name: torch.randn(shape, generator=draw).to(dtype).requires_grad_() for name, shape in shapes.items()}


def batch_loss(seed: int, dtype: torch.dtype = torch.float64) -> Callable[[Mapping[str, Tensor]], Tensor]:
    x = torch.randn(8, 3, generator=seeded(seed)).to(dtype)
    y = torch.randint(3, (8,), generator=seeded(seed))

    def loss(p: Mapping[str, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(x @ p["up"].T) @ p["down"].T, y)

    return loss


def test_traces_are_those_of_the_written_out_hessian() -> None:
    parameters, first, second = mlp(), batch_loss(2), batch_loss(3)
    expected = oracle.traces(lambda p: (first(p) + second(p)) / 2, parameters)
    losses = [lambda: first(parameters), lambda: second(parameters)]
    estimates = hessian_traces(losses, parameters, 300, seeded(), "exact")
    assert list(estimates) == ["up", "down"]
    for name, estimate in estimates.items():
        assert len(estimate.samples) == 300
        assert abs(estimate.mean - expected[name]) < 4 * estimate.stderr
        # The test means nothing unless the error is small against the trace.
        assert estimate.stderr < 0.2 * abs(expected[name])


def test_a_sample_is_the_probe_times_its_hessian_product() -> None:
    parameters, loss = mlp(), batch_loss(2)
    estimates = hessian_traces(lambda: loss(parameters), parameters, 2, seeded(7), "exact")
    draw = seeded(7)
    probe = torch.cat([torch.randn(p.shape, generator=draw).double().flatten() for p in parameters.values()])
    terms = probe * (oracle.hessian(loss, parameters) @ probe)
    assert estimates["up"].samples[0] == pytest.approx(float(terms[:12].sum()))
    assert estimates["down"].samples[0] == pytest.approx(float(terms[12:].sum()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 2e-2)])
def test_finite_difference_equals_exact_probe_by_probe(dtype: torch.dtype, tolerance: float) -> None:
    parameters, first, second = mlp(dtype), batch_loss(2, dtype), batch_loss(3, dtype)
    losses = [lambda: first(parameters), lambda: second(parameters)]
    exact = hessian_traces(losses, parameters, 5, seeded(), "exact")
    cheap = hessian_traces(losses, parameters, 5, seeded(), "finite_difference")
    for name in parameters:
        torch.testing.assert_close(
            torch.tensor(cheap[name].samples),
            torch.tensor(exact[name].samples),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_quadratic_has_its_known_trace(product: Product) -> None:
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    estimate = hessian_traces(lambda: 1.5 * w.square().sum(), {"w": w}, 400, seeded(), product)["w"]
    assert abs(estimate.mean - 18) < 4 * estimate.stderr < 6


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_linear_loss_has_no_curvature(product: Product) -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    estimate = hessian_traces(lambda: w.sum(), {"w": w}, 3, seeded(), product)["w"]
    assert estimate.mean == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("product", PRODUCTS)
def test_parameters_come_back_bit_by_bit(product: Product) -> None:
    parameters, loss = mlp(torch.float32), batch_loss(2, torch.float32)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    hessian_traces(lambda: loss(parameters), parameters, 3, seeded(), product)
    for name, p in parameters.items():
        assert torch.equal(p, before[name])
        assert p.grad is None


@pytest.mark.parametrize("product", PRODUCTS)
def test_non_finite_loss_is_refused_and_parameters_restored(product: Product) -> None:
    parameters = mlp()
    before = parameters["up"].detach().clone()
    losses = [lambda: parameters["up"].square().sum(), lambda: parameters["up"].sum() * float("nan")]
    with pytest.raises(NonFiniteLoss, match=r"batch 1's loss .* nan"):
        hessian_traces(losses, {"up": parameters["up"]}, 2, seeded(), product)
    assert torch.equal(parameters["up"], before)


def test_impossible_questions_are_refused() -> None:
    parameters, loss = mlp(), batch_loss(2)

    def ask(**change: object) -> None:
        defaults = {"losses": lambda: loss(parameters), "parameters": parameters, "probes": 2}
        hessian_traces(**{"generator": seeded(), **defaults, **change})  # type: ignore[arg-type]

    with pytest.raises(ParameterError, match="exact, finite_difference"):
        ask(product="jacobi")
    with pytest.raises(ParameterError, match="standard error"):
        ask(probes=1)
    with pytest.raises(ParameterError, match="step"):
        ask(product="finite_difference", step=0.0)
    with pytest.raises(ParameterError, match="1 16-bit parameters"):
        half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        ask(product="finite_difference", parameters={"half": half})
    with pytest.raises(ValueError, match="without grad: \\['frozen'\\]"):
        ask(parameters={"frozen": torch.ones(2)})
    with pytest.raises(ValueError, match="0 losses"):
        ask(losses=[])
