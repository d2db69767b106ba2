"""The Hasse diagram: what is in it, what its colours and lines say, folding, the formats, strange names, bad input."""

import html
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import bert, mlp
from torch import nn

from hsaid_kernels.hierarchy import graph
from hsaid_kernels.hierarchy.hierarchy import Hierarchy

pygraphviz = pytest.importorskip("pygraphviz")
transformers = pytest.importorskip("transformers")

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"
SPECS = ["hsaid-3", "said", "L1+L3|L2|L4", "L1+L2+L4|L3", "L1|L2|L3|L4", "L2|L4"]


def hierarchy_of(model_class: str, **config) -> Hierarchy:
    model_class = getattr(transformers, model_class)
    with torch.device("meta"):
        return Hierarchy.from_model(model_class(model_class.config_class(**config)))


@pytest.fixture(scope="module")
def mbert() -> Hierarchy:
    return hierarchy_of("BertForSequenceClassification", vocab_size=119547)


@pytest.fixture(scope="module")
def llama() -> Hierarchy:
    return hierarchy_of("LlamaForCausalLM", num_hidden_layers=3)


def blocks(*items: nn.Module) -> Hierarchy:
    model = nn.Module()
    model.layers = nn.ModuleList(items)
    return Hierarchy.from_model(model)


def parsed(dot: str) -> tuple[dict[str, dict], dict[tuple[str, str], dict]]:
    """(attributes of each node, of each edge) as Graphviz understands them; without headers and unseen edges."""
    with pygraphviz.AGraph(string=dot) as made:
        nodes = {str(node): node.attr.to_dict() for node in made.nodes() if ":" in node}
        edges = {tuple(edge): edge.attr.to_dict() for edge in made.edges() if edge.attr["style"] != "invis"}
    return nodes, edges


def count_paths(edges) -> int:
    """From a node without an edge to it to one without an edge from it."""
    after = {}
    for tail, head in edges:
        after.setdefault(tail, []).append(head)

    def onwards(node: str) -> int:
        return sum(map(onwards, after[node])) if node in after else 1

    return sum(map(onwards, after.keys() - {head for _, head in edges}))


def steps(hierarchy: Hierarchy, path: tuple) -> list[str]:
    return [f"{level}:{name}" for level, name in zip(hierarchy.levels, path) if name is not None]


def texts(svg: ElementTree.Element) -> list[str]:
    return [text.text for text in svg.iter(f"{SVG}text")]


def test_every_path_of_mbert(mbert):
    nodes, edges = parsed(mbert.to_dot(fold=False))
    assert Counter(name[:2] for name in nodes) == {"L1": 15, "L2": 3, "L3": 8, "L4": 2}
    chains = [steps(mbert, path) for path in mbert.paths]
    assert edges.keys() == {pair for chain in chains for pair in zip(chain, chain[1:])}
    assert count_paths(edges) == 201
    assert graph.Graph.of(mbert).num_paths == 201


def test_folded_mbert(mbert):
    nodes, edges = parsed(mbert.to_dot())
    assert Counter(name[:2] for name in nodes) == {"L1": 4, "L2": 3, "L3": 8, "L4": 2}
    assert nodes["L1:layer.0"]["label"] == "layer.0 … layer.11  × 12"
    # From embeddings, layers, attention, intermediate, output, pooler, classifier; then from L3, in its order.
    assert len(edges) == 4 + 3 + 5 + 1 + 2 + 1 + 2 + (1 + 1 + 1 + 2 + 2 + 2 + 2 + 2)
    assert count_paths(edges) == 5 + 16 + 2 + 2


@pytest.mark.parametrize("fold", [False, True])
def test_nodes_are_in_the_models_order(mbert, tmp_path, fold):
    mbert.draw(tmp_path / "a.svg", "hsaid-3", fold=fold)
    places = {}
    for group in ElementTree.parse(tmp_path / "a.svg").iter(f"{SVG}g"):
        if group.get("class") == "node":
            text = group.find(f".//{SVG}text")
            places[group.find(f"{SVG}title").text] = float(text.get("x")), float(text.get("y"))
    heads, columns = [], []
    for level in mbert.levels:
        column = [f"{level}:{name}" for name in mbert.nodes(level) if f"{level}:{name}" in places]
        assert len(column) == len([name for name in places if name.startswith(f"{level}:")])
        heights = [places[name][1] for name in (level, *column)]
        assert heights == sorted(set(heights))  # from top to bottom
        heads.append(heights[0])
        columns.append(places[column[0]][0])
    assert len(set(heads)) == 1
    assert columns == sorted(set(columns))  # from left to right


CUT = {  # partition -> the levels at both ends of the edges that are not cut
    None: ["L1L2", "L1L3", "L1L4", "L2L3", "L3L4"],
    "did": ["L1L2", "L1L3", "L1L4", "L2L3", "L3L4"],
    "said": ["L1L2", "L1L3", "L1L4", "L2L3", "L3L4"],
    "hsaid-3": ["L1L2"],
    "L1+L3|L2|L4": ["L1L3"],
    "L1+L4|L2|L3": ["L1L4"],
    "L1|L2|L3|L4": [],
    "L1|L4": ["L2L3"],
}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("spec", CUT)
def test_cut_edges_are_dashed(mbert, spec, fold):
    _, edges = parsed(mbert.to_dot(spec, fold=fold))
    solid = {tail[:2] + head[:2] for (tail, head), look in edges.items() if look["style"] != "dashed"}
    dashed = {tail[:2] + head[:2] for (tail, head), look in edges.items() if look["style"] == "dashed"}
    assert sorted(solid) == CUT[spec]
    assert not solid & dashed
    assert solid | dashed == set(CUT[None])
    assert ("dashed: cut" in mbert.to_dot(spec, fold=fold)) == bool(dashed)


def test_components_have_their_colors_and_counts(mbert, tmp_path):
    nodes, _ = parsed(mbert.to_dot("L1+L2|L4"))
    by_level = {
        level: {look["fillcolor"] for name, look in nodes.items() if name[:2] == level} for level in mbert.levels
    }
    assert by_level == {"L1": {graph.COLORS[0]}, "L2": {graph.COLORS[0]}, "L3": {"white"}, "L4": {graph.COLORS[1]}}
    plain, _ = parsed(mbert.to_dot())
    assert {look["fillcolor"] for look in plain.values()} <= {"white", ""}
    mbert.draw(tmp_path / "a.svg", mbert.partition("hsaid-3"))
    said = texts(ElementTree.parse(tmp_path / "a.svg").getroot())
    expected = ["201 tensors, 201 paths, 177,854,978 weights", "L1+L2: 39", "L3: 8", "L4: 2", "→ 49 multipliers"]
    assert [text for text in said if text in expected] == expected


def test_skipped_and_merged_nodes():
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=2))
    hierarchy = Hierarchy.from_model(model, skip=["L2:output"], merge={"mix": ["attention", "intermediate"]})
    nodes, edges = parsed(hierarchy.to_dot())
    assert [name for name in nodes if name[:2] == "L2"] == ["L2:mix"]
    assert ("L1:layer.0", "L3:dense") in edges
    assert graph.Graph.of(hierarchy).num_paths == len(set(hierarchy.paths)) == 41 - 2 * 2


def test_t5_folds_but_for_the_first_blocks():
    nodes, _ = parsed(hierarchy_of("T5ForConditionalGeneration", num_layers=4).to_dot())
    assert [look["label"] for name, look in nodes.items() if name[:2] == "L1"] == [
        "shared",
        "encoder.block.0",
        "encoder.block.1 … encoder.block.3  × 3",
        "encoder.final_layer_norm",
        "decoder.block.0",
        "decoder.block.1 … decoder.block.3  × 3",
        "decoder.final_layer_norm",
    ]


def test_only_neighbours_that_are_the_same_fold():
    def labels(hierarchy: Hierarchy, level: str) -> list[str]:
        return [look["label"] for name, look in parsed(hierarchy.to_dot())[0].items() if name[:2] == level]

    wide, narrow = (lambda: nn.Linear(2, 2)), (lambda: nn.Linear(2, 1))
    assert labels(blocks(wide(), wide(), narrow()), "L1") == ["layers.0 … layers.1  × 2", "layers.2"]
    assert labels(blocks(wide(), narrow(), wide()), "L1") == ["layers.0", "layers.1", "layers.2"]
    assert labels(blocks(wide(), nn.Linear(2, 2, bias=False)), "L1") == ["layers.0", "layers.1"]
    same_but_no_numbers = nn.ModuleDict({"a": wide(), "b": wide()})
    assert labels(blocks(same_but_no_numbers), "L3") == ["a", "b"]
    apart = blocks(nn.ModuleDict({"a": nn.Sequential(wide())}), nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), wide())}))
    assert labels(apart, "L3") == ["a.0", "a.1"]  # the one in layers.0, the other in layers.1
    experts = nn.ModuleList(nn.ModuleDict({"up": wide(), "down": wide()}) for _ in range(3))
    mixtures = blocks(*(nn.ModuleDict({"gate": wide(), "experts": experts}) for _ in range(2)))
    assert labels(mixtures, "L2") == ["experts.0 … experts.2  × 3"]


def expected_multipliers(partition) -> dict[str, int]:
    """Node -> number of the multiplier: the node is where the path of the multiplier ends."""
    numbers = {}
    for component in partition.components:
        for path in component.paths:
            end = max(at for at, name in enumerate(path) if name is not None)
            numbers[f"{component.levels[end]}:{'/'.join(name or '' for name in path[: end + 1])}"] = len(numbers)
    return numbers


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["mbert", "llama"])
def test_every_multiplier_has_its_node(request, name, spec):
    hierarchy = request.getfixturevalue(name)
    partition = hierarchy.partition(spec)
    values = [0.5 + number / 256 for number in range(partition.num_multipliers)]
    nodes, edges = parsed(hierarchy.to_dot(partition, multipliers=torch.tensor(values)))
    numbers = expected_multipliers(partition)
    assert len(numbers) == partition.num_multipliers
    shown = {node: look["label"].split("  ")[1] for node, look in nodes.items() if "  " in look["label"]}
    assert shown == {node: f"{values[number]:.3f}" for node, number in numbers.items()}
    assert {look["fillcolor"] for node, look in nodes.items() if node not in numbers} <= {"white"}
    if spec == "said":  # a tree for every block
        assert max(Counter(head for _, head in edges).values()) == 1
        assert count_paths(edges) == len(hierarchy.tensors)
    component_of = {level: component for component in partition.components for level in component.levels}
    cut = {edge for edge in edges if component_of.get(edge[0][:2]) != component_of.get(edge[1][:2])}
    assert cut == {edge for edge, look in edges.items() if look["style"] == "dashed"}


def test_multipliers_are_blue_below_1_and_red_above(mbert):
    partition = mbert.partition("L3|L4")
    values = torch.ones(partition.num_multipliers)
    values[0], values[1], values[2] = 0.9, 1.2, 1.1
    nodes, _ = parsed(mbert.to_dot(partition, multipliers=values))
    colors = {name: look["fillcolor"] for name, look in nodes.items() if name[:2] in ("L3", "L4")}

    def between(end: tuple, part: float) -> str:
        return "#" + "".join(f"{round(255 + part * (channel - 255)):02X}" for channel in end)

    word, position, token, *others = (f"L3:{name}" for name in mbert.nodes("L3"))
    assert colors.pop(word) == between(graph.BELOW, 0.5)  # half as far from 1 as the largest change
    assert colors.pop(position) == between(graph.ABOVE, 1)
    assert colors.pop(token) == between(graph.ABOVE, 0.5)
    assert set(colors.values()) == {"#FFFFFF"} and len(colors) == len(others) + 2
    assert graph.BELOW[2] > graph.BELOW[0] and graph.ABOVE[0] > graph.ABOVE[2]
    scale = re.findall(r"BGCOLOR='(#\w+)'>([\d.]+)<", mbert.to_dot(partition, multipliers=values))
    assert [text for _, text in scale] == ["0.800", "0.900", "1.000", "1.100", "1.200"]
    assert [color for color, _ in scale] == [
        between(graph.BELOW, 1),
        between(graph.BELOW, 0.5),
        "#FFFFFF",
        between(graph.ABOVE, 0.5),
        between(graph.ABOVE, 1),
    ]


def test_untrained_multipliers_are_white(mbert):
    nodes, _ = parsed(mbert.to_dot("said", multipliers=[1.0] * 201))
    assert {look["fillcolor"] for look in nodes.values()} == {"white", "#FFFFFF"}


def test_small_changes_keep_two_digits():
    hierarchy = Hierarchy.from_model(mlp())
    nodes, _ = parsed(hierarchy.to_dot("L4", multipliers=[1.000123, 0.99995]))
    assert [nodes[name]["label"] for name in ("L4:weight", "L4:bias")] == ["weight  1.00012", "bias  0.99995"]


def test_black_is_readable_on_every_color():
    """WCAG's contrast of at least 4.5."""

    def luminance(color: tuple) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in color)]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    components = [tuple(bytes.fromhex(color[1:])) for color in graph.COLORS]
    for color in [graph.BELOW, graph.ABOVE, *components]:
        assert (luminance(color) + 0.05) / 0.05 >= 4.5


def test_trained_nodes_fold_only_where_multipliers_are_equal(mbert):
    partition = mbert.partition("hsaid-3")
    values = partition.initial()
    nodes, _ = parsed(mbert.to_dot(partition, fold=True, multipliers=values))
    assert [look["label"] for name, look in nodes.items() if name[:2] == "L1"] == [
        "embeddings  1.000",
        "layer.0 … layer.11  × 12",
        "pooler  1.000",
        "classifier  1.000",
    ]
    values[partition.components[0].paths.index(("layer.5", "intermediate"))] = 2
    nodes, _ = parsed(mbert.to_dot(partition, fold=True, multipliers=values))
    assert [name for name in nodes if name[:2] == "L1"] == [
        *("L1:embeddings", "L1:layer.0", "L1:layer.5", "L1:layer.6", "L1:pooler", "L1:classifier")
    ]
    assert nodes["L2:layer.5/intermediate"]["label"] == "intermediate  2.000"
    assert nodes["L2:layer.6/intermediate"]["label"] == "intermediate  1.000"
    assert len(parsed(mbert.to_dot(partition, multipliers=values))[0]) == 15 + 36 + 8 + 2


STRANGE = [
    '"',
    "\\",
    '\\"',
    "\\N",
    "a/b",
    "a&amp;b",
    "<b>",
    "]]>",
    "é … 層",
    "x -> y",
    "a\nb",
    "L3",
    "{}|;",
    "--",
    "%s {}",
]


@pytest.mark.parametrize("multipliers", [False, True])
def test_strange_names(tmp_path, multipliers):
    children = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in STRANGE})
    hierarchy = blocks(children)
    values = torch.linspace(0.5, 1.5, len(STRANGE)) if multipliers else None
    for suffix in graph.FORMATS:
        hierarchy.draw(tmp_path / f"a{suffix}", "L1+L2+L3", multipliers=values)
    labels = [name.replace("\n", "\\n") for name in STRANGE]
    svg = ElementTree.parse(tmp_path / "a.svg").getroot()
    groups = [group for group in svg.iter(f"{SVG}g") if group.get("class") == "node"]
    titles = [group.find(f"{SVG}title").text for group in groups]
    assert len(set(titles)) == len(titles) == 4 + 1 + len(STRANGE) + 1
    shown = [texts(group)[0] for group, title in zip(groups, titles) if title.startswith("L3:")]
    assert [text.replace("\xa0", " ").split("  ")[0] for text in shown] == labels
    nodes, edges = parsed((tmp_path / "a.dot").read_text(encoding="utf-8"))
    assert (len(nodes), len(edges)) == (len(STRANGE) + 2, 2 * len(STRANGE))


def test_names_that_join_to_the_same():
    """The first name and what is under it are told apart, wherever there is a slash."""
    model = nn.Module()
    for name, child in {"a/b": "c", "a": "b/c"}.items():
        model.add_module(name, nn.ModuleDict({child: nn.Linear(1, 1, bias=False)}))
    hierarchy = Hierarchy.from_model(model)
    nodes, _ = parsed(hierarchy.to_dot("L1+L3|L4", multipliers=[0.5, 1.5, 1.0]))
    assert len(nodes) == 5


def test_formats(mbert, tmp_path, capfd):
    for suffix in (".svg", ".png", ".dot", ".html", ".SVG"):
        mbert.draw(tmp_path / f"a{suffix}", "hsaid-3")
    assert capfd.readouterr() == ("", "")
    svg = (tmp_path / "a.svg").read_bytes()
    assert svg == (tmp_path / "a.SVG").read_bytes()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert "layer.0 … layer.11  × 12" in [text.replace("\xa0", " ") for text in texts(root)]
    titles = {link.get("{http://www.w3.org/1999/xlink}title") for link in root.iter(f"{SVG}a")}
    assert {"L2 attention: 120 tensors", "L1 classifier: 2 tensors", "L3:dense -> L4:bias"} <= titles
    png = (tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png[12:16] == b"IHDR" and b"IEND" in png[-12:]
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert 700 < width < 1500 and 300 < height < 900
    assert (tmp_path / "a.dot").read_text(encoding="utf-8") == mbert.to_dot("hsaid-3")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "<title>201 tensors, 201 paths, 177,854,978 weights</title>" in page
    inside = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    assert ElementTree.tostring(ElementTree.fromstring(inside)) == ElementTree.tostring(root)
    assert not re.search(r"(src|href)=", html.unescape(page).replace("xlink:title", ""))


def test_dot_needs_no_library(mbert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    mbert.draw(tmp_path / "a.dot")
    for suffix in (".svg", ".png", ".html"):
        with pytest.raises(ImportError, match=r'pip install "hsaid_kernels\[graph\]"'):
            mbert.draw(tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.dot"]


def test_same_bytes_for_every_seed_of_hashes(tmp_path):
    code = """if True:
        import sys, torch
        from torch import nn
        from hsaid_kernels.hierarchy.hierarchy import Hierarchy
        items = [nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcde"}) for _ in range(3)]
        hierarchy = Hierarchy.from_model(nn.ModuleList(items))
        hierarchy.draw(sys.argv[1], "hsaid-3")
    """
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, tmp_path / f"{seed}.svg"], check=True, env=environment)
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_heads():
    """Shared by all layers, a head is one node; in a component with its block, a node for each block, by both names."""
    model = bert(num_hidden_layers=2, num_attention_heads=2)
    hierarchy = Hierarchy.from_model(model, heads=True)
    assert "head.0 … head.1  × 2" in hierarchy.to_dot()
    for spec, labels in (
        ("L1+L2|L3|L4|L5", ["head.0  1.000", "head.1  1.000"]),
        ("L1+L5|L3|L4", [f"layer.{layer} head.{head}  1.000" for layer in (0, 1) for head in (0, 1)]),
    ):
        partition = hierarchy.partition(spec)
        text = hierarchy.to_dot(partition, multipliers=partition.initial())
        assert re.findall(r'label="(.*head.*)", tooltip', text) == labels


def test_pictures_of_the_docs(tmp_path):
    """Nodes, edges and texts; where they are depends on the fonts at hand."""
    subprocess.run([sys.executable, DOCS / "graphs.py", tmp_path], check=True)

    def content(path: Path) -> Counter:
        root = ElementTree.parse(path).getroot()
        return Counter(title.text for title in root.iter(f"{SVG}title")) + Counter(texts(root))

    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["heads.svg", "llama.svg", "mbert.svg", "t5.svg", "xlm-r.svg"]
    for name in made:
        assert content(tmp_path / name) == content(DOCS / "graphs" / name)


@pytest.mark.parametrize("name", ["a", "a.pdf", "a.svg.gz", ".svg"])
def test_unknown_suffix(mbert, tmp_path, name):
    with pytest.raises(
        ValueError, match=re.escape("path: expected a name that ends in .svg, .png, .dot or .html, got")
    ):
        mbert.draw(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_was_there(mbert, tmp_path, monkeypatch):
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "old.svg").write_text("old")
    with pytest.raises(FileNotFoundError, match="path: expected a file that can be written, got '.*no/a.svg': No such"):
        mbert.draw(tmp_path / "no" / "a.svg")
    with pytest.raises(IsADirectoryError, match="path: expected a file that can be written, got '.*folder.svg': Is a"):
        mbert.draw(tmp_path / "folder.svg")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="path: expected a file that can be written, got '.*old.svg': No space left"):
            mbert.draw(tmp_path / "old.svg")
    monkeypatch.setattr(graph, "LAYOUT", "import sys; sys.exit('out of ink')")
    with pytest.raises(RuntimeError, match="Graphviz could not lay the graph out: out of ink"):
        mbert.draw(tmp_path / "old.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.svg", "old.svg"]
    assert (tmp_path / "old.svg").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"partition": "L1+L9"}, ValueError, "with unknown 'L9'"),
        ({"partition": 3}, TypeError, "partition: expected a Partition or a string like 'L1+L2|L3|L4', got 3"),
        (
            {"partition": "other"},
            ValueError,
            "partition: expected one of this hierarchy's, got another's: L4: 2 -> 2 m",
        ),
        ({"multipliers": [1.0]}, ValueError, "partition: expected the one that the multipliers belong to, got None"),
        ({"partition": "L4", "multipliers": [1.0]}, ValueError, "multipliers: expected 2 finite numbers, got 1"),
        (
            {"partition": "L4", "multipliers": torch.tensor([1.0, torch.inf])},
            ValueError,
            "multipliers: expected 2 finite numbers, got one that is inf",
        ),
    ],
)
def test_bad_arguments(mbert, tmp_path, arguments, error, message):
    if arguments.get("partition") == "other":
        arguments = {"partition": Hierarchy.from_model(mlp()).partition("L4")}
    with pytest.raises(error, match=re.escape(message)):
        mbert.to_dot(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        mbert.draw(tmp_path / "a.dot", **arguments)
    assert not list(tmp_path.iterdir())


def test_everything_skipped(tmp_path):
    hierarchy = Hierarchy.from_model(nn.Linear(2, 2), skip=["weight", "bias"])
    hierarchy.draw(tmp_path / "a.svg", "L4")
    assert "2 tensors, 1 paths, 6 weights" in texts(ElementTree.parse(tmp_path / "a.svg").getroot())
