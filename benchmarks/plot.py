"""One SVG from the JSON of call.py and decode.py.

Run ``python benchmarks/plot.py CALL.json DECODE.json OUT.svg``.
"""

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, ROW, BAR, GAP = 760, 244, 112, 24, 14, 56
OURS = "audiences_async"
PANELS = (
    ("CPU per call, 64 at once", "CPU of one call, 20 audiences, 64 at once"),
    ("CPU per record, 1,000 records", "CPU of decoding one record, a reply of 1,000"),
    ("CPU per record, 100,000 records", "CPU of decoding one record, a reply of 100,000"),
)
CUT = 5.0  # a bar ends at so many times the baseline, and says what it stands for

STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.t{font-weight:600}.n,.f{font-size:12px;fill:#59636e}.o{font-weight:600}
.p{fill:#fff}.b{fill:#afb8c1}.m{fill:#0969da}.c{stroke:#fff;stroke-width:3}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.n,.f{fill:#9198a1}.p{fill:#0d1117}.b{fill:#59636e}.m{fill:#4493f8}
.c{stroke:#0d1117}}
"""


def panel(records: list[dict[str, Any]], title: str, top: int) -> Iterator[str]:
    yield f'<text class="t" x="16" y="{top}">{escape(title)}</text>'
    baseline = records[0]["baseline"]
    yield f'<text class="n" x="{WIDTH - 16}" y="{top}" text-anchor="end">ratio to {escape(baseline)}</text>'
    longest = min(CUT, max(record["ratio"] for record in records))
    for number, record in enumerate(sorted(records, key=lambda record: record["ratio"])):
        y = top + 12 + number * ROW
        width = (WIDTH - LEFT - RIGHT - 16) * min(record["ratio"], longest) / longest
        ours = record["case"] == OURS
        label, told = ("o", "o") if ours else ("l", "n")
        yield f'<text class="{label}" x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(record["case"])}</text>'
        yield f'<rect class="{"m" if ours else "b"}" x="{LEFT}" y="{y + 1}" width="{width:.1f}" height="{BAR}" rx="2"/>'
        if record["ratio"] > longest:
            yield f'<path class="c" d="M{LEFT + width - 16:.1f} {y + 18}l6 -20"/>'
        value = f"{record['ratio']:.2f} · {record['median']:.3g} µs"
        if record["median"] >= 1000:
            value = f"{record['ratio']:.1f} · {record['median'] / 1000:.2g} ms"
        yield f'<text class="{told}" x="{LEFT + width + 6:.1f}" y="{y + 12}">{value}</text>'


def drawn(found: list[dict[str, Any]]) -> str:
    records = [record for file in found for record in file["results"]]
    parts: list[str] = []
    top = 28
    for table, title in PANELS:
        shown = [record for record in records if record["table"] == table]
        parts += panel(shown, title, top)
        top += len(shown) * ROW + GAP
    versions: dict[str, str] = {}
    for file in found:
        versions |= file["versions"]
    names = [f"{name} {number}" for name, number in versions.items() if name != "attrs"]
    half = (len(names) + 1) // 2
    notes = (f"{found[0]['interpreter']}; {found[0]['machine']}", ", ".join(names[:half]), ", ".join(names[half:]))
    for number, note in enumerate(notes):
        parts.append(f'<text class="f" x="16" y="{top - 16 + 17 * number}">{escape(note)}</text>')
    height = top + 17 * len(notes) - 16
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(summary(records))}</title>'
    background = f'<rect class="p" width="{WIDTH}" height="{height}" rx="6"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", background, *parts, "</svg>\n"])


def summary(records: list[dict[str, Any]]) -> str:
    """The picture in words, for those who do not see it."""
    ours = {record["table"]: record for record in records if record["case"] == OURS}
    told = (f"{title}: {ours[table]['ratio']:.2f} of {ours[table]['baseline']}" for table, title in PANELS)
    return f"{OURS}. {'; '.join(told)}"


def main() -> None:
    *sources, target = map(Path, sys.argv[1:])
    found = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    svg = drawn(found)
    assert len(svg.encode()) < 20_000
    target.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
