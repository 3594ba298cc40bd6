"""Pictures of diagnostics, as PNG files. Needs matplotlib ([plots] extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resq_compiler.errors import DumpError
from resq_compiler.inspection.activations import Diagnostics
from resq_compiler.inspection.attribution import Cost, Costs
from resq_compiler.inspection.dump_files import unwritable
from resq_compiler.util.install import install_command

COLOURS = {
    "attention_input": "#2b6cb0", "mlp_input": "#c05621", "o_input": "#2f855a", "down_input": "#b83280",
    "key": "#6b46c1", "value": "#718096", "weights": "#2b6cb0", "activations": "#c05621",
    "KV cache": "#6b46c1",
}  # fmt: skip
DPI = 110


def activation_plots(found: Diagnostics, directory: Path) -> dict[str, str]:
    """Channel sizes, spectra, noise and bits of each block. Returns titles by file name."""
    pictures = {
        "channels.png": ("Size of each channel: raw, along the principal directions (P), after U = P R", _channels),
        "spectrum.png": ("Eigenvalues of second moments and the energy in the high part", _spectrum),
        "noise.png": ("Signal to noise of every site: original values at the main bits (dashed), after the compile (solid)", _noise),
        "bits.png": ("Mean bits of each block", _bits),
    }  # fmt: skip
    for name, (_, draw) in pictures.items():
        _save(draw(found), directory / name)
    return {name: title for name, (title, _) in pictures.items()}


def attribution_plots(found: Costs, directory: Path) -> dict[str, str]:
    """Ranked costs, one picture for each level. Returns titles by file name."""
    titles = {}
    for level in dict.fromkeys(c.level for c in found.costs):
        name = f"cost-by-{level}.png"
        _save(_ranking([c for c in found.costs if c.level == level][:40]), directory / name)
        titles[name] = f"Cost of quantizing one {level} alone: KL from the float model, nats per token"
    return titles


def _figure(*grid: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DumpError(f"plots: matplotlib is not installed; run: {install_command('plots')}") from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*grid, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise unwritable(path, error) from error


def _channels(found: Diagnostics) -> Any:
    names = list(found.channels) or ["no site"]
    figure, axes = _figure(len(names), 3, size=(11, 2.6 * len(names)))
    labels = {"raw": "raw", "P": "after P", "U": "after U = P R"}
    for row, name in zip(axes, names, strict=True):
        views = found.channels.get(name, {})
        for axis, (key, label) in zip(row, labels.items(), strict=True):
            values = views.get(key)
            if values is not None:
                axis.fill_between(range(len(values)), values, step="mid", color="#2b6cb0", linewidth=0)
                axis.set_ylim(bottom=0)
            axis.set_title(f"{name}: {label}", fontsize=9)
            axis.set_xlabel("channel", fontsize=8)
        row[0].set_ylabel("max |x| over tokens", fontsize=8)
    return figure


def _spectrum(found: Diagnostics) -> Any:
    figure, ((left, right),) = _figure(1, 2, size=(11, 3.4))
    for name, values in found.spectra.items():
        share = (values.flip(0) / values.sum()).clamp_min(1e-12)
        left.semilogy([(i + 1) / len(share) for i in range(len(share))], share, label=name)
    left.set(xlabel="share of the directions, strongest first", ylabel="share of the energy of each direction")
    left.axvline(1 / 8, color="#999", linestyle=":", linewidth=1)
    for kind, points in _by_kind(found.high_energy).items():
        right.plot(*zip(*points, strict=True), marker=".", label=kind, color=COLOURS.get(kind))
    right.set(xlabel="block", ylabel="energy in the high part", ylim=(0, 1))
    _legends(left, right)
    return figure


def _noise(found: Diagnostics) -> Any:
    figure, ((left, right),) = _figure(1, 2, size=(11, 3.6))
    after, before = _by_kind(found.noise_db), _by_kind(found.raw_noise_db)
    for kind, points in after.items():
        left.plot(*zip(*points, strict=True), marker=".", label=kind, color=COLOURS.get(kind))
        if kind in before:
            left.plot(*zip(*before[kind], strict=True), linestyle="--", linewidth=1, color=COLOURS.get(kind))
    left.set(xlabel="block", ylabel="activations: SQNR, dB")
    series: dict[str, list[tuple[int, float]]] = {}
    for name, value in found.weight_db.items():
        numbers = [int(p) for p in name.split(".") if p.isdigit()]
        if numbers:
            series.setdefault(".".join(name.split(".")[-2:]), []).append((numbers[0], value))
    for name, points in series.items():
        right.plot(*zip(*points, strict=True), label=name, linewidth=1)
    right.set(xlabel="block", ylabel="weights: SQNR, dB")
    _legends(left, right)
    return figure


def _bits(found: Diagnostics) -> Any:
    figure, ((axis,),) = _figure(1, 1, size=(11, 2.6))
    series = _by_kind(found.bits)
    for i, (kind, points) in enumerate(series.items()):
        blocks, values = zip(*points, strict=True)
        width = 0.8 / len(series)
        axis.bar(
            [b - 0.4 + (i + 0.5) * width for b in blocks], values, width=width, label=kind, color=COLOURS.get(kind)
        )
    axis.set(xlabel="block", ylabel="mean bits of a column")
    _legends(axis)
    return figure


def _ranking(costs: list[Cost]) -> Any:
    figure, ((axis,),) = _figure(1, 1, size=(9, 0.8 + 0.22 * len(costs)))
    axis.barh([c.name for c in costs], [c.kl for c in costs], color="#c05621")
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.set_xlabel("KL, nats per token")
    for i, cost in enumerate(costs):
        axis.text(cost.kl, i, f" {100 * cost.increase:+.1f} % ppl", va="center", fontsize=7, color="#555")
    axis.margins(x=0.15)
    return figure


def _by_kind(values: dict[str, float]) -> dict[str, list[tuple[int, float]]]:
    """blocks.N.KIND -> value, as kind -> [(block, value)]."""
    series: dict[str, list[tuple[int, float]]] = {}
    for name, value in values.items():
        _, _, rest = name.partition("blocks.")
        block, _, kind = rest.partition(".")
        if block.isdigit():
            series.setdefault(kind, []).append((int(block), value))
    return series


def _legends(*axes: Any) -> None:
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6, ncols=2, framealpha=0.6)
        axis.grid(alpha=0.25)
        if axis.get_xlabel() == "block":
            axis.locator_params(axis="x", integer=True)
