"""The model of communication and memory, and the page that shows it."""

from pathlib import Path

import pytest
import torch

from flux2 import AUTOENCODERS, TRANSFORMERS, AutoEncoder, SiT
from flux2.discriminator import PatchDiscriminator
from train import scaling


def test_bytes_and_memory_of_two():
    assert scaling.ddp_bytes(100, 2) == 400 and scaling.ddp_bytes(100, 4) == 600
    assert scaling.fsdp_bytes(100, 2) == 400 and scaling.fsdp_bytes(100, 2, bf16=False) == 600
    model = scaling.Model(name="x", parameters=100, flops=1.0, per_gpu=1, largest=10, averages=1)
    assert scaling.memory_bytes(model, 2, fsdp=False) == 2000 and scaling.memory_bytes(model, 2, fsdp=True) == 1040


def test_models_are_of_the_sizes_that_they_name():
    with torch.device("meta"):
        sit = sum(p.numel() for p in SiT(TRANSFORMERS["sit-xl"], in_channels=128, num_classes=1000).parameters())
        parts = AutoEncoder(AUTOENCODERS["flux.2"]), PatchDiscriminator()
        autoencoder = sum(p.numel() for part in parts for p in part.parameters())
    assert sit == pytest.approx(scaling.MODELS[0].parameters, rel=0.02)
    assert autoencoder == pytest.approx(scaling.MODELS[1].parameters, rel=0.01)


def test_page_has_the_tables():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    assert f"<!-- model -->\n{scaling.tables()}\n<!-- /model -->" in page
