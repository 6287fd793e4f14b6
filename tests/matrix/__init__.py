"""Coverage, measured: which models compile in which modes with every eligible linear sparse, and the right numbers.

    python -m tests.matrix run                      # every cell, into tests/matrix/results.json
    python -m tests.matrix run --only gpt2/export   # some of them
    python -m tests.matrix report --readme README.md

Run from the root of the repository.  What a cell asserts is in ``cells``; a sample of the cells is part of the tests.
"""
