"""For development: the commands behind dev.py, a real ComfyUI server, stand-in models. Not in the registry archive."""
