# SPDX-License-Identifier: Apache-2.0
"""What `make_plan` and `python -m hift_ext plan` are made of.

A training step on fake tensors is traced; what its pages cost is added; settings are looked for.
"""
