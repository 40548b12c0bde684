"""Autoencoders in folders and on the Hugging Face hub: `from_pretrained`, `save_pretrained`, `push_to_hub`.

A folder holds config.json, which people can read, and model.safetensors; README.md is its model card. Nothing in it is
executed. huggingface_hub is imported when the net is asked.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from flux2.tensor_files import load_json, save_json, save_tensors

OWN_WEIGHTS = "model.safetensors"
CARD = """\
# {name}

{what}, in the format of flux2-tokenizer.

```python
from flux2 import {cls}

ae = {cls}.from_pretrained("{name}")
z = ae.encode(x)  # pixels [N, 3, H, W] in [-1, 1] -> normalised latents [N, {channels}, H/{multiple}, W/{multiple}]
x = ae.decode(z)
```

| field | value |
|---|---|
{rows}
"""


class HubMixin:
    """What an autoencoder class of this project inherits to be read from, and written to, folders and the hub."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        filename: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """An autoencoder in eval mode, from a path or from a repository OWNER/NAME of the hub.

        name: what `load_autoencoder` takes, or a repository that holds a folder of `save_pretrained`, diffusers'
        AutoencoderKL or AutoencoderKLFlux2, or a whole diffusers pipeline (its vae/); filename: one file of it instead,
        in an original layout. revision, token, cache_dir, local_files_only: as huggingface_hub has them. Only the
        config and the weights are fetched. preset, device, dtype: as in `load_autoencoder`.

        FileNotFoundError if it is neither a path nor the name of a repository; OSError, in one sentence, if the hub
        does not give it; ValueError if it is something else, or an autoencoder of another class.
        """
        from flux2.checkpoints import load_autoencoder

        if Path(name).exists():
            path = Path(name) / filename if filename else Path(name)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            path = _fetch(str(name), filename, {**options, "local_files_only": local_files_only})
        else:
            raise FileNotFoundError(f"{name}: expected a file, a folder, or a repository OWNER/NAME, got none of them")
        ae = load_autoencoder(path, preset=preset, device=device, dtype=dtype)
        if not isinstance(ae, cls):
            raise ValueError(f"{name}: expected an autoencoder of class {cls.__name__}, got {type(ae).__name__}")
        return ae

    def save_pretrained(
        self, folder: str | Path, *, name: str | None = None, license: str | None = None, tags: tuple[str, ...] = ()
    ) -> None:
        """Writes config.json, model.safetensors and, where there is none, README.md: a model card.

        name: of the repository, for the card; the folder's by default. license: an identifier of the hub, as
        "apache-2.0"; tags: beside the card's own. Files appear complete or not at all, config.json last. ValueError if
        `folder` is a file; OSError if it cannot be written.
        """
        from flux2.checkpoints import FORMAT, config_to_dict

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder, or a path that is free, got a file")
        config = config_to_dict(self.cfg)  # pyright: ignore[reportAttributeAccessIssue]
        save_tensors(folder / OWN_WEIGHTS, self.state_dict(), {"format": "pt"})  # pyright: ignore[reportAttributeAccessIssue]
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(model_card(self, name or folder.resolve().name, license, tags))
        save_json(folder / "config.json", {"format": FORMAT, "autoencoder": config})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload autoencoder",
        create_pr: bool = False,
        license: str | None = None,
        tags: tuple[str, ...] = (),
    ) -> str:
        """Writes what `save_pretrained` does to a repository, made if it is not there; returns the commit's address.

        A README.md that is there already stays. OSError, in one sentence, if the hub does not take it.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder, _in_one_sentence(repo_id):
            self.save_pretrained(folder, name=repo_id, license=license, tags=tags)
            api.create_repo(repo_id, private=private, exist_ok=True)
            keep = ["README.md"] if api.file_exists(repo_id, "README.md", revision=revision) else None
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=keep,
            )
        return done.commit_url


def model_card(ae: Any, name: str, license: str | None, tags: tuple[str, ...]) -> str:
    """README.md of a repository: its metadata as the hub reads it, how to load the model, and its config."""
    import yaml

    from flux2.checkpoints import config_to_dict

    config, cls = config_to_dict(ae.cfg), type(ae).__name__
    about: dict[str, Any] = {"library_name": "flux2-tokenizer", "pipeline_tag": "image-to-image"}
    about |= {"license": license} if license else {}
    about["tags"] = list(dict.fromkeys(["autoencoder", "image-tokenizer", *tags]))
    millions = sum(p.numel() for p in ae.parameters()) / 1e6
    text = CARD.format(
        name=name,
        cls=cls,
        what=f"An image autoencoder of {millions:.1f} million parameters",
        channels=ae.cfg.latent_channels,
        multiple=ae.cfg.multiple,
        rows="\n".join(f"| {key} | {value} |" for key, value in config.items()),
    )
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n{text}"


@contextmanager
def _in_one_sentence(repo_id: str) -> Iterator[None]:
    """Turns what the hub's client raises, offline too, into an OSError of one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures = (HfHubHTTPError.__base__, HfHubHTTPError, HFValidationError, OSError)  # the first: the HTTP client's own
    try:
        yield
    except failures as error:  # pyright: ignore[reportGeneralTypeIssues]
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(f"{repo_id}: the hub did not give or take it: {reason}") from error


def _fetch(repo_id: str, filename: str | None, options: dict[str, Any]) -> Path:
    """The local copy of one file, or of the folder that holds an autoencoder's config and weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from flux2.checkpoints import DIFFUSERS_WEIGHTS, FORMAT

    with _in_one_sentence(repo_id):
        if filename:
            return Path(hf_hub_download(repo_id, filename, **options))
        seen = []
        for folder in ("", "vae/"):
            try:
                config = Path(hf_hub_download(repo_id, f"{folder}config.json", **options))
            except LocalEntryNotFoundError:  # not a word about the repository: it could not be asked
                raise
            except EntryNotFoundError:
                continue
            fields = load_json(config)
            seen.append(f"{folder}config.json of {fields.get('_class_name', fields.get('format', 'another kind'))}")
            if fields.get("format") == FORMAT or "block_out_channels" in fields:
                weights = OWN_WEIGHTS if fields.get("format") == FORMAT else DIFFUSERS_WEIGHTS
                return Path(hf_hub_download(repo_id, f"{folder}{weights}", **options)).parent
    raise ValueError(
        f"{repo_id}: expected config.json or vae/config.json of an autoencoder, got {' and '.join(seen) or 'neither'};"
        " filename= takes one file of the repository"
    )
