"""A real ComfyUI for development: as a server, or in this process."""
