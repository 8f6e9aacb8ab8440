"""The subcommands of `ldmkit`: each is a module with `add_arguments(parser)` and `run(args)`; importing one loads no torch."""
