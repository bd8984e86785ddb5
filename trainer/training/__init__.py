"""One run: its loop, checkpoints, manifest and files."""
