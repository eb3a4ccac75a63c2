"""`python -m stepline.trainer`, as torchrun starts it."""

from stepline.trainer.cli import main

if __name__ == "__main__":
    main()
