"""ComfyUI's two renderers of graphs: the canvas and Nodes 2.0."""

from __future__ import annotations

import pytest

# In the default run a test of one renderer is enough: both run the same code of ours.
ONE_ON_THE_CANVAS = [pytest.param(False, id="canvas"), pytest.param(True, id="nodes-2", marks=pytest.mark.full)]
ONE_IN_NODES_2 = [pytest.param(False, id="canvas", marks=pytest.mark.full), pytest.param(True, id="nodes-2")]
