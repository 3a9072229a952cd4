"""What `torchtrainer.session` gives scripts with a loop of their own: stopping together, checkpoints, and resumable loaders."""
