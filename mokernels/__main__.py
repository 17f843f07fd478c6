"""``python -m mokernels``: the command line."""

from mokernels.cli import main

if __name__ == "__main__":
    main()
