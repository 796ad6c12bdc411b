"""Draws workflows in the format that the browser saves (version 0.4): nodes in columns, links by name, coloured groups, notes."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Port = tuple[int, str]  # node id, name of its output

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/distilled-t5/distilled-t5")
TITLE_PX, NODE_GAP_PX, GROUP_PAD_PX, GROUP_TITLE_PX = 30, 30, 20, 45
COLOURS = {"models": "#3f789e", "prompt": "#8A8", "control": "#b58b2a", "sampling": "#a1309b", "picture": "#b06634"}


@dataclass(frozen=True)
class Slot:
    """An input, an output or a widget of a node type."""

    name: str
    type: str
    optional: bool = False


@dataclass(frozen=True)
class Kind:
    """What the browser knows of a node type: sockets, widgets and outputs, in its order; the pack it comes from."""

    sockets: tuple[Slot, ...]
    widgets: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    pack: str = "comfy-core"
    version: str = "0.16.3"


def kind(sockets: str, widgets: str, outputs: str, **origin: str) -> Kind:
    """A Kind from words such as `model:MODEL`; a question mark behind the type marks an optional input."""
    return Kind(_slots(sockets), _slots(widgets), _slots(outputs), **origin)


def _slots(words: str) -> tuple[Slot, ...]:
    pairs = [word.split(":") for word in words.split()]
    return tuple(Slot(name, type_name.removesuffix("?"), type_name.endswith("?")) for name, type_name in pairs)


def stable_uuid(name: str) -> str:
    """The same UUID for the same name, on every machine."""
    return str(uuid.uuid5(NAMESPACE, name))


@dataclass
class Canvas:
    """A workflow in the making; `name` is the file's and decides the workflow's id."""

    name: str
    kinds: Mapping[str, Kind]
    nodes: list[Json] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[Json] = field(default_factory=list)

    def node(self, type_name: str, rect: Sequence[int], widgets: Sequence[Any], inputs: Mapping[str, Port], **extra: Any) -> int:
        """Add a node at `rect` (left, top, width, height); returns its id. `extra`: title, models, color, bgcolor."""
        made, node_id = self.kinds[type_name], len(self.nodes) + 1
        properties: Json = {"cnr_id": made.pack, "ver": made.version, "Node name for S&R": type_name}
        if extra.get("models"):
            properties["models"] = list(extra.pop("models"))
        self.nodes.append(
            {"id": node_id, "type": type_name, "pos": list(rect[:2]), "size": list(rect[2:]), "flags": {}, "order": node_id - 1, "mode": 0}
            | {
                "inputs": [_input(slot, slot in made.widgets) for slot in (*made.sockets, *made.widgets)],
                "outputs": [_output(slot) for slot in made.outputs],
            }
            | {"properties": properties, "widgets_values": list(widgets)}
            | {key: value for key, value in extra.items() if value}
        )
        for name, port in inputs.items():
            self._link(port, node_id, name)
        return node_id

    def note(self, rect: Sequence[int], title: str, text: str) -> int:
        """Add a note in Markdown."""
        node_id = len(self.nodes) + 1
        properties = {"cnr_id": "comfy-core", "ver": "0.16.3"}
        self.nodes.append(
            {
                "id": node_id,
                "type": "MarkdownNote",
                "pos": list(rect[:2]),
                "size": list(rect[2:]),
                "flags": {},
                "order": node_id - 1,
                "mode": 0,
            }
            | {"inputs": [], "outputs": [], "properties": properties, "widgets_values": [text.strip()]}
            | {"title": title, "color": "#222", "bgcolor": "#000"}
        )
        return node_id

    def group(self, title: str, colour: str, node_ids: Sequence[int]) -> None:
        """Add a coloured group around nodes."""
        rects = [(*node["pos"], *node["size"]) for node in self.nodes if node["id"] in node_ids]
        left, top = min(rect[0] for rect in rects) - GROUP_PAD_PX, min(rect[1] for rect in rects) - TITLE_PX - GROUP_TITLE_PX
        right, bottom = max(rect[0] + rect[2] for rect in rects) + GROUP_PAD_PX, max(rect[1] + rect[3] for rect in rects) + GROUP_PAD_PX
        bounding = [left, top, right - left, bottom - top]
        self.groups.append(
            {"id": len(self.groups) + 1, "title": title, "bounding": bounding, "color": COLOURS[colour], "font_size": 24, "flags": {}}
        )

    def _link(self, port: Port, target_id: int, input_name: str) -> None:
        origin = self.nodes[port[0] - 1]
        origin_slot = next(index for index, slot in enumerate(origin["outputs"]) if slot["name"] == port[1])
        target_slot, target = next((i, s) for i, s in enumerate(self.nodes[target_id - 1]["inputs"]) if s["name"] == input_name)
        link_id = len(self.links) + 1
        self.links.append([link_id, port[0], origin_slot, target_id, target_slot, target["type"]])
        origin["outputs"][origin_slot]["links"].append(link_id)
        target["link"] = link_id

    def to_json(self, **extra: Any) -> Json:
        """The workflow as the browser saves it; `extra` goes into its field of that name."""
        view = {"ds": {"scale": 0.55, "offset": [620, 200]}, "frontendVersion": "1.47.12", "workflowRendererVersion": "LG"}
        return {
            "id": stable_uuid(self.name),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": view | extra,
            "version": 0.4,
        }


@dataclass
class Column:
    """Stacks nodes of one width from top to bottom."""

    canvas: Canvas
    left: int
    width: int
    top: int = 0

    def add(self, type_name: str, height: int, *widgets: Any, inputs: Mapping[str, Port] | None = None, **extra: Any) -> int:
        """Add a node below the last one."""
        rect = (self.left, self.top, self.width, height)
        self.top += height + TITLE_PX + NODE_GAP_PX
        return self.canvas.node(type_name, rect, widgets, inputs or {}, **extra)

    def note(self, height: int, title: str, text: str) -> int:
        """Add a note below the last node."""
        rect = (self.left, self.top, self.width, height)
        self.top += height + TITLE_PX + NODE_GAP_PX
        return self.canvas.note(rect, title, text)

    def new_group(self) -> None:
        """Leave room for the frame of the group above and the title of the next."""
        self.top += 2 * GROUP_PAD_PX + GROUP_TITLE_PX - NODE_GAP_PX


def _input(slot: Slot, is_widget: bool) -> Json:
    made: Json = {"name": slot.name, "type": slot.type, "link": None}
    if is_widget:
        made["widget"] = {"name": slot.name}
    return made | ({"shape": 7} if slot.optional else {})


def _output(slot: Slot) -> Json:
    return {"name": slot.name, "type": slot.type, "links": []}
