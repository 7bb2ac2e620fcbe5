"""4-bit weights: the formats of the packed bytes, the matmul over them with its gradient, and their kernels.

May import: options, launch.
Start in quantizers.py: `Quantizer` is the interface of NF4 (nf4.py) and HQQ (hqq.py). layer.py is the linear
layer over either, operators.py its matmul.
"""
