"""RAE files: ours whole with the encoder, the original decoder and statistics, and the command line on them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux2 import AUTOENCODERS, RAE, RAES, AutoEncoder, load_autoencoder, save_autoencoder
from flux2.__main__ import main
from flux2.checkpoint_folders import Checkpoints
from flux2.checkpoints import config_from_dict, config_to_dict
from flux2.checkpoints_rae import build_rae, load_official_decoder, load_official_statistics
from flux2.images import load_image, to_array, to_pixels, to_uint8
from flux2.tensor_files import load_tensors, save_tensors
from flux2.vit_decoder import DECODERS, sincos_positions

TINY = RAES["rae-tiny"]


@pytest.fixture
def rae():
    rae = RAE(TINY).eval()
    with torch.no_grad():
        rae.encoder.net.pos_embed.add_(0.1)  # unlike the weights that a file is not needed for
        for p in rae.decoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    rae.latent_mean.normal_()
    rae.latent_var.uniform_(0.5, 2)
    return rae


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


def test_configs_as_dicts():
    for cfg in (*RAES.values(), dataclasses.replace(TINY, noise_tau=0.1)):
        fields = json.loads(json.dumps(config_to_dict(cfg)))
        assert fields["kind"] == "rae" and config_from_dict(fields) == cfg
    assert config_from_dict(config_to_dict(AUTOENCODERS["va-vae"])) == AUTOENCODERS["va-vae"]
    with pytest.raises(ValueError, match="unknown field 'encoders'; did you mean 'encoder'"):
        config_from_dict({"kind": "rae", "encoders": "mae-b/16"})
    with pytest.raises(ValueError, match="expected kind rae, or none, got 'vqgan'"):
        config_from_dict({"kind": "vqgan"})


def test_own_file_holds_everything(rae, tmp_path, monkeypatch):
    save_autoencoder(rae, tmp_path / "rae.safetensors")
    monkeypatch.setattr("flux2.teachers._pretrained", lambda cfg: pytest.fail("asked the hub"))
    back = load_autoencoder(tmp_path / "rae.safetensors")
    assert isinstance(back, RAE) and back.cfg == TINY and not back.training
    assert same(rae.state_dict(), back.state_dict())
    assert all(p.requires_grad for p in back.decoder.parameters())
    assert not any(p.requires_grad for p in back.encoder.parameters())
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(back.encode(x), rae.encode(x)) and torch.equal(back.reconstruct(x), rae.reconstruct(x))
    half = load_autoencoder(tmp_path / "rae.safetensors", preset="rae-tiny", dtype=torch.bfloat16)
    assert half.latent_mean.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"expected the shape of rae-mae .* got RAEConfig\(encoder='tiny-random'"):
        load_autoencoder(tmp_path / "rae.safetensors", preset="rae-mae")
    with pytest.raises(ValueError, match=r"expected the shape of flux\.2"):
        load_autoencoder(tmp_path / "rae.safetensors", preset="flux.2")
    with pytest.raises(ValueError, match="not written in diffusers' layout; save with layout='bfl'"):
        save_autoencoder(rae, tmp_path / "folder", layout="diffusers")
    assert not (tmp_path / "folder").exists()


def test_real_encoder_is_read_without_the_hub(tmp_path, monkeypatch):
    """At full width on the meta device: the keys and shapes of a file are all it takes"""
    monkeypatch.setattr("flux2.teachers._pretrained", lambda cfg: pytest.fail("asked the hub"))
    cfg = dataclasses.replace(RAES["rae"], decoder="tiny")
    with torch.device("meta"):
        expected = RAE(cfg, encoder_weights=None).state_dict()
    zero = {k: torch.zeros(()).expand(v.shape) for k, v in expected.items()}
    rae = build_rae(cfg, zero)
    assert rae.latent_mean.shape == (768, 16, 16) and not rae.latent_mean.is_meta


def test_wrong_tensors_are_named(rae, tmp_path):
    file = tmp_path / "rae.safetensors"
    save_autoencoder(rae, file)
    state, metadata = load_tensors(file)
    save_tensors(file, {k: v for k, v in state.items() if k != "decoder.cls_token"}, metadata)
    with pytest.raises(ValueError, match=r"rae\.safetensors: missing keys: decoder\.cls_token$"):
        load_autoencoder(file)
    save_tensors(file, state | {"latent_var": torch.ones(192)}, metadata)
    with pytest.raises(ValueError, match=r"wrong shapes: expected latent_var \[192, 4, 4\], got \[192\]"):
        load_autoencoder(file)
    save_tensors(file, state)  # without its config
    with pytest.raises(ValueError, match="not an autoencoder of this family"):
        load_autoencoder(file)
    with torch.device("meta"):
        sd = AutoEncoder(AUTOENCODERS["flux.1"]).state_dict()
    save_file({k: torch.zeros(v.shape) for k, v in sd.items()}, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="not a rae-tiny autoencoder: those are read from this project's own files"):
        load_autoencoder(tmp_path / "ae.safetensors", preset="rae-tiny")


def test_run_folder_gives_the_newest_average(rae, tmp_path):
    config = {"format": "flux2-tokenizer", "autoencoder": dataclasses.asdict(TINY)}
    weights = {"model": RAE(TINY).state_dict(), "ema": rae.state_dict()}
    Checkpoints(tmp_path / "checkpoints").save(20, weights, config)
    assert same(rae.state_dict(), load_autoencoder(tmp_path).state_dict())


def official(rae):
    """The decoder's tensors under the names that bytetriper/RAE's decoder has, written out one layer at a time"""
    ours, theirs = rae.decoder.state_dict(), {"trainable_cls_token": rae.decoder.cls_token.detach()}
    positions = sincos_positions(4, 4, 192, torch.device("cpu"))
    theirs["decoder_pos_embed"] = torch.cat([torch.zeros(1, 192), positions])[None]
    for kind in ("weight", "bias"):
        for part in ("embed", "norm", "pred"):
            theirs[f"decoder_{part}.{kind}"] = ours[f"{part}.{kind}"]
        for i in range(DECODERS["tiny"].depth):
            a, b = f"decoder_layers.{i}", f"blocks.{i}"
            q, k, v = ours[f"{b}.qkv.{kind}"].split(192)
            theirs[f"{a}.attention.attention.query.{kind}"] = q
            theirs[f"{a}.attention.attention.key.{kind}"] = k
            theirs[f"{a}.attention.attention.value.{kind}"] = v
            theirs[f"{a}.attention.output.dense.{kind}"] = ours[f"{b}.proj.{kind}"]
            theirs[f"{a}.intermediate.dense.{kind}"] = ours[f"{b}.fc1.{kind}"]
            theirs[f"{a}.output.dense.{kind}"] = ours[f"{b}.fc2.{kind}"]
            theirs[f"{a}.layernorm_before.{kind}"] = ours[f"{b}.norm1.{kind}"]
            theirs[f"{a}.layernorm_after.{kind}"] = ours[f"{b}.norm2.{kind}"]
    return {k: v.clone() for k, v in theirs.items()}


def test_original_decoder_loads(rae, tmp_path):
    theirs = official(rae)
    torch.save(theirs, tmp_path / "decoder.pt")
    other = RAE(TINY)
    load_official_decoder(other, tmp_path / "decoder.pt")
    assert same(rae.decoder.state_dict(), other.decoder.state_dict())
    assert all(p.requires_grad for p in other.decoder.parameters())

    def refused(change, message):
        torch.save(theirs | change, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_official_decoder(RAE(TINY), tmp_path / "bad.pt")

    refused(
        {"decoder_norm.scale": torch.ones(1)}, r"bad\.pt: not a decoder 'tiny' of RAE: unexpected keys: \S+\.scale$"
    )
    key = "decoder_layers.1.attention.attention.key.weight"
    refused({key: torch.zeros(3, 3)}, rf"wrong shapes: expected {key} \[192, 192\], got \[3, 3\]")
    positions = theirs["decoder_pos_embed"].flip(1)
    refused({"decoder_pos_embed": positions}, "expected fixed sine-cosine positions, got others")


def test_original_statistics_load(rae, tmp_path):
    mean, var = torch.randn(192, 4, 4), torch.rand(192, 4, 4)
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    load_official_statistics(rae, tmp_path / "stat.pt")
    assert torch.equal(rae.latent_mean, mean) and torch.equal(rae.latent_var, var)
    torch.save({"mean": mean[:, :2], "var": var}, tmp_path / "stat.pt")
    with pytest.raises(ValueError, match=r"wrong shapes: expected latent_mean \[192, 4, 4\], got \[192, 2, 4\]"):
        load_official_statistics(rae, tmp_path / "stat.pt")


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("fits.png", (64, 64)), ("wide.png", (40, 90))):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def test_commands(rae, pictures, tmp_path, capsys):
    save_autoencoder(rae, tmp_path / "rae.safetensors")
    use = ["--weights", str(tmp_path / "rae.safetensors")]
    assert main(["reconstruct", str(pictures), *use, "--out", str(tmp_path / "r")]) == 0
    sheet = load_image(tmp_path / "r" / "wide.png")
    ours = to_array(to_uint8(rae.reconstruct(to_pixels(load_image(pictures / "wide.png"))[None]))[0])
    assert np.array_equal(sheet[:, 92:182], ours)
    capsys.readouterr()

    assert main(["encode", str(pictures), *use, "--out", str(tmp_path / "z")]) == 1  # one picture is of another size
    assert "skipped: the latent statistics are of 64x64 pixels" in capsys.readouterr().err
    assert load_file(tmp_path / "z" / "fits.safetensors")["latents"].shape == (192, 4, 4)
    assert main(["decode", str(tmp_path / "z"), *use, "--out", str(tmp_path / "x")]) == 0
    expected = to_uint8(rae.reconstruct(to_pixels(load_image(pictures / "fits.png"))[None]))[0]
    difference = load_image(tmp_path / "x" / "fits.png").astype(int) - to_array(expected)
    assert abs(difference).max() <= 1  # normalised and back, in fp32

    save_tensors(tmp_path / "w" / "a.safetensors", {"latents": torch.zeros(192, 2, 4)})
    assert main(["decode", str(tmp_path / "w"), *use, "--out", str(tmp_path / "y")]) == 1
    assert "got 32x64 pixels" in capsys.readouterr().err
    assert main(["convert", use[1], str(tmp_path / "vae"), "--layout", "diffusers"]) == 2
    assert "not written in diffusers' layout" in capsys.readouterr().err
    assert main(["convert", use[1], str(tmp_path / "b.safetensors"), "--layout", "bfl"]) == 0
    assert same(load_file(tmp_path / "b.safetensors"), rae.state_dict())


def test_info(rae, tmp_path, capsys):
    assert main(["info"]) == 0
    table = capsys.readouterr().out
    assert "768 x 16x16" in table and "415,056,640" in table and "rae-tiny" in table and "84,046,115" in table
    save_autoencoder(rae, tmp_path / "rae.safetensors")
    assert main(["info", str(tmp_path / "rae.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "tiny-random" in out and "latent statistics     fitted" in out and "192 channels for 16x16 pixels" in out
    assert main(["info", "rae-mae"]) == 0
    assert "mae-b/16" in capsys.readouterr().out
