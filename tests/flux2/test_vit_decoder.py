"""RAE's decoder against diffusers' port of the original, loops over pixels, and autograd."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from flux2.compat import ensure_torchvision
from flux2.vit_decoder import DECODERS, ViTDecoder, ViTDecoderConfig, blocks_of, pixels_of, sincos_positions

ensure_torchvision()
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder  # noqa: E402 - imports torchvision

SMALL = ViTDecoderConfig(width=24, depth=2, heads=3, mlp=40)


def noisy(decoder):
    """Weights that all matter: zeros and ones moved too"""
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return decoder


def diffusers_twin(decoder, side):
    theirs = RAEDecoder(
        hidden_size=decoder.embed.in_features,
        decoder_hidden_size=SMALL.width,
        decoder_num_hidden_layers=SMALL.depth,
        decoder_num_attention_heads=SMALL.heads,
        decoder_intermediate_size=SMALL.mlp,
        num_patches=side**2,
        image_size=16 * side,
    )
    names = {
        "proj": "attention.to_out.0",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
    }
    state = {"trainable_cls_token": decoder.cls_token}
    for part in ("embed", "norm", "pred"):
        for kind in ("weight", "bias"):
            state[f"decoder_{part}.{kind}"] = getattr(getattr(decoder, part), kind)
    for i, block in enumerate(decoder.blocks):
        for kind in ("weight", "bias"):
            for j, name in enumerate("qkv"):
                rows = slice(j * SMALL.width, (j + 1) * SMALL.width)
                state[f"decoder_layers.{i}.attention.to_{name}.{kind}"] = getattr(block.qkv, kind)[rows]
            for ours, name in names.items():
                state[f"decoder_layers.{i}.{name}.{kind}"] = getattr(getattr(block, ours), kind)
    theirs.load_state_dict(state)
    return theirs


def test_decodes_as_diffusers_does_and_so_do_the_gradients():
    ours = noisy(ViTDecoder(SMALL, 10))
    theirs = diffusers_twin(ours, side=16)  # its positions are the original's on this grid alone
    z = torch.randn(2, 10, 16, 16, requires_grad=True)
    z_theirs = z.detach().clone().requires_grad_()
    expected = theirs.unpatchify(theirs(z_theirs.flatten(2).transpose(1, 2)).logits)
    got = ours(z)
    assert got.shape == (2, 3, 256, 256)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(z.grad, z_theirs.grad, rtol=1e-3, atol=1e-4)
    for a, b in (
        (ours.pred.weight, theirs.decoder_pred.weight),
        (ours.cls_token, theirs.trainable_cls_token),
        (ours.blocks[0].norm1.weight, theirs.decoder_layers[0].layernorm_before.weight),
        (ours.blocks[1].fc1.bias, theirs.decoder_layers[1].intermediate.dense.bias),
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_positions_say_column_then_row():
    positions = sincos_positions(3, 5, 24, torch.device("cpu"))
    assert positions.shape == (15, 24) and positions.dtype == torch.float32
    for row in range(3):
        for column in range(5):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / 6) for i in range(6)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(positions[5 * row + column], expected, atol=1e-6)


def test_blocks_are_row_column_colour():
    x = torch.randn(2, 3, 32, 48)
    blocks = blocks_of(x)
    assert blocks.shape == (2, 6, 768)
    for block, row, column, colour in ((0, 0, 0, 0), (4, 3, 7, 2), (5, 15, 0, 1)):
        got = blocks[1, block, (16 * row + column) * 3 + colour]
        assert got == x[1, colour, 16 * (block // 3) + row, 16 * (block % 3) + column]
    assert torch.equal(pixels_of(blocks, 2, 3), x)


@pytest.mark.parametrize(
    ("name", "parameters"), [("tiny", 1_965_312), ("b", 86_237_952), ("l", 303_887_104), ("xl", 415_056_640)]
)
def test_parameters(name, parameters):
    cfg = DECODERS[name]
    with torch.device("meta"):
        decoder = ViTDecoder(cfg, 192 if name == "tiny" else 768)
    w, m = cfg.width, cfg.mlp
    block = 4 * w * w + 4 * w + 2 * w * m + w + m + 4 * w
    ends = (decoder.embed.in_features + 1) * w + w + 2 * w + (w + 1) * 768
    assert sum(p.numel() for p in decoder.parameters()) == cfg.depth * block + ends == parameters


def test_any_grid_and_no_position_is_another():
    decoder = noisy(ViTDecoder(SMALL, 4)).eval()
    z = torch.ones(1, 4, 2, 5)
    blocks = blocks_of(decoder(z))[0]  # of equal latents, told apart by position alone
    assert blocks.shape == (10, 768)
    distances = torch.cdist(blocks, blocks) + 1e3 * torch.eye(10)
    assert distances.min() > 1e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_last_layer_grad_norm_is_autograd_s(autocast):
    decoder = noisy(ViTDecoder(dataclasses.replace(SMALL, depth=1), 4))
    z, weight = torch.randn(2, 4, 2, 3), torch.randn(2, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x, h = decoder.with_features(z)
        got = decoder.last_layer_grad(h.detach(), weight).norm()
        (expected,) = torch.autograd.grad((x.float() * weight).sum(), decoder.pred.weight)
    assert got.dtype == torch.float32 and not got.requires_grad and got.ndim == 0
    torch.testing.assert_close(got, expected.norm(), rtol=1e-2 if autocast else 1e-5, atol=0)
