"""The best bias beside a replaced weight: free of parameters, and never worse.

Every GPT-2 linear has a bias, so the mean of what a replacement loses can be given back. What remains is the
error in the covariance instead of the second moment, under any output metric: solving with `psd.centred` and
correcting the bias afterwards is the joint optimum.
"""

from torch import Tensor


def corrected_bias(bias: Tensor, *, mean: Tensor, difference: Tensor) -> Tensor:
    """b' = b + mu (W - K): the best bias (n,) given D = W - K (m, n) and the mean (m,) of the input; float64.

    For the value/output pair of a head take D = W_v W_o - W_v' W_o' and the output bias: the mean of the
    layer input passes through attention rows, because they sum to one.
    """
    return bias.double() + mean.double() @ difference.double()
