"""4-bit weights: what the packed bytes mean, the matmul over them and its gradient, and their kernels.

May import: options, launch.
Start in quantizers.py: `Quantizer` is the interface, NF4 and HQQ the two that there are.
"""
