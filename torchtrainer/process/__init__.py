"""The operating system: processes, logs, error files, signals. Standard library only."""
