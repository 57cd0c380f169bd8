"""``python -m vmamba`` is the command ``vmamba``."""

from .cli import main

if __name__ == "__main__":
    main()
