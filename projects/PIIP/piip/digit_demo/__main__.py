"""`python -m piip.digit_demo`: see :mod:`piip.digit_demo.run`."""

from .run import main

if __name__ == "__main__":
    main()
