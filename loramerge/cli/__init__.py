"""The command line: thin, one module a command, over the verbs of the library."""
