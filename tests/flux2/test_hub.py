"""Autoencoders in folders and on the hub, whose client is replaced where the net would be asked."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from flux2 import AUTOENCODERS, RAE, RAES, AutoEncoder, save_autoencoder
from flux2.tensor_files import save_json

TINY = dataclasses.replace(AUTOENCODERS["flux.2"], ch=8, decoder_ch=8, num_groups=4, ch_mult=(1, 2), num_res_blocks=1)


@pytest.fixture
def ae():
    return AutoEncoder(TINY).eval()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder: repositories OWNER/NAME in it; `asked` lists the files that were."""
    root, asked = tmp_path / "hub", []

    def download(repo_id, filename, **options):
        asked.append((filename, options))
        path = root / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(root=root, asked=asked)


def test_a_folder_and_back(ae, tmp_path):
    ae.save_pretrained(tmp_path / "mine")
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["autoencoder"]["ch_mult"] == [1, 2] and config["format"] == "flux2-tokenizer"
    back = AutoEncoder.from_pretrained(tmp_path / "mine", dtype=torch.float64)
    assert back.cfg == TINY and not back.training and next(back.parameters()).dtype == torch.float64
    assert same(back.float(), ae)


def test_an_rae_and_back(tmp_path):
    rae = RAE(RAES["rae-tiny"]).eval()
    rae.save_pretrained(tmp_path)
    assert same(RAE.from_pretrained(tmp_path), rae)
    with pytest.raises(ValueError, match="expected an autoencoder of class AutoEncoder, got RAE"):
        AutoEncoder.from_pretrained(tmp_path)


def test_the_card_is_what_the_hub_reads_and_what_it_shows_runs(ae, tmp_path, monkeypatch):
    ae.save_pretrained(tmp_path / "mine", license="apache-2.0", tags=("faces",))
    card = (tmp_path / "mine" / "README.md").read_text()
    data = huggingface_hub.ModelCard(card).data
    assert data.license == "apache-2.0" and data.tags == ["autoencoder", "image-tokenizer", "faces"]
    assert data.library_name == "flux2-tokenizer" and "| ch_mult | [1, 2] |" in card
    monkeypatch.chdir(tmp_path)
    scope = {"x": torch.rand(1, 3, 8, 12)}
    exec(card.split("```python\n")[1].split("```")[0], scope)
    assert scope["z"].shape == (1, 128, 2, 3) and scope["x"].shape == (1, 3, 8, 12)
    (tmp_path / "mine" / "README.md").write_text("my own")
    ae.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own"
    ae.save_pretrained(tmp_path / "other", name="me/other")
    other = (tmp_path / "other" / "README.md").read_text()
    assert "license" not in yaml.safe_load(other.split("---")[1]) and "# me/other" in other


def test_a_repository(ae, hub, tmp_path):
    ae.save_pretrained(hub.root / "me" / "mine")
    back = AutoEncoder.from_pretrained("me/mine", revision="v1", token="secret", cache_dir=tmp_path)
    assert same(back, ae)
    assert [name for name, _ in hub.asked] == ["config.json", "model.safetensors"]
    expected = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "local_files_only": False}
    assert all(options == expected for _, options in hub.asked)


@pytest.mark.parametrize("folder", ["", "vae"])
def test_a_repository_of_diffusers(folder, ae, hub):
    """An autoencoder, or a pipeline with another config.json at its top"""
    repository = hub.root / "me" / "pipeline"
    save_autoencoder(ae, repository / folder, layout="diffusers")
    if folder:
        save_json(repository / "config.json", {"_class_name": "Transformer"})
    assert same(AutoEncoder.from_pretrained("me/pipeline"), ae)
    assert hub.asked[-1][0] == os.path.join(folder, "diffusion_pytorch_model.safetensors")


def test_one_file_of_a_repository_or_of_a_folder(ae, hub):
    save_autoencoder(ae, hub.root / "me" / "files" / "ae.safetensors")
    assert same(AutoEncoder.from_pretrained("me/files", filename="ae.safetensors"), ae)
    assert same(AutoEncoder.from_pretrained(hub.root / "me" / "files", filename="ae.safetensors"), ae)


def test_what_is_not_there_is_said_in_one_sentence(hub, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a file, a folder, or a repository OWNER/NAME"):
        AutoEncoder.from_pretrained("nowhere")
    with pytest.raises(ValueError, match="me/none: expected config.json or vae/config.json .* got neither"):
        AutoEncoder.from_pretrained("me/none")
    save_json(hub.root / "me" / "other" / "config.json", {"_class_name": "Transformer"})
    with pytest.raises(ValueError, match="me/other: expected .* got config.json of Transformer; filename="):
        AutoEncoder.from_pretrained("me/other")

    def offline(*_, **__):
        raise LocalEntryNotFoundError("Cannot reach the hub.\nAnd much more.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="me/none: the hub did not give or take it: Cannot reach the hub.$"):
        AutoEncoder.from_pretrained("me/none")


def test_the_real_client_offline():
    """HF_HUB_OFFLINE: nothing is asked, and one sentence comes back."""
    code = "from flux2 import AutoEncoder\ntry: AutoEncoder.from_pretrained('me/none')\nexcept OSError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout.startswith("me/none: the hub did not give or take it: "), done.stderr
    assert done.stdout.count("\n") == 1


class Api:
    """What push_to_hub calls of HfApi"""

    calls: ClassVar[list] = []
    has_card = False
    reachable = True

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        if not self.reachable:
            raise huggingface_hub.errors.HfHubHTTPError.__base__("no network")
        self.calls.append(("create", repo_id, options))

    def file_exists(self, repo_id, filename, **options):
        return self.has_card

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        files = set(os.listdir(folder_path)) - set(ignore_patterns or ())
        self.calls.append(("upload", files, options))
        assert AutoEncoder.from_pretrained(folder_path).cfg == TINY
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_push(ae, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    assert ae.push_to_hub("me/mine", private=True, token="t", license="mit") == "https://hub/commit/1"
    assert Api.calls[:2] == [("token", "t"), ("create", "me/mine", {"private": True, "exist_ok": True})]
    _, files, options = Api.calls[2]
    assert files == {"config.json", "model.safetensors", "README.md"}
    assert options == {
        "repo_id": "me/mine", "commit_message": "Upload autoencoder", "revision": None, "create_pr": False
    }  # fmt: skip
    monkeypatch.setattr(Api, "has_card", True)
    ae.push_to_hub("me/mine")
    assert Api.calls[-1][1] == {"config.json", "model.safetensors"}
    monkeypatch.setattr(Api, "reachable", False)
    with pytest.raises(OSError, match="me/mine: the hub did not give or take it: no network"):
        ae.push_to_hub("me/mine")


def test_places_that_cannot_be_written(ae, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, or a path that is free, got a file"):
        ae.save_pretrained(tmp_path / "file")
