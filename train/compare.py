"""Compares autoencoders by the flow models trained on them: `python -m train.compare`. `--help` lists options."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch

from flux2.features import build_features
from flux2.tensor_files import load_json, save_json
from train.compare_config import CompareConfig, CompareOptions, parse_compare
from train.compare_plan import plan
from train.compare_processes import Crew, cores
from train.compare_report import write_comparison_report
from train.compare_work import State, run_worker
from train.configs import differences, to_dict
from train.loop import choose_device, choose_precision, environment
from train.run import exit_code

NARROW = 512  # width up to which a flow model leaves most of a GPU idle


def workers_of(config: CompareConfig, options: CompareOptions, device: torch.device) -> int:
    """Processes of this machine."""
    if options.jobs:
        return options.jobs
    if device.type == "cuda":
        alone = 4 if config.flow.transformer.width <= NARROW else 1
        return (options.per_gpu or alone) * torch.cuda.device_count()
    return cores()


def write_header(config: CompareConfig, folder: Path, device: torch.device) -> None:
    """comparison.json, or the check that the one that is there is of this config. ValueError names what differs."""
    path = folder / "comparison.json"
    if path.is_file():
        if changed := differences(load_json(path)["config"], to_dict(config)):
            raise ValueError(f"{folder} was started with another config; " + "; ".join(changed))
        return
    features = build_features(config.features, config.feature_weights)
    machine = environment(device)
    machine.pop("command", None)  # may name folders of the machine
    what = f"{config.reference_crops} crops of training pictures that training does not draw"
    if not config.crops.cached_crops:
        what = "centre squares of the training pictures"
    header = {
        "preset": config.preset,
        "config": to_dict(config),
        "features": {"name": features.name, "label": features.label, "identity": features.identity},
        "samples": config.samples,
        "reference": Path(config.reference).name if config.reference else what,
        "environment": machine,
    }
    save_json(path, header)


def compare(config: CompareConfig, options: CompareOptions) -> int:
    """Runs the comparison; the exit code: 0, 1 where models failed, 128 + signal after an interruption."""
    folder = options.folder(config)
    if options.report:
        print(f"report: {write_comparison_report(folder)}")
        return 0
    device = choose_device(options.device)
    precision = choose_precision(config.flow.precision, device)  # one for all machines that work on it
    config = dataclasses.replace(config, flow=dataclasses.replace(config.flow, precision=precision))
    state = State(config, folder)
    count = workers_of(config, options, device)
    print(plan(config, *state.counts(), count), flush=True)
    if options.dry_run:
        return 0
    for name in config.autoencoders:
        if name not in config.paths:
            config.flags_of(name)  # a ValueError before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    write_header(config, folder, device)
    if options.retry_failed:
        state.forget_failures()
    print(f"folder: {folder}; {count} worker{'s' if count > 1 else ''} on {device}", flush=True)
    began = time.monotonic()
    alone = count == 1 and device.type == "cpu"  # a GPU may be lost, and with it the process that uses it
    code = run_worker(config, options) if alone else Crew(config, options, device, count).run()
    (done, failed), total = state.counts(), len(state.cells)
    state.write_csv()
    if done:
        print(f"report: {write_comparison_report(folder)}")
    if code:
        print(f"{done} of {total} models are done; the same command goes on")
        return code
    for result in state.results():
        if result["status"] != "done":
            print(f"failed: {result['id']}: {result['error']}", file=sys.stderr)
    words = f"{done - failed} of {total} models done, {failed} failed"
    print(f"{words}; {time.monotonic() - began:.0f} s of this call")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The program: exit code 0; 1 where models failed; 2 on bad input; 130 or 143 after an interruption."""
    return exit_code(lambda: compare(*parse_compare(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
