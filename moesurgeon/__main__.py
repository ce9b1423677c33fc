"""``python -m moesurgeon``: the same as the script, for launchers that want a module."""

from moesurgeon.cli import main

if __name__ == "__main__":
    main()
