"""`python -m tokensieve`: the same as the command `tokensieve`."""

from tokensieve.cli import main

if __name__ == "__main__":
    main()
