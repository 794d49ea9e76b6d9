"""`python -m nfnets_xla` is `nfnets-xla`."""

from nfnets_xla.cli import main

if __name__ == "__main__":
    main()
