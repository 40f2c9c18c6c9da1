"""``python -m vitscale``."""

from vitscale.cli import main

if __name__ == "__main__":
    main()
