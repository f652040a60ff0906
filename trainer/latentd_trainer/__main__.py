"""`python -m latentd_trainer`, which is also what `torchrun -m latentd_trainer` starts."""

from latentd_trainer.cli import main

if __name__ == "__main__":
    main()
