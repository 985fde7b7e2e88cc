"""`promptuary methods`: every known method.

Knows none of them; the registry does.
"""

from __future__ import annotations

from promptuary.cli import console


def methods(as_json: console.Json = False) -> None:
    """List the methods, and the baselines to compare them with."""
    from promptuary import registry

    rows = []
    for name in registry.names("methods"):
        method = registry.load("methods", name)
        rows.append(
            {
                "name": name,
                "title": method.title,
                "paper": method.paper,
                "sites": sorted(method.sites),
                "reconstructed": method.reconstructed,
            }
        )
    console.table(
        ("name", "title", "paper", "sites", "reconstructed"),
        [
            (r["name"], r["title"], r["paper"], " ".join(r["sites"]), "yes" if r["reconstructed"] else "no")
            for r in rows
        ],
    )
    known = [registry.load("baselines", name) for name in registry.names("baselines")]
    baselines = [{"name": one.name, "title": one.title, "paper": one.paper} for one in known]
    console.table(("baseline", "title", "paper"), [tuple(row.values()) for row in baselines])
    if as_json:
        console.emit({"methods": rows, "baselines": baselines})
