"""HOG against a loop over pixels; each vision transformer, at one narrow block, against timm's own forward_features."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux2.compat import ensure_torchvision
from flux2.teachers import TEACHERS, HOGTeacher, ViTConfig, ViTTeacher, build_teacher
from flux2.tensor_files import save_tensors

ensure_torchvision()
import timm  # noqa: E402 - imports torchvision

HOG_BINS = 9
VITS = [name for name, row in TEACHERS.items() if isinstance(row, ViTConfig)]
FAMILIES = ("dinov2-s", "dinov2-b-reg", "dinov3-b", "clip-b/16", "siglip2-b/16", "mae-b/16")


def loop_hog(plane, eps):
    """[8, 8] plane with a replicated border -> centred histogram of 9 bins, one pixel at a time"""
    padded = np.pad(plane, 1, mode="edge")
    votes = np.zeros(HOG_BINS)
    for i in range(8):
        for j in range(8):
            gx = (padded[i + 1, j + 2] - padded[i + 1, j]) / 2
            gy = (padded[i + 2, j + 1] - padded[i, j + 1]) / 2
            position = (math.atan2(gy, gx) % math.pi) / math.pi * HOG_BINS
            low = int(position) % HOG_BINS
            part = position - int(position)
            votes[low] += math.hypot(gx, gy) * (1 - part)
            votes[(low + 1) % HOG_BINS] += math.hypot(gx, gy) * part
    votes /= 64
    votes /= math.sqrt((votes**2).sum() + eps**2)
    return votes - votes.mean()


def test_tokens_equal_a_loop_over_pixels():
    teacher = HOGTeacher(patch=8)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    tokens = teacher(x)
    assert tokens.shape == (1, teacher.channels, 1, 1) == (1, 27, 1, 1)
    for c in range(3):
        expected = loop_hog(x[0, c].double().numpy(), teacher.cfg.eps)
        np.testing.assert_allclose(tokens[0, 9 * c : 9 * c + 9, 0, 0].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("bin_index", [0, 2, 5, 8])
def test_gradient_direction_lands_in_its_bin(bin_index):
    angle = math.pi * bin_index / HOG_BINS
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = (columns * math.cos(angle) + rows * math.sin(angle)) / 32
    cells = HOGTeacher(patch=8)(ramp.expand(1, 3, 16, 16))[0, :9, 0, 0]
    assert cells.argmax().item() == bin_index


def test_flat_pictures_and_shapes():
    teacher = HOGTeacher(patch=16)
    assert teacher(torch.zeros(2, 3, 32, 48)).abs().max() == 0
    assert teacher(torch.rand(2, 3, 32, 48)).shape == (2, 108, 2, 3)
    with pytest.raises(ValueError, match=r"multiples of 16, got \[1, 3, 24, 32\]"):
        teacher(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match="multiple of 8"):
        HOGTeacher(patch=12)


def narrow(name):
    """The row at one block of width 32; everything else as it is"""
    return dataclasses.replace(TEACHERS[name], channels=32, options={"depth": 1, "embed_dim": 32, "num_heads": 2})


@pytest.fixture
def narrow_rows(monkeypatch):
    for name in FAMILIES:
        monkeypatch.setitem(TEACHERS, name, narrow(name))


def scrambled(net, seed=1):
    """Weights unlike the seeded ones, large enough that each matters (layer scales begin at 1e-5)"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return net


def expected_tokens(net, x, patch):
    """Resized first and normalised then, read by timm, and put on the grid token by token"""
    kernel = net.patch_embed.proj.weight.shape[-1]
    h, w = (side // patch for side in x.shape[2:])
    x = F.interpolate((x + 1) / 2, (h * kernel, w * kernel), mode="bicubic")
    row = timm.get_pretrained_cfg(net.pretrained_cfg["architecture"] + "." + net.pretrained_cfg["tag"])
    x = torch.stack([(x[:, c] - row.mean[c]) / row.std[c] for c in range(3)], 1)
    features = net.forward_features(x)
    grid = torch.empty(len(x), features.shape[2], h, w)
    for i in range(h):
        for j in range(w):
            grid[:, :, i, j] = features[:, features.shape[1] - h * w + i * w + j]
    return grid


@pytest.mark.parametrize("name", VITS)
def test_rows_are_what_timm_builds(name):
    row = TEACHERS[name]
    assert row.model in timm.list_pretrained(row.model)
    with torch.device("meta"):
        net = ViTTeacher(dataclasses.replace(row, options={"depth": 1}), 16, "random").net
    assert net.embed_dim == row.channels and net.patch_embed.patch_size == (row.patch, row.patch)
    assert isinstance(net.norm, nn.LayerNorm) and net.dynamic_img_size
    assert net.num_prefix_tokens == (0 if "siglip" in name else 5 if "reg" in name or "dinov3" in name else 1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("patch", [8, 16])
def test_tokens_are_timm_s_on_the_latent_grid(name, patch):
    teacher = ViTTeacher(narrow(name), patch, "random")
    scrambled(teacher.net)
    x = torch.rand(2, 3, 2 * patch, 3 * patch) * 2 - 1
    tokens = teacher(x)
    assert tokens.shape == (2, 32, 2, 3) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, expected_tokens(teacher.net, x, patch).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["dinov2-b-reg", "dinov3-b", "siglip2-b/16"])
def test_a_change_of_a_cell_changes_its_token_most(name):
    teacher = ViTTeacher(narrow(name), 16, "random")
    x = torch.zeros(1, 3, 64, 80)
    lit = x.clone()
    lit[:, :, 32:48, 16:32] += torch.randn(3, 16, 16)
    change = (teacher(lit) - teacher(x)).square().sum(1)[0]
    assert divmod(change.argmax().item(), 5) == (2, 1)
    assert change[2, 1] > 5 * change.flatten().sort().values[-2]


def test_teachers_are_frozen():
    teacher = ViTTeacher(narrow("dinov2-s"), 16, "random")
    holder = nn.ModuleList([teacher]).train()
    assert holder.training and not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not teacher(x).requires_grad and not HOGTeacher(16).train()(x).requires_grad
    assert not HOGTeacher(16).train().training


@pytest.mark.parametrize("name", ["clip-b/16", "dinov3-b"])
def test_under_autocast_and_in_half_precision(name):
    teacher = ViTTeacher(narrow(name), 16, "random")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    exact = teacher(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = teacher(x.bfloat16())
    half = teacher.bfloat16()(x)
    for tokens in (cast, half):
        assert tokens.dtype == torch.float32 and not torch.equal(tokens, exact)
        assert F.cosine_similarity(tokens, exact, dim=1).min() > 0.99


@pytest.mark.parametrize("name", ["hog", "dinov2-b-reg", "dinov3-b"])
def test_compiles_without_graph_breaks(name):
    teacher = HOGTeacher(16) if name == "hog" else ViTTeacher(narrow(name), 16, "random")
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    torch.testing.assert_close(torch.compile(teacher, fullgraph=True, backend="aot_eager")(x), teacher(x))


def test_random_weights_are_the_same_each_time_and_draw_nothing(narrow_rows):
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="'mae-b/16' has random weights"):
        a, b = (build_teacher("mae-b/16", 16, "random") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def original_names(name, state):
    """timm's tensors as the release of that network names them, with what it holds besides"""
    state = dict(state)
    if name == "mae-b/16":
        return {"model": state}
    if name == "dinov2-b-reg":  # timm has added the class token's position to it
        state["register_tokens"] = state.pop("reg_token")
        pos_cls = torch.full((1, 1, 32), 0.5)
        state["pos_embed"] = torch.cat([pos_cls, state["pos_embed"]], 1)
        return state | {"cls_token": state["cls_token"] - pos_cls, "mask_token": torch.zeros(1, 32)}
    if name == "dinov3-b":
        renamed = {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in state.items()}
        renamed["storage_tokens"] = renamed.pop("reg_token")
        extra = {"mask_token": torch.zeros(1, 32), "rope_embed.periods": torch.ones(4)}
        return renamed | extra | {"blocks.0.attn.qkv.bias": torch.zeros(96)}
    assert name == "siglip2-b/16"
    return {f"visual.trunk.{k}": v for k, v in state.items()} | {"logit_scale": torch.zeros(())}


@pytest.mark.parametrize("name", ["dinov2-b-reg", "dinov3-b", "siglip2-b/16", "mae-b/16"])
def test_weights_come_from_a_file(name, narrow_rows, tmp_path):
    net = scrambled(ViTTeacher(narrow(name), 16, "random").net)
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    classifier = {"head.weight": torch.zeros(5, 32), "attn_pool.latent": torch.zeros(1, 1, 32)}
    save_tensors(tmp_path / "timm.safetensors", state | classifier)
    torch.save(state, tmp_path / "timm.pth")
    torch.save(original_names(name, state), tmp_path / "original.pth")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    for file in ("timm.safetensors", "timm.pth", "original.pth"):
        teacher = build_teacher(name, 16, tmp_path / file)
        torch.testing.assert_close(dict(teacher.net.state_dict()), state, rtol=0, atol=1e-6)
        torch.testing.assert_close(teacher(x), expected_tokens(net, x, 16).detach(), rtol=1e-3, atol=1e-4)


def test_wrong_weights_are_refused_in_a_sentence(narrow_rows, tmp_path):
    state = ViTTeacher(narrow("mae-b/16"), 16, "random").net.state_dict()
    file = tmp_path / "a.safetensors"

    def refused(tensors, message, name="mae-b/16"):
        save_tensors(file, tensors)
        with pytest.raises(ValueError, match=message) as caught:
            build_teacher(name, 16, file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)

    rest = {k: v for k, v in state.items() if k != "norm.bias"}
    refused(rest, r"vit_base_patch16_224\.mae: missing keys: norm\.bias$")
    refused(state | {"blocks.1.norm1.bias": torch.zeros(32)}, r"unexpected keys: blocks\.1\.norm1\.bias$")
    refused(rest | {"norm.bias": torch.zeros(3)}, r"wrong shapes: expected norm\.bias \[32\], got \[3\]")
    refused(state, r"expected patches \[32, 3, 14, 14\] .* got \[32, 3, 16, 16\]", name="dinov2-s")
    refused({"a": torch.zeros(3)}, r"missing keys: .* unexpected keys: a$")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="cut short or damaged"):
        build_teacher("mae-b/16", 16, file)
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        build_teacher("mae-b/16", 16, tmp_path / "none.pth")


def test_unknown_names_and_weights_that_cannot_be_had(monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of hog, .*, got 'dinov2b'; did you mean 'dinov2-b'\?"):
        build_teacher("dinov2b", 16)
    with pytest.raises(ValueError, match="'hog' is computed and has no weights, got a.pth"):
        build_teacher("hog", 16, "a.pth")

    def offline(name, pretrained, **options):
        assert name == "vit_base_patch16_224.mae" and pretrained
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"_224\.mae \(no network\); pass a local file .* --teacher-weights FILE"):
        build_teacher("mae-b/16", 16)
