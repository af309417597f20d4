"""Learning from language feedback: critique, refine, pair, prefer."""
