"""Images a second of this project's loader alone, beside torchvision's and WebDataset's on the same files.

    python benchmarks/loader_speed.py

All decode with Pillow, cut a random square of 256 to 512 source pixels, shrink it to 256 (bicubic), mirror half of them
and stack batches of 32 uint8 crops; rounds are interleaved, and the median and the best of each are kept. Files are
JPEG photographs of 640 x 480, written to a temporary folder. Two minutes on two cores; results/loader-speed.json.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from flux2.compat import ensure_torchvision  # noqa: E402
from flux2.images import load_image  # noqa: E402
from flux2.tensor_files import save_json  # noqa: E402
from train.crops import Augmentation, resized  # noqa: E402
from train.data import CropBatches, Pictures, batches, embedded_photographs  # noqa: E402
from train.loop import environment  # noqa: E402
from train.sources import open_source  # noqa: E402

SIDE, BATCH, HEIGHT, WIDTH = 256, 32, 480, 640
SCALE = (1.0, 2.0)  # source pixels per pixel
OUT = Path(__file__).parent / "results" / "loader-speed.json"


def write_files(place: Path, num: int) -> None:
    """`num` JPEG files in place/folder/a/, and the same bytes in place/shards/*.tar."""
    photographs = embedded_photographs()[0]
    folder, shards = place / "folder" / "a", place / "shards"
    folder.mkdir(parents=True)
    shards.mkdir()
    from PIL import Image

    for i in range(num):
        image = photographs[i % len(photographs)]
        top, left = (i * 37) % max(1, image.shape[0] - HEIGHT), (i * 53) % max(1, image.shape[1] - WIDTH)
        part = resized(image[top : top + HEIGHT, left : left + WIDTH], (HEIGHT, WIDTH))
        Image.fromarray(part).save(folder / f"{i:05}.jpg", quality=90)
    files = sorted(folder.iterdir())
    for shard in range(4):
        with tarfile.open(shards / f"{shard:03}.tar", "w") as archive:
            for file in files[shard::4]:
                archive.add(file, file.name)


class TheirCrop:
    """The same crop, flip and type with torchvision's own parts, but for the law of a crop's size: RandomResizedCrop's
    is uniform in area. PIL in, uint8 [3, R, R] out."""

    def __init__(self) -> None:
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        low, high = ((SIDE * s) ** 2 / (HEIGHT * WIDTH) for s in SCALE)
        self.crop = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    SIDE, scale=(low, min(high, HEIGHT**2 / (HEIGHT * WIDTH))), ratio=(1.0, 1.0),
                    interpolation=InterpolationMode.BICUBIC,
                ),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        )  # fmt: skip

    def __call__(self, image) -> torch.Tensor:
        return self.crop(image)


def decoded(content: bytes):
    """RGB picture of a tar member, as torchvision's ImageFolder decodes a file."""
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")


def ours(data: str, workers: int, steps: int) -> Iterable[torch.Tensor]:
    augmentation = Augmentation(crop_scale=SCALE)
    crops = CropBatches(Pictures(open_source(data)), resolution=SIDE, batch=BATCH, augmentation=augmentation, seed=0)
    return batches(crops, 0, steps, workers=workers)


def image_folder(data: str, workers: int, steps: int) -> Iterable[torch.Tensor]:
    from torchvision.datasets import ImageFolder

    loader = DataLoader(
        ImageFolder(data, transform=TheirCrop()), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    return (x for _, (x, _) in zip(range(steps), loader, strict=False))


def web_dataset(data: str, workers: int, steps: int) -> Iterable[torch.Tensor]:
    import webdataset

    shards = [str(p) for p in sorted(Path(data).glob("*.tar"))]
    crop = TheirCrop()
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
    samples = samples.to_tuple("jpg").map_tuple(lambda content: crop(decoded(content))).batched(BATCH, partial=False)
    loader = webdataset.WebLoader(samples, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    return (x for _, (x,) in zip(range(steps), loader, strict=False))


LOADERS: dict[str, tuple[Callable[[str, int, int], Iterable[torch.Tensor]], str]] = {
    "ours, folder": (ours, "folder"),
    "torchvision ImageFolder": (image_folder, "folder"),
    "ours, tar shards": (ours, "shards"),
    "WebDataset": (web_dataset, "shards"),
}


def images_per_second(batches: Iterable[torch.Tensor]) -> float:
    """The start of worker processes and what they read ahead included."""
    began, count = time.perf_counter(), 0
    for batch in batches:
        assert batch.shape == (BATCH, 3, SIDE, SIDE) and batch.dtype == torch.uint8, batch.shape
        count += len(batch)
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    options = parser.parse_args()
    ensure_torchvision()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_files(Path(place), options.images)
        assert load_image(next((Path(place) / "folder" / "a").iterdir())).shape == (HEIGHT, WIDTH, 3)
        steps = options.images // BATCH - 4  # WebDataset drops what is left in each worker
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for workers in (0, 2):
                for name, (loader, data) in LOADERS.items():
                    rate = images_per_second(loader(str(Path(place) / data), workers, steps))
                    rates.setdefault((name, workers), []).append(rate)
    rows = [
        {"loader": name, "workers": workers, "median": round(statistics.median(r), 1), "best": round(max(r), 1)}
        for (name, workers), r in rates.items()
    ]
    for row in rows:
        print(f"{row['loader']:26}{row['workers']} workers {row['median']:8.1f} images/s, best {row['best']:.1f}")
    machine = environment(torch.device("cpu"))
    machine.pop("command")
    about = {"side": SIDE, "batch": BATCH, "images": options.images, "rounds": options.rounds, "note": options.note}
    save_json(options.out, {"about": about, "environment": machine, "rows": rows})


if __name__ == "__main__":
    main()
