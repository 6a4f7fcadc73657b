"""The `m2mkd` command; each module holds one subcommand and is imported when it is used."""
