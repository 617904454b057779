"""Run the recurrence of LSTMs faster: a custom VJP, a library in C, Pallas, and cuDNN."""
