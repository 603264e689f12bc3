"""The machinery around the models: configuration, store, data, compression jobs, training, evaluation,
sweeps.
"""
