"""One picture per suite, as PNG and SVG, next to its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.registry import Row

OURS, OTHERS, WORSE, LINE = "#1b7837", "#b35806", "#b2182b", "#555555"
COLOURS = {
    "ours": OURS,
    "reference": "#7fbf7b",
    "ours (loop)": "#7fbf7b",
    "eager": OTHERS,
    "full graph": OTHERS,
    "full logits": OTHERS,
    "published": OTHERS,
    "one pass per sample": "#542788",
    "torch linear_ce": "#542788",
    "floor": LINE,
}
ROLES = {"ours": OURS, "floor": LINE}


@contextmanager
def drawing(path: Path, size: tuple[float, float], lines: int = 1, columns: int = 2, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes `[lines][columns]`, saved when the context ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
        | {"svg.fonttype": "none", "svg.hashsalt": "dllm-kernels"}  # texts stay texts; ids do not change from time to time
    )
    saved = {"dpi": options.pop("dpi", 120), "metadata": options.pop("metadata", None)}
    margins = options.pop("margins", (0, 0, 1, 1))
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, **options)
    try:
        yield figure, axes
        figure.tight_layout(rect=margins)
        figure.savefig(path, **saved)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    finally:
        pyplot.close(figure)


def source(path: Path) -> str:
    """What `ratios` was told of its source, from the file; empty where there is none."""
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get("Source", ""))


def _log_scale(axis: Any) -> None:
    """Logarithmic y with plain numbers at 1, 2 and 5."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _powers_of_two(axis: Any, ticks: Sequence[int], label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.set_xlabel(label)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10)


def _groups(axis: Any, values: Mapping[str, Mapping[str, float]], names: Sequence[str], fmt: Any) -> None:
    """A group of points per key of `values`, one per name in it: on a logarithmic axis the length of a bar says nothing."""
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        shift = (i - (len(names) - 1) / 2) * width
        points = [(x + shift, group[name]) for x, group in enumerate(values.values()) if group.get(name)]
        if points:
            axis.plot(*zip(*points, strict=True), "o", markersize=5, color=COLOURS.get(name, f"C{i}"), label=name)
            for x, y in points:
                told = fmt(y) if callable(fmt) else fmt % y
                above = (
                    {"xytext": (0, 5), "va": "bottom"} if i % 2 == 0 else {"xytext": (0, -5), "va": "top"}
                )  # neighbours do not meet
                axis.annotate(told, (x, y), textcoords="offset points", ha="center", fontsize=7, **above)
    axis.set_xticks(range(len(values)), list(values), fontsize=8)
    axis.grid(axis="x", visible=False)


def bars(rows: Sequence[Row], path: Path) -> None:
    """Time over the floor, and extra memory, of each case and contestant; one line of panels per shape."""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        if row["time_ms"]:
            key = ", ".join(f"{name}={row['sizes'][name]}" for name in row["sizes"] if name not in ("N", "M"))
            key += f", {row['case'].split()[-1]}" * (len(row["case"].split()) > 2)
            shapes.setdefault(key, []).append(row)
    if not shapes:
        return
    names = [name for name in COLOURS if name != "floor" and any(row["contestant"] == name for row in rows)]
    height = 0.6 + 3.6 * len(shapes)
    with drawing(path, (13, height), len(shapes), margins=(0, 0, 1, 1 - 0.4 / height)) as (figure, axes):
        for (shape, members), (left, right) in zip(shapes.items(), axes, strict=True):
            for axis, key, title in (
                (left, "to_floor", "time / bare matrix products"),
                (right, "memory_mib", "extra peak memory, MiB"),
            ):
                values: dict[str, dict[str, float]] = {}
                for row in members:
                    label = row["case"].replace(" N=", "\nN=").split(",H=")[0]
                    values.setdefault(label, {})[row["contestant"]] = row[key] or 0.0
                _groups(axis, values, names, _short)
                axis.margins(y=0.12)
                _title(axis, f"{title}    ({shape})")
                _log_scale(axis)
            left.axhline(1.0, color=LINE, linewidth=1.2, linestyle="--", label="floor")
        handles, captions = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, captions, loc="upper center", ncols=len(captions), frameon=False)


def curves_over_samples(families: Mapping[str, Sequence[Row]], path: Path, *, title: str, samples: str = "K") -> None:
    """Extra memory and seconds against the number of Monte-Carlo samples; a line of panels per family."""
    measured = {family: [row for row in rows if row["time_ms"]] for family, rows in families.items()}
    measured = {family: rows for family, rows in measured.items() if rows}
    if not measured:
        return
    height = 1.1 + 4 * len(measured)
    with drawing(path, (12, height), len(measured), margins=(0, 0.5 / height, 1, 1 - 0.3 / height)) as (figure, axes):
        for (family, rows), (left, right) in zip(measured.items(), axes, strict=True):
            for name in dict.fromkeys(row["contestant"] for row in rows):
                _curves_of(name, [row for row in rows if row["contestant"] == name], left, right)
            _title(left, f"extra peak memory of {family}, MiB")
            _title(right, f"seconds of {family} (median, quartiles)")
            for axis in (left, right):
                _powers_of_two(axis, sorted({row["sizes"]["K"] for row in rows}), f"Monte-Carlo samples {samples}")
                _log_scale(axis)
                axis.margins(x=0.12, y=0.1)  # for the figures at the ends of lines
        named = {}
        for _, right in axes:
            named |= dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
        figure.legend(named.values(), named, loc="lower center", ncols=2 if len(named) > 3 else 3, frameon=False, fontsize=8)
        sizes = {key: value for key, value in next(iter(measured.values()))[0]["sizes"].items() if key != "K"}
        figure.suptitle(f"{title}, {', '.join(f'{k}={v}' for k, v in sizes.items())}", fontsize=11, y=1 - 0.1 / height)


def _curves_of(name: str, rows: Sequence[Row], left: Any, right: Any) -> None:
    """One contestant's memory, the last figure written out, and time."""
    colour, dashed = COLOURS.get(name, COLOURS["floor"]), name in ("ours (loop)", "limit")
    style = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "--" if dashed else "-"}
    known = [row for row in rows if row["memory_mib"] is not None and row["role"] != "floor"]
    if known:
        points = [(row["sizes"]["K"], row["memory_mib"]) for row in known]
        left.plot(*zip(*points, strict=True), **style)
        place: dict[str, Any] = {"xytext": (6, -11) if dashed else (6, 4), "textcoords": "offset points"}
        left.annotate(_short(points[-1][1]), points[-1], color=colour, fontsize=9, **place)
    samples = [row["sizes"]["K"] for row in rows]
    medians, low, high = ([row["time_ms"][key] / 1e3 for row in rows] for key in ("median", "q1", "q3"))
    note = f" ({rows[0]['note']})" if rows[0]["note"] and rows[0]["role"] != "floor" else ""
    right.plot(samples, medians, label=name + note, **style)
    right.fill_between(samples, low, high, color=colour, alpha=0.15, linewidth=0)


def seconds_and_memory(rows: Sequence[Row], path: Path, phases: Sequence[str] = ()) -> None:
    """Every measured row: points on logarithmic axes; phases are bars, shares of the slowest call of their case."""
    measured = [row for row in rows if row["time_ms"] and (row.get("phases_s") or not phases)]
    if not measured:
        return
    labels = [f"{str(row['case']).split(' ')[0]}: {row['contestant']}" for row in measured]
    colours = [ROLES.get(row["role"], OTHERS) for row in measured]
    height = 1.2 + 0.4 * len(measured) + 0.5 * bool(phases)
    with drawing(path, (12, height), sharey=True, margins=(0, 0.5 / height * bool(phases), 1, 1)) as (figure, ((left, right),)):
        if phases:
            _stacked(left, measured, labels, phases)
            figure.legend(*left.get_legend_handles_labels(), loc="lower left", ncols=len(phases), frameon=False, fontsize=8)
        else:
            _points(left, labels, [row["time_ms"]["median"] / 1e3 for row in measured], colours)
            _title(left, "seconds (median)")
        _points(right, labels, [row["memory_mib"] or 0.0 for row in measured], colours)
        _title(right, "extra peak memory, MiB")
        left.margins(y=0.5 / len(measured) + 0.02)
        left.invert_yaxis()


def _points(axis: Any, labels: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    """A point per label on a logarithmic axis, its figure beside it; what is 0 stands at the left, in words."""
    least = min((value for value in values if value > 0), default=1.0)
    axis.set_xscale("log")
    for place, (value, colour) in enumerate(zip(values, colours, strict=True)):
        if value > 0:
            axis.plot([value], [place], "o", color=colour, markersize=7)
        where = value if value > 0 else least / 2
        axis.annotate(_short(value), (where, place), xytext=(7, -3), textcoords="offset points", fontsize=8)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_xlim(least / 2.5, 4 * max(*values, least))


def _stacked(axis: Any, rows: Sequence[Row], labels: Sequence[str], phases: Sequence[str]) -> None:
    most = {row["case"]: max(sum(r["phases_s"].values()) for r in rows if r["case"] == row["case"]) for row in rows}
    ends = [0.0] * len(rows)
    for number, phase in enumerate(phases):
        shares = [row["phases_s"][phase] / most[row["case"]] for row in rows]
        axis.barh(labels, shares, left=ends, label=phase, color=f"C{number}")
        ends = [end + share for end, share in zip(ends, shares, strict=True)]
    for place, (end, row) in enumerate(zip(ends, rows, strict=True)):
        axis.text(end + 0.01, place, f"{row['time_ms']['median'] / 1e3:.3g} s", va="center", fontsize=8)
    _title(axis, "seconds by phase (bars: shares of the slower)")
    axis.set_xlim(0, 1.2)


def squared_errors(rows: Sequence[Row], path: Path) -> None:
    """Mean squared error against the number of forward passes, with 95 % intervals; one panel per model."""
    rows = [row for row in rows if row["figures"]]
    models, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "contestant"))
    width = 6.2 * len(models) + 2
    with drawing(path, (width, 5.4), columns=len(models), margins=(0, 0, 1 - 2.2 / width, 1)) as (figure, axes):
        for axis, model in zip(axes[0], models, strict=True):
            for number, name in enumerate(names):
                mine = [row for row in rows if (row["model"], row["contestant"]) == (model, name)]
                # side by side: intervals at equal budgets would hide each other
                x = [row["sizes"]["K"] * 1.02 ** (number - len(names) / 2) for row in mine]
                figures = [row["figures"]["mse"] for row in mine]
                spread = [[f["value"] - f["low"] for f in figures], [f["high"] - f["value"] for f in figures]]
                style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "capsize": 2, "color": f"C{number}"}
                style["linestyle"] = "--" if name.endswith("L/count") else "-"
                axis.errorbar(x, [f["value"] for f in figures], spread, label=name, **style)
            _title(axis, model)
            _powers_of_two(axis, sorted({row["sizes"]["K"] for row in rows}), "forward passes")
            axis.set_yscale("log")
        axes[0][0].set_ylabel("mean squared error of the ELBO, nats²")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", frameon=False, fontsize=9)


def grouped(values: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """Points on a logarithmic axis: a group per key of `values`, one per name in it."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    with drawing(path, (9, 4.2), columns=1) as (_, ((axis,),)):
        _groups(axis, values, names, "%.1e")
        axis.set_yscale("log")
        axis.margins(y=0.15)
        _title(axis, title)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def growth(values: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """A pair of points on a logarithmic axis per key of `values`, ours and another way, and the way between them."""
    names = list(dict.fromkeys(name for pair in values.values() for name in pair))
    with drawing(path, (8, 5), columns=1) as (_, ((axis,),)):
        places = range(len(values))
        for place, pair in zip(places, values.values(), strict=True):
            axis.plot([max(value, 0.1) for value in pair.values()], [place] * len(pair), color="#cccccc", zorder=1)
        for name, colour in zip(names, (OURS, OTHERS), strict=True):
            points = [max(pair[name], 0.1) for pair in values.values()]
            axis.plot(points, places, "o", color=colour, label=name, zorder=2)
            for place, point, pair in zip(places, points, values.values(), strict=True):
                above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
                axis.annotate(_short(pair[name]), (point, place), **above)
        axis.set_yticks(range(len(values)), list(values))
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel(title)
        axis.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def ratios(labels: Sequence[str], panels: Mapping[str, Sequence[float]], path: Path, source: str) -> None:
    """Lying bars, a panel per title; to the left of 1 ours loses. `source` is kept in the file."""
    from benchmarks.report import digits

    size = (12, 0.9 + 0.27 * len(labels))
    with drawing(path, size, columns=len(panels), sharey=True, dpi=110, metadata={"Source": source}) as (_, axes):
        for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
            # bars begin at 1, so that their length is the logarithm of the ratio
            ends = [value - 1.0 if value else 0.0 for value in values]
            drawn = axis.barh(labels, ends, left=1.0, color=[OURS if value >= 1 else WORSE for value in values])
            axis.bar_label(drawn, [digits(value) if value else "–" for value in values], fontsize=8, padding=2)
            axis.axvline(1.0, color=LINE, linewidth=1)
            axis.set_xscale("log")
            axis.set_xlim(min(0.5, 0.5 * min((v for v in values if v), default=1.0)), 3 * max(values))
            _title(axis, title)
            axis.grid(axis="y", visible=False)
        axes[0][0].invert_yaxis()


def before_and_after(rows: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path) -> None:
    """Shares before (hollow) and after (full), a point per seed, and the mean after as a stroke; a line per name."""
    with drawing(path, (8, 1.4 + 0.32 * len(rows)), columns=1) as (_, ((axis,),)):
        for place, row in enumerate(rows.values()):
            before, after = ([100 * value for value in row[key]] for key in ("sft", "rl"))
            mean = sum(after) / len(after)
            told = ("before RL", "after RL, a point per seed", "their mean") if place == 0 else (None, None, None)
            axis.plot(before, [place] * len(before), "o", markerfacecolor="none", color=LINE, label=told[0])
            axis.plot(after, [place] * len(after), "o", color=OURS, label=told[1])
            axis.plot([mean, mean], [place - 0.3, place + 0.3], color=OURS, linewidth=2, label=told[2])
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_xlabel(title)
        axis.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0))
