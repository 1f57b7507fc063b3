"""`python -m elastic.checkpoint`."""

from elastic.checkpoint.cli import main

if __name__ == "__main__":
    main()
