# SPDX-License-Identifier: Apache-2.0
"""The version, in this one place: the build reads it and compiles it into the extension.

The extension is refused at import when its copy differs from this one.
"""

__version__ = "0.1.0"
