"""The report as one self-contained HTML page: no scripts, no outside files, pictures embedded."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from data.look.html import Picture, html_page, picture_section
from train.console import short
from train.model_flops import engineering, stage_flops
from train.record import RunRecord, label_name, language_name
from train.verdict import Check, Grade, Verdict

MARK = {Grade.GOOD: "✓", Grade.UNKNOWN: "?", Grade.WARN: "!", Grade.BAD: "✗"}
WORD = {Grade.GOOD: "good", Grade.UNKNOWN: "unknown", Grade.WARN: "warn", Grade.BAD: "bad"}

STYLE = """
.verdict { color: white; border-radius: 8px; padding: 14px 20px; margin: 14px 0 16px; font-size: 24px;
  font-weight: 650; } .verdict small { display: block; font-size: 14px; font-weight: 400; opacity: .92; }
.verdict.good { background: var(--good); } .verdict.warn { background: var(--warn); }
.verdict.bad { background: var(--bad); }
.checks { display: grid; grid-template-columns: repeat(auto-fit, minmax(248px, 1fr)); gap: 10px; }
.check { border: 1px solid var(--line); border-left: 5px solid; border-radius: 6px; padding: 8px 12px 10px; }
.check.good { border-left-color: var(--good); } .check.warn { border-left-color: var(--warn); }
.check.bad { border-left-color: var(--bad); } .check.unknown { border-left-color: var(--unknown); }
.check b { display: flex; justify-content: space-between; font-size: 13px; font-weight: 600; }
.check.good b span { color: var(--good); } .check.warn b span { color: var(--warn); }
.check.bad b span { color: var(--bad); } .check.unknown b span { color: var(--unknown); }
.check strong { display: block; font-size: 20px; line-height: 1.35; }
.check div { font-size: 12.5px; line-height: 1.4; color: var(--faint); }
tr.baseline td { color: var(--faint); }
@media print { .check { break-inside: avoid; } }
"""


def page(run: RunRecord, verdict: Verdict, pictures: Sequence[Picture], missing: Sequence[str]) -> str:
    """The whole page. `missing`: what could not be drawn and why, said at the end."""
    name = str(run.config.get("name") or run.directory.name)
    title = f"{name}: {verdict.headline}"
    sections = [picture_section(picture) for picture in pictures]
    table = evaluation_table(run)
    if table:
        place = next((i + 1 for i, picture in enumerate(pictures) if picture.name == "evaluation"), len(sections))
        sections.insert(place, table)
    sections += [data_table(run)] if run.data else []
    facts = _facts(run)
    if facts:
        sections.append("<h2>The run</h2>" + facts)
    if missing:
        sections.append(
            "<h2>Not shown</h2><ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in missing) + "</ul>"
        )
    aside = f"<small>{escape(verdict.aside[0].upper() + verdict.aside[1:])}</small>" if verdict.aside else ""
    head = [
        f'<h1>Run {escape(name)} <span class="faint">{escape(_subtitle(run))}</span></h1>',
        f'<div class="verdict {WORD[verdict.grade]}">{MARK[verdict.grade]} {escape(verdict.headline)}{aside}</div>',
        f'<div class="checks">{"".join(map(_check, verdict.checks))}</div>',
    ]
    return html_page(title, STYLE, head + sections)


def _check(check: Check) -> str:
    word = WORD[check.grade]
    return (
        f'<div class="check {word}"><b>{escape(check.title)}<span>{MARK[check.grade]} {word}</span></b>'
        f"<strong>{escape(check.figure)}</strong><div>{escape(check.text)}</div></div>"
    )


def evaluation_table(run: RunRecord) -> str:
    """Bits per byte: a row per language and checkpoint, a column per context length, then the baselines."""
    contexts = sorted({row.context for row in run.rows})
    if not contexts:
        return ""
    out = ["<table><tr><th>bits per byte</th><th class=left>checkpoint</th>"]
    out += [f"<th>{context:,} tokens</th>" for context in contexts] + ["</tr>"]
    for language in dict.fromkeys(row.language for row in run.rows):
        rows, spoken = [row for row in run.rows if row.language == language], escape(language_name(language))
        for i, label in enumerate(dict.fromkeys(row.label for row in rows)):
            cells = {row.context: row.bits_per_byte for row in rows if row.label == label}
            first = ' class="first"' if i == 0 else ""
            out.append(f'<tr{first}><td>{spoken}</td><td class="left">{escape(label_name(label))}</td>')
            out += [f"<td>{cells[c]:.3f}</td>" if c in cells else "<td></td>" for c in contexts] + ["</tr>"]
        for name, value in run.baselines.get(language, {}).items():
            out.append(
                f'<tr class="baseline"><td>{spoken}</td><td class="left">{escape(name.replace("_", " "))}</td>'
                f'<td colspan="{len(contexts)}">{value:.3f}</td></tr>'
            )
    return "".join(out) + "</table>"


def data_table(run: RunRecord) -> str:
    """What the data build read, removed and kept, by language."""
    columns = {
        "documents_read": "documents read",
        "exact_duplicates": "exact duplicates",
        "near_duplicates": "near duplicates",
        "heldout_documents": "held out",
        "added_documents": "repeated",
        "documents": "trained on",
        "tokens": "tokens",
        "bytes_per_token": "bytes per token",
    }
    if not any(counts.get("added_documents") for counts in run.data.values()):
        del columns["added_documents"]
    out = [
        "<h2>The text</h2><table><tr><th>language</th>",
        *(f"<th>{title}</th>" for title in columns.values()),
        "</tr>",
    ]
    for language, counts in run.data.items():
        cells = (counts.get(key) for key in columns)
        shown = ("" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else f"{cell:,}" for cell in cells)
        out += [f"<tr><td>{escape(language_name(language))}</td>", *(f"<td>{cell}</td>" for cell in shown), "</tr>"]
    return "".join(out) + "</table>"


def _subtitle(run: RunRecord) -> str:
    names = [name for name, _, _ in run.stages if name]
    return f"{short(run.tokens[-1])} tokens" + (f" · {' → '.join(names)}" if names else "")


def _facts(run: RunRecord) -> str:
    """What was run, from the resolved configuration: the few numbers a reader asks for first."""
    model, parallel = _mapping(run.config.get("model")), _mapping(run.config.get("parallel"))
    precision = _mapping(run.config.get("precision"))
    facts = []
    if model:
        facts.append(("model", f"{model.get('name')}: " + ", ".join(
            f"{model[key]:,} {key.replace('_', ' ').removeprefix('num ')}"
            for key in ("num_layers", "hidden_size", "num_routed_experts", "experts_per_token", "vocab_size")
            if isinstance(model.get(key), int)
        )))  # fmt: skip
    if parallel:
        facts.append(
            ("parallel", ", ".join(f"{k} {v}" for k, v in parallel.items() if isinstance(v, (int, str)) and v))
        )
    if precision:
        facts.append(("precision", ", ".join(f"{key} {value}" for key, value in precision.items())))
    resolved = [event for event in run.events if event.get("event") == "kernels"]
    if resolved and precision.get("fp8"):
        table = _mapping(resolved[-1].get("table"))
        facts.append(("kernels", ", ".join(f"{op} {name}" for op, name in table.items())))
    for stage in stage_flops(run):
        speed = "" if stage.per_second is None else f", {engineering(stage.per_second)}FLOPs per second on all ranks"
        per_token = f"{engineering(stage.per_token)}FLOPs per token at {stage.length:,}"
        facts.append((f"model FLOPs, {stage.name}", f"{per_token} (causal, without MTP and recomputation){speed}"))
    facts += [(key, str(run.config[key])) for key in ("seed",) if key in run.config]
    if not facts:
        return ""
    return (
        "<table>"
        + "".join(f'<tr><td>{escape(k)}</td><td class="left">{escape(str(v))}</td></tr>' for k, v in facts)
        + "</table>"
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
