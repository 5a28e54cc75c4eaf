"""`python -m intervale`: the same as the `intervale` command."""

from intervale.cli.main import main

if __name__ == "__main__":
    main()
