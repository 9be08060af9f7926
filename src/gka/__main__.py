"""Run the command `gka` as `python -m gka`."""

from gka.commands.main import main

if __name__ == "__main__":
    main()
