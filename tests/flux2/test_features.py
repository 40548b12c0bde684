"""HOG against its definition, Inception and the scores on it against torch-fidelity, ViTs against timm's forward."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from flux2 import features
from flux2.compat import ensure_torchvision
from flux2.distances import Moments, frechet_distance, inception_score, kernel_distance, precision_recall
from flux2.features import FEATURES, build_features
from flux2.images import find_images, load_image, save_png
from flux2.teachers import VITS

ensure_torchvision()
import timm  # noqa: E402 - imports torchvision
import torch_fidelity  # noqa: E402 - as well
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402


def pictures(num=3, height=64, width=64, seed=0):
    """Smooth colour fields with some noise: uint8 [N, 3, H, W]"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 4, 4, generator=generator)
    fine = F.interpolate(coarse, (height, width), mode="bicubic") + 0.05 * torch.randn(
        num, 3, height, width, generator=generator
    )
    return (255 * fine).round().clamp(0, 255).to(torch.uint8)


def test_hog_is_a_mean_over_each_quadrant():
    hog, x = build_features("hog"), pictures(2, 48, 80)
    pool = hog(x)["pool"]
    assert pool.shape == (2, hog.channels) == (2, 120) and pool.dtype == torch.float32
    cells = hog.hog(x.float() / 127.5 - 1)  # [2, 27, 6, 10]
    for i in range(2):
        for j in range(2):
            histogram = cells[:, :, 3 * i : 3 * i + 3, 5 * j : 5 * j + 5].mean((2, 3))
            torch.testing.assert_close(pool[:, 2 * i + j : 108 : 4], histogram, rtol=1e-5, atol=1e-6)
            colour = x[:, :, 24 * i : 24 * i + 24, 40 * j : 40 * j + 40].float().mean((2, 3)) / 255
            torch.testing.assert_close(pool[:, 108 + 2 * i + j :: 4], colour, rtol=1e-5, atol=1e-6)


def test_hog_of_flat_and_striped_quadrants():
    hog = build_features("hog")
    x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    x[:, 0, :32, 32:] = 255  # red, upper right; edges between quadrants fall into cells of both
    x[:, :, 40:56, 8:24] = (torch.arange(16) // 2 % 2 * 255).to(torch.uint8)  # upright stripes, lower left
    histograms, colours = hog(x)["pool"][0].split((108, 12))
    colours = colours.view(3, 2, 2)
    assert colours[0, 0, 1] == 1 and colours[1:, 0, 1].abs().max() == 0 and colours[:, 1, 1].abs().max() == 0
    stripes = histograms.view(3, 9, 2, 2)[:, :, 1, 0]
    assert (stripes.argmax(1) == 0).all() and stripes[:, 0].min() > 0.1  # gradients across, orientation 0


def test_what_pictures_are_refused():
    hog = build_features("hog")
    for x, message in (
        (torch.zeros(1, 3, 32, 32), r"uint8 pictures \[N, 3, H, W\], got torch.float32 \[1, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"got torch.uint8 \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 3, 32, 24, dtype=torch.uint8), r"multiples of 16, got \[1, 3, 32, 24\]"),
        (torch.zeros(1, 3, 0, 32, dtype=torch.uint8), r"multiples of 16, got \[1, 3, 0, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hog(x)


def test_names():
    assert FEATURES[:2] == ("hog", "inception") and {"dinov2-l", "dinov2-b-reg"} < set(FEATURES)
    with pytest.raises(ValueError, match="expected one of hog, inception, .* got 'dinov2'; did you mean 'dinov2-"):
        build_features("dinov2")
    with pytest.raises(ValueError, match="'hog' are computed and have no weights, got w.pth"):
        build_features("hog", "w.pth")
    hog = build_features("hog")
    assert (hog.name, hog.label, hog.identity) == ("hog", "FD-HOG", "hog-v1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of the FID's Inception, with means and variances that are not 0 and 1"""
    net = build_features("inception", "random").net
    generator = torch.Generator().manual_seed(5)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.05, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    net.fc.weight.data.mul_(30)
    net.fc.bias.data.normal_(generator=generator)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return build_features("inception", weights)


def test_inception_is_torch_fidelity_s(weights, inception):
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    seen = []
    theirs.Mixed_6d.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = pictures(2, 40, 56)
    got = inception(x)
    pool, logits = theirs(x)
    assert got["pool"].shape == (2, inception.channels) == (2, 2048) and pool.std(0).mean() > 1e-3
    assert torch.equal(got["pool"], pool) and torch.equal(got["logits"], logits) and logits.shape == (2, 1008)
    branch = theirs.Mixed_6d.branch1x1  # written out, and laid out as TensorFlow does
    y = F.conv2d(seen[0], branch.conv.weight[:7])
    norm = branch.bn
    mean, var, scale, shift = (
        t[:7].view(1, 7, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    y = torch.relu((y - mean) / torch.sqrt(var + 1e-3) * scale + shift)
    assert got["spatial"].shape == (2, 7 * 17 * 17)
    spatial = got["spatial"].view(2, 17, 17, 7)
    for i, j in ((0, 0), (3, 16), (16, 5)):
        torch.testing.assert_close(spatial[:, i, j], y[:, :, i, j], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inception(x[1:])["pool"], pool[1:], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inception(x)["pool"], pool)


def test_scores_agree_with_torch_fidelity(weights, monkeypatch, tmp_path):
    """From PNG files, all through both programs. Both see pictures at 107 pixels a side instead of 299, for time."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
    inception = build_features("inception", weights)
    found = []
    for k, name in enumerate(("fake", "real")):
        x = pictures(24, 32, 32, seed=k)
        if name == "fake":
            x[8:] = (0.6 * x[8:].float() + 90).to(torch.uint8)
        for i, picture in enumerate(x):
            save_png(tmp_path / name / f"{i:02}.png", picture.permute(1, 2, 0).numpy())
        arrays = np.stack([load_image(path) for path in find_images(tmp_path / name)])
        outputs = [inception(part) for part in torch.from_numpy(arrays).permute(0, 3, 1, 2).split(8)]
        found.append({key: torch.cat([o[key] for o in outputs]) for key in outputs[0]})
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "fake"), input2=str(tmp_path / "real"), feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), isc=True, fid=True, kid=True, prc=True, isc_splits=3,
        kid_subsets=10, kid_subset_size=16, rng_seed=2020, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    fake, real = found
    moments = []
    for part in found:
        moments.append(Moments(2048))
        for x in part["pool"].split(10):
            moments[-1].add(x)
    fid = frechet_distance(*moments)
    kid = kernel_distance(fake["pool"], real["pool"], subsets=10, subset_size=16, seed=2020)
    isc = inception_score(fake["logits"], 3, 2020)
    precision, recall = precision_recall(real["pool"], fake["pool"])
    assert 0 < precision != recall < 1 and 1.1 < isc[0] < 20 and kid[0] > 2 * kid[1] > 0
    close = {
        "frechet_inception_distance": fid,
        "kernel_inception_distance_mean": kid[0],
        "kernel_inception_distance_std": kid[1],
        "inception_score_mean": isc[0],
        "inception_score_std": isc[1],
        "precision": precision,
        "recall": recall,
    }
    assert {k: expected[k] for k in close} == pytest.approx(close, rel=1e-3)


def test_features_are_frozen_and_take_any_batch(inception):
    x = pictures(3)
    for f in (build_features("hog"), inception):
        holder = torch.nn.ModuleList([f]).train()
        assert holder.training and not any(m.training for m in f.modules())
        assert not any(p.requires_grad for p in f.parameters())
        pool = f(x)["pool"]
        assert not pool.requires_grad and torch.isfinite(pool).all() and f(x[:0])["pool"].shape == (0, f.channels)
        torch.testing.assert_close(pool[2:], f(x[2:])["pool"], rtol=1e-5, atol=1e-6)
        before = x.clone()
        f(x)
        assert torch.equal(x, before)


def test_numbers_do_not_depend_on_the_program_s_precision():
    """TF32 is off while features are computed, and as it was afterwards, also after an error."""
    hog, seen = build_features("hog"), []

    def read():
        conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        return conv.fp32_precision, matmul.fp32_precision, torch.get_float32_matmul_precision()

    hog.hog.register_forward_pre_hook(lambda module, inputs: seen.append(read()))
    torch.set_float32_matmul_precision("high")
    try:
        before = read()
        hog(pictures(1))
        assert read() == before and before[1] == "tf32" and seen[0][:2] == ("ieee", "ieee")
        hog.hog.register_forward_pre_hook(lambda module, inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hog(pictures(1))
        assert read() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_are_named_by_their_content(weights, inception, tmp_path, monkeypatch):
    """Not by the kind of file; and only the published file makes a FID."""
    state = torch.load(weights)
    save_file(state, tmp_path / "w.safetensors")
    same = build_features("inception", str(tmp_path / "w.safetensors"))
    assert same.identity == inception.identity and len(inception.identity) == len("inception-") + 12
    assert inception.label == same.label == "FD-inception"
    state["Conv2d_1a_3x3.bn.running_mean"][0] += 1e-3
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "other.pth")
    assert build_features("inception", tmp_path / "other.pth").identity != inception.identity
    random = [build_features("inception", "random") for _ in range(2)]
    assert random[0].identity == random[1].identity != inception.identity and random[0].label == "FD-inception-random"
    monkeypatch.setattr(features, "FID_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    assert build_features("inception", weights).label == "FID"


def test_inception_from_torch_s_cache(weights, tmp_path, monkeypatch):
    """Never from the net: without the file, one sentence says which it is and where it is looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("the net was asked"))
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match="need weights-inception.* --feature-weights FILE.*https://") as caught:
        build_features("inception")
    assert str(cached) in str(caught.value) and "\n" not in str(caught.value)
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    with pytest.raises(ValueError, match="expected a file whose SHA-256 begins with 6726825d"):
        build_features("inception")
    monkeypatch.setattr(features, "FID_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    assert build_features("inception").label == "FID"


def test_files_that_are_not_its_weights(weights, tmp_path):
    def refused(match, kind=ValueError):
        with pytest.raises(kind, match=match) as caught:
            build_features("inception", tmp_path / "w.pth")
        assert "w.pth" in str(caught.value) and "\n" not in str(caught.value)

    refused("no such file", FileNotFoundError)
    state = torch.load(weights)
    torch.save(state | {"fc.bias": torch.zeros(1000)}, tmp_path / "w.pth")
    refused(r"not the weights of torch-fidelity's Inception, .* fc.bias \[1008\], got \[1000\]")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    refused("missing keys: .* unexpected keys: features.0.weight")
    (tmp_path / "w.pth").write_bytes(weights.read_bytes()[:100_000])
    refused("w.pth")
    (tmp_path / "w.pth").write_bytes(pickle.dumps(print, 2))  # runs nothing
    refused("not a torch file of tensors alone")


def narrow(name):
    return dataclasses.replace(VITS[name], channels=32, options={"depth": 2, "embed_dim": 32, "num_heads": 2})


def scrambled(name, path):
    """A file of weights of the narrow row, each large enough to matter, and timm's network with them"""
    row = narrow(name)
    net = timm.create_model(row.model, pretrained=False, num_classes=0, dynamic_img_size=True, **row.options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    torch.save(net.state_dict(), path)
    return net.eval()


def pil_resized(x, side=224):
    arrays = [np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).resize((side, side), Image.BICUBIC)) for p in x]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def cubic(x, a=-0.75):
    """Keys's kernel, as torch has it"""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def released_positions(table):
    """DINOv2's: 37 x 37 to 16 x 16 at a scale of 16.1 / 37, four taps a side, borders repeated"""
    centre = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    matrix = np.zeros((16, 37))
    for tap in range(-1, 3):
        source = np.floor(centre).astype(int) + tap
        np.add.at(matrix, (np.arange(16), source.clip(0, 36)), cubic(centre - source))
    grid = np.einsum("iy,jx,yxd->ijd", matrix, matrix, table[0, 1:].double().numpy().reshape(37, 37, -1))
    return torch.cat([table[0, :1], torch.from_numpy(grid.reshape(256, -1)).float()])[None]


@pytest.mark.parametrize("name", ["dinov2-l", "dinov2-b-reg", "dinov3-s", "clip-b/16", "siglip2-b/16", "mae-b/16"])
def test_vits_are_timm_s_class_token(name, tmp_path, monkeypatch):
    monkeypatch.setitem(VITS, name, narrow(name))
    net = scrambled(name, tmp_path / "w.pth")
    f = build_features(name, tmp_path / "w.pth")
    assert (f.name, f.label, f.channels) == (name, f"FD-{name}", 32) and f.identity.startswith(f"{name}-")
    x = pictures(2, 96, 150)
    pool = f(x)["pool"]
    assert pool.shape == (2, 32) and pool.dtype == torch.float32
    row = timm.get_pretrained_cfg(VITS[name].model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (row.mean, row.std))
    if name == "dinov2-l":
        table = released_positions(net.pos_embed.detach())
        monkeypatch.setattr(type(net), "_pos_embed", lambda self, y: torch.cat(
            [self.cls_token.expand(len(y), -1, -1), y.flatten(1, 2)], 1) + table)  # fmt: skip
    with torch.no_grad():
        tokens = net.forward_features((pil_resized(x) / 255 - mean) / std)
    expected = tokens.mean(1) if "siglip" in name else tokens[:, 0]
    change = (pool[0] - pool[1]).abs().max()
    assert change > 0.05  # it depends on the picture
    torch.testing.assert_close(pool, expected, rtol=0, atol=0.02 * change.item())
    torch.testing.assert_close(f(x[1:])["pool"], pool[1:], rtol=1e-4, atol=1e-5)


def test_resizing_is_pil_s_to_a_level(monkeypatch):
    """Large pictures are low-passed first, or a chequerboard would alias."""
    monkeypatch.setitem(VITS, "dinov2-s", narrow("dinov2-s"))
    f, seen = build_features("dinov2-s", "random"), []
    f.net.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    board = (torch.arange(512)[:, None] + torch.arange(512)) % 2 * 255
    x = torch.stack([board.expand(3, -1, -1).to(torch.uint8), pictures(1, 512, 512)[0]])
    f(x)
    std, mean = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
    levels = (seen[0] * std + mean) * 255
    assert (levels - pil_resized(x)).abs().max() < 1.01 and levels[0].std() < 20
    assert f.label == "FD-dinov2-s-random"


def test_vit_weights_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="w.pth: no such file"):
        build_features("dinov2-s", tmp_path / "w.pth")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(ValueError, match=r"cannot get .*small_patch14_dinov2.* \(no net\); .*--feature-weights FILE"):
        build_features("dinov2-s")
