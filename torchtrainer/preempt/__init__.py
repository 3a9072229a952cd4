"""Advance warnings that this machine or job will be taken away, whatever they come from, as one value."""
