"""torch.func's transforms: the reference's numbers where there are any, otherwise an error that names the operator."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from piip_core.ops import deform_attn_grid, deform_attn_grid_reference, ms_deform_attn, ms_deform_attn_reference

SHAPES = [(3, 4), (2, 1)]
FLAT = [3, 4, 2, 1]


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


FORMS = {  # function, the same in plain PyTorch, arguments
    "given": (
        lambda value, locations, weights: ms_deform_attn(value, SHAPES, locations, weights),
        lambda value, locations, weights: ms_deform_attn_reference(value, FLAT, locations, weights),
        (random(2, 14, 2, 3), random(2, 4, 2, 2, 3, 2).sigmoid(), random(2, 4, 2, 2, 3)),
    ),
    "grid": (
        lambda value, sampling: deform_attn_grid(value, SHAPES, (2, 2), sampling, 3),
        lambda value, sampling: deform_attn_grid_reference(value, FLAT, (2, 2), sampling, 3),
        (random(2, 14, 2, 3), random(2, 4, 36)),
    ),
}
of_every_form = pytest.mark.parametrize(("function", "reference", "arguments"), FORMS.values(), ids=FORMS)


def stacked(tensors, copies=3):
    return [torch.stack([tensor * (i + 1) / copies for i in range(copies)], dim=1) for tensor in tensors]


def one_by_one(function, *batches):
    """What vmap over axis 1 of every argument is."""
    results = [function(*items) for items in zip(*(batch.unbind(1) for batch in batches), strict=True)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(map(torch.stack, zip(*results, strict=True)))


def summed_gradient(function, arguments):
    return grad(lambda *inputs: function(*inputs).square().sum(), argnums=tuple(range(len(arguments))))


@of_every_form
def test_reverse_mode_and_vmap(function, reference, arguments):
    every = tuple(range(len(arguments)))
    ours, theirs = summed_gradient(function, arguments), summed_gradient(reference, arguments)
    batches = stacked(arguments)
    expected = {
        "grad": (ours(*arguments), theirs(*arguments)),
        "vjp": (vjp(function, *arguments)[0], reference(*arguments)),
        "jacrev": (
            jacrev(function, every)(*arguments),
            torch.autograd.functional.jacobian(reference, arguments),
        ),
        "vmap": (vmap(function, in_dims=1)(*batches), one_by_one(reference, *batches)),
        "vmap, value shared": (
            vmap(function, in_dims=(None, *[1] * (len(batches) - 1)))(arguments[0], *batches[1:]),
            one_by_one(lambda *rest: reference(arguments[0], *rest), *batches[1:]),
        ),
        "vmap of grad": (vmap(ours, in_dims=1)(*batches), one_by_one(theirs, *batches)),
        "make_fx of grad": (make_fx(ours)(*arguments)(*arguments), theirs(*arguments)),
        "batched gradients": (
            torch.autograd.functional.jacobian(function, arguments, vectorize=True),
            torch.autograd.functional.jacobian(reference, arguments),
        ),
    }
    for name, (found, wanted) in expected.items():
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")


def tangent_of_a_dual(function, arguments):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])


REFUSED = {
    "jvp": lambda function, arguments: jvp(function, arguments, arguments),
    "jacfwd": lambda function, arguments: jacfwd(function)(*arguments),
    "jacfwd, last": lambda function, arguments: jacfwd(function, len(arguments) - 1)(*arguments),
    "hessian": lambda function, arguments: hessian(lambda *inputs: function(*inputs).sum())(*arguments),
    "dual_level": tangent_of_a_dual,
    "dual_level without gradients": torch.no_grad()(tangent_of_a_dual),
    "grad of grad": lambda function, arguments: grad(
        lambda value: summed_gradient(function, arguments)(value, *arguments[1:])[0].sum()
    )(arguments[0]),
    "jvp of a gradient": lambda function, arguments: jvp(summed_gradient(function, arguments), arguments, arguments),
}


@pytest.mark.parametrize("transform", REFUSED.values(), ids=REFUSED)
@of_every_form
def test_forward_mode_and_second_derivatives_are_refused_by_name(function, reference, arguments, transform):
    with pytest.raises(NotImplementedError, match=r"Deformable attention .* no second derivative, and no forward-mode"):
        transform(function, arguments)


@of_every_form
def test_inference_mode_and_tracing(function, reference, arguments):
    with torch.inference_mode():
        torch.testing.assert_close(function(*arguments), reference(*arguments))
    traced = torch.jit.trace(function, arguments, check_trace=False)
    assert "piip::" in str(traced.graph)
    torch.testing.assert_close(traced(*arguments), reference(*arguments))
