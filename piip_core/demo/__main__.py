"""`python -m piip_core.demo`: see :mod:`piip_core.demo.run`."""

from .run import main

if __name__ == "__main__":
    main()
