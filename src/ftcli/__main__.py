"""`python -m ftcli`, where the command is not on the path."""

from __future__ import annotations

from ftcli.cli.main import main

if __name__ == "__main__":
    main()
