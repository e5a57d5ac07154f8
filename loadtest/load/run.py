"""`ropeway loadtest`: Locust against a server, run by run, and a report with a verdict."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest.errors import Unmeasurable
from loadtest.load.address import Address
from loadtest.load.points import Bounds, Point, find_knee
from loadtest.load.report import Report
from loadtest.load.scenarios import SCENARIOS
from loadtest.load.stream import Generation
from loadtest.others import Others, doubt
from loadtest.servers import ropeway

RAMP = "ramp"
BELOW_KNEE = 0.6
LEAST_REQUESTS = 8
"""Fewer in the counted seconds would say nothing of 95 % of them: the ramp goes no lower."""

BROKEN, UNMEASURED, TERMINATED = 1, 3, 128 + signal.SIGTERM
"""Exit codes, besides 0 and that of misuse, 2."""

SOURCES = 8
"""Locust users of a run; their sum is a Poisson process again, however many they are."""

option = partial(typer.Option, show_envvar=False)
LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Locust:
    """How Locust is run against a server.

    context: the server's, in tokens; workers: processes.
    """

    address: Address
    context: int
    workers: int

    def run(self, scenario: str, rate: float, seconds: float, seed: int) -> list[Generation]:
        """One headless run, until its last request has ended. Raises Unmeasurable.

        seed: another for each run of a server, whose prefix cache would know the prompts otherwise.
        """
        with tempfile.TemporaryDirectory(prefix="ropeway-load-") as folder:
            records, secret = Path(folder) / "records.json", Path(folder) / "locust.toml"
            command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE)]
            command += ["--headless", "--host", self.address.url, "--users", str(SOURCES)]
            command += ["--spawn-rate", "1000", "--stop-timeout", "120"]
            command += ["--exit-code-on-error", "0"]
            command += ["--scenario", scenario, "--source-rate", str(rate / SOURCES)]
            command += ["--load-seconds", str(seconds), "--context", str(self.context)]
            command += ["--load-seed", str(seed)]
            command += ["--records", str(records), "--only-summary", "--loglevel", "WARNING"]
            if self.address.api_key is not None:  # not where a list of processes shows it
                secret.write_text(f"[tool.locust]\napi-key = {json.dumps(self.address.api_key)}\n")
                command += ["--config", str(secret)]
            if self.address.ssl_cafile is not None:
                command += ["--ssl-cafile", str(self.address.ssl_cafile)]
            if self.workers > 1:
                command += ["--processes", str(self.workers)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            if done.returncode or not records.exists():
                raise Unmeasurable(f"locust ended with status {done.returncode}:\n{done.stdout}")
            return [Generation(**each) for each in json.loads(records.read_text())]


def fill(
    report: Report,
    names: Sequence[str],
    run: Callable[[str, float], tuple[Point, list[Generation]]],
    rate: float | None,
    start_rate: float,
    least: float,
) -> None:
    """The ramp and the scenarios of these names, into the report.

    run: a scenario at so many requests/s. rate: of the scenarios, None for BELOW_KNEE of the
    knee's. least: requests/s below which a run says nothing.
    """
    run("steady", start_rate)  # warms up; counts nowhere
    if RAMP in names:
        report.knee = find_knee(
            lambda at: run("steady", at)[0], report.bounds, start_rate, least=least
        )
        knee = report.knee.point or report.knee.points[0]
        rate = rate or max(BELOW_KNEE * knee.rate, least)
    assert rate is not None
    for name in names:
        if name != RAMP:
            point, generations = run(name, rate)
            report.runs.append(point)
            report.generations[name] = generations


def _address(
    host: str | None, serve: str, api_key: str | None, ssl_cafile: Path | None
) -> Address | None:
    """Of the server that runs already; None where one is to be started. Raises BadParameter."""
    if host is None:
        if ssl_cafile is not None or "--ssl-" in serve:
            raise typer.BadParameter("a server with HTTPS must run already: name it by --host")
        return None
    if serve:
        raise typer.BadParameter("--serve is for a server that is started here, not for --host")
    try:
        return Address(host, api_key, ssl_cafile)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def loadtest(
    *,
    host: Annotated[
        str | None,
        option(help="Load this server.", show_default="one that is started for it"),
    ] = None,
    serve: Annotated[str, option(help="Arguments of the server that is started, by spaces.")] = "",
    scenario: Annotated[
        list[str] | None,
        option(help="ramp or a scenario; may be repeated.", show_default="all"),
    ] = None,
    rate: Annotated[
        float | None,
        option(help="Requests/s of the scenarios.", show_default="0.6 of the knee's"),
    ] = None,
    start_rate: Annotated[float, option(help="Requests/s that the ramp begins with.")] = 2.0,
    seconds: Annotated[float, option(min=1, help="Counted seconds of each run.")] = 12.0,
    warmup: Annotated[float, option(min=0, help="Seconds before these.")] = 3.0,
    workers: Annotated[int, option(min=1, help="Processes of Locust.")] = 1,
    api_key: Annotated[
        str | None, option(metavar="KEY", help="Sent with every request.", show_default=False)
    ] = None,
    ssl_cafile: Annotated[
        Path | None,
        option(
            metavar="FILE",
            help="Certificates to trust, for an https:// host.",
            show_default="the system's",
        ),
    ] = None,
    slo_ttft_ms: Annotated[float, option(help="Bound of 95 % of first tokens.")] = 500.0,
    slo_itl_ms: Annotated[float, option(help="Bound of 95 % of inter-token gaps.")] = 50.0,
    slo_errors: Annotated[float, option(help="Bound of the share of errors.")] = 0.01,
    slo_rate: Annotated[float, option(help="Requests/s that the knee must reach.")] = 0.0,
    out: Annotated[Path, option(help="Folder of the report.")] = Path("loadtest-report"),
) -> None:
    """Find the highest rate that keeps the bounds, then try each scenario below it.

    Leaves index.html, points.csv and requests.csv. The exit code is 1 where a bound is not kept,
    and 3 where nothing could be measured.
    """
    names = scenario or [RAMP, *SCENARIOS]
    for name in names:
        if name != RAMP and name not in SCENARIOS:
            known = ", ".join([RAMP, *SCENARIOS])
            raise typer.BadParameter(f"--scenario must be one of {known}, got {name!r}")
    if rate is None and RAMP not in names:
        raise typer.BadParameter("--rate is needed where there is no ramp to derive it from")
    for option, value in (("--rate", rate), ("--start-rate", start_rate)):
        if value is not None and value * seconds < LEAST_REQUESTS:
            raise typer.BadParameter(
                f"{option} must be at least {LEAST_REQUESTS / seconds:g}, {LEAST_REQUESTS} "
                f"requests in the {seconds:g} s of a run, got {value:g}"
            )
    address = _address(host, serve, api_key, ssl_cafile)
    # So that the server does not outlive us, as it would where SIGTERM just ended us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    console = Console(stderr=True)
    bounds = Bounds(slo_ttft_ms, slo_itl_ms, slo_errors)
    notes = {
        "server": host or f"ropeway serve {serve}".strip(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "each run": f"{warmup:g} s and {seconds:g} s that count",
        "Locust processes": str(workers),
    }
    report = Report(bounds, notes, warmup=warmup, least_rate=slo_rate)
    others, seeds = Others(), itertools.count()

    try:
        with ExitStack() as stack:
            if address is None:
                url = stack.enter_context(ropeway(*serve.split())).url
                address = Address(url, api_key)
            name, context = address.model()
            notes["model"] = f"{name}, context {context:,} tokens"
            locust = Locust(address, context, workers)

            def run(name: str, at: float) -> tuple[Point, list[Generation]]:
                generations = locust.run(name, at, warmup + seconds, next(seeds))
                point = Point.of(at, warmup, seconds, generations)
                broken = point.broken(bounds)
                console.print(
                    f"{name:9} {at:7.2f} requests/s: {point.tokens_per_s:6.0f} tokens/s, "
                    f"p95 TTFT {point.ttft[1]:6.0f} ms, p95 inter-token {point.itl[1]:5.1f} ms  "
                    + ("; ".join(broken) or "kept"),
                    highlight=False,
                    soft_wrap=True,
                )
                return point, generations

            fill(report, names, run, rate, start_rate, LEAST_REQUESTS / seconds)
            if host is None:  # all of it was here
                load = others.document()
                notes["machine"] = f"{load['cores']} cores"
                report.doubts += filter(None, [doubt(load)])
    except (Unmeasurable, ValueError) as error:  # ValueError: no request came
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(UNMEASURED) from error
    report.write(out)
    for line in [*report.warnings, *report.failures]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"the report: {out / 'index.html'}", highlight=False, soft_wrap=True)
    if report.failures:
        raise typer.Exit(BROKEN)


if __name__ == "__main__":
    app()
