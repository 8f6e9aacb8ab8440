"""The subcommands of `ldmkit`: each module has `add_arguments(parser)`, imported without torch, and `run(args) -> exit code`."""
