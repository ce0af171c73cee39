"""What the FP8 loss study makes of its losses: relative differences, their spread over seeds, the verdict, the plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

DECAY, LAST_SHARE, TARGET = 0.9, 0.2, 0.0025
BASE, RECIPE, CONTROL = "bf16", "fp8", "e4m1"
# Losses by variant, then seed.
Losses = Mapping[str, Mapping[int, list[float]]]


@dataclass(frozen=True)
class Verdict:
    """differences: variant -> seed -> relative difference to BF16, averaged over the last fifth of the steps.
    mean, spread: of these over seeds (spread: standard deviation, n - 1; NaN for one seed)."""

    differences: dict[str, dict[int, float]]
    mean: dict[str, float]
    spread: dict[str, float]

    @property
    def pooled(self) -> float:
        """Standard deviation over seeds, pooled over recipe and control."""
        return float(np.sqrt((self.spread[RECIPE] ** 2 + self.spread[CONTROL] ** 2) / 2))

    @property
    def distance(self) -> float:
        """Between the means of control and recipe."""
        return abs(self.mean[CONTROL] - self.mean[RECIPE])

    @property
    def separates(self) -> bool:
        """Whether the study can tell the control from the recipe; never with one seed."""
        return self.distance > 2 * self.pooled

    @property
    def within_target(self) -> bool:
        return abs(self.mean[RECIPE]) < TARGET

    def missed(self) -> list[str]:
        """One line for each thing that is not as it should be."""
        found = []
        if np.isnan(self.pooled):
            found.append("without power: one seed has no spread; give --seeds 2 or more")
        elif not self.separates:
            found.append(
                f"without power: control and recipe are {100 * self.distance:.3f} % apart, which is not more than "
                f"twice the pooled standard deviation of {100 * self.pooled:.3f} %"
            )
        if not self.within_target:
            found.append(f"recipe: {100 * self.mean[RECIPE]:+.3f} % from BF16; allowed is {100 * TARGET:g} %")
        return found


def smooth(values: list[float]) -> np.ndarray:
    """Exponential moving average with decay 0.9, as in V3's figure 10; its start is corrected for the missing past."""
    average, out = 0.0, []
    for i, value in enumerate(values):
        average = DECAY * average + (1 - DECAY) * value
        out.append(average / (1 - DECAY ** (i + 1)))
    return np.array(out)


def relative_difference(losses: list[float], base: list[float]) -> np.ndarray:
    """(losses - base) / base by step, both smoothed."""
    return (smooth(losses) - smooth(base)) / smooth(base)


def last_mean(values: np.ndarray) -> float:
    """Over the last fifth."""
    return float(values[-max(1, round(LAST_SHARE * len(values))) :].mean())


def judge(losses: Losses) -> Verdict:
    """Every variant's seeds must be those of BF16."""
    differences = {
        variant: {seed: last_mean(relative_difference(values, losses[BASE][seed])) for seed, values in runs.items()}
        for variant, runs in losses.items()
        if variant != BASE
    }
    mean, spread = {}, {}
    for variant, by_seed in differences.items():
        found = np.array(list(by_seed.values()))
        mean[variant] = float(found.mean())
        spread[variant] = float(found.std(ddof=1)) if len(found) > 1 else float("nan")
    return Verdict(differences, mean, spread)


def draw(losses: Losses, tokens: int, path: Path) -> None:
    """Losses above, relative differences to BF16 below (mean and, as a band, the seeds' range), over tokens."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 7.5), sharex=True, height_ratios=[1, 1.3])
    looks = {
        BASE: ("BF16", "#1f2933"),
        RECIPE: ("FP8 recipe", "#2166ac"),
        "per_tensor": ("E4M3, one scale per tensor", "#e08214"),
        CONTROL: ("control: one mantissa bit", "#b2182b"),
    }
    for variant, (label, color) in looks.items():
        if variant not in losses:
            continue
        runs = losses[variant]
        million = np.arange(1, len(next(iter(runs.values()))) + 1) * tokens / 1e6
        upper.plot(million, np.mean([smooth(values) for values in runs.values()], 0), color=color, label=label, lw=1.3)
        if variant == BASE:
            continue
        percent = 100 * np.array([relative_difference(values, losses[BASE][seed]) for seed, values in runs.items()])
        lower.plot(million, percent.mean(0), color=color, label=label, lw=1.4)
        lower.fill_between(million, percent.min(0), percent.max(0), color=color, alpha=0.18, lw=0)
    lower.axvspan((1 - LAST_SHARE) * million[-1], million[-1], color="#f1f4f7", zorder=0)
    for bound in (-TARGET, 0.0, TARGET):
        lower.axhline(100 * bound, color="#7b8794", linestyle=":" if bound else "-", lw=0.8)
    upper.set_ylabel("loss (nats per token), smoothed")
    lower.set_ylabel("difference to BF16 (%)")
    lower.set_xlabel("million tokens")
    upper.legend(frameon=False)
    lower.legend(frameon=False, loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
