"""Workflows as the browser saves them (version 0.4), turned into prompts for ComfyUI's HTTP API."""

from typing import Any

Json = dict[str, Any]

WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
SEED_NAMES = frozenset({"seed", "noise_seed"})
NOTE_TYPES = frozenset({"Note", "MarkdownNote"})
MUTED, BYPASSED = 2, 4


def to_api_prompt(workflow: Json, object_info: Json) -> Json:
    """The API prompt of a saved workflow; `object_info` is the server's answer to /object_info.

    Notes and muted nodes are left out. ValueError for a node type that the server does not have, for a bypassed node, and for a number of
    saved widget values that differs from the node's.
    """
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in NOTE_TYPES and node.get("mode", 0) != MUTED}
    for node in nodes.values():
        _check_node(node, object_info)
    return {str(node_id): _api_node(node, object_info[node["type"]], links, nodes) for node_id, node in nodes.items()}


def set_inputs(prompt: Json, class_type: str, **values: Any) -> None:
    """Set inputs, in place, on every node of a class in an API prompt; ValueError if there is no such node or input."""
    matching = [node for node in prompt.values() if node["class_type"] == class_type]
    if not matching:
        raise ValueError(f"no {class_type} in the prompt: it has {', '.join(sorted({node['class_type'] for node in prompt.values()}))}")
    for node in matching:
        unknown = [name for name in values if name not in node["inputs"]]
        if unknown:
            raise ValueError(f"{class_type} has no input {', '.join(unknown)}: expected one of {', '.join(node['inputs'])}")
        node["inputs"].update(values)


def widget_names(node_info: Json) -> list[str | None]:
    """The input of each entry of a node's `widgets_values`, in order; None for entries that only the browser uses."""
    names: list[str | None] = []
    for name, spec in _inputs_of(node_info):
        if _is_widget(spec):
            names += [name, *[None] * _browser_widgets(name, spec)]
    return names


def _check_node(node: Json, object_info: Json) -> None:
    where = f"node {node['id']} ({node['type']})"
    if node["type"] not in object_info:
        raise ValueError(f"{where}: the server has no such node type. What to do: install the pack it comes from.")
    if node.get("mode", 0) == BYPASSED:
        raise ValueError(f"{where} is bypassed, which an API prompt cannot express. What to do: remove or mute it.")


def _inputs_of(node_info: Json) -> list[tuple[str, list[Any]]]:
    groups = [node_info["input"].get(group, {}) for group in ("required", "optional")]
    return [(name, spec) for group in groups for name, spec in group.items()]


def _is_widget(spec: list[Any]) -> bool:
    is_value = isinstance(spec[0], list) or spec[0] in WIDGET_TYPES
    return is_value and not _options(spec).get("forceInput")


def _options(spec: list[Any]) -> Json:
    return spec[1] if len(spec) > 1 else {}


def _browser_widgets(name: str, spec: list[Any]) -> int:
    """How many widgets the browser adds after this one: "control after generate" of a seed, the upload button of an image."""
    options = _options(spec)
    is_seed = spec[0] == "INT" and name in SEED_NAMES
    return int(bool(options.get("control_after_generate", is_seed))) + int(bool(options.get("image_upload")))


def _api_node(node: Json, node_info: Json, links: dict[int, list[Any]], nodes: dict[int, Json]) -> Json:
    inputs = {name: value for name, value in zip(widget_names(node_info), _widget_values(node, node_info), strict=True) if name is not None}
    for slot in node.get("inputs", []):
        link = links.get(slot["link"]) if slot.get("link") is not None else None
        if link is not None and link[1] in nodes:
            inputs[slot["name"]] = [str(link[1]), link[2]]
    title = node.get("title") or node_info.get("display_name") or node["type"]
    return {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}


def _widget_values(node: Json, node_info: Json) -> list[Any]:
    values, names = node.get("widgets_values", []), widget_names(node_info)
    if len(values) != len(names):
        expected = ", ".join(name or "(browser only)" for name in names)
        raise ValueError(f"node {node['id']} ({node['type']}) saves {len(values)} widget values: expected {len(names)}: {expected}")
    return values
