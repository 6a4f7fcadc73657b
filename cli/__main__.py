"""Runs the command line as `python -m m2mkd.cli`."""

from m2mkd.cli.main import main

if __name__ == "__main__":
    main(prog_name="m2mkd")
