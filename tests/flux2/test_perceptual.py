"""LPIPS against the lpips package with random backbones, and against files of its weights."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from flux2.compat import ensure_torchvision
from flux2.perceptual import LPIPS


def peer(net):
    """lpips's own module"""
    ensure_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


def torchvision_names(network):
    return {"features." + k.split(".", 2)[2]: v for k, v in network.state_dict().items() if k.startswith("net.")}


@pytest.mark.parametrize("net", ["alex", "vgg"])
@pytest.mark.parametrize("names", ["torchvision", "lpips"])
def test_values_and_gradients_are_those_of_the_package(tmp_path, net, names):
    theirs = peer(net)
    torch.save(torchvision_names(theirs) if names == "torchvision" else theirs.state_dict(), tmp_path / "w.pth")
    ours = LPIPS(net, tmp_path / "w.pth")
    x, y = torch.rand(2, 3, 64, 48) * 2 - 1, torch.rand(2, 3, 64, 48) * 2 - 1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = ours(a, y), theirs(b, y).mean()
    got.backward()
    expected.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max().item())


@pytest.fixture
def random_lpips():
    with pytest.warns(UserWarning, match="random backbone"):
        return LPIPS("alex", "random")


def test_it_trains_the_reconstruction_and_nothing_else(random_lpips):
    x, y = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_(), (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    random_lpips.train()
    assert not random_lpips.training and not any(p.requires_grad for p in random_lpips.parameters())
    random_lpips(x, y).backward()
    assert x.grad.abs().max() > 0 and y.grad is None
    with torch.no_grad():  # the gradient is that of the value
        step = 1e-2 * x.grad / x.grad.norm()
        slope = (random_lpips(x + step, y) - random_lpips(x - step, y)) / 2e-2
    assert slope.item() == pytest.approx(x.grad.norm().item(), rel=0.1)


def test_features_that_are_all_zero_have_a_finite_gradient(random_lpips):
    """A ReLU may leave a position without any feature; x / (|x| + eps) then has a gradient of NaN."""
    with torch.no_grad():
        random_lpips.slices[0][0].bias.fill_(-1e3)
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    random_lpips(x, torch.rand(1, 3, 32, 32)).backward()
    assert torch.isfinite(x.grad).all()


def test_one_graph_and_autocast(random_lpips):
    x, y = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    compiled = torch.compile(random_lpips, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), random_lpips(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        loss = random_lpips(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, random_lpips(x, y), rtol=0.05, atol=0)


def test_errors(tmp_path, monkeypatch, random_lpips):
    with pytest.raises(ValueError, match=r"sides of at least 32, got \[1, 3, 16, 32\]"):
        random_lpips(torch.zeros(1, 3, 16, 32), torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="expected 'vgg' or 'alex', got 'squeeze'"):
        LPIPS("squeeze")
    with pytest.raises(FileNotFoundError, match="no such file"):
        LPIPS("alex", tmp_path / "missing.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: expected the weights of alex .* missing 10 of 10"):
        LPIPS("alex", tmp_path / "other.safetensors")
    wrong = torchvision_names(peer("alex")) | {"features.0.bias": torch.zeros(3)}
    save_file({k: v.contiguous() for k, v in wrong.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"slice1.0.bias: expected \[64\], got \[3\]"):
        LPIPS("alex", tmp_path / "wrong.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(FileNotFoundError, match="LPIPS needs https://.*OSError.*--lpips-weights"):
        LPIPS("alex")
