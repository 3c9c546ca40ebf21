"""What merge_methods.py has measured, judged: gains, tables, a plot, and the page in docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merge_rows import OF

Losses = dict[str, float]
_TICKS = (-1000, -500, -200, -100, -50, 0, 50, 100)
START, END = "<!-- findings: written by hand, kept by the script -->", "<!-- end of findings -->"
_MARKS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Judged:
    """One world's table."""

    tasks: tuple[str, ...]
    sizes: str
    """How much was trained and measured, in words."""
    lead: list[dict[str, Any]]
    """The base and the tasks' own models."""
    merges: list[dict[str, Any]]
    """The best mean gain first."""
    validation: dict[str, Losses]
    """Losses on the validation halves, of the models that the greedy soup is made of, and of the soup."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(results: Sequence[tuple[str, str, Losses]], validation: Mapping[str, Losses], tasks: tuple[str, ...], sizes: str) -> Judged:
    """The results with their gains.

    Raises:
        SystemExit: a fine-tuning is not better than the base, or the greedy soup is below its best input on validation.
    """
    base = next(losses for group, _, losses in results if group == "base")
    own = {
        kind: dict(zip(tasks, [found for group, _, found in results if group == f"own {kind}"], strict=True)) for kind in set(OF.values())
    }
    rows: list[dict[str, Any]] = []
    for group, name, losses in results:
        best = own[OF.get(group, group.removeprefix("own ").replace("base", "full"))]
        if failed := [task for task in tasks if best[task][task] >= base[task]]:
            raise SystemExit(f"the fine-tuning of {failed[0]} ({group}) is not better than the base: give more --steps")
        gains = {task: (base[task] - losses[task]) / (base[task] - best[task][task]) for task in tasks}
        rows.append({"group": group, "name": name, "losses": losses, "gains": gains, "mean": sum(gains.values()) / len(tasks)})
    means = {name: sum(losses.values()) / len(tasks) for name, losses in validation.items()}
    soup = means.pop("greedy_soup")
    if soup > min(means.values()) + 1e-6:
        raise SystemExit(f"the greedy soup's loss on validation is {soup}, its best input's {min(means.values())}")
    lead = [row for row in rows if row["group"] not in OF]
    merges = sorted((row for row in rows if row["group"] in OF), key=lambda row: -float(row["mean"]))
    return Judged(tasks, sizes, lead, merges, dict(validation))


def table(world: Judged) -> list[str]:
    """Markdown."""
    tasks = world.tasks
    lines = [
        f"| what | of | {' | '.join(f'{task}: loss' for task in tasks)} | {' | '.join(f'{task}: gain' for task in tasks)} | mean gain |",
        "|---|---|" + "--:|" * (2 * len(tasks) + 1),
    ]
    for row in world.lead + world.merges:
        losses = " | ".join(f"{row['losses'][task]:.3f}" for task in tasks)
        gains = " | ".join(f"{100 * row['gains'][task]:.0f} %" for task in tasks)
        lines.append(f"| {row['name']} | {row['group']} | {losses} | {gains} | {100 * row['mean']:.0f} % |")
    return lines


def soup_line(world: Judged) -> str:
    """What the greedy soup and its inputs lose on the rows it was chosen by."""
    means = {name: sum(losses.values()) / len(losses) for name, losses in world.validation.items()}
    soup = means.pop("greedy_soup")
    inputs = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
    return f"On the validation halves the mean loss of the greedy soup is {soup:.3f}; of its inputs, each alone: {inputs}."


def plot(worlds: Mapping[str, Judged], path: Path) -> None:
    """The mean gain of every merge, and a mark for each task."""
    import matplotlib
    from matplotlib.figure import Figure

    from ftcli.reporting.plot import COLOURS, INK

    most = max(len(world.merges) for world in worlds.values())
    with matplotlib.rc_context({"svg.hashsalt": "ftcli", "svg.fonttype": "none", "text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(6.6 * len(worlds), 1.2 + 0.19 * most), layout="constrained", facecolor="white")
        for axes, (name, world) in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds.items(), strict=True):
            _draw(axes, world)
            axes.set_title(name, color=INK)
        handles = [
            matplotlib.lines.Line2D([], [], marker=_MARKS[index], color=COLOURS[index], linestyle="", label=group)
            for index, group in enumerate(OF)
        ]
        figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=len(OF))
        figure.savefig(path, metadata={"Date": None, "Creator": "ftcli"})


def _draw(axes: Any, world: Judged) -> None:
    from ftcli.reporting.plot import COLOURS, FAINT, INK

    shown = world.merges[::-1]
    for height, row in enumerate(shown):
        index = list(OF).index(row["group"])
        axes.plot([100 * gain for gain in row["gains"].values()], [height] * len(world.tasks), "|", color=COLOURS[index], markersize=6)
        axes.plot(100 * row["mean"], height, _MARKS[index], color=COLOURS[index], markersize=5)
    axes.set_yticks(range(len(shown)), [row["name"] for row in shown])
    axes.set_ylim(-1, len(shown))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(100, color=INK, linewidth=0.8, linestyle=":")
    least = min(100 * gain for row in shown for gain in row["gains"].values())
    left = min(-25.0, 1.2 * least)
    axes.set_xscale("symlog", linthresh=100, linscale=1)
    axes.set_xlim(left, 120)
    ticks = [tick for tick in _TICKS if tick > left]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("gain kept, % (mark: mean, strokes: tasks; logarithmic below -100)", color=INK)
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def write_docs(folder: Path, worlds: Mapping[str, Judged], about: str) -> None:
    """merge-methods.md and merge-methods.svg; what was found by people reading the tables stays in the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "merge-methods.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    findings = old.partition(START)[2].partition(END)[0].strip()
    if findings:
        print(f"{page}: the findings are kept as they were: read them against the new tables")
    lines = ["# Merging three fine-tunes, method by method", "", about, "", "![gain kept](merge-methods.svg)", ""]
    lines += [START, "", findings, "", END] if findings else [START, "", END]
    for name, world in worlds.items():
        lines += ["", f"## {name}", "", world.sizes, "", soup_line(world), "", *table(world)]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(worlds, folder / "merge-methods.svg")
