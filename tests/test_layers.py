"""No circles between modules, packages' own files included (``make lint`` sees those between siblings, and the layers)."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp

PACKAGE = "mobe_gguf"


def circle(graph: grimp.ImportGraph) -> list[str]:
    """Modules of which each imports the next, at its top, in a function or for types alone; empty if there are none."""
    try:
        TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()
    except CycleError as e:
        return e.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    assert len(graph.modules) > 100
    assert circle(graph) == []
    graph.add_import(importer=f"{PACKAGE}.export.card", imported=f"{PACKAGE}.export")
    assert set(circle(graph)) == {f"{PACKAGE}.export.card", f"{PACKAGE}.export"}
