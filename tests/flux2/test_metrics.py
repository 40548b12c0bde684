"""PSNR and SSIM against computations of their own, LPIPS against the package."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from flux2.compat import ensure_torchvision
from flux2.metrics import lpips_distance, psnr, ssim
from flux2.perceptual import LPIPS


def test_psnr_is_per_picture():
    a = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    b = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    b[2] = a[2]
    expected = [
        10 * math.log10(255**2 / np.mean((x.astype(float) - y) ** 2))
        for x, y in zip(a.numpy()[:2], b.numpy()[:2], strict=True)
    ]
    got = psnr(a, b)
    assert got.dtype == torch.float64 and got[:2].tolist() == pytest.approx(expected) and got[2] == math.inf
    one = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(one, one + 1).item() == pytest.approx(48.1308, abs=1e-4)


def written_out_ssim(x, y):
    """Wang et al. 2004 on one channel: 11-tap Gaussian of sigma 1.5, borders left out."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(a):
        return correlate1d(correlate1d(a, taps, axis=0), taps, axis=1)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def test_ssim_is_the_papers():
    a = torch.randint(0, 256, (2, 3, 24, 30), dtype=torch.uint8)
    b = (a.float() * 0.7 + torch.randint(0, 60, a.shape)).to(torch.uint8)
    expected = [
        np.mean([written_out_ssim(a[n, c].double().numpy(), b[n, c].double().numpy()) for c in range(3)])
        for n in range(2)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_small_pictures_have_no_ssim():
    x = torch.zeros(2, 3, 10, 40, dtype=torch.uint8)
    assert ssim(x, x).isnan().all()


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_input_is_named(metric):
    good = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="first argument: expected uint8 .*, got torch.float32"):
        metric(good.float(), good)
    with pytest.raises(
        ValueError, match=r"second argument: expected uint8 .* 1, 3 or 4 channels, got torch.uint8 \[1, 2, 16, 16\]"
    ):
        metric(good, good[:, :2])
    with pytest.raises(ValueError, match="equal shapes"):
        metric(good, good[:, :, :12])


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_of_each_picture_is_the_package_s(net, tmp_path):
    ensure_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips

        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = LPIPS(net, tmp_path / "w.pth")
    a = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8)
    b = (a.float() * torch.tensor([1, 0.9, 0.4]).view(3, 1, 1, 1)).to(torch.uint8)
    expected = theirs(a / 127.5 - 1, b / 127.5 - 1).flatten().detach()
    got = lpips_distance(a, b, ours)
    assert got.dtype == torch.float32 and got[0] == 0 < got[1] < got[2]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    loss = ours(a / 127.5 - 1, b / 127.5 - 1)
    torch.testing.assert_close(got.mean(), loss, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"expected uint8 \[N, C, H, W\] of 1, 3 or 4 channels, got torch.float32"):
        lpips_distance(a.float(), b.float(), ours)
    with pytest.raises(ValueError, match="equal shapes"):
        lpips_distance(a, b[:, :, :32], ours)
    with pytest.raises(ValueError, match="sides of at least 32"):
        lpips_distance(a[..., :31], b[..., :31], ours)
