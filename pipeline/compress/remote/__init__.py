"""Source files that travel with an exported model: krony copies them beside the weights.

They import torch, transformers and each other, and nothing of krony, so `trust_remote_code=True` opens the
folder where krony is not installed. krony itself runs them only to check an export. Their one relative import
is how transformers finds the second file; each states its licence because it leaves the repository.
"""
