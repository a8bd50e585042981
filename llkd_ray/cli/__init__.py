"""The program ``llkd``: its subcommands, exit statuses and messages."""
