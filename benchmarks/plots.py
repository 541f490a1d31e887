"""One PNG per suite, next to its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import Row

COLOURS = {
    "ours": "#1b7837",
    "reference": "#7fbf7b",
    "ours (loop)": "#7fbf7b",
    "eager": "#b35806",
    "full graph": "#b35806",
    "full logits": "#b35806",
    "published": "#b35806",
    "one pass per sample": "#542788",
    "torch linear_ce": "#542788",
    "floor": "#555555",
}


def pyplot_module() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    )
    return pyplot


def bars(rows: Sequence[Row], path: Path) -> None:
    """Time over the floor, and extra memory, of each case and contestant; one line of panels per shape."""
    pyplot = pyplot_module()
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        if row["time_ms"]:
            key = ", ".join(f"{name}={row['sizes'][name]}" for name in row["sizes"] if name not in ("N", "M"))
            key += f", {row['case'].split()[-1]}" * (len(row["case"].split()) > 2)
            shapes.setdefault(key, []).append(row)
    if not shapes:
        return
    figure, axes = pyplot.subplots(len(shapes), 2, figsize=(13, 0.6 + 3.6 * len(shapes)), squeeze=False)
    names = [name for name in COLOURS if any(row["contestant"] == name for row in rows)]
    for (shape, members), (left, right) in zip(shapes.items(), axes, strict=True):
        labels = list(dict.fromkeys(row["case"] for row in members))
        for axis, value, title in (
            (left, lambda row: row["to_floor"], "time / bare matrix products"),
            (right, lambda row: row["memory_mib"], "extra peak memory, MiB"),
        ):
            _bars_of(axis, members, labels, names, value)
            axis.set_title(f"{title}    ({shape})", loc="left", fontsize=10)
            _log_scale(axis)
        left.axhline(1.0, color=COLOURS["floor"], linewidth=1.2, linestyle="--", label="floor")
    handles, captions = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, captions, loc="upper center", ncols=len(captions), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / (0.6 + 3.6 * len(shapes))))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars_of(axis: Any, rows: Sequence[Row], labels: Sequence[str], names: Sequence[str], value: Any) -> None:
    shown = [name for name in names if name != "floor"]
    width = 0.8 / max(1, len(shown))
    by = {(row["case"], row["contestant"]): row for row in rows}
    for i, name in enumerate(shown):
        points = [
            (x + (i - (len(shown) - 1) / 2) * width, value(by[label, name]))
            for x, label in enumerate(labels)
            if (label, name) in by and value(by[label, name])
        ]
        if not points:
            continue
        drawn = axis.bar(*zip(*points, strict=True), width=width * 0.92, color=COLOURS[name], label=name)
        axis.bar_label(drawn, fmt=_short, fontsize=7, padding=1)
    axis.set_xticks(range(len(labels)), [label.replace(" N=", "\nN=").split(",H=")[0] for label in labels], fontsize=8)
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.12)


def _log_scale(axis: Any) -> None:
    """Logarithmic y with plain numbers at 1, 2 and 5."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def curves_over_samples(families: Mapping[str, Sequence[Row]], path: Path, *, title: str, samples: str = "K") -> None:
    """Extra memory and seconds of each family's contestants against the number of Monte-Carlo samples; a line of panels each."""
    pyplot = pyplot_module()
    measured = {family: [row for row in rows if row["time_ms"]] for family, rows in families.items()}
    measured = {family: rows for family, rows in measured.items() if rows}
    if not measured:
        return
    figure, axes = pyplot.subplots(len(measured), 2, figsize=(12, 0.6 + 4 * len(measured)), squeeze=False)
    for (family, rows), (left, right) in zip(measured.items(), axes, strict=True):
        for name in dict.fromkeys(row["contestant"] for row in rows):
            _curves_of(name, [row for row in rows if row["contestant"] == name], left, right)
        ticks = sorted({row["sizes"]["K"] for row in rows})
        left.set_title(f"extra peak memory of {family}, MiB", loc="left", fontsize=10)
        right.set_title(f"seconds of {family} (median, quartiles)", loc="left", fontsize=10)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.minorticks_off()
            _log_scale(axis)
            axis.set_xlabel(f"Monte-Carlo samples {samples}")
    axes[0][1].legend(frameon=False, loc="upper left", fontsize=8)  # where rising curves leave room
    sizes = {key: value for key, value in next(iter(measured.values()))[0]["sizes"].items() if key != "K"}
    figure.suptitle(f"{title}, {', '.join(f'{k}={v}' for k, v in sizes.items())}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curves_of(name: str, rows: Sequence[Row], left: Any, right: Any) -> None:
    """One contestant's memory, the last figure written out, and time."""
    colour, dashed = COLOURS.get(name, COLOURS["floor"]), name in ("ours (loop)", "limit")
    style = {"color": colour, "marker": "o", "markersize": 5, "linestyle": "--" if dashed else "-"}
    samples = [row["sizes"]["K"] for row in rows]
    known = [row for row in rows if row["memory_mib"] is not None and row["role"] != "floor"]
    if known:
        left.plot([row["sizes"]["K"] for row in known], [row["memory_mib"] for row in known], **style)
        left.annotate(
            f"{known[-1]['memory_mib']:.3g}",
            (known[-1]["sizes"]["K"], known[-1]["memory_mib"]),
            xytext=(6, -11) if dashed else (6, 4),
            textcoords="offset points",
            color=colour,
            fontsize=9,
        )
    milliseconds = [[row["time_ms"][key] for row in rows] for key in ("median", "q1", "q3")]
    medians, low, high = ([value / 1e3 for value in values] for values in milliseconds)
    note = f" ({rows[0]['note']})" if rows[0]["note"] and rows[0]["role"] != "floor" else ""
    right.plot(samples, medians, label=name + note, **style)
    right.fill_between(samples, low, high, color=colour, alpha=0.15, linewidth=0)


def seconds_and_memory(rows: Sequence[Row], path: Path) -> None:
    """Lying bars of every case and contestant that was measured."""
    pyplot = pyplot_module()
    measured = [row for row in rows if row["time_ms"] and row["role"] != "floor"]
    if not measured:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 0.8 + 0.42 * len(measured)), sharey=True)
    labels = [f"{row['case'].rpartition(' ')[0]}: {row['contestant']}" for row in measured]
    colours = [COLOURS["ours" if row["role"] == "ours" else "published"] for row in measured]
    for axis, values, title in (
        (axes[0], [row["time_ms"]["median"] / 1e3 for row in measured], "seconds (median)"),
        (axes[1], [row["memory_mib"] or 0.0 for row in measured], "extra peak memory, MiB"),
    ):
        axis.bar_label(axis.barh(labels, values, color=colours), fmt="%.3g", fontsize=8, padding=2)
        axis.set_xscale("symlog", linthresh=1e-2)
        axis.set_title(title, loc="left", fontsize=10)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def squared_errors(rows: Sequence[Row], path: Path) -> None:
    """Mean squared error against the number of forward passes, with 95 % intervals; one panel per model."""
    pyplot = pyplot_module()
    rows = [row for row in rows if row["figures"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(6.2 * len(models) + 2, 5.4), squeeze=False)
    ticks = sorted({row["sizes"]["K"] for row in rows})
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for axis, model in zip(axes[0], models, strict=True):
        for number, name in enumerate(names):
            mine = [row for row in rows if (row["model"], row["contestant"]) == (model, name)]
            # side by side: intervals at equal budgets would hide each other
            x = [row["sizes"]["K"] * 1.02 ** (number - len(names) / 2) for row in mine]
            figures = [row["figures"]["mse"] for row in mine]
            middle = [f["value"] for f in figures]
            spread = [[f["value"] - f["low"] for f in figures], [f["high"] - f["value"] for f in figures]]
            style = "--" if name.endswith("L/count") else "-"
            axis.errorbar(
                x,
                middle,
                spread,
                label=name,
                color=f"C{number}",
                marker="o",
                markersize=4,
                linestyle=style,
                linewidth=1.2,
                capsize=2,
            )
        axis.set_title(model, loc="left", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.set_xlabel("forward passes")
    axes[0][0].set_ylabel("mean squared error of the ELBO, nats²")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / (6.2 * len(models) + 2), 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def grouped(values: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """Bars on a logarithmic axis: a group per key of `values`, a bar per name in it."""
    pyplot = pyplot_module()
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    figure, axis = pyplot.subplots(figsize=(9, 4.2))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        points = [
            (x + (i - (len(names) - 1) / 2) * width, group[name]) for x, group in enumerate(values.values()) if name in group
        ]
        color = COLOURS.get(name, f"C{i}")
        drawn = axis.bar(*zip(*points, strict=True), width=width * 0.92, color=color, label=name)
        axis.bar_label(drawn, fmt="%.1e", fontsize=7, padding=1)
    axis.set_xticks(range(len(values)), list(values))
    axis.set_yscale("log")
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
