"""Published weights against a second implementation of their networks; our own files; what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from flux2 import TRANSFORMERS, SiT, TransformerConfig
from flux2.checkpoints_transformer import (
    from_published,
    load_projector,
    load_transformer,
    reverse_time,
    save_transformer,
    transformer_to_dict,
)

WIDTH, HEADS, DEPTH, CLASSES, CHANNELS, SIDE = 48, 4, 2, 5, 6, 4  # SIDE: of the grid of tokens


@pytest.fixture(autouse=True)
def row(monkeypatch):
    """A row from which to know the heads, where nothing else tells them."""
    monkeypatch.setitem(TRANSFORMERS, "row", TransformerConfig(width=WIDTH, depth=DEPTH, heads=HEADS, repa_depth=1))


# The networks of SiT, LightningDiT and RAE once more, as functions of their files


def pos_embed(width):
    """Columns first, then rows, sines before cosines."""
    table = torch.zeros(1, SIDE * SIDE, width)
    for n in range(SIDE * SIDE):
        for axis, place in enumerate((n % SIDE, n // SIDE)):
            for i in range(width // 4):
                angle = place / 10000 ** (i / (width // 4))
                table[0, n, axis * width // 2 + i] = math.sin(angle)
                table[0, n, axis * width // 2 + width // 4 + i] = math.cos(angle)
    return table


def rope_tables(head_dim):
    """Half of the channels turn with the row, half with the column, each frequency for two neighbours."""
    angles = torch.zeros(SIDE * SIDE, head_dim)
    for n in range(SIDE * SIDE):
        for channel in range(head_dim):
            place = n // SIDE if channel < head_dim // 2 else n % SIDE
            angles[n, channel] = place * 10000 ** (-2 * (channel % (head_dim // 2) // 2) / (head_dim // 2))
    return angles.cos(), angles.sin()


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(p, name, x):
    if (weight := p.get(f"{name}.weight")) is not None:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


def attend(p, name, x, heads, rope):
    b, n, d = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    if f"{name}.q_norm.weight" in p:
        q, k = norm(p, f"{name}.q_norm", q), norm(p, f"{name}.k_norm", k)
    if f"{rope}.freqs_cos" in p:
        cos, sin = p[f"{rope}.freqs_cos"], p[f"{rope}.freqs_sin"]
        q, k = (t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin for t in (q, k))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(d // heads)).exp()
    y = weights / weights.sum(-1, keepdim=True) @ v
    return linear(p, f"{name}.proj", y.transpose(1, 2).reshape(b, n, d))


def block(p, i, x, c, heads, rope):
    s1, a1, g1, s2, a2, g2 = linear(p, f"blocks.{i}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
    x = x + g1 * attend(p, f"blocks.{i}.attn", norm(p, f"blocks.{i}.norm1", x) * (1 + a1) + s1, heads, rope)
    h = norm(p, f"blocks.{i}.norm2", x) * (1 + a2) + s2
    if f"blocks.{i}.mlp.w12.weight" in p:
        a, b = linear(p, f"blocks.{i}.mlp.w12", h).chunk(2, -1)
        return x + g2 * linear(p, f"blocks.{i}.mlp.w3", F.silu(a) * b)
    return x + g2 * linear(p, f"blocks.{i}.mlp.fc2", F.gelu(linear(p, f"blocks.{i}.mlp.fc1", h), approximate="tanh"))


def tokens(p, name, z):
    weight = p[f"{name}.proj.weight"]
    return F.conv2d(z, weight, p[f"{name}.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def published(p, z, t, y):
    """What the code that wrote p gives; t and the sign as that code has them. (output, tokens after the first block)"""
    p = {k: v.double() for k, v in p.items()}
    z, t = z.double(), t.double()
    if "t_embedder.W" in p:
        angles = 2 * math.pi * t[:, None] * p["t_embedder.W"]
        features = torch.cat((angles.sin(), angles.cos()), 1)
    else:
        angles = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        features = torch.cat((angles.cos(), angles.sin()), 1)
    time = linear(p, "t_embedder.mlp.2", F.silu(linear(p, "t_embedder.mlp.0", features)))[:, None]
    c = time + p["y_embedder.embedding_table.weight"][y][:, None]
    ddt = "s_embedder.proj.weight" in p
    if ddt:
        c = F.silu(c)
    x = tokens(p, "s_embedder" if ddt else "x_embedder", z) + p["pos_embed"]
    seen = []
    for i in range(DEPTH):
        x = block(p, i, x, c, HEADS, "enc_feat_rope" if ddt else "feat_rope")
        seen.append(x)
    if ddt:
        c = linear(p, "s_projector", F.silu(time + x))
        x = block(p, DEPTH, tokens(p, "x_embedder", z), c, 2, "dec_feat_rope")
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
    out = linear(p, "final_layer.linear", norm(p, "final_layer.norm_final", x) * (1 + scale) + shift)
    patch = p["x_embedder.proj.weight"].shape[-1]
    out = out.reshape(len(z), SIDE, SIDE, patch, patch, -1)
    image = torch.einsum("nhwpqc->nchpwq", out).reshape(len(z), -1, SIDE * patch, SIDE * patch)
    return image[:, :CHANNELS], seen[0]


def weights(patch=1, sigma=False, rms=False, swiglu=False, rope=False, qk_norm=False, head=0):
    """A file's tensors, random."""
    p = {}

    def add(name, out, fan_in, *kernel):
        p[f"{name}.weight"] = torch.randn(out, fan_in, *kernel) / (fan_in * math.prod(kernel)) ** 0.5
        p[f"{name}.bias"] = 0.3 * torch.randn(out)

    widths = [WIDTH] * DEPTH + ([head] if head else [])
    for i, d in enumerate(widths):
        add(f"blocks.{i}.attn.qkv", 3 * d, d)
        add(f"blocks.{i}.attn.proj", d, d)
        add(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
        hidden = int(2 / 3 * 4 * d)
        for name, out, fan_in in (
            (("w12", 2 * hidden, d), ("w3", d, hidden)) if swiglu else (("fc1", 4 * d, d), ("fc2", d, 4 * d))
        ):
            add(f"blocks.{i}.mlp.{name}", out, fan_in)
        norms = {f"blocks.{i}.norm{j}": d for j in (1, 2) if rms}
        norms |= {f"blocks.{i}.attn.{n}_norm": d // HEADS for n in "qk" if qk_norm}
        p |= {f"{name}.weight": 1 + 0.3 * torch.randn(width) for name, width in norms.items()}
    last = widths[-1]
    if rms:
        p["final_layer.norm_final.weight"] = 1 + 0.3 * torch.randn(last)
    add("final_layer.linear", patch**2 * CHANNELS * (1 + sigma), last)
    add("final_layer.adaLN_modulation.1", 2 * last, last)
    add("x_embedder.proj", last, CHANNELS, patch, patch)
    add("t_embedder.mlp.0", WIDTH, 512 if head else 256)
    add("t_embedder.mlp.2", WIDTH, WIDTH)
    p["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, WIDTH)
    p["pos_embed"] = pos_embed(WIDTH)
    if head:
        add("s_embedder.proj", WIDTH, CHANNELS, patch, patch)
        add("s_projector", head, WIDTH)
        p["t_embedder.W"] = torch.randn(256)
    if rope:
        for name, width in (
            {"enc_feat_rope": WIDTH // HEADS, "dec_feat_rope": head // 2}.items()
            if head
            else (("feat_rope", WIDTH // HEADS),)
        ):
            p[f"{name}.freqs_cos"], p[f"{name}.freqs_sin"] = rope_tables(width)
    return p


FILES = {
    "SiT": ("sit", {"patch": 2, "sigma": True}),
    "DiT": ("dit", {"patch": 2, "sigma": True}),
    "REPA": ("repa", {"patch": 2}),
    "LightningDiT": ("lightningdit", {"rms": True, "swiglu": True, "rope": True}),
    "LightningDiT, norms of queries": ("lightningdit", {"rms": True, "swiglu": True, "rope": True, "qk_norm": True}),
    "LightningDiT, rope alone": ("lightningdit", {"rope": True}),
    "RAE": ("rae", {"rms": True, "swiglu": True, "rope": True, "head": 64}),
}


def inputs(patch=1):
    z = torch.randn(3, CHANNELS, SIDE * patch, SIDE * patch)
    return z, torch.tensor([0.03, 0.4, 0.98]), torch.tensor([0, 3, CLASSES])


@pytest.mark.parametrize("name", FILES)
def test_published_weights_give_what_their_code_gives(name, tmp_path):
    convention, switches = FILES[name]
    p = weights(**switches)
    save_file(p, tmp_path / "a.safetensors")
    model = load_transformer(tmp_path / "a.safetensors", convention=convention)
    assert not model.training and all(q.requires_grad for q in model.parameters())
    z, t, y = inputs(switches.get("patch", 1))
    z.requires_grad_()
    v, features = model(z, t, y, return_features=True)
    backward = convention in ("sit", "lightningdit")
    theirs = 1 - t if backward else 999 * t if convention == "dit" else t
    expected, first = published(p, z, theirs, y)
    expected = -expected if backward else expected
    assert expected.std() > 0.3
    atol = 1e-4 if convention == "dit" else 1e-5  # cosines of up to 999 in fp32
    torch.testing.assert_close(v.double(), expected, rtol=1e-5, atol=atol)
    torch.testing.assert_close(features.double(), first, rtol=1e-5, atol=atol)
    (got,), (dz,) = (torch.autograd.grad(out.double().square().sum(), z) for out in (v, expected))
    torch.testing.assert_close(got, dz, rtol=1e-4, atol=10 * atol)


def test_the_convention_matters():
    p = weights(patch=2)
    z, t, y = inputs(2)
    out = {}
    for convention in ("sit", "repa"):
        fields, tensors = from_published(p, convention)
        model = SiT(TransformerConfig(**fields["config"]), fields["in_channels"], fields["num_classes"])
        model.load_state_dict(tensors)
        out[convention] = model(z, t, y)
    assert (out["sit"] - out["repa"]).abs().max() > 0.1
    assert (out["sit"] + out["repa"]).abs().max() > 0.1  # time is more than the sign


def test_reversed_time_in_the_weights_is_exact():
    weight, t = torch.randn(7, 256, dtype=torch.float64), torch.linspace(0, 1, 11, dtype=torch.float64)
    w = (-math.log(10000.0) / 128 * torch.arange(128)).exp().double()

    def features(t):
        return torch.cat((torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)), 1)

    torch.testing.assert_close(features(t) @ reverse_time(weight).T, features(1 - t) @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reverse_time(reverse_time(weight)), weight, rtol=1e-12, atol=1e-12)
    assert reverse_time(weight.float()).dtype == torch.float32


def test_training_checkpoints_give_their_average(tmp_path):
    p, other = weights(patch=2), weights(patch=2)
    content = {"model": other, "ema": {f"module.{k}": v for k, v in p.items()}, "steps": 7}
    torch.save(content, tmp_path / "a.pt")
    save_file(p, tmp_path / "a.safetensors")
    a, b = (load_transformer(tmp_path / f, convention="repa").state_dict() for f in ("a.pt", "a.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_repa_projector_is_read_and_left_out_of_the_model(tmp_path):
    p = weights(patch=2)
    for i, (out, fan_in) in {0: (32, WIDTH), 2: (32, 32), 4: (20, 32)}.items():
        p[f"projectors.0.{i}.weight"], p[f"projectors.0.{i}.bias"] = torch.randn(out, fan_in), torch.randn(out)
    save_file(p, tmp_path / "a.safetensors")
    x = torch.randn(2, 5, WIDTH)
    expected = linear(p, "projectors.0.0", x)
    for i in (2, 4):
        expected = linear(p, f"projectors.0.{i}", F.silu(expected))
    torch.testing.assert_close(load_projector(tmp_path / "a.safetensors")(x), expected)
    model = load_transformer(tmp_path / "a.safetensors", convention="repa")
    assert not any("projector" in k for k in model.state_dict())
    save_transformer(model, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: expected projectors\.0\.0\.weight .*, got no projector"):
        load_projector(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["row", "RAE", "flux2"])
def test_own_file_carries_any_shape(name, tmp_path):
    if name == "flux2":
        cfg = TransformerConfig(width=48, depth=2, heads=2, repa_depth=1, block="flux2", sincos=False, time_scale=1e3)
    else:
        cfg = TRANSFORMERS["row"] if name == "row" else TransformerConfig(
            **from_published(weights(**FILES["RAE"][1]), "rae")[0]["config"]
        )  # fmt: skip
    model = SiT(cfg, 3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    save_transformer(model, tmp_path / "deep" / "a.safetensors")
    back = load_transformer(tmp_path / "deep" / "a.safetensors")
    assert back.cfg == cfg and transformer_to_dict(back) == transformer_to_dict(model)
    assert not any(t.is_meta for t in (*back.parameters(), *back.buffers()))
    z, t, y = torch.randn(2, 3, 4, 6), torch.rand(2), torch.tensor([1, 2])
    assert torch.equal(back(z, t, y), model(z, t, y))
    half = load_transformer(tmp_path / "deep" / "a.safetensors", dtype=torch.bfloat16)
    assert half(z.bfloat16(), t, y).dtype == torch.bfloat16
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.safetensors"]
    with pytest.raises(ValueError, match="convention: expected None for a file of ours, got 'sit'"):
        load_transformer(tmp_path / "deep" / "a.safetensors", convention="sit")


def change(p, **tensors):
    return {k: v for k, v in (p | {k.replace("__", "."): v for k, v in tensors.items()}).items() if v is not None}


@pytest.mark.parametrize(
    ("convention", "switches", "changed", "message"),
    [
        (None, {}, {}, "convention: expected one of sit, lightningdit, repa, rae, dit for a file that is not ours"),
        ("SiT", {}, {}, "convention: expected one of .*, got 'SiT'"),
        ("sit", {}, {"blocks__1__mlp__fc2__bias": None}, r"missing keys: blocks\.1\.mlp\.fc2\.bias$"),
        ("sit", {}, {"extra": torch.zeros(1)}, r"unexpected keys: extra$"),
        ("sit", {}, {"blocks__1__attn__proj__weight": torch.zeros(2, 2)}, r"blocks\.1.* \[48, 48\], got \[2, 2\]"),
        ("sit", {}, {"x_embedder__proj__weight": None}, r"expected x_embedder\.proj\.weight, got blocks\.0"),
        ("sit", {}, {"blocks__0__attn__qkv__weight": None}, r"expected blocks\.0\.attn\.qkv\.weight, got blocks"),
        ("sit", {}, {"pos_embed": pos_embed(WIDTH).flip(1)}, "pos_embed: expected the fixed positions of a square"),
        ("sit", {}, {"pos_embed": pos_embed(WIDTH)[:, :7]}, r"pos_embed: expected .* grid, got \[1, 7, 48\] others"),
        ("sit", {"rope": True}, {"feat_rope__freqs_sin": torch.zeros(16, 12)}, "feat_rope.freqs_sin: expected the"),
        ("sit", {"rope": True, "head": 64}, {}, "'sit': expected a sinusoid of t, got a Fourier embedding"),
        ("rae", {"rope": True, "head": 48}, {}, "expected a head of another width than the trunk's 48, got the same"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_a_sentence(convention, switches, changed, message, tmp_path):
    save_file(change(weights(**switches), **changed), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_transformer(tmp_path / "a.safetensors", convention=convention)
    assert str(tmp_path / "a.safetensors") in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_nothing_tells_are_asked_for(monkeypatch):
    monkeypatch.delitem(TRANSFORMERS, "row")
    with pytest.raises(ValueError, match=r"tensors do not tell the heads: expected .*\(192x6, .*1152x28.*\), got 48"):
        from_published(weights(), "sit")
    assert from_published(weights(qk_norm=True), "sit")[0]["config"]["heads"] == HEADS


def test_own_files_are_strict(tmp_path):
    path = tmp_path / "a.safetensors"
    model = SiT(TRANSFORMERS["row"], 3, 2)
    save_transformer(model, path)
    state, fields = load_file(path), transformer_to_dict(model)
    for broken, message in [
        ({**fields, "config": {**fields["config"], "widht": 3}}, r"unknown field 'widht'; did you mean 'width'\?"),
        ({**fields, "config": {**fields["config"], "norm": "batch"}}, "norm: expected one of layer, rms, got 'batch'"),
        ({**fields, "in_channels": 4}, r"wrong shapes: .*x_embedder\.proj\.weight \[48, 4, 1, 1\], got \[48, 3,"),
        ({"config": fields["config"]}, "expected config, in_channels and num_classes, got config"),
    ]:  # fmt: skip
        save_file(state, path, {"flux2_transformer": json.dumps(broken)})
        with pytest.raises(ValueError, match=message):
            load_transformer(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_transformer(tmp_path / "missing.safetensors", convention="sit")
