"""Wraps a canvas as a blueprint: a workflow of one node that is a subgraph, which the node library offers under the file's name."""

from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import Canvas, Json, Port, stable_uuid

INPUT_NODE, OUTPUT_NODE = -10, -20  # ids by which the browser knows a subgraph's borders
LINK_FIELDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
BORDER_WIDTH_PX, SLOT_PX, MARGIN_PX = 120, 20, 200
OUR_DESCRIPTION = "Loads a distilled T5 and encodes a prompt for Flux: positive and empty negative conditioning."


def wrap(canvas: Canvas, exposed: Sequence[tuple[int, str]], given: Mapping[str, Port]) -> Json:
    """The blueprint of a canvas: `exposed` widgets (node id, name) become its inputs, `given` names its outputs."""
    links: list[Json] = [dict(zip(LINK_FIELDS, link, strict=True)) for link in canvas.links]
    inputs = [_expose(canvas, links, slot, node_id, name) for slot, (node_id, name) in enumerate(exposed)]
    outputs = [_give(canvas, links, slot, name, port) for slot, (name, port) in enumerate(given.items())]
    inner = _definition(canvas, links, inputs, outputs)
    return {
        "id": stable_uuid(f"blueprint {canvas.name}"),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_outer_node(canvas, inner["id"], exposed, inputs, outputs)],
        "links": [],
        "groups": [],
        "config": {},
        "definitions": {"subgraphs": [inner]},
        "extra": {"workflowRendererVersion": "LG", "BlueprintDescription": OUR_DESCRIPTION},
        "version": 0.4,
    }


def _expose(canvas: Canvas, links: list[Json], slot: int, node_id: int, name: str) -> Json:
    target_slot, target = next((i, s) for i, s in enumerate(canvas.nodes[node_id - 1]["inputs"]) if s["name"] == name)
    target["link"] = _add_link(links, (INPUT_NODE, slot), (node_id, target_slot), target["type"])
    return _border_slot(canvas, "input", slot, name, target["type"], target["link"])


def _give(canvas: Canvas, links: list[Json], slot: int, name: str, port: Port) -> Json:
    outputs = canvas.nodes[port[0] - 1]["outputs"]
    origin_slot, origin = next((i, s) for i, s in enumerate(outputs) if s["name"] == port[1])
    origin["links"].append(_add_link(links, (port[0], origin_slot), (OUTPUT_NODE, slot), origin["type"]))
    return _border_slot(canvas, "output", slot, name, origin["type"], origin["links"][-1])


def _add_link(links: list[Json], origin: tuple[int, int], target: tuple[int, int], type_name: str) -> int:
    link_id = len(links) + 1
    ends = {"origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0], "target_slot": target[1]}
    links.append({"id": link_id} | ends | {"type": type_name})
    return link_id


def _border_slot(canvas: Canvas, side: str, slot: int, name: str, type_name: str, link_id: int) -> Json:
    left = _left_border(canvas) if side == "input" else _right_border(canvas)
    return {
        "id": stable_uuid(f"{canvas.name} {side} {name}"),
        "name": name,
        "type": type_name,
        "linkIds": [link_id],
        "pos": [left + BORDER_WIDTH_PX / 2, SLOT_PX * (slot + 1)],
    }


def _left_border(canvas: Canvas) -> int:
    return min(node["pos"][0] for node in canvas.nodes) - MARGIN_PX


def _right_border(canvas: Canvas) -> int:
    return max(node["pos"][0] + node["size"][0] for node in canvas.nodes) + MARGIN_PX - BORDER_WIDTH_PX


def _definition(canvas: Canvas, links: list[Json], inputs: list[Json], outputs: list[Json]) -> Json:
    def border(node_id: int, left: int, slots: list[Json]) -> Json:
        return {"id": node_id, "bounding": [left, 0, BORDER_WIDTH_PX, SLOT_PX * (len(slots) + 2)]}

    return {
        "id": stable_uuid(f"subgraph {canvas.name}"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(canvas.nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": canvas.name,
        "inputNode": border(INPUT_NODE, _left_border(canvas), inputs),
        "outputNode": border(OUTPUT_NODE, _right_border(canvas), outputs),
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": canvas.nodes,
        "groups": [],
        "links": links,
        "extra": {"workflowRendererVersion": "LG"},
        "category": "Distilled T5",
        "description": OUR_DESCRIPTION,
    }


def _outer_node(canvas: Canvas, type_id: str, exposed: Sequence[tuple[int, str]], inputs: list[Json], outputs: list[Json]) -> Json:
    sockets: list[dict[str, Any]] = [
        {"name": slot["name"], "type": slot["type"], "widget": {"name": slot["name"]}, "link": None} for slot in inputs
    ]
    ours = next(node["properties"] for node in canvas.nodes if node["type"].startswith("DistilledT5"))
    return {
        "id": 1,
        "type": type_id,
        "pos": [0, 0],
        "size": [400, 360],
        "flags": {},
        "order": 0,
        "mode": 0,
        "title": canvas.name,
        "inputs": sockets,
        "outputs": [{"name": slot["name"], "type": slot["type"], "links": []} for slot in outputs],
        "properties": {"proxyWidgets": [[str(node_id), name] for node_id, name in exposed], "cnr_id": ours["cnr_id"], "ver": ours["ver"]},
        "widgets_values": [],
    }
