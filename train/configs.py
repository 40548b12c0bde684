"""What all training programs share of their command lines: run options, presets by name, configs compared on resume."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from flux2.tensor_files import nearest

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a run happens; may differ between a run and its resumption."""

    compile: bool = False
    """Compile the training step with torch.compile."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """What the networks run on: fused operations (auto), those in Triton or not at all, or stock modules (torch)."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""
    out: Path = Path("runs")
    """Folder of all runs."""
    name: str = ""
    """Folder of this run inside --out; by default the preset's name, with a number if that is taken."""
    resume: Literal["no", "auto"] = "no"
    """auto continues the named run from its newest checkpoint, or starts it."""
    allow_changed: tuple[str, ...] = ()
    """Keys of the config that may differ from the run's when it is resumed (lr, or gan.weight); any other refuses."""
    save_every: int = 0
    """Steps between checkpoints; 0 is a quarter of the run, at most 1000."""
    keep: int = 2
    """Checkpoints kept."""
    stop_after: int = 0
    """Save and leave after this many steps (0: at the end)."""
    patience: int = 20
    """Updates skipped in a row, for a loss or gradient that is not a finite number, before the run stops."""
    rollback: float = 0.0
    """Go back to the checkpoint before, and on with other samples, where the loss rises above this multiple of its
    median or --patience is reached; 0 is never."""
    peer_timeout: float = 600.0
    """Seconds that a process of several waits for another before that counts as lost, and the run starts again: more
    than the first takes for what it does alone, as a latent cache or the report."""
    max_bad: float = 0.01
    """Share of the pictures that may be unreadable (three always may) before the run stops; each is passed over and
    listed in bad_samples.jsonl."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the log goes beside log.jsonl; each has to be installed: pip install 'flux2-tokenizer[track]'."""
    dry_run: bool = False
    """Print the resolved config, parameters, memory and arithmetic, and stop."""

    def __post_init__(self) -> None:
        for name, least in (("save_every", 0), ("keep", 1), ("stop_after", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not self.peer_timeout > 0:
            raise ValueError(f"peer_timeout: expected a positive number of seconds, got {self.peer_timeout}")
        if self.rollback and not self.rollback > 1:
            raise ValueError(f"rollback: expected 0 or a number above 1, got {self.rollback}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad: expected a share in [0, 1], got {self.max_bad}")
        if self.name and (Path(self.name).name != self.name or self.name in (".", "..")):
            raise ValueError(f"name: expected a plain folder name, got {self.name!r}; --out chooses where runs go")


Options = TypeVar("Options", bound=RunOptions)


def parse(
    argv: list[str], presets: Mapping[str, Config], *, options: Options, default: str, prog: str, description: str
) -> tuple[Config, Options]:
    """Config and options from the command line: the row of --preset and `options`, then what is given over them.

    Prints and exits on --help (0) and on unknown or malformed options (2); ValueError on an unknown preset or on values
    that do not fit together.
    """
    import tyro

    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=prog, usage=argparse.SUPPRESS)
    chosen.add_argument("--preset", default=default)
    preset = chosen.parse_known_args(argv)[0].preset
    if preset not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {preset!r}{nearest(preset, presets)}")
    row = presets[preset]
    return tyro.cli(
        tuple[Annotated[type(row), tyro.conf.arg(name="")], Annotated[type(options), tyro.conf.arg(name="")]],  # type: ignore[misc]
        prog=prog,
        description=description,
        default=(row, options),
        args=argv,
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict of a config dataclass, tuples as lists: what config.yaml and the checkpoints hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe(config: Any) -> str:
    """A config dataclass as YAML, as it is printed and saved."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(
    saved: dict[str, Any], now: dict[str, Any], prefix: str = "", words: tuple[str, str] = ("saved", "now")
) -> list[str]:
    """One line `key: saved A, now B` for each key in which two config dicts differ; `words` in their places."""
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key, "absent"), now.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.", words)
        elif a != b:
            lines.append(f"{prefix}{key}: {words[0]} {a}, {words[1]} {b}")
    return lines


def in_short(config: Any, presets: Mapping[str, Any]) -> str:
    """What a run prints of its config: the preset's name, and each key in which it differs from that preset; all of it
    where there is no such preset, as in configs made in code."""
    if config.preset not in presets:
        return describe(config).rstrip()
    changed = differences(to_dict(presets[config.preset]), to_dict(config), words=("preset", "now"))
    return "\n  ".join([f"preset {config.preset}" + (", but" if changed else ""), *changed])
