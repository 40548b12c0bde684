"""Programs: `python -m train.vae`."""
