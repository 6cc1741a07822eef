"""``python -m mimogrid``: the command line."""

from mimogrid.shell.cli.main import main


if __name__ == "__main__":
    raise SystemExit(main())
