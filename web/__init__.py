"""The web page: `python -m web`. docs/web.md says what it can do."""
