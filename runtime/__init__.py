"""What the commands share: ComfyUI in this process, ranks, signals, atomic writes, locks, logging, random states."""
