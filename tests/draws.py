"""The number of random cases that tests draw, and their seed.

A plain run draws few. LSTM_JAX_DRAWS=25 draws 25 times as many, and runs the slowest cases of tests
of several processes; LSTM_JAX_DRAWS_SEED is another seed.
"""

import os

TIMES = int(os.environ.get("LSTM_JAX_DRAWS", "1"))
SEED = int(os.environ.get("LSTM_JAX_DRAWS_SEED", "0"))
