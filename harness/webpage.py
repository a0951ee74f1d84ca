"""`report --html`: every record on one self-contained page, drawn in the browser from embedded JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from . import board, claims, machine, store
from .plots.style import registered
from .rows import BUDGETS, Group, Row
from .stats import Interval
from .tables import budget, dense_baselines, ranked

PAGE = "index.html"
PARTS = Path(__file__).with_name("page")


def page(sets: Mapping[str, Iterable[Group]]) -> str:
    """The page as HTML, the same text for the same records. It loads nothing."""
    text = json.dumps(data(sets), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {name: (PARTS / f"page.{name}").read_text(encoding="utf-8").strip() for name in ("html", "css", "js")}
    page = parts["html"].replace("{css}", parts["css"]).replace("{js}", parts["js"])
    return page.replace("{data}", text.replace("<", "\\u003c")) + "\n"


def data(sets: Mapping[str, Iterable[Group]]) -> dict[str, Any]:
    """What `page.js` reads: a row per cell in the order of the leaderboard, the methods in that of their colours, the
    machines, and the claims."""
    machines: dict[str, int] = {}
    rows = []
    for section in board.sections(sets):
        for table in section.groups:
            for row in table.rows:
                line = machine.line(row.record["machine"], row.record)
                rows.append(_row(row, table) | {"machine": machines.setdefault(line, len(machines))})
    findings = [claims.judge(claim, sets) for claim in claims.load()]
    found = registered()
    found += sorted({row["method"] for row in rows if not row["baseline"]} - set(found))
    return {"rows": rows, "methods": found, "machines": list(machines), "claims": [_claim(found) for found in findings]}


def _row(row: Row, table: Group) -> dict[str, Any]:
    cell, latency, fidelity, prepare = (
        row.record["cell"],
        row.part("latency"),
        row.part("fidelity"),
        row.part("prepare"),
    )
    delta = row.task_average_difference
    ranks = [(row.ranks.get(limit), ranked(row, limit)) for limit in BUDGETS]
    sites = row.part("density").get("sites") or {}
    memory = board.extra_memory(row)
    return {
        "set": row.source,
        "link": f"{row.source}/{store.FILE}" if row.source else store.FILE,
        "key": row.record["key"],
        "place": board.place_of(row.record),
        "cpu": table.on_cpu,
        "model": f"{cell['model']} ({cell['weights']} weights)",
        **{name: cell[name] for name in ("mode", "batch", "context")},
        "details": table.details,
        "method": row.method,
        "options": row.options,
        "target": row.target,
        "label": row.label,
        "seeds": len(row.seeds),
        "baseline": row.is_baseline,
        "control": row.control,
        "density": row.part("density").get("model"),
        "sites": {name: _site(site) for name, site in sites.items() if site.get("layers")},
        "mb": _scaled(row.decode.get("bytes"), 1e6),
        "mbDense": _scaled(row.decode.get("bytes_dense"), 1e6),
        "read": row.bytes_share,
        "gflop": _scaled(row.decode.get("flops"), 1e9),
        "gflopDense": _scaled(row.decode.get("flops_dense"), 1e9),
        "ms": latency.get("median"),
        "p10": latency.get("p10"),
        "p90": latency.get("p90"),
        "speedup": _interval(row.speedup),
        "verdict": None if row.method == "dense" else latency.get("verdict"),
        "limit": latency.get("fraction_of_limit"),
        "time": (latency.get("breakdown") or {}).get("ms"),
        "dense": dense_baselines(Group(table.machine, table.setting, [row], [])),
        "loss": None if row.is_baseline else row.loss and row.loss[:1],
        "budget": budget(row),
        "ranks": [None if rank is None else {"place": rank.place, "text": text} for rank, text in ranks],
        "tasks": delta and _interval(Interval(100 * delta.estimate, 100 * delta.low, 100 * delta.high)),
        "perplexity": fidelity.get("perplexity"),
        "ratio": _interval(row.perplexity_ratio),
        "kl": fidelity.get("kl"),
        "agreement": fidelity.get("greedy_agreement"),
        "tokens": prepare.get("tokens"),
        "seconds": prepare.get("seconds"),
        "artifact": _scaled(row.part("artifact").get("bytes"), 1e6),
        "memory": _scaled(memory, 1e6),
        "fidelity": board.level(row.method),
    }


def _site(site: dict[str, Any]) -> dict[str, Any]:
    """Its density: by layer, most tokens of each, by token, and of what sequences use together; null where unknown."""
    counts = site.get("histogram")
    return {
        "layers": [round(density, 4) for density in site["layers"]],
        "spread": site.get("spread") and [[round(low, 4), round(high, 4)] for low, _, high in site["spread"]],
        "tokens": counts and [round(n / sum(counts), 5) for n in counts],
        "unions": site.get("unions"),
    }


def _claim(found: claims.Finding) -> dict[str, Any]:
    claim = found.claim
    return {
        "paper": claim.paper,
        "arxiv": claim.arxiv,
        "claim": claim.claim,
        "setting": claim.setting,
        "measured": claims.measured(found),
        "cell": claims.described(found.row) + f"; {board.place_of(found.row.record)}" if found.row else "–",
        "remarks": "; ".join(found.remarks) or "–",
        "verdict": found.verdict,
        "order": claims.VERDICTS.index(found.verdict),
    }


def _interval(value: Interval | None) -> list[float] | None:
    if value is None:
        return None
    return [value.estimate, value.low, value.high] if isfinite(value.high) else [value.estimate]


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
