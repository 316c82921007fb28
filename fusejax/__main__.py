"""`python -m fusejax`: the command `fusejax`."""

from fusejax.cli import main

if __name__ == "__main__":
    main()
