"""Compares autoencoders by the flow models trained on them: `python -m train.compare`. `--help` lists options."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flux2.features import build_features
from flux2.tensor_files import load_json, save_json
from train.compare_config import CompareConfig, CompareOptions, parse_compare
from train.compare_plan import plan
from train.compare_report import write_comparison_report
from train.compare_work import State, run_worker, worker_process
from train.configs import differences, to_dict
from train.loop import choose_device, environment
from train.run import exit_code

NARROW = 512  # width up to which a flow model leaves most of a GPU idle


def workers_of(config: CompareConfig, options: CompareOptions, device: torch.device) -> int:
    """Processes of this machine."""
    if options.jobs:
        return options.jobs
    if device.type == "cuda":
        alone = 4 if config.flow.transformer.width <= NARROW else 1
        return (options.per_gpu or alone) * torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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


def run_processes(config: CompareConfig, options: CompareOptions, device: torch.device, count: int) -> int:
    """`count` workers of this machine until they end; the exit code: the greatest of theirs, so an interruption's.

    On a CPU each has its share of the cores; GPUs are dealt out in turn. A signal to this process reaches them all.
    """
    spawn, started = multiprocessing.get_context("spawn"), []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // count) if device.type == "cpu" else 0
    kept = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    visible = (kept["CUDA_VISIBLE_DEVICES"] or "").split(",")
    stop = [0]

    def pass_on(number: int, _: Any) -> None:
        stop[0] = number
        for process in started:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGTERM)

    previous = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for i in range(count):
            if device.type == "cpu":
                os.environ["OMP_NUM_THREADS"] = str(threads)
            elif device.index is None:
                number = i % torch.cuda.device_count()
                os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if visible[0] else str(number)
            process = spawn.Process(target=worker_process, args=(config, options, threads))
            process.start()
            started.append(process)
        for process in started:
            process.join()
    finally:
        for key, value in kept.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop[0]:
        return 128 + stop[0]
    codes = [128 - p.exitcode if (p.exitcode or 0) < 0 else p.exitcode or 0 for p in started]
    return max(codes)


def compare(config: CompareConfig, options: CompareOptions) -> int:
    """Runs the comparison; the exit code: 0, 1 where models failed, 128 + signal after an interruption."""
    folder = options.folder(config)
    if options.report:
        print(f"report: {write_comparison_report(folder)}")
        return 0
    device = choose_device(options.device)
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
    code = run_worker(config, options) if count == 1 else run_processes(config, options, device, count)
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
