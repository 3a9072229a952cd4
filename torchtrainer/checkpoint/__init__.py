"""Checkpoints: how the state of a run comes to the disk, is verified there, and is found again."""
