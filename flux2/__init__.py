"""Models and mathematics: image autoencoders of the FLUX.2 class, flow-matching transformers on their latents."""

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.checkpoints import load_autoencoder, save_autoencoder
from flux2.export import export
from flux2.fuse import FuseReport, fuse, unfuse
from flux2.rae import RAE, RAES, RAEConfig
from flux2.transformer import TRANSFORMERS, SiT, TransformerConfig

__all__ = [
    "AUTOENCODERS",
    "RAE",
    "RAES",
    "TRANSFORMERS",
    "AutoEncoder",
    "AutoencoderConfig",
    "FuseReport",
    "RAEConfig",
    "SiT",
    "TransformerConfig",
    "export",
    "fuse",
    "load_autoencoder",
    "save_autoencoder",
    "unfuse",
]
