"""PatchGAN against its layer list written out, the ViT discriminator against loops over heads, tokens and channels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux2 import discriminator
from flux2.discriminator import PatchDiscriminator, ViTDiscriminator, load_backbone
from flux2.teachers import ViTConfig
from flux2.tensor_files import save_tensors

IN, OUT, BIAS = 0, 1, 3
LDM = [(3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False), (512, 1, 1, True)]


def randomised(module):
    """Norms of one and zero hide what they do."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def written_out(x, tensors, norm):
    """LDM's layers, by the state dict's names"""
    for i, (_, _, stride, biased) in enumerate(LDM):
        at = 0 if i == 0 else 3 * i - 1  # convolution, norm, LeakyReLU; the first has no norm
        x = F.conv2d(x, tensors[f"main.{at}.weight"], tensors[f"main.{at}.bias"] if biased else None, stride, 1)
        if 0 < i < 4:
            x = norm(x, tensors[f"main.{at + 1}.weight"], tensors[f"main.{at + 1}.bias"])
        if i < 4:
            x = torch.where(x > 0, x, 0.2 * x)
    return x


def whitened(x, axes):
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()


def batch_norm(x, weight, bias):
    return whitened(x, (0, 2, 3)) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def group_norm(x, weight, bias):
    groups = whitened(x.unflatten(1, (32, -1)), (2, 3, 4)).flatten(1, 2)
    return groups * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(("name", "norm"), [("batch", batch_norm), ("group", group_norm)])
def test_patchgan_is_the_layers_of_ldm(name, norm):
    net = randomised(PatchDiscriminator(norm=name)).double()
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    logits = net(x)
    assert logits.shape == (2, 1, 3, 4)
    torch.testing.assert_close(logits, written_out(x, net.state_dict(), norm), rtol=1e-9, atol=1e-9)


def test_parameters_and_keys_are_those_of_ldm():
    net = PatchDiscriminator(norm="batch")
    convolutions = sum(16 * c[IN] * c[OUT] + c[BIAS] * c[OUT] for c in LDM)
    norms = 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in net.parameters()) == convolutions + norms == 2_765_633
    norm_keys = ("weight", "bias")
    keys = ["main.0.weight", "main.0.bias", "main.2.weight", *[f"main.3.{k}" for k in norm_keys]]
    keys += ["main.5.weight", *[f"main.6.{k}" for k in norm_keys]]
    keys += ["main.8.weight", *[f"main.9.{k}" for k in norm_keys], "main.11.weight", "main.11.bias"]
    assert list(net.state_dict()) == keys
    theirs = {k: torch.full_like(v, 0.5) for k, v in net.state_dict().items()}
    net.load_state_dict(theirs | {"main.3.running_mean": torch.ones(128), "main.3.num_batches_tracked": torch.ones(())})
    assert all((p == 0.5).all() for p in net.parameters())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict(theirs | {"main.3.other": torch.ones(128)})


def test_batch_norm_judges_in_eval_as_in_training_and_remembers_nothing():
    """LDM's never leaves train mode; running statistics would also keep a NaN for good."""
    net, x = PatchDiscriminator(norm="batch", width=8), torch.randn(3, 3, 32, 32)
    logits = net(x)
    net(torch.full_like(x, torch.nan))
    assert torch.equal(net.eval()(x), logits) and not list(net.buffers())


def test_initial_weights():
    net = PatchDiscriminator(width=32)
    for name, p in net.named_parameters():
        if p.ndim == 4:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(p.mean().item()) < 4 * 0.02 / p.numel() ** 0.5, name
    gains = torch.cat([m.weight for m in net.main if isinstance(m, nn.GroupNorm)])
    assert gains.mean().item() == pytest.approx(1, abs=0.01) and gains.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(("n_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_field_and_no_more(n_layers, field):
    """Of the convolutions: statistics, which look at the whole picture, are taken out."""
    net = PatchDiscriminator(2, width=4, n_layers=n_layers).double()
    net.main = nn.Sequential(*(m for m in net.main if not isinstance(m, nn.GroupNorm)))
    x = torch.randn(1, 2, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = net(x)
    middle = logits.shape[2] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle - 1], x)
    for axis in (2, 3):
        seen = gradient.abs().amax([a for a in range(4) if a != axis]).nonzero()[:, 0]
        assert len(seen) == field and seen[-1] - seen[0] == field - 1


def test_group_norm_keeps_pictures_apart_and_batch_norm_does_not():
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for norm, apart in (("group", True), ("batch", False)):
        net = PatchDiscriminator(width=8, norm=norm).double()
        same = torch.allclose(net(x), torch.cat([net(x[:1]), net(x[1:])]), atol=1e-12)
        assert same is apart, norm


def test_any_channels_width_and_depth():
    assert PatchDiscriminator(32, width=5, n_layers=2)(torch.randn(1, 32, 12, 16)).shape == (1, 1, 1, 2)
    net = PatchDiscriminator(width=4, n_layers=5)
    assert [m.out_channels for m in net.main if isinstance(m, nn.Conv2d)] == [4, 8, 16, 32, 32, 32, 1]


def test_patchgan_refuses_what_it_cannot_take():
    net = PatchDiscriminator(width=4)
    assert net(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"sides of at least 24, got \[1, 3, 24, 23\]"):
        net(torch.zeros(1, 3, 24, 23))
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\].*got \[1, 4, 32, 32\]"):
        net(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="norm: expected group or batch, got 'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="n_layers: expected at least 1, got 0"):
        PatchDiscriminator(n_layers=0)


@pytest.fixture
def vit():
    """Tiny backbone whose weights are large enough to matter, heads of all-different parameters; fp64, eval."""
    backbone = load_backbone("random-tiny")
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.2 * torch.randn_like(p))
    net = randomised(ViTDiscriminator(backbone)).double()
    net(torch.zeros(1, 3, 32, 32, dtype=torch.float64))  # a power iteration, now that the weights are others
    return net.eval()


def loop_block(x, block, size):
    """[D, L] -> spectral convolution around the sequence, norm over tokens, LeakyReLU"""
    power = block[0].parametrizations.weight
    kernel = power.original.detach().numpy()  # [D, D, size]
    sigma = power[0]._u.numpy() @ kernel.reshape(len(kernel), -1) @ power[0]._v.numpy()
    out = np.zeros_like(x) + block[0].bias.detach().numpy()[:, None]
    for tap in range(size):
        out += kernel[:, :, tap] / sigma @ np.roll(x, size // 2 - tap, axis=1)
    for channel in range(len(out)):
        row = out[channel]
        row = (row - row.mean()) / np.sqrt(row.var() + 1e-6)
        row = row * block[1].weight[channel].item() + block[1].bias[channel].item()
        out[channel] = np.where(row > 0, row, 0.2 * row)
    return out


def test_vit_discriminator_equals_loops(vit):
    x = torch.rand(2, 3, 20, 24, dtype=torch.float64) * 2 - 1
    resized = F.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        resized[:, c] = ((resized[:, c] + 1) / 2 - mean) / std
    net, maps = vit.backbone, []
    tokens = net._pos_embed(net.patch_embed(resized))
    for block in net.blocks:
        tokens = block(tokens)
        maps.append(tokens[:, 1:].detach().transpose(1, 2).numpy())  # without the class token
    got = vit(x)
    assert got.shape == (2, 5, 16) and vit.blocks == [0, 1, 2, 3]
    for i, head in enumerate(vit.heads):
        for n in range(2):
            h = loop_block(maps[min(i, 3)][n], head.point, 1)
            h = (loop_block(h, head.line, 9) + h) / np.sqrt(2)
            weight = head.out.weight.detach().numpy()[:, :, 0]
            assert np.linalg.norm(weight) == pytest.approx(1)  # a row's spectral norm is its length
            np.testing.assert_allclose(got[n, i].detach().numpy(), (weight @ h)[0] + head.out.bias.item(), atol=1e-6)


def test_spectral_norm_is_the_largest_singular_value(vit):
    vit.train()
    for _ in range(100):
        vit(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    for head in vit.eval().heads:
        for conv in (head.point[0], head.line[0]):
            assert torch.linalg.svdvals(conv.weight.flatten(1))[0].item() == pytest.approx(1, abs=1e-3)


def test_gradient_reaches_pixels_and_heads_but_not_the_backbone(vit):
    x = (torch.rand(2, 3, 24, 24, dtype=torch.float64) * 2 - 1).requires_grad_()
    before = {k: v.clone() for k, v in vit.backbone.state_dict().items()}
    vit(x).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in vit.backbone.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for h in vit.heads for p in (h.out.bias, h.line[0].bias))
    step = 1e-6 * x.grad / x.grad.norm()
    with torch.no_grad():
        slope = (vit(x + step).square().mean() - vit(x - step).square().mean()) / 2e-6
    assert slope.item() == pytest.approx(x.grad.norm().item(), rel=1e-5) and slope > 1e-6
    torch.optim.SGD(vit.parameters(), 1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in vit.backbone.state_dict().items())


def test_what_is_saved_and_trained_is_the_heads(vit):
    assert all(key.startswith("heads.") for key in vit.state_dict())
    assert all(name.startswith("heads.") for name, _ in vit.named_parameters())
    twin = ViTDiscriminator(vit.backbone).double().eval()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert not torch.equal(twin(x), vit(x))
    twin.load_state_dict(vit.state_dict())
    assert torch.equal(twin(x), vit(x))
    vit.train().requires_grad_(True)
    assert not vit.backbone.training and not any(p.requires_grad for p in vit.backbone.parameters())
    assert {p.dtype for p in vit.float().backbone.parameters()} == {torch.float32}  # .to and its kin take it along


def test_blocks_are_those_of_rae_at_depth_twelve():
    from timm.models.vision_transformer import VisionTransformer

    deep = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=12, num_heads=2, num_classes=0)
    assert ViTDiscriminator(deep).blocks == [2, 5, 8, 11]


def test_bf16_pixels_are_resized_in_fp32():
    net, x = ViTDiscriminator(load_backbone("random-tiny")), (torch.rand(1, 3, 20, 24) * 2 - 1).bfloat16()
    for got, expected in zip(net.tokens(x), net.tokens(x.float()), strict=True):
        assert torch.equal(got, expected)


def test_spectral_norm_stays_out_of_autocast():
    """A GPU's autocast would take the power iteration to bf16."""
    net, seen = ViTDiscriminator(load_backbone("random-tiny")), []
    for name, module in net.named_modules():
        if name.endswith("parametrizations.weight"):
            module.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.rand(1, 3, 32, 32))
    assert seen == [False] * 15


def test_eval_leaves_the_power_iteration_alone(vit):
    x, before = torch.rand(1, 3, 32, 32, dtype=torch.float64), {k: v.clone() for k, v in vit.state_dict().items()}
    vit(x)
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    vit.train()(x)
    assert any(not torch.equal(v, before[k]) for k, v in vit.state_dict().items())


@pytest.mark.parametrize(
    ("make", "autocast"),
    [
        (lambda: PatchDiscriminator(width=8), False),
        (lambda: PatchDiscriminator(width=8), True),
        (lambda: ViTDiscriminator(load_backbone("random-tiny")), True),
    ],
)
def test_one_graph_of_the_same_values(make, autocast):
    net = make()
    x, values = torch.rand(2, 3, 32, 32) * 2 - 1, []
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for f in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.load_state_dict(state)  # the spectral norms' vectors move
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = f(leaf)
        values.append([logits, *torch.autograd.grad(logits.float().square().mean(), [leaf, *net.parameters()])])
        assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3 * a.abs().max().item() if autocast else 1e-6)


def test_weights_come_from_a_file_of_the_right_tensors(tmp_path, monkeypatch):
    import timm
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    row = ViTConfig(model="vit_small_patch8_224.dino", channels=8, patch=8, options=shape)
    monkeypatch.setitem(discriminator.BACKBONES, "dino-s/8", row)
    source = VisionTransformer(**shape, num_classes=0)
    save_tensors(tmp_path / "w.safetensors", source.state_dict())
    loaded = load_backbone("dino-s/8", tmp_path / "w.safetensors")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert torch.equal(load_backbone("dino-s/8", tmp_path / "w.pth").pos_embed, source.pos_embed)

    wrong = source.state_dict()
    del wrong["norm.bias"]
    save_tensors(tmp_path / "w.safetensors", wrong)
    with pytest.raises(ValueError, match="not the weights of vit_small_patch8_224.dino: missing keys: norm.bias"):
        load_backbone("dino-s/8", tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        load_backbone("dino-s/8", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="random-tiny: has no weights to load, got w.pth"):
        load_backbone("random-tiny", "w.pth")
    with pytest.raises(ValueError, match="backbone: expected one of dino-s/8, random-tiny, got 'dino'"):
        load_backbone("dino")

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ValueError, match=r"cannot get the weights .*\(no route\).*--gan.backbone-weights"):
        load_backbone()


def test_random_backbone_is_the_same_each_time_and_draws_nothing():
    """It is not saved: a resumed run must find the one it had."""
    torch.manual_seed(3)
    first, after = load_backbone("random-tiny").state_dict(), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(v, first[k]) for k, v in load_backbone("random-tiny").state_dict().items())


def test_vit_discriminator_refuses_other_channels(vit):
    with pytest.raises(ValueError, match=r"expected pixels \[N, 3, H, W\], got \[1, 4, 32, 32\]"):
        vit(torch.zeros(1, 4, 32, 32))
