# SPDX-License-Identifier: Apache-2.0
"""The cards: profiles of known ones."""

from __future__ import annotations

from hift_ext.profiles import PROFILES, Profile, get, link_bytes_per_s

__all__ = ["PROFILES", "Profile", "get", "link_bytes_per_s"]
