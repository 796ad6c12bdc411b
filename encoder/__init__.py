"""The student: the one place that knows its tensors.

`layout`, `dialects`, `metadata`, `foreign` and `files` need torch and safetensors only. `served` is the half that runs inside ComfyUI,
`student` the half that is trained (transformers). Nothing is imported here: whoever wants a half names it.
"""
