"""Distilled T5 for ComfyUI: small text encoders in the place of T5-XXL.

ComfyUI imports this file by path. It holds a lazy entry point and nothing else, so that starting ComfyUI costs nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"

# pytest imports the root of a repository without a package; ComfyUI and the trainer always give one.
if __package__:
    WEB_DIRECTORY = "./web"

    async def comfy_entrypoint():  # noqa: ANN201 (naming the type would import it)
        """Return the extension with this pack's nodes (ComfyUI's V3 node API)."""
        import comfyui_version

        from .runtime.comfyui import refuse_old_comfyui

        refuse_old_comfyui(comfyui_version.__version__)
        from .nodes import DistilledT5Extension

        return DistilledT5Extension()
