"""`python -m gka`: the command `gka`."""

from gka.cli import main

if __name__ == "__main__":
    main()
