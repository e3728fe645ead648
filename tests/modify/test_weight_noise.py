"""Weight noise is what independent noise on every weight, drawn afresh for each token, does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import WeightNoise, sparsify
from tests.zoo import BY_ID, call

D, H = 6, 10
SIGMAS = 5  # a correct program fails one comparison in 2 million; the seed is fixed besides


def block() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)).double()


def entering(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen


def leaving(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda *hook: seen.append(hook[-1].detach()))
    return seen


def check_standard_normal(noise: Tensor) -> None:
    """Mean 0, variance 1, and a normal's share beyond one and two deviations."""
    n = noise.numel()
    noise = noise.double().flatten()
    assert abs(noise.mean().item()) <= SIGMAS / n**0.5
    assert abs(noise.square().mean().item() - 1) <= SIGMAS * (2 / n) ** 0.5
    for bound, share in ((1.0, 0.317311), (2.0, 0.045500)):
        error = (noise.abs() > bound).double().mean().item() - share
        assert abs(error) <= SIGMAS * (share * (1 - share) / n) ** 0.5


def test_its_size_is_rho_times_the_weights_rms_times_the_norm_of_the_token() -> None:
    model = block()
    # rows of different size share one rms, which is no standard deviation: the mean is not zero
    model[1].weight.data = torch.rand(H, 1) * (model[1].weight.data + 0.5)
    x = torch.randn(1, 4, D, dtype=torch.float64) * torch.tensor([0.5, 1, 2, 4])[:, None]
    n, rho = 3000, 0.25
    shift = nn.Identity()  # instead of the norm, so that ‖x_t‖ differs from token to token
    model[0] = shift
    model[2] = nn.GELU()  # no token is silent, so that every one has a size to divide by
    handle = sparsify(model, WeightNoise(rho), inputs=x)
    z_in, down_in, y = entering(model[2]), entering(model[3]), leaving(model[3])
    model(x.expand(n, -1, -1))

    up, down = model[1], model[3]
    for weight, bias, inputs, outputs in (
        (up.weight, up.bias, x.expand(n, -1, -1), z_in[0]),
        (down.weight, down.bias, down_in[0], y[0]),
    ):
        rms = (sum(w * w for w in weight.flatten().tolist()) / weight.numel()) ** 0.5
        size = rho * rms * inputs.square().sum(-1, keepdim=True).sqrt()
        noise = (outputs - F.linear(inputs, weight, bias)) / size
        for t in range(4):
            check_standard_normal(noise[:, t])
    assert handle.rows()[0]["change"] == "ρ = 0.25 on up and down"


def covariance(samples: Tensor) -> Tensor:
    flat = samples.flatten(1)
    return flat.T @ flat / len(flat)


def test_outputs_vary_as_under_an_explicit_draw_of_the_weights_for_every_token() -> None:
    """Covariances over tokens and units, of ours, of the draws, and in theory, agree."""
    model, n, rho = block(), 20_000, 0.3
    x = torch.randn(1, 3, D, dtype=torch.float64)
    sparsify(model, WeightNoise(rho, layers=("up",)), inputs=x)
    seen = entering(model[2])
    model(x.expand(n, -1, -1))
    inputs = model[0](x)
    clean = F.linear(inputs, model[1].weight, model[1].bias)
    ours = covariance((seen[0] - clean).detach())

    std = rho * model[1].weight.square().mean().sqrt()
    draws = std * torch.randn(n, 3, H, D, dtype=torch.float64)  # E_t, added to W for token t
    explicit = covariance(torch.einsum("nthd,td->nth", draws, inputs[0]).detach())

    sizes = (std * inputs[0].norm(dim=-1)).detach().repeat_interleave(H) ** 2
    theory = torch.diag(sizes)
    # the sample covariance of normals has variance (σ_ii σ_jj + σ_ij²) / n
    error = ((torch.outer(sizes, sizes) + theory**2) / n).sqrt()
    assert bool(((ours - theory).abs() <= SIGMAS * error).all())
    assert bool(((explicit - theory).abs() <= SIGMAS * error).all())
    assert bool(((ours - explicit).abs() <= SIGMAS * 2**0.5 * error).all())


def test_every_token_and_every_pass_has_a_draw_of_its_own() -> None:
    model, x = block(), torch.randn(1, 1, D, dtype=torch.float64).expand(3, 7, D)
    sparsify(model, WeightNoise(), inputs=x)
    first, second = model(x), model(x)
    rows = torch.cat([first, second]).reshape(-1, D)
    assert len({tuple(row) for row in rows.tolist()}) == 2 * 3 * 7


def test_in_eval_mode_there_is_none() -> None:
    model, x = block(), torch.randn(2, 3, D, dtype=torch.float64)
    clean = model(x)
    handle = sparsify(model, WeightNoise(), inputs=x)
    assert not torch.equal(model(x), clean)
    model.eval()
    assert torch.equal(model(x), clean)
    model.train()
    handle.remove()
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize("layer", ["up", "down"])
def test_one_layer_alone_can_have_it(layer: str) -> None:
    model, x = block(), torch.randn(2, 3, D, dtype=torch.float64)
    z, y = entering(model[2]), leaving(model[3])
    model(x)
    sparsify(model, WeightNoise(layers=(layer,)), inputs=x)
    z2, a2, y2 = entering(model[2]), entering(model[3]), leaving(model[3])
    model(x)
    assert torch.equal(z2[0], z[0]) == (layer == "down")
    clean = F.linear(a2[0], model[3].weight, model[3].bias)
    assert torch.equal(y2[0], clean) == (layer == "up")
    assert not torch.equal(y2[0], y[0])


def test_the_noise_is_a_constant_for_the_gradient() -> None:
    model, x = block(), torch.randn(2, 3, D, dtype=torch.float64)
    weight = torch.randn(2, 3, H, dtype=torch.float64)
    sparsify(model, WeightNoise(0.5, layers=("up",)), inputs=x)
    z: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda _, args: z.append(args[0]))
    model(x)
    (grad,) = torch.autograd.grad((z[0] * weight).sum(), model[1].weight)
    expected = torch.einsum("bth,btd->hd", weight, model[0](x))
    # a sum over six tokens in another order
    torch.testing.assert_close(grad, expected, rtol=0, atol=64 * torch.finfo(grad.dtype).eps)


# --- families ----------------------------------------------------------------------------------


def weight_of(module: nn.Module) -> Tensor:
    """[out, in]"""
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("case", ["gpt2", "llama", "phi3", "opt-pre-norm", "t5-relu"])
def test_linear_layers_of_every_kind_get_their_own_size_of_noise(case: str) -> None:
    """Conv1D, gate beside up, both fused in one layer, and tokens flattened to [B·T, D]."""
    model, inputs = BY_ID[case].build()
    handle = sparsify(model, WeightNoise(0.2), inputs=inputs)
    first = handle.blocks[0]
    layers = {id(part.module): part.module for part in (first.up, first.gate, first.down) if part}
    assert len(layers) == {"llama": 3}.get(case, 2)
    seen = {key: (entering(module), leaving(module)) for key, module in layers.items()}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for _ in range(4):
        call(model, inputs)
    for key, module in layers.items():
        x, out = (torch.stack(values).double() for values in seen[key])
        weight = weight_of(module).double()
        clean = F.linear(x, weight, None if module.bias is None else module.bias.double())
        size = 0.2 * weight.square().mean().sqrt() * x.norm(dim=-1, keepdim=True)
        silent = x.norm(dim=-1) == 0
        check_standard_normal(((out - clean) / size)[~silent])


def gradient(checkpointing: bool) -> dict[str, Tensor]:
    model, inputs = BY_ID["gpt2"].build()
    model.train()
    model.config.use_cache = False
    if checkpointing:
        with warnings.catch_warnings():  # transformers 5.23 has a new name for it, 5.17 has not
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`")
            model.gradient_checkpointing_enable({"use_reentrant": False})
    sparsify(model, WeightNoise(), inputs=inputs)
    torch.manual_seed(7)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradient_checkpointing_repeats_the_same_draw() -> None:
    plain, checkpointed = gradient(False), gradient(True)
    for name, expected in plain.items():
        scale = expected.abs().max().item()
        atol = 4 * torch.finfo().eps * scale  # the same operations on the same numbers
        torch.testing.assert_close(checkpointed[name], expected, rtol=0, atol=atol)


def test_a_copy_of_the_model_is_noisy_on_its_own() -> None:
    model, x = block(), torch.randn(2, 3, D, dtype=torch.float64)
    handle = sparsify(model, WeightNoise(), inputs=x)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(model(x), model(x))
    assert not torch.equal(twin(x), twin(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WeightNoise(0), "rho=0"),
        (lambda: WeightNoise(-0.1), "rho=-0.1"),
        (lambda: WeightNoise(float("nan")), "rho=nan"),
        (lambda: WeightNoise(layers=()), "layers="),
        (lambda: WeightNoise(layers=("gate",)), "gate"),
        (lambda: WeightNoise(layers="up"), "layers='up'"),
        (lambda: WeightNoise(layers=("residual",)), "expected 'up', 'down', 'attention' or"),
    ],
)
def test_bad_options_are_named(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
