# SPDX-License-Identifier: MIT
"""Views of an audit: the text report, the live dashboard and the HTML page."""
