"""The machinery: configuration, store, data, compression jobs, training, evaluation, sweeps."""
