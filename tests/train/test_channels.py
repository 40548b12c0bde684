"""Pictures of one and four channels: decoded, cropped, trained on, reconstructed."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy import few_pixels, run, toy, trainer_of

from flux2 import load_autoencoder, save_autoencoder
from flux2.__main__ import main
from flux2.autoencoder import AutoEncoder, AutoencoderConfig
from flux2.images import as_rgb, decode_image, error_image, load_image, save_png
from flux2.metrics import psnr
from train import vae
from train.crops import Augmentation, colours, crop_of
from train.data import CropBatches, Pictures, embedded_photographs, open_pictures

CHANNELS = (1, 3, 4)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def picture(seed, side=48):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 255, (6, 6, 4), dtype=np.uint8)
    return Image.fromarray(smooth, "RGBA").resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(6):
        picture(i).save(tmp_path / "p" / f"{i}.png")
    return str(tmp_path / "p")


@pytest.mark.parametrize("channels", CHANNELS)
def test_pictures_are_decoded_to_their_channels(channels, folder, tmp_path):
    source = Image.open(f"{folder}/0.png")
    got = load_image(f"{folder}/0.png", channels)
    assert got.shape == (48, 48, channels) and got.dtype == np.uint8
    if channels == 4:
        assert np.array_equal(got, np.array(source))
    else:
        white = Image.alpha_composite(Image.new("RGBA", source.size, (255, 255, 255, 255)), source)
        assert np.array_equal(got.squeeze(), np.array(white.convert(MODES[channels])))
    save_png(tmp_path / "again.png", got)
    assert Image.open(tmp_path / "again.png").mode == MODES[channels]
    assert np.array_equal(load_image(tmp_path / "again.png", channels), got)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "LA", "1", "RGB"])
def test_four_channels_of_pictures_that_have_none_are_opaque(mode, tmp_path):
    image = picture(0).convert("RGB")
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 257 * 40, np.uint16))
    else:
        image = image.convert("L").convert(mode) if mode in ("LA", "1") else image.convert(mode)
    image.save(tmp_path / "a.tiff")
    got = decode_image(tmp_path / "a.tiff", "a", 4)
    assert got.shape[2] == 4 and (got[..., 3] == 255).all()
    assert np.array_equal(got[..., :3], decode_image(tmp_path / "a.tiff", "a", 3))
    if mode == "I;16":
        assert (got[..., :3] == 40).all() and (decode_image(tmp_path / "a.tiff", "a", 1) == 40).all()


def test_three_channels_are_as_before_and_two_are_refused():
    for index in range(2):
        assert np.array_equal(embedded_photographs(3)[1][index], embedded_photographs()[1][index])
    with pytest.raises(ValueError, match="channels: expected 1, 3 or 4, got 2"):
        Pictures(embedded_photographs()[0].source, channels=2)
    with pytest.raises(ValueError, match=r"channels: expected 1 \(grey\), 3 \(RGB\) or 4 \(RGBA\), got 2"):
        AutoencoderConfig(z_channels=4, channels=2)


def test_crops_do_not_let_colours_of_what_cannot_be_seen_through():
    image = np.zeros((8, 8, 4), np.uint8)
    image[:, :4] = (255, 0, 0, 0)
    image[:, 4:] = (0, 0, 255, 255)
    crop = crop_of(image, 4, [0.5] * 12, Augmentation(crop_scale=(2.0, 2.0), flip=False))
    assert crop.shape == (4, 4, 4) and crop[..., 0].max() == 0 and crop[:, 3].tolist() == [[0, 0, 255, 255]] * 4


def test_colours_leave_transparency_alone_and_grey_grey():
    draws = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    rgba = torch.randint(0, 255, (3, 4, 5, 5), dtype=torch.uint8)
    changed = colours(rgba, draws, 0.5)
    assert torch.equal(changed[:, 3], rgba[:, 3]) and torch.equal(changed[:, :3], colours(rgba[:, :3], draws, 0.5))
    grey = colours(rgba[:, :1], draws, 0.5)
    assert grey.shape == (3, 1, 5, 5) and not torch.equal(grey, rgba[:, :1])


def test_as_rgb():
    x = torch.tensor([0.5, -0.5, 1.0, 0.0]).view(1, 4, 1, 1)  # half transparent
    assert torch.allclose(as_rgb(x).flatten(), torch.tensor([0.25, -0.25, 0.5]))
    assert as_rgb(x[:, :1]).flatten().tolist() == [0.5] * 3 and as_rgb(x[:, :3]).flatten().tolist() == [0.5, -0.5, 1.0]


def test_errors_of_transparency_can_be_seen():
    a, b = np.zeros((1, 1, 4), np.uint8), np.array([[[0, 0, 0, 10]]], np.uint8)
    assert error_image(a, b).tolist() == [[[50, 50, 50, 255]]]


@pytest.mark.parametrize("channels", CHANNELS)
def test_one_step_with_every_loss(channels):
    flags = ("--autoencoder.channels", str(channels), "--vf-weight", "0.1", "--eq-probability", "1.0")
    config = toy(*flags, "--resolution", "64", gan_weight=0.5, gan_r1=1.0, gan_r1_every=1, gan_augment=1.0,
                 lpips_weight=1.0, lpips_net="alex", lpips_weights="random")  # fmt: skip
    trainer = trainer_of(config)
    data = CropBatches(
        embedded_photographs(channels)[0], resolution=64, batch=2, augmentation=config.augmentation, seed=0
    )
    before = {n: p.clone() for n, p in trainer.ae.named_parameters()}
    terms = trainer.step(0, data[0])
    assert data[0].shape == (2, channels, 64, 64)
    assert all(v.isfinite() for v in terms.values()) and {"lpips", "gan", "align", "vf", "kl"} <= terms.keys()
    assert not torch.equal(before["decoder.conv_out.weight"], trainer.ae.decoder.conv_out.weight)


@pytest.mark.parametrize("channels", CHANNELS)
def test_trained_from_its_principal_components_and_reconstructed_by_the_command(
    channels, folder, tmp_path, monkeypatch, capsys
):
    few_pixels(monkeypatch)
    flags = ("--autoencoder.channels", str(channels), "--data", folder, "--steps", "4", "--name", "x")
    assert run(tmp_path, *flags) == 0
    ae = load_autoencoder(tmp_path / "x")
    assert ae.cfg.channels == channels and ae.encoder.conv_in.weight.shape[1] == channels
    pictures = open_pictures(folder, channels=channels)[0]
    x = torch.from_numpy(pictures[0].copy()).permute(2, 0, 1)[None]
    quality = psnr(x, vae.reconstruct_uint8(ae, x)).item()
    assert quality > 20  # smooth pictures: the warm start alone is good
    out = tmp_path / "out"
    assert main(["reconstruct", f"{folder}/1.png", "--weights", str(tmp_path / "x"), "--out", str(out)]) == 0
    assert Image.open(out / "1.png").mode == MODES[channels] and "PSNR" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_say_their_channels_in_both_layouts(channels, tmp_path):
    cfg = AutoencoderConfig(z_channels=4, ch=8, decoder_ch=8, ch_mult=(1, 1), num_res_blocks=1, num_groups=4,
                            latent_norm="batchnorm", channels=channels)  # fmt: skip
    torch.manual_seed(0)
    ae = AutoEncoder(cfg).eval()
    save_autoencoder(ae, tmp_path / "a.safetensors")
    save_autoencoder(ae, tmp_path / "d", layout="diffusers")
    for place in (tmp_path / "a.safetensors", tmp_path / "d"):
        loaded = load_autoencoder(place)
        x = torch.rand(1, channels, 16, 16) * 2 - 1
        assert torch.equal(loaded.reconstruct(x), ae.reconstruct(x))
