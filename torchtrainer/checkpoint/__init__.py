"""Checkpoints: write the state of a run to disk, verify it there, and find it again."""
