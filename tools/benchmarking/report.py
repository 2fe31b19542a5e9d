"""Human-readable forms of a measurement: a table, a verdict, a comparison, a chart."""

from pathlib import Path
from typing import Any

Result = dict[str, Any]
# Settings that must be equal for two measurements to be compared.
SETTINGS = ("recipe", "fidelity", "device", "batch_size", "num_threads", "order", "hw_decoder_load", "pixels")


def table(result: Result) -> str:
    """A Markdown table: each stage alone on one core, and the pipeline up to and including it."""
    lines = [
        "| stage | stage alone, ms/image (one core) | pipeline so far, images/s | min - max | CPU-s / 1,000 |",
        "|---|---|---|---|---|",
    ]
    for name, stage in result["stages"].items():
        single = f"{stage['alone_ms']['median']:.3f}" if "alone_ms" in stage else ""
        so_far = stage.get("images_per_s")
        rate = f"{so_far['median']:.0f} | {so_far['min']:.0f} - {so_far['max']:.0f}" if so_far else " | "
        cpu = f"{stage['cpu_s_per_1000']['median']:.2f}" if "cpu_s_per_1000" in stage else ""
        lines.append(f"| {name} | {single} | {rate} | {cpu} |")
    for name, rival in result.get("against", {}).items():
        rate = rival["images_per_s"]
        lines.append(
            f"| {name} | | {rate['median']:.0f} | {rate['min']:.0f} - {rate['max']:.0f} | "
            f"{rival['cpu_s_per_1000']['median']:.2f} |"
        )
    return "\n".join(lines)


def verdict(result: Result) -> str:
    """The loader's bottleneck, the setting to change, and the cores needed."""
    return f"{_limit(result)} {_needed(result)}"


def _needed(result: Result) -> str:
    """The cores needed for the wanted rate, and the rate that more cores cannot exceed."""
    cpu, feeding = result["cpu_s_per_1000"]["median"], result["feeding_ms"]["median"]
    wanted = result["wanted"] or 1000.0
    return (
        f"1,000 images take {cpu:.2f} CPU-seconds ({result['pixels']}): {wanted:,.0f} images/s need "
        f"{wanted * cpu / 1e3:.1f} cores; the busiest single thread, {feeding:.3f} ms an image, would bind "
        f"at {1e3 / max(feeding, 1e-6):,.0f} images/s."
    )


def _limit(result: Result) -> str:
    stages, threads = result["stages"], result["num_threads"]
    whole = list(stages.values())[-1]
    costs = {name: s["alone_ms"]["median"] for name, s in stages.items() if "alone_ms" in s}
    slowest = max(costs, key=lambda name: costs[name])
    share = 100 * costs[slowest] / sum(costs.values())
    if result["device"] != "cpu":
        read = stages["read"]["images_per_s"]["median"]
        limit = result["images_per_s"]["median"]
        if read < 1.3 * limit:
            return f"Reading limits ({read:.0f} images/s): faster storage, or --order block."
        return (
            f"{slowest} costs most ({share:.0f} % of the stages' time): try --tune, for the share of the hardware "
            "decoder and the number of threads."
        )
    machine = result["machine"]
    busy, cores = whole["cores_busy"]["median"], min(machine["cores"], machine["cpu_quota"] or machine["cores"])
    wanted = min(threads, cores)
    if busy >= 0.85 * wanted:
        advice = (
            "more threads (--num-threads)"
            if threads < cores
            else "more cores or a GPU, smaller stored images (shard with --short-side), or fewer views"
        )
        return f"The processor limits: {busy:.1f} of {cores} cores are busy, {share:.0f} % with {slowest}; {advice}."
    if machine["load_before"] > 0.5 * cores:
        return (
            f"Other programs limit: load {machine['load_before']} on {cores} cores before the start, and "
            f"only {busy:.1f} cores were free; measure again on a quiet machine."
        )
    if result["from_storage_percent"] > 10:
        percent = result["from_storage_percent"]
        return f"Storage limits: {percent:.0f} % of the bytes came from it; --order block reads in runs."
    return f"Waiting limits: only {busy:.1f} of {wanted} cores are busy; a larger batch or --tune."


def comparable(settings: dict[str, Any], earlier: Result) -> None:
    """Raise ValueError that names the first setting in which two measurements differ."""
    for name in SETTINGS:
        if settings[name] != earlier[name]:
            option = name.replace("_", "-")
            raise ValueError(f"--compare: the earlier run had --{option} {earlier[name]}, not {settings[name]}")


def compare(result: Result, earlier: Result) -> list[str]:
    """One line per figure: the change, and whether it exceeds the noise (the ranges of both runs do not overlap)."""
    single = min(result["repeats"], earlier["repeats"]) < 2
    lines = []
    for label, new, old in _pairs(result, earlier):
        change = 100 * (new["median"] / old["median"] - 1)
        apart = new["min"] > old["max"] or new["max"] < old["min"]
        noise = "noise unknown" if single else "beyond noise" if apart else "within noise"
        lines.append(f"{label}: {old['median']} -> {new['median']} ({change:+.1f} %, {noise})")
    return lines


def _pairs(result: Result, earlier: Result) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    pairs = []
    for name, stage in result["stages"].items():
        before = earlier["stages"].get(name, {})
        for key, unit in (("alone_ms", "ms/image, stage alone"), ("images_per_s", "images/s")):
            if key in stage and key in before and before[key]["median"]:
                pairs.append((f"{name}, {unit}", stage[key], before[key]))
    return pairs


def chart(result: Result, path: Path) -> None:
    """Write a PNG chart of the stages; needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    stages = {n: s for n, s in result["stages"].items() if n != "read"}  # its bar would dwarf all others
    rungs = {n: s["images_per_s"] for n, s in stages.items() if "images_per_s" in s}
    rivals = {n: r["images_per_s"] for n, r in result.get("against", {}).items()}
    singles = {n: s["alone_ms"]["median"] for n, s in result["stages"].items() if "alone_ms" in s}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained")
    bars = {**rungs, **rivals}
    middle = [r["median"] for r in bars.values()]
    error = [[r["median"] - r["min"] for r in bars.values()], [r["max"] - r["median"] for r in bars.values()]]
    shades = ["tab:blue"] * len(rungs) + ["tab:gray"] * len(rivals)
    marks = left.bar(list(bars), middle, yerr=error, color=shades, capsize=3)
    left.bar_label(marks, fmt="%.0f", padding=3)
    left.set_ylabel("images/s")
    left.set_title(f"{result['recipe']} on {result['device']}, {result['num_threads']} threads")
    left.tick_params(axis="x", labelsize=8)
    right.barh(list(singles), list(singles.values()), color="tab:orange")
    right.invert_yaxis()
    right.set_xlabel("ms per image, stage alone on one core")
    figure.savefig(path, dpi=120)
    plt.close(figure)
