"""The headless trainer: step-following distillation (arXiv:2503.19897) on ComfyUI's own model management. Importing it does nothing."""
