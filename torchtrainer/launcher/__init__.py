"""The command line: ``torchtrainer`` and its subcommands. Nothing here imports torch."""
