"""`python -m npedit`, the same as the command `npedit`."""

from npedit.cli.main import main

if __name__ == "__main__":
    main()
