"""Evaluates autoencoders and flow models: `python -m train.evaluate COMMAND`. `--help` of each has examples."""

from __future__ import annotations

import sys
from collections.abc import Callable

from train.evaluation import comparison_table, load_result
from train.references import note
from train.run import exit_code


def _reconstruct(argv: list[str]) -> int:
    from train import evaluate_reconstruct

    return evaluate_reconstruct.main(argv)


def _generate(argv: list[str]) -> int:
    from train import evaluate_generate

    return evaluate_generate.main(argv)


def _latents(argv: list[str]) -> int:
    from train import latent_report

    return latent_report.main(argv)


def _learnability(argv: list[str]) -> int:
    from train import learnability

    return learnability.main(argv)


def _table(argv: list[str]) -> int:
    import argparse

    about = "Print results side by side; refused where they do not compare."
    parser = argparse.ArgumentParser(prog="python -m train.evaluate table", description=about)
    parser.add_argument("results", nargs="+", help="evaluation.json files, or the folders they are in")
    results = [load_result(path) for path in parser.parse_args(argv).results]
    print(comparison_table(results))
    protocol = results[0]["protocol"]
    reference = f"reference {protocol['reference'][:12]} ({protocol['crop']})"
    print(f"{protocol['count']} pictures each; features {protocol['features']}; {reference}")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "reconstruct": (_reconstruct, "an autoencoder's reconstructions"),
    "generate": (_generate, "samples of a flow model, or pictures of anyone's"),
    "latents": (_latents, "what an autoencoder's latent is like"),
    "learnability": (_learnability, "how well a small flow model learns an autoencoder's latents"),
    "table": (_table, "results side by side"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command: exit code 0; 2 on bad input; 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        usage = "usage: python -m train.evaluate COMMAND ...\n\n"
        usage += "\n".join(f"  {name:<14}{about}" for name, (_, about) in COMMANDS.items())
        if asked := argv[:1] in (["-h"], ["--help"]):
            print(usage + "\n\n--help of each shows its options and examples")
        else:
            note(f"error: expected one of {', '.join(COMMANDS)}, got {' '.join(argv[:1]) or 'none'}\n{usage}")
        return 0 if asked else 2

    def program() -> int:
        try:
            return COMMANDS[argv[0]][0](argv[1:])
        except KeyboardInterrupt:
            note("interrupted; no result is written")
            return 130

    return exit_code(program)


if __name__ == "__main__":
    sys.exit(main())
