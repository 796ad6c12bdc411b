"""Encoder files in and out, and the CLIP made of them.

`served`, `clip_l` and `teacher` run inside ComfyUI; the other modules need torch and safetensors at most. Nothing is imported here.
"""
