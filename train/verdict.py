"""Was the run healthy? A handful of checks with stated limits, each a sentence with its figures.

The limits are conventions for telling a reader where to look, not theory; each stands beside its check.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from train.console import short
from train.record import RunRecord, label_name, language_name

LATE = 0.1  # the share of the run that speaks for its end
SKIPPED_WARN = 0.01  # share of steps skipped for a norm that is not finite
ROSE_WARN, ROSE_BAD = 0.05, 0.2  # loss at the end above the lowest mean over an equally long window
SPIKE = 6.0  # robust standard deviations above the median of the window before
SPIKE_WINDOW = 64
MAX_VIO_WARN, MAX_VIO_BAD = 1.0, 3.0  # busiest expert at twice, at four times the mean
DEAD_SHARE = 0.05  # an expert below this share of the mean load is dead
LONG_WARN, LONG_BAD = 0.02, 0.1  # bits per byte at the longest context above those at the shortest
CONTEXT_USE = 0.05  # a model must be this much better with its context than with one token


class Grade(IntEnum):
    """Ordered by gravity; UNKNOWN is not a fault of the run, but nobody looked."""

    GOOD = 0
    UNKNOWN = 1
    WARN = 2
    BAD = 3


@dataclass(frozen=True)
class Check:
    """title: what was looked at. figure: the number to see first. text: one sentence saying what it means."""

    title: str
    grade: Grade
    figure: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """The checks and what they come to."""

    checks: tuple[Check, ...]

    @property
    def grade(self) -> Grade:
        worst = max(check.grade for check in self.checks)
        return Grade.GOOD if worst is Grade.UNKNOWN else worst

    @property
    def headline(self) -> str:
        if self.grade is Grade.GOOD:
            return "Healthy"
        return ("Not healthy: " if self.grade is Grade.BAD else "Needs a look: ") + self.named(self.grade)

    @property
    def aside(self) -> str:
        """What the headline leaves unsaid; empty if nothing."""
        parts = []
        if self.grade is Grade.BAD and self.named(Grade.WARN):
            parts.append(f"needs a look: {self.named(Grade.WARN)}")
        if self.named(Grade.UNKNOWN):
            parts.append(f"not checked: {self.named(Grade.UNKNOWN)}")
        return "; ".join(parts)

    def named(self, grade: Grade) -> str:
        """The checks of one grade, as they stand in a sentence."""
        return ", ".join(check.title[0].lower() + check.title[1:] for check in self.checks if check.grade is grade)


def judge(run: RunRecord) -> Verdict:
    """All checks, in the order a reader asks them."""
    return Verdict(
        (
            finished(run),
            loss_fell(run),
            *held_out(run),
            context_used(run),
            long_context(run),
            steady(run),
            *(() if run.dense else (balance(run), dead_experts(run))),
            throughput(run),
        )
    )


def finished(run: RunRecord) -> Check:
    state = str(run.status.get("state", ""))
    restarts = max(0, sum(event.get("event") == "started" for event in run.events) - 1)
    note = f", {restarts} restart{'s' if restarts != 1 else ''}" if restarts else ""
    text = f"{short(run.tokens[-1])} tokens in {run.step[-1]:,} steps{note}."
    if not state:
        return Check("Completion", Grade.UNKNOWN, "?", f"The run left no status; {text}")
    if state == "done":
        return Check("Completion", Grade.GOOD, "done", text)
    grade = Grade.BAD if state == "failed" else Grade.WARN
    return Check("Completion", grade, state, f"The run's last state is '{state}'; {text}")


def loss_fell(run: RunRecord) -> Check:
    _, loss = run.logged("train/loss")
    title = "Training loss"
    if len(loss) == 0:
        return Check(title, Grade.UNKNOWN, "?", "No step logged train/loss.")
    broken = int((~np.isfinite(loss)).sum())
    if broken:
        return Check(title, Grade.BAD, f"{broken} not finite", f"{broken} of {len(loss)} steps had NaN or infinity.")
    width = len(late(loss))
    begin, end = float(loss[0]), float(late(loss).mean())
    sums = np.cumsum(np.r_[0.0, loss])
    lowest = float((sums[width:] - sums[:-width]).min() / width)
    text = f"From {begin:.2f} nats per token at the first step to {end:.2f} over the last {LATE:.0%}"
    text += f", after {lowest:.2f} at its best." if end > (1 + ROSE_WARN) * lowest else "."
    bad = end >= begin or end > (1 + ROSE_BAD) * lowest
    grade = Grade.BAD if bad else Grade.WARN if end > (1 + ROSE_WARN) * lowest else Grade.GOOD
    return Check(title, grade, f"{begin:.2f} → {end:.2f}", text)


def held_out(run: RunRecord) -> list[Check]:
    """Per language, the last checkpoint at its longest context against zlib and a token unigram."""
    checks = []
    for language in dict.fromkeys(row.language for row in run.rows):
        rows = [row for row in run.rows if row.language == language]
        after = [row for row in rows if row.label == rows[-1].label]
        row = max(after, key=lambda row: row.context)
        title, best = f"Held-out {language_name(language)}", row.bits_per_byte
        limits = {name: run.baselines.get(language, {}).get(name) for name in ("zlib", "token_unigram")}
        known = {name.replace("_", " "): value for name, value in limits.items() if value is not None}
        figure = f"{best:.2f} bits/byte"
        if not known or row.label == "before":
            checks.append(
                Check(title, Grade.UNKNOWN, figure, "No baseline, or no trained checkpoint, to compare with.")
            )
            continue
        lost = [name for name, value in known.items() if not best < value]
        grade = Grade.GOOD if not lost else Grade.WARN if len(lost) < len(known) else Grade.BAD
        against = ", ".join(f"{name} {value:.2f}" for name, value in known.items())
        word = "Below" if not lost else "NOT below " + " and ".join(lost) + ";"
        checks.append(Check(title, grade, figure, f"{word} {against} ({label_name(row.label)})."))
    if not checks:
        checks.append(Check("Held-out text", Grade.UNKNOWN, "?", "There is no evaluation.json: not evaluated."))
    return checks


def context_used(run: RunRecord) -> Check:
    title = "Context use"
    gains = []
    for language in dict.fromkeys(row.language for row in run.rows):
        rows = [row for row in run.rows if row.language == language and row.label != "before" and row.one_token]
        if rows:
            row = max((r for r in rows if r.label == rows[-1].label), key=lambda row: row.context)
            gains.append((language, (row.one_token or 0.0) / row.bits_per_byte - 1))
    if not gains:
        return Check(title, Grade.UNKNOWN, "?", "Not evaluated with one token of context.")
    worst = min(gain for _, gain in gains)
    text = "With only one token before each, it is worse by " + ", ".join(
        f"{gain:.0%} in {language_name(language)}" for language, gain in gains
    )
    grade = Grade.GOOD if worst >= CONTEXT_USE else Grade.BAD if worst <= 0 else Grade.WARN
    return Check(title, grade, f"+{worst:.0%}" if worst >= 0 else f"{worst:.0%}", text + ".")


def long_context(run: RunRecord) -> Check:
    """The last checkpoint, at the longest context it was evaluated at against the shortest."""
    title = "Longer context"
    changes = []
    for language in dict.fromkeys(row.language for row in run.rows):
        rows = [row for row in run.rows if row.language == language]
        after = sorted((row for row in rows if row.label == rows[-1].label), key=lambda row: row.context)
        if len(after) > 1 and after[0].label != "before":
            changes.append((language, after[0], after[-1], after[-1].bits_per_byte / after[0].bits_per_byte - 1))
    if not changes:
        return Check(title, Grade.UNKNOWN, "?", "Evaluated at fewer than two context lengths.")
    worst = max(change for *_, change in changes)
    text = "; ".join(
        f"{language_name(language)} {near.bits_per_byte:.2f} at {near.context:,} tokens, "
        f"{far.bits_per_byte:.2f} at {far.context:,}"
        for language, near, far, _ in changes
    )
    grade = Grade.GOOD if worst <= LONG_WARN else Grade.WARN if worst <= LONG_BAD else Grade.BAD
    return Check(title, grade, f"{worst:+.1%} bits", text + ".")


def steady(run: RunRecord) -> Check:
    """Steps skipped, loss spikes, gradient norm."""
    title = "Steady steps"
    _, loss = run.logged("train/loss")
    _, norm = run.logged("optim/grad_norm")
    lost, spikes = len(run.skips()), len(loss_spikes(run))
    finite = norm[np.isfinite(norm)]
    text = f"{lost} steps skipped, {spikes} loss spikes"
    if len(finite):
        text += f", gradient norm {float(np.median(finite)):.2g} at the median and {float(finite.max()):.2g} at most"
    share = lost / max(1, len(loss))
    grade = Grade.BAD if share > SKIPPED_WARN else Grade.WARN if lost or spikes else Grade.GOOD
    return Check(title, grade, f"{lost} skipped", text + ".")


def loss_spikes(run: RunRecord) -> list[int]:
    """Token counts at which the loss stood SPIKE robust deviations above the window before (a stage's first steps are
    exempt: other lengths have another loss)."""
    tokens, loss = run.logged("train/loss")
    starts = np.searchsorted(tokens, [first for _, first, _ in run.stages], side="right")
    found = []
    for i in range(SPIKE_WINDOW, len(loss)):
        begin = max(start for start in (0, *starts) if start <= i)
        window = loss[max(begin, i - SPIKE_WINDOW) : i]
        if len(window) < SPIKE_WINDOW:
            continue
        middle = float(np.median(window))
        spread = 1.4826 * float(np.median(np.abs(window - middle)))
        if loss[i] > middle + max(SPIKE * spread, 0.05 * middle):
            found.append(int(tokens[i]))
    return found


def balance(run: RunRecord) -> Check:
    title = "Expert balance"
    _, vio = run.logged("moe/max_vio")
    vio = vio[np.isfinite(vio)]
    if len(vio) == 0:
        return Check(title, Grade.UNKNOWN, "?", "No step logged moe/max_vio.")
    begin, end = float(vio[: max(1, int(LATE * len(vio)))].mean()), float(late(vio).mean())
    text = (
        f"The busiest expert is {begin:.0%} above the mean load early in the run, {end:.0%} at the end "
        f"(limit {MAX_VIO_WARN:.0%})."
    )
    grade = Grade.GOOD if end <= MAX_VIO_WARN else Grade.WARN if end <= MAX_VIO_BAD else Grade.BAD
    return Check(title, grade, f"max_vio {end:.2f}", text)


def dead_experts(run: RunRecord) -> Check:
    title = "Dead experts"
    if not run.load:
        return Check(title, Grade.UNKNOWN, "?", "There is no load.jsonl.")
    dead = []
    for layer, (_, load) in run.load.items():
        mean = late(load).mean(axis=0)
        dead += [f"{layer}.{expert}" for expert in np.flatnonzero(mean < DEAD_SHARE * mean.mean())]
    total = sum(load.shape[1] for _, load in run.load.values())
    if not dead:
        text = (
            f"All {total} experts of {len(run.load)} layers have at least {DEAD_SHARE:.0%} of the mean load at the end."
        )
        return Check(title, Grade.GOOD, f"0 of {total}", text)
    shown = ", ".join(dead[:8]) + (", …" if len(dead) > 8 else "")
    text = f"Below {DEAD_SHARE:.0%} of the mean load at the end (layer.expert): {shown}."
    return Check(title, Grade.BAD if len(dead) > 0.1 * total else Grade.WARN, f"{len(dead)} of {total}", text)


def throughput(run: RunRecord) -> Check:
    title = "Throughput"
    _, rate = run.logged("perf/tokens_per_s")
    rate = rate[np.isfinite(rate)]
    if len(rate) == 0:
        return Check(title, Grade.UNKNOWN, "?", "No step logged perf/tokens_per_s.")
    middle, slow = float(np.median(rate)), float(np.quantile(rate, 0.05))
    text = f"Median over the run; the slowest 5 % of steps ran below {short(slow)}."
    return Check(title, Grade.GOOD, f"{short(middle)} tokens/s", text)


def late(values: np.ndarray) -> np.ndarray:
    """The last LATE share of the records, at least one."""
    return values[-max(1, int(LATE * len(values))) :]
