"""The load report: one HTML file with its plots inside, and the same figures as CSV."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from loadtest.load.points import SHARES, Bounds, Knee, Point
from loadtest.load.scenarios import SCENARIOS
from loadtest.load.stream import LEFT, OK, Generation

BLUES = ("#9ecae1", "#3182bd", "#08306b")
RED, GREY, GREEN = "#c0392b", "#888888", "#2e7d32"
TWENTY = 20
"""Of fewer requests, the slowest alone is beyond 95 %."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h1 { margin-bottom: 0 } .sub { color: #666; margin-top: 0 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 } svg { width: 100%; height: auto }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid #ddd;
         font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: 600 } th:first-child, td:first-child, td.text { text-align: left }
.bad { color: #c0392b } .good { color: #2e7d32 } .warn { background: #fff3cd; padding: .5rem 1rem }
"""


@dataclass
class Report:
    """Everything that was measured.

    knee: of the ramp, None where it was not asked for. runs: the other scenarios. generations: of
    those, by scenario. notes: what the reader should know of the server and the machine. doubts:
    why the figures may not be the server's alone. warmup: seconds of each run that do not count.
    """

    bounds: Bounds
    notes: Mapping[str, str]
    knee: Knee | None = None
    runs: list[Point] = field(default_factory=list)
    generations: dict[str, Sequence[Generation]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    warmup: float = 0.0
    least_rate: float = 0.0

    @property
    def failures(self) -> list[str]:
        """What breaks the service level, a line each."""
        found = [
            f"{point.scenario} at {point.rate:.2f} requests/s: {reason}"
            for point in self.runs
            for reason in point.broken(self.bounds)
        ]
        if self.knee is not None:
            if self.knee.point is None:
                found.insert(0, "ramp: no rate keeps the bounds")
            elif self.knee.point.rate < self.least_rate:
                found.insert(
                    0, f"ramp: {self.knee.point.rate:.2f} requests/s < {self.least_rate:g} asked"
                )
        return found

    @property
    def warnings(self) -> list[str]:
        """Where the figures are not the server's alone."""
        points = [*(self.knee.points if self.knee else ()), *self.runs]
        found = [*self.doubts]
        if points and (fewest := min(point.requests for point in points)) < TWENTY:
            found.append(
                f"the run of the fewest requests has {fewest}: its p95 is that of its slowest; "
                "--seconds makes runs longer"
            )
        found += [
            f"{point.scenario} at {point.rate:.2f} requests/s: the load generator was late by "
            f"{point.late_ms:.0f} ms (p95); give it more --workers or a machine of its own"
            for point in points
            if point.late_ms > 0.2 * self.bounds.ttft_ms
        ]
        if self.knee and self.knee.point and not self.knee.bracketed:
            found.append("the bounds were never broken: the knee is above the highest rate tried")
        return found

    def write(self, folder: Path) -> None:
        """index.html, points.csv and requests.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text(self._html())
        ramp = self.knee.points if self.knee else ()
        rows = [{"run": "ramp"} | self._point_row(point) for point in ramp]
        rows += [{"run": point.scenario} | self._point_row(point) for point in self.runs]
        _write_csv(folder / "points.csv", rows)
        requests = [_request_row(each) for some in self.generations.values() for each in some]
        _write_csv(folder / "requests.csv", requests)

    def _point_row(self, point: Point) -> dict[str, object]:
        percentiles = {
            f"{kind}_p{share * 100:g}_ms": round(value, 3)
            for kind, values in (("ttft", point.ttft), ("itl", point.itl))
            for share, value in zip(SHARES, values, strict=True)
        }
        return {
            "rate": point.rate,
            "seconds": point.seconds,
            "requests": point.requests,
            "tokens_per_s": round(point.tokens_per_s, 2),
            **percentiles,
            "cached_share": round(point.cached_share, 4),
            "left": point.left,
            "errors": sum(point.errors.values()),
            "late_p95_ms": round(point.late_ms, 3),
            "kept": not point.broken(self.bounds),
        }

    def _html(self) -> str:
        notes = "; ".join(f"{name}: {value}" for name, value in self.notes.items())
        parts = [
            "<h1>Load report</h1>",
            f"<p class=sub>{html.escape(notes)}</p>",
            self._verdict(),
        ]
        if self.knee is not None:
            parts += [
                "<h2>Ramp to saturation</h2>",
                "<p>Poisson arrivals, log-normal lengths; each point a run of its own, from an "
                "idle server to its last answer. A rate is given up when two runs broke a bound; "
                "the second is shown. Dashed: the bounds; green: the knee.</p>",
                _svg(self._ramp_figure(self.knee)),
                self._table(self.knee.points),
            ]
        if self.runs:
            parts += [
                "<h2>Scenarios</h2>",
                self._table(self.runs),
                "<p class=sub>requests: those that count; cached: prompt tokens that the prefix "
                "cache had; left: by their clients. In the plots: every request, grey where it "
                "came during the warm-up, and every gap of those that count.</p>",
            ]
        for point in self.runs:
            says = SCENARIOS[point.scenario].says
            parts += [
                f"<h3>{point.scenario}</h3><p>{html.escape(says)}, {point.rate:.2f} requests/s</p>",
                _svg(self._scenario_figure(self.generations[point.scenario])),
            ]
        return (
            "<!doctype html><html lang=en><meta charset=utf-8><title>Ropeway load report</title>"
            f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
            + "\n".join(parts)
            + "</html>\n"
        )

    def _verdict(self) -> str:
        bounds = self.bounds
        parts = [
            f"<p>Bounds: 95 % of first tokens within {bounds.ttft_ms:g} ms, 95 % of gaps between "
            f"tokens within {bounds.itl_ms:g} ms, errors at most {bounds.errors:.1%}.</p>"
        ]
        if self.knee is not None and self.knee.point is not None:
            point = self.knee.point
            parts.append(
                f"<p>The knee: <b>{point.rate:.2f} requests/s</b> ({point.tokens_per_s:.0f} "
                f"tokens/s) keep them: p95 TTFT {point.ttft[1]:.0f} ms, p95 inter-token "
                f"{point.itl[1]:.1f} ms.</p>"
            )
        parts += [f"<p class=warn>{html.escape(each)}</p>" for each in self.warnings]
        if self.failures:
            items = "".join(f"<li>{html.escape(each)}</li>" for each in self.failures)
            parts.append(f"<p class=bad>Not kept:</p><ul class=bad>{items}</ul>")
        else:
            parts.append("<p class=good>All bounds are kept.</p>")
        return "".join(parts)

    def _table(self, points: Sequence[Point]) -> str:
        rows = [
            "<table><tr><th>run<th>requests/s<th>requests<th>tokens/s<th>TTFT ms<br>p50, p95, p99"
            "<th>inter-token ms<br>p50, p95, p99<th>cached<th>left<th>errors<th>bounds</tr>"
        ]
        for point in points:
            broken = point.broken(self.bounds)
            verdict = "<td class=bad>broken" if broken else "<td class=good>kept"
            errors = ", ".join(f"{count} x {code}" for code, count in point.errors.items()) or "0"
            rows.append(
                f"<tr><td>{point.scenario}<td>{point.rate:.2f}<td>{point.requests}"
                f"<td>{point.tokens_per_s:.0f}<td>{_joined(point.ttft, 0)}"
                f"<td>{_joined(point.itl, 1)}<td>{point.cached_share:.0%}<td>{point.left}"
                f"<td>{html.escape(errors)}{verdict}</tr>"
            )
        return "".join([*rows, "</table>"])

    def _ramp_figure(self, knee: Knee) -> Figure:
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        throughput, ttft, itl = figure.subplots(1, 3)
        rates = [point.rate for point in knee.points]
        throughput.plot(rates, [point.tokens_per_s for point in knee.points], "o-", color=BLUES[1])
        throughput.set(title="Output", ylabel="tokens/s", ylim=(0, None))
        for axes, name, bound in (
            (ttft, "ttft", self.bounds.ttft_ms),
            (itl, "itl", self.bounds.itl_ms),
        ):
            for at, share in enumerate(SHARES):
                values = [getattr(point, name)[at] for point in knee.points]
                axes.plot(rates, values, "o-", color=BLUES[at], label=f"p{share * 100:g}")
            axes.axhline(bound, color=RED, linestyle="--", linewidth=1)
            axes.set_yscale("log")
            axes.legend(frameon=False)
        ttft.set(title="Time to first token", ylabel="ms")
        itl.set(title="Between tokens", ylabel="ms")
        for axes in (throughput, ttft, itl):
            axes.set_xlabel("requests/s offered")
            axes.set_xscale("log", base=2)
            _plain(axes)
            if knee.point is not None:
                axes.axvline(knee.point.rate, color=GREEN, linewidth=1)
        return figure

    def _scenario_figure(self, generations: Sequence[Generation]) -> Figure:
        figure = Figure(figsize=(11, 2.6), layout="constrained")
        firsts, gaps = figure.subplots(1, 2, width_ratios=(2, 1))
        begin = min(each.at for each in generations)
        for colour, label, kind in (
            (BLUES[1], "complete", [each for each in generations if each.outcome == OK]),
            (GREEN, "left by its client", [each for each in generations if each.outcome == LEFT]),
            (RED, "failed", [each for each in generations if each.failed]),
        ):
            if kind:
                times = [each.at - begin for each in kind]
                waits = [1000 * (each.total if each.first is None else each.first) for each in kind]
                firsts.plot(times, waits, ".", color=colour, label=label)
        firsts.axvspan(0, self.warmup, color=GREY, alpha=0.15, linewidth=0)
        firsts.axhline(self.bounds.ttft_ms, color=RED, linestyle="--", linewidth=1)
        firsts.set(xlabel="second of arrival", ylabel="ms")
        firsts.set_title("Time to first token", loc="left")
        firsts.set_yscale("log")
        firsts.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3)
        counted = [each for each in generations if each.at - begin >= self.warmup]
        if between := [1000 * gap for each in counted for gap in each.gaps]:
            gaps.ecdf(between)
        gaps.axvline(self.bounds.itl_ms, color=RED, linestyle="--", linewidth=1)
        gaps.axhline(0.95, color=GREY, linestyle=":", linewidth=1)
        gaps.set(xlabel="ms", ylabel="share", xscale="log")
        gaps.set_title("Between tokens", loc="left")
        for axes in (firsts, gaps):
            _plain(axes)
        return figure


def _request_row(generation: Generation) -> dict[str, object]:
    return {
        "scenario": generation.scenario,
        "at": round(generation.at, 3),
        "outcome": generation.outcome,
        "status": generation.status,
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "tokens": generation.tokens,
        "ttft_s": None if generation.first is None else round(generation.first, 4),
        "total_s": round(generation.total, 4),
        "late_s": round(generation.late, 4),
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Empty where there are no rows."""
    with path.open("w", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_minor_formatter(NullFormatter())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.spines[["top", "right"]].set_visible(False)


def _joined(values: Sequence[float], digits: int) -> str:
    return ", ".join("none" if math.isinf(each) else f"{each:.{digits}f}" for each in values)


def _svg(figure: Figure) -> str:
    """The figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
