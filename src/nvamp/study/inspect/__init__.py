"""What `nvamp inspect` does: a text under a model, token by token, on one page."""
