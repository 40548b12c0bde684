"""Every common kind of picture comes out right, or is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux2.images import (
    adm_center_crop,
    error_image,
    find_images,
    from_uint8,
    load_image,
    save_png,
    tile,
    to_array,
    to_pixels,
    to_uint8,
)

RNG = np.random.default_rng(0)


def smooth(height=24, width=40):
    """uint8 [H, W, 3] that JPEG keeps within a few grey levels."""
    rows, columns = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return (np.stack((rows, columns, (rows + columns) / 2), -1) * 200 + 20).astype(np.uint8)


def close(a, b, tolerance=6):
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= tolerance


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_plain_pictures(tmp_path, suffix):
    Image.fromarray(smooth()).save(tmp_path / f"a.{suffix}", quality=98)
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.dtype == np.uint8 and close(image, smooth(), 0 if suffix == "png" else 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    transposed = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),  # stored turned left, shown turned right
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](smooth())
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(transposed)).save(tmp_path / "a.jpg", quality=98, exif=exif)
    assert close(load_image(tmp_path / "a.jpg"), smooth(), 12)


def test_transparency_is_laid_on_white(tmp_path):
    colour, alpha = smooth(), RNG.integers(0, 256, (24, 40), dtype=np.uint8)
    expected = np.round(colour * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None])
    Image.fromarray(np.dstack((colour, alpha))).save(tmp_path / "rgba.png")
    assert close(load_image(tmp_path / "rgba.png"), expected, 1)
    Image.fromarray(np.dstack((colour[..., 0], alpha))).save(tmp_path / "la.png")
    assert close(load_image(tmp_path / "la.png")[..., 0], expected[..., 0], 1)
    palette = Image.fromarray(colour).quantize(8)
    palette.save(tmp_path / "p.png", transparency=0)
    index = np.asarray(palette)
    image = load_image(tmp_path / "p.png")
    assert (image[index == 0] == 255).all()
    assert np.array_equal(image[index != 0], np.asarray(palette.convert("RGB"))[index != 0])


def test_grey_and_bilevel_become_rgb(tmp_path):
    grey = smooth()[..., 1]
    Image.fromarray(grey).save(tmp_path / "l.png")
    assert np.array_equal(load_image(tmp_path / "l.png"), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(grey > 100).save(tmp_path / "1.png")
    assert np.array_equal(load_image(tmp_path / "1.png")[..., 0], np.where(grey > 100, 255, 0))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 1, 128, 129, 257, 32768, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[0, :, 0].tolist() == [round(v / 257) for v in values[0].tolist()]


def test_cmyk_colours_come_out_right(tmp_path):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, :8, 0] = 255  # cyan
    ink[:, 8:, 1] = ink[:, 8:, 2] = 255  # magenta + yellow: red
    Image.frombytes("CMYK", (16, 16), ink.tobytes()).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    image = load_image(tmp_path / "a.jpg").astype(int)
    assert image[8, 2, 0] < 40 and image[8, 2, 1] > 100 and image[8, 2, 2] > 100
    assert image[8, 13, 0] > 150 and image[8, 13, 1] < 90 and image[8, 13, 2] < 90


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(tmp_path / "a.webp")[4, 4].tolist() == [255, 0, 0]


def bad_file(kind, path, monkeypatch):
    whole = path.with_name("whole.png")
    Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        path.write_bytes(whole.read_bytes())
    elif kind == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")
    else:
        path.write_bytes({"truncated": whole.read_bytes()[:3000], "empty": b"", "text": b"hello there"}[kind])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged picture"),
        ("empty", r"not a picture \(the file is empty\)"),
        ("text", "not a picture"),
        ("bomb", "refused, too many pixels"),
        ("float", "floating-point pictures have no agreed range"),
    ],
)
def test_bad_pictures_are_refused_by_name(kind, message, tmp_path, monkeypatch):
    path = tmp_path / "bad.png"
    bad_file(kind, path, monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such picture"):
        load_image(tmp_path / "a.png")


def test_find_images(tmp_path):
    names = ["b.JPG", "a.png", "sub/c.webp", "sub/deep/d.jpeg", ".hidden.png", ".git/e.png", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    found = [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)]
    assert found == ["a.png", "b.JPG", "sub/c.webp", "sub/deep/d.jpeg"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # named by hand: tried as it is
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected \.jpg, .* got none"):
        find_images(tmp_path / "empty")


def test_pixels_round_trip_and_round():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = to_pixels(every)
    assert x.shape == (3, 16, 16) and x.min() == -1 and x.max() == 1
    assert np.array_equal(to_array(to_uint8(x)), every)
    assert to_uint8(torch.tensor([-2.0, -1, 0.0, 1, 2])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([100.4, 100.6]) / 127.5 - 1).tolist() == [100, 101]
    assert to_pixels(every[None]).shape == (1, 3, 16, 16)
    assert torch.equal(from_uint8(to_uint8(x)), x)
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, C\]"):
        to_pixels(every.astype(np.float32))


def halved(image):
    """Means of two columns, then of two rows, each rounded half up to 8 bits as PIL does"""
    x = image.astype(int)
    x = (x[:, ::2] + x[:, 1::2] + 1) // 2
    return ((x[::2] + x[1::2] + 1) // 2).astype(np.uint8)


def test_adm_s_crop_is_halvings_then_bicubic_then_the_centre():
    even = RNG.integers(0, 256, (128, 192, 3), dtype=np.uint8)
    assert np.array_equal(adm_center_crop(even, 32), halved(halved(even))[:, 8:40])  # of 32 x 48
    turned = np.ascontiguousarray(even.swapaxes(0, 1))
    assert np.array_equal(adm_center_crop(turned, 32), halved(halved(turned))[8:40])
    for h, w, size, once, resized, top, left in (
        (100, 76, 32, True, (42, 32), 5, 0),  # 50 x 38, times 32 / 38: 42.1 x 32
        (20, 31, 32, False, (32, 50), 0, 9),  # from below: 32 x 49.6
        (63, 90, 32, False, (32, 46), 0, 7),  # 63 is below twice 32: no halving
        (64, 91, 33, False, (33, 47), 0, 7),
    ):
        image = RNG.integers(60, 196, (h, w, 3), dtype=np.uint8)  # PIL clips after the columns too: no overshoot here
        expected = torch.from_numpy(halved(image) if once else image).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(expected, resized, mode="bicubic", antialias=True)[0]
        expected = expected.permute(1, 2, 0)[top : top + size, left : left + size].clamp(0, 255).round().numpy()
        assert close(adm_center_crop(image, size), expected, 2)
    for image, size in ((even.astype(np.float32), 32), (even[..., 0], 32), (even[:0], 32), (even, 0)):
        with pytest.raises(ValueError, match=r"centre crop: expected uint8 \[H, W, 3\] and a positive size, got"):
            adm_center_crop(image, size)


def test_save_png_is_whole_or_nothing(tmp_path, monkeypatch):
    save_png(tmp_path / "sub" / "a.png", smooth())
    assert np.array_equal(load_image(tmp_path / "sub" / "a.png"), smooth())

    def full(self, path, format):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(tmp_path / "sub" / "a.png", smooth())
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["a.png"]
    assert np.array_equal(load_image(tmp_path / "sub" / "a.png"), smooth())


def test_tile_and_error_image():
    black, grey = np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 3), 30, np.uint8)
    sheet = tile([black, grey, grey], columns=2, gap=1)
    assert sheet.shape == (5, 7, 3)
    assert (sheet[:2, :3] == 0).all() and (sheet[:2, 4:] == 30).all() and (sheet[3:, :3] == 30).all()
    assert (sheet[2] == 255).all() and (sheet[:, 3] == 255).all() and (sheet[3:, 4:] == 255).all()
    with pytest.raises(ValueError, match="pictures of one size"):
        tile([black, grey[:1]], columns=2)
    assert (error_image(black, grey) == 150).all() and (error_image(grey, black, gain=10) == 255).all()


def test_the_limit_of_pixels_does_not_hang_on_pillows_own(tmp_path, monkeypatch):
    """Which other code of the process may lift"""
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("flux2.images.LARGEST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a.png: refused, too many pixels \(40 x 30, over 1,000\)"):
        load_image(tmp_path / "a.png")
