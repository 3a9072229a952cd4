"""Decides what the workers do, from the user's process. Never imports torch."""
