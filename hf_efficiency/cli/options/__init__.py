"""What each command takes: one module a command, with its `SUMMARY` and `add_arguments(parser)`, and nothing heavy."""
