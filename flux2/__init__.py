"""Models and mathematics: image autoencoders of the FLUX.2 class, their losses, metrics and checkpoints."""

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig
from flux2.checkpoints import load_autoencoder, save_autoencoder

__all__ = ["AUTOENCODERS", "AutoEncoder", "AutoencoderConfig", "load_autoencoder", "save_autoencoder"]
