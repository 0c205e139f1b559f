# SPDX-License-Identifier: Apache-2.0
# The sections of gpu_check.py, and what they share: the device, real or simulated, and the report.
# A section is a module with `run(device, budget)`, which yields rows as it finds them.
"""What `benchmarks/gpu_check.py` checks and measures."""
