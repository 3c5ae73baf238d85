"""The training loop behind the command line: options, checkpoints, metrics, the run directory."""
