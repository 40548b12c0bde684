"""Models and mathematics: image autoencoders of the FLUX.2 class, their losses, metrics and checkpoints."""

from flux2.autoencoder import AUTOENCODERS, AutoEncoder, AutoencoderConfig

__all__ = ["AUTOENCODERS", "AutoEncoder", "AutoencoderConfig"]
