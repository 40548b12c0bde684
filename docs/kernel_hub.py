"""Lays `kernels/` out as a repository of Hugging Face's kernel hub: `make kernel-hub` writes dist/kernel-hub.

    build.toml                                  as kernel-builder reads it (edition 5)
    torch-ext/flux2_tokenizer_kernels/          the source: kernels/ as it is
    build/torch-BACKEND/flux2_tokenizer_kernels/  the same, for each backend, beside its metadata.json
    README.md                                   the card

Nothing is compiled: Triton compiles where it runs. `kernels.get_local_kernel(Path("dist/kernel-hub"))` of Hugging
Face's `kernels` loads it, in an environment that has theirs, not ours.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME, VERSION, LICENSE = "flux2-tokenizer-kernels", 1, "Apache-2.0"
PACKAGE = NAME.replace("-", "_")
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
UNIVERSAL = "torch-universal"  # what loaders before metadata.json look for

BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
license = "{LICENSE}"
edition = 5
backends = [{", ".join(f'"{b}"' for b in BACKENDS)}]

[torch-noarch]
"""
CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [kernels, triton, autoencoder]
---

# {name}

Fused operations of image autoencoders and flow matching, with gradients: {operations}.

```python
from kernels import get_kernel

ops = get_kernel("OWNER/{name}", version={version})
y = ops.norm_silu_conv2d(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.num_groups, norm.eps)
```

Triton on CUDA, ROCm and XPU devices, aten on CPUs. torch 2.11 and triton 3.6, or newer.
"""


def write(folder: Path) -> None:
    """Writes the repository to `folder`, in place of one that is there. OSError if it cannot be written.

    ValueError if the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").is_file():
        raise ValueError(f"{folder}: expected a folder that is free, or an older build, got something else")
    shutil.rmtree(folder, ignore_errors=True)
    variants = [*(f"torch-{backend}" for backend in BACKENDS), UNIVERSAL]
    for place in (folder / "torch-ext", *(folder / "build" / v for v in variants)):
        shutil.copytree(ROOT / "kernels", place / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    for variant in variants:
        backend = "cpu" if variant == UNIVERSAL else variant.removeprefix("torch-")
        about = {
            "id": f"_{PACKAGE}_{VERSION}_{backend}",
            "name": NAME,
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "build" / variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    sys.path.insert(0, str(ROOT))
    import kernels

    operations = ", ".join(f"`{name}`" for name in kernels.__all__)
    (folder / "README.md").write_text(CARD.format(name=NAME, version=VERSION, operations=operations))
    (folder / "build.toml").write_text(BUILD)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "kernel-hub"
    write(target)
    print(target)
