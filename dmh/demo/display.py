"""What a person sees of the demo: live bars on a terminal, a line a phase elsewhere, and the closing table.

Owns words and layout.  Knows nothing of processes; the figures are `dmh.demo.progress`.  Sizes are in MB (10^6 bytes)
throughout, so that megabytes a second and the size of the array can be compared.
"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dmh.demo.progress import MEGABYTE, Job, Phase, Progress

BAR_WIDTH = 32
NAME_WIDTH = 16


class Display:
    """Shows a demo while it runs.  A context manager: leaving it gives the terminal back."""

    def __init__(self, job: Job, *, live: bool) -> None:
        self.console = Console(highlight=False)
        self._job = job
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> Display:
        job = self._job
        self.console.print(
            f"[bold]A NumPy array of {_mb(job.array)} MB in {_mb(job.limit)} MB of memory.[/bold]"
            f"  The rest of it goes to\n{job.place}",
            soft_wrap=True,
        )
        if self._live:
            self._live.start()
            self._live.update(Text("\nstarting the service ..."), refresh=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, progress: Progress, now: float) -> None:
        """The state of the moment, on a terminal."""
        if self._live:
            self._live.update(Group("", _phases(progress, now), "", _memory(progress, self._job)), refresh=True)

    def ended(self, phase: Phase) -> None:
        """A phase is over: a line about it where there is no terminal to redraw."""
        if not self._live:
            counted = phase.counters
            self.console.print(
                f"{phase.name:<{NAME_WIDTH}}{phase.seconds:6.2f} s  {counted['faults']:>7,} faults  "
                f"fetched {_mb(counted['fetched_bytes']):>7} MB  written {_mb(counted['written_bytes']):>7} MB",
                soft_wrap=True,
            )
            self.console.file.flush()

    def close(self, progress: Progress, seconds: float) -> None:
        """The closing table and the sentence under it."""
        self.console.print(_closing_table(progress, self._job))
        share = progress.highest / self._job.limit
        self.console.print(
            f"memory    limit {_mb(self._job.limit)} MB, highest resident {_mb(progress.highest)} MB ({share:.0%}) "
            "by the kernel's count",
            soft_wrap=True,
        )
        self.console.print("verified ", _verdict(progress, self._job), soft_wrap=True)
        self.console.print(f"\n{_sentence(progress, self._job, seconds)}", soft_wrap=not self._live)


def _mb(size: float) -> str:
    return f"{size / MEGABYTE:,.1f}"


def _bar(fraction: float, colour: str, blind_at: float | None = None) -> ProgressBar:
    """A bar; with `blind_at`, the time, one that only shows that something goes on."""
    return ProgressBar(
        1.0,
        min(fraction, 1.0),
        width=BAR_WIDTH,
        pulse=blind_at is not None,
        animation_time=blind_at,
        complete_style=colour,
        finished_style=colour,
        pulse_style=colour,
    )


def _phases(progress: Progress, now: float) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=NAME_WIDTH)
    grid.add_column(width=BAR_WIDTH)
    grid.add_column(justify="right", min_width=6)
    grid.add_column(justify="right", min_width=7)
    for phase in progress.phases:
        if phase.state == "waiting":
            grid.add_row(Text(phase.name, "dim"))
            continue
        running = phase.state == "running"
        blind = running and phase.fraction is None
        bar = _bar(phase.fraction or 0.0, "green", blind_at=now if blind else None)
        share = "" if phase.fraction is None else f"{phase.fraction:.0%}"
        took = now - phase.began if running else phase.seconds
        grid.add_row(Text(phase.name, "bold" if running else ""), bar, share, f"{took:.1f} s")
    return grid


def _memory(progress: Progress, job: Job) -> RenderableType:
    rates = progress.rates()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=NAME_WIDTH)
    grid.add_column(width=BAR_WIDTH)
    grid.add_column()
    grid.add_row(
        "resident/limit", _bar(progress.resident / job.limit, "cyan"), f"{_mb(progress.resident)} / {_mb(job.limit)} MB"
    )
    traffic = f"{rates.faults:,.0f} faults/s   fetched {_mb(rates.fetched)} MB/s   written {_mb(rates.written)} MB/s"
    return Group(grid, traffic)


def _closing_table(progress: Progress, job: Job) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_footer=True)
    total = progress.total()

    def figures(phase: Phase) -> list[str]:
        counted = phase.counters
        numbers = [f"{counted.get(name, 0):,}" for name in ("faults", "prefetched")]
        return [*numbers, *(_mb(counted.get(name, 0)) for name in ("fetched_bytes", "written_bytes"))]

    headings = ("seconds", "MB/s", "faults", "prefetched", "fetched MB", "written MB")
    table.add_column("phase", footer="total", no_wrap=True)
    for heading, footer in zip(headings, [f"{total.seconds:.2f}", "", *figures(total)], strict=True):
        table.add_column(heading, footer=footer, justify="right", no_wrap=True)
    for phase in progress.phases:
        if phase.state == "done":
            # Random updates pass over no more than the pages they hit, so an array's bytes a second would say nothing.
            speed = "" if phase.name == "random updates" else f"{job.array / MEGABYTE / max(phase.seconds, 1e-3):,.0f}"
            table.add_row(phase.name, f"{phase.seconds:.2f}", speed, *figures(phase))
        else:
            table.add_row(phase.name, "stopped" if phase.state == "running" else "not run")
    return table


def _verdict(progress: Progress, job: Job) -> Text:
    if progress.verified:
        return Text(f"yes, all {job.array:,} bytes, after every change", "bold green")
    if wrong := progress.wrong:
        at = wrong.index * 8
        return Text(
            f"NO: {wrong.phase}: element {wrong.index:,} (byte {at:,}, page {at // job.page_size:,} of the array)\n"
            f"          expected {wrong.expected:#018x}, got {wrong.got:#018x}",
            "bold red",
        )
    return Text("no: the program did not come to its end", "bold red")


def _sentence(progress: Progress, job: Job, seconds: float) -> str:
    if progress.wrong:
        return (
            "The array does not hold what was written to it: dmh lost data, or something else wrote to its memory "
            f"(seed {job.seed})."
        )
    if progress.highest > job.limit:
        return "Every byte was right, but the region had more memory than memory.limit allows: that is a bug in dmh."
    if not progress.verified:
        return "The demo did not come to its end; the message above says why."
    return (
        f"NumPy filled, summed, updated and sorted {_mb(job.array)} MB in {_mb(job.limit)} MB of memory "
        f"in {seconds:.0f} s, and every byte was right."
    )
