"""Tables of a comparison as text, from the numbers of `train.compare_summary`, for its page and for the documents."""

from __future__ import annotations

from typing import Any

from train.compare_findings import CLAIMS, MEASURES
from train.compare_plots import number
from train.compare_rows import LAWS, NO_REPA, PUBLISHED, in_order
from train.compare_summary import FACTORS

Table = tuple[list[str], list[list[str]]]  # header, rows


def label_of(summary: dict[str, Any]) -> str:
    """What the distances are called: "FD-HOG", "FID"."""
    return summary["features"].get("label", "FD")


def triangle_table(summary: dict[str, Any]) -> Table:
    """Learnability, quality and compression of each autoencoder."""
    label = label_of(summary)
    header = ["autoencoder", f"best {label}", "velocity loss", "PSNR, dB", "SSIM", f"{label} of reconstructions"]
    header += ["channels a token", "bits a pixel", "effective rank", "probe R2"]
    rows = []
    for name in in_order(summary["autoencoders"]):
        info, best = summary["autoencoders"][name], summary["best"].get(name, {}).get("best", {})
        cells = [_with_error(best), fixed(best.get("velocity"), 3), fixed(info.get("psnr"), 2)]
        cells += [fixed(info.get("ssim"), 3), number(info.get("rfd")), str(info.get("channels", "-"))]
        cells += [fixed(info.get("bits_per_pixel"), 2), fixed(info.get("effective_rank"), 1)]
        rows.append([name, *cells, fixed(info.get("probe_r2"), 3)])
    return header, rows


def quality_table(summary: dict[str, Any]) -> Table:
    """The article's reconstruction figures, and ours beside them."""
    header = ["autoencoder", "PSNR, published", "PSNR, here", "SSIM, published", "SSIM, here", "rFID, published"]
    header += [f"{label_of(summary)} of reconstructions, here", "PSIM, published", "LPIPS, here"]
    rows = []
    for name in in_order(summary["autoencoders"]):
        info, theirs = summary["autoencoders"][name], PUBLISHED.get(name, {})
        rows.append(
            [name, fixed(theirs.get("psnr"), 2), fixed(info.get("psnr"), 2)]
            + [fixed(theirs.get("ssim"), 3), fixed(info.get("ssim"), 3)]
            + [fixed(theirs.get("rfid"), 4), number(info.get("rfd"))]
            + [fixed(theirs.get("psim"), 3), fixed(info.get("lpips"), 3)]
        )
    return header, rows


def sensitivity_table(summary: dict[str, Any]) -> Table:
    """Change of FD by each factor in per cent, here (over so many settings) and as published."""
    header = ["autoencoder"]
    for words in FACTORS.values():
        header += [f"{words}, published", f"{words}, here"]
    rows = []
    for name in in_order(summary["sensitivity"]):
        found, cells = summary["sensitivity"][name], []
        for factor in FACTORS:
            ours, theirs = found[factor], PUBLISHED.get(name, {}).get("sensitivity", {}).get(factor)
            here = "-" if ours["percent"] is None else f"{ours['percent']:.1f}% ({ours['settings']})"
            cells += ["-" if theirs is None else f"{theirs:.1f}%", here]
        rows.append([name, *cells, f"{found['law']['dropped']} of {found['law']['of']}"])
    return [*header, "left out"], rows


def best_table(summary: dict[str, Any]) -> Table:
    """The best setting of each autoencoder, as published and here; a star: an end of the shifts that were tried."""
    label = label_of(summary)
    header = ["autoencoder", "law, published", "law, here", "shifts, published", "shifts, here", "REPA, here"]
    header += ["gFID, published", f"{label}, here", f"{label} without REPA, here"]
    rows = []
    for name in in_order(summary["autoencoders"]):
        theirs, found = PUBLISHED.get(name, {}), summary["best"].get(name, {})
        best, plain = found.get("best", {}), found.get("best without REPA", {})
        law, shifts, repa = setting_words(best) if best else ("-", "-", "-")
        published = [fixed(theirs.get(f"{kind}_shift"), 2) for kind in ("train", "sampling")]
        rows.append(
            [name, theirs.get("law", "-"), law, " / ".join(published) if theirs else "-", shifts, repa]
            + [fixed(theirs.get("gfid"), 2), _with_error(best), number(plain.get("fd"))]
        )
    return header, rows


def setting_words(best: dict[str, Any]) -> tuple[str, str, str]:
    """Law, "train / sampling" shift with its stars, and REPA of a best setting."""
    shifts = [f"{best[f'{kind}_shift']:.2f}{'*' if kind in best['edge'] else ''}" for kind in ("train", "sampling")]
    repa: str = best["repa"]
    return LAWS.get(best["law"], str(best["law"])), " / ".join(shifts), "no" if repa == NO_REPA else repa


def verdicts_table(summary: dict[str, Any]) -> Table:
    """A row a finding of the article: what shows here, by each measure."""
    rows = [
        [f"({letter}) {claim}", *(summary["verdicts"][letter].get(m, "") for m in MEASURES)]
        for letter, claim in CLAIMS.items()
    ]
    return ["finding of the article", *(f"by {words}" for words in MEASURES.values())], rows


def findings_table(summary: dict[str, Any]) -> Table:
    """Every test of (a), (d), (e): a row a claim, a column a measure."""
    tests = [t for t in summary["findings"] if t["finding"] in "ade"]
    rows = []
    for finding, claim in dict.fromkeys((t["finding"], t["claim"]) for t in tests):
        of = {t["measure"]: t for t in tests if (t["finding"], t["claim"]) == (finding, claim)}
        rows.append([f"({finding}) {claim}", *(_judged(of.get(m), 1) for m in MEASURES)])
    return ["better by, %", *MEASURES.values()], rows


def shifts_table(summary: dict[str, Any]) -> Table:
    """The tests of (b), slopes, and (c), logarithms of ratios."""
    rows = [
        [f"({t['finding']}) {t['claim']}", MEASURES[t["measure"]], _judged(t, 2)]
        for t in summary["findings"]
        if t["finding"] in "bc"
    ]
    return ["claim", "measure", "mean, standard error, pairs"], rows


def orders(summary: dict[str, Any]) -> str:
    """Two sentences: autoencoders from the best to the worst as published and here, and how far the two agree."""
    published, here = summary["published"], summary["order"]
    text = f"From the best: {', '.join(published['order'])} as published; {', '.join(here) or 'none yet'} here."
    return f"{text} {published['pairs_alike']} of {published['pairs']} pairs stand in the article's order."


def equal_quality(summary: dict[str, Any]) -> str:
    """How far flux.2 and flux.2-nosem are from equal quality: half a sentence, or none."""
    pair = [summary["autoencoders"].get(n, {}).get("psnr") for n in ("flux.2", "flux.2-nosem")]
    return "" if None in pair else f"PSNR of flux.2 less that of flux.2-nosem is {pair[0] - pair[1]:+.2f} dB"


def state(summary: dict[str, Any]) -> str:
    """One sentence: how many models there are of those planned."""
    n = summary["models"]
    text = f"{n['done']:,} of {n['planned']:,} models are done" if n["planned"] else f"{n['done']:,} models are done"
    text += f", {n['failed']:,} failed" if n["failed"] else ""
    text += f", {n['missing']:,} are not there yet" if n["missing"] else ""
    text += f"; {n['not_finite']:,} figures are not finite and left out" if n["not_finite"] else ""
    return text + "."


def machine(summary: dict[str, Any]) -> str:
    """Processor, GPU, threads and torch of the comparison."""
    env = summary["environment"]
    gpu = "" if env.get("gpu", "none") == "none" else f", {env['gpu']}"
    threads = f"{env.get('threads', '-')} thread" + ("" if env.get("threads") == 1 else "s")
    return f"{env.get('processor', '-')}{gpu}, {threads}, torch {env.get('packages', {}).get('torch', '-')}"


def protocol(summary: dict[str, Any]) -> Table:
    """What the figures are measured with, and on what."""
    features, grid = summary["features"], summary["grid"]
    rows = [
        ["features", f"{features.get('label', '-')}: {features.get('name', '-')}, {features.get('identity', '-')}"],
        ["samples a figure", "-" if summary["samples"] is None else f"{summary['samples']:,}"],
        ["reference", str(summary["config"].get("reference") or "crops of the training pictures")],
        ["last checkpoint", f"{summary['last_nimg']:,} images"],
        ["laws", ", ".join(LAWS[law] for law in grid["law"]) or "-"],
        ["train shifts", ", ".join(f"{s:g}" for s in grid["train_shift"]) or "-"],
        ["sampling shifts", ", ".join(f"{s:g}" for s in grid["sampling_shift"]) or "-"],
        ["REPA", ", ".join(grid["repa"]) or "-"],
        ["seeds", ", ".join(map(str, grid["seed"])) or "-"],
        ["commit", str(summary["environment"].get("commit", "-"))],
        ["machine", machine(summary)],
    ]
    return ["protocol", ""], rows


def _judged(test: dict[str, Any] | None, digits: int) -> str:
    if test is None or not test["n"]:
        return "no data"
    error = "" if test["standard_error"] is None else f" ± {test['standard_error']:.{digits}f}"
    return f"{test['mean']:+.{digits}f}{error} ({test['n']}): {test['verdict']}"


def _with_error(best: dict[str, Any]) -> str:
    shown, error = number(best.get("fd")), best.get("fd_error")
    return shown if error is None else f"{shown} ± {error:.{len(shown.partition('.')[2])}f}"


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals; `-` for none."""
    return "-" if value is None else f"{value:.{digits}f}"
