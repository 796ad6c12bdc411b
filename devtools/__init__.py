"""What development needs around the pack: a real ComfyUI server, stand-in models, example workflows. Not in the registry archive."""
