"""What `nvamp inspect` does: score a text token by token, and show it on one page."""
