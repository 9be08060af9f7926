"""`python -m gka`: the command `gka`."""

from gka.commands.main import main

if __name__ == "__main__":
    main()
