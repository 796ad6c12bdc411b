"""What every command shares: finding and starting ComfyUI, ranks, stop, disk, locks, logging, randomness."""
