"""A picture of cost against prompt length as SVG, from numbers.

Knows no row, model or method. The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 500, 28, 364
GREY = "#7b818b"
COLOURS = ("#2f6fb5", "#1d9a8a", "#c0562f", "#8a4fb0")
"""Readable on white and on the dark background of the documentation."""

DASHES = ("none", "none", "8 6", "none")
"""Lines that lie on each other can both be seen."""

Point = tuple[int, float, float]
"""Prompt length, operations, time; both in units of the same base."""


def picture(series: Mapping[str, Sequence[Point]], points: Mapping[str, Point]) -> str:
    """Lines of operations with dots of time, and single points."""
    top = max(max(one[1:]) for line in (*series.values(), list(points.values())) for one in line)
    highest, furthest = float(int(top) + 1), max(one[0] for line in series.values() for one in line)

    def x(length: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * length / furthest, 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * value / highest, 1)

    said = "; ".join(
        f"{name}: " + ", ".join(f"{operations:.2f} at {length}" for length, operations, _ in line)
        for name, line in series.items()
    )
    said += "; " + "; ".join(f"{name}: {operations:.2f}" for name, (_, operations, _) in points.items())
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title desc" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, '
        'sans-serif" font-size="13">',
        '  <title id="title">What a training step costs against the length of the prompt</title>',
        f'  <desc id="desc">Operations of a step, where LoRA on the same texts is 1. {said}.</desc>',
        f'  <g stroke="{GREY}" stroke-width="1">',
    ]
    ticks = [0.5 * step for step in range(int(2 * highest) + 1)] if highest <= 4 else list(range(int(highest) + 1))
    out += [f'    <path d="M{LEFT} {y(tick)} H{RIGHT}" opacity="0.25"/>' for tick in ticks]
    out += [f'    <path d="M{LEFT} {y(1)} H{RIGHT}" stroke-dasharray="6 4" stroke-width="2"/>', "  </g>"]
    out += [f'  <g fill="{GREY}">']
    out += [f'    <text x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>' for tick in ticks]
    lengths = sorted({0, *(one[0] for line in series.values() for one in line)})
    out += [f'    <text x="{x(length)}" y="{BOTTOM + 20}" text-anchor="middle">{length}</text>' for length in lengths]
    middle = (LEFT + RIGHT) / 2
    out += [
        f'    <text x="{middle}" y="{BOTTOM + 42}" text-anchor="middle">rows of the prompt</text>',
        f'    <text x="{RIGHT}" y="{y(1) + 16}" text-anchor="end">LoRA on the same texts</text>',
        f'    <text x="{LEFT - 48}" y="{TOP - 10}">cost of a step (LoRA = 1)</text>',
        "  </g>",
    ]
    for colour, dash, (_, line) in zip(COLOURS, DASHES, series.items(), strict=False):
        path = " L".join(f"{x(length)} {y(operations)}" for length, operations, _ in line)
        style = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
        out.append(f'  <path d="M{path}" fill="none" {style}/>')
        out += [f'  <circle cx="{x(length)}" cy="{y(time)}" r="4" fill="{colour}"/>' for length, _, time in line]
    for colour, (length, operations, time) in zip(COLOURS, points.values(), strict=False):
        for value, filled in ((operations, "none"), (time, colour)):
            across, down = x(length), y(value)
            out.append(
                f'  <path d="M{across} {down - 7} L{across + 7} {down} L{across} {down + 7} L{across - 7} {down} z" '
                f'fill="{filled}" stroke="{colour}" stroke-width="2"/>'
            )
    row = TOP + 10
    for colour, dash, name in zip(COLOURS, DASHES, series, strict=False):
        style = f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
        out.append(f'  <path d="M{RIGHT + 16} {row - 4} h22" {style}/>')
        out.append(f'  <text x="{RIGHT + 44}" y="{row}" fill="{colour}">{name}</text>')
        row += 24
    row += 12
    for text in ("lines: operations, counted", "dots: time, measured", "diamonds: EPT s=60"):
        out.append(f'  <text x="{RIGHT + 16}" y="{row}" fill="{GREY}">{text}</text>')
        row += 22
    return "\n".join([*out, "</svg>", ""])
