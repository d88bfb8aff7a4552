"""`python -m two_level_mha`: the command line."""

from two_level_mha_cli import main

if __name__ == "__main__":
    main()
