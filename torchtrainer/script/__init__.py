"""What a worker takes over from the script that made the trainer, so that user code runs there as it does in the script."""
